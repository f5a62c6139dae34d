// Forward and backward of one row of a head, with the math of heads.h. A row is two halves of pairs,
// contiguous, and its tables and weight have the accumulator dtype.
#pragma once

#include "kernels.h"
#include "vec.h"

MVSPLIT_KERNELS_BEGIN

namespace {

enum class Op { rope, qk_norm, rope_qk_norm };

// Tables and weight of one row.
template <class T>
struct HeadRow {
    int64_t Dh, half;                   // half = ceil(Dh / 2)
    const acc_t<T>* cos = nullptr;      // [half]
    const acc_t<T>* sin = nullptr;      // [half], negated if `conjugate`
    const acc_t<T>* squares = nullptr;  // [half], cos^2 + sin^2
    const acc_t<T>* weight = nullptr;   // [2*half]
    HeadRow(int64_t width) : Dh(width), half((width + 1) / 2) {}
};

template <class T>
struct Pair {
    Acc<T> a, b;
};

template <class T>
Pair<T> rotate(const Pair<T>& p, const Acc<T>& c, const Acc<T>& s) {
    return {p.a * c - p.b * s, p.b * c + p.a * s};
}

template <class T>
Pair<T> unrotate(const Pair<T>& p, const Acc<T>& c, const Acc<T>& s) {
    return {p.a * c + p.b * s, p.b * c - p.a * s};
}

template <class T, class Count>
Pair<T> load_pair(const T* x, int64_t i, int64_t half, Count n) {
    return {load(x + i, n), load(x + half + i, n)};
}

template <class T, class Count>
Pair<T> load_pair_acc(const acc_t<T>* x, int64_t i, int64_t half, Count n) {
    return {load_acc<T>(x + i, n), load_acc<T>(x + half + i, n)};
}

// Loop over half a row: C full chunks if C > 0 (Dh 64, 128, 256), else any length. A loop of known
// length is unrolled, so that its values stay in registers from one sweep to the next.
template <class T, int C, class F>
void for_half(int64_t half, const F& f) {
    if constexpr (C == 0) {
        for_chunks<T>(half, f);
    } else {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) f(int64_t{c} * kChunk<T>, Full<T>{});
    }
}

// Return the sum over a row. add(i, count, s) adds the terms of the chunk of pairs at i to s. A row
// of C > 0 chunks has at most 8 terms per lane, which need no compensation.
template <class T, int C, class F>
acc_t<T> sum_half(int64_t half, const F& add) {
    if constexpr (C == 0) return sum_row<T>(half, add);
    Acc<T> s(0);
    for_half<T, C>(half, [&](int64_t i, auto n) { add(i, n, s); });
    return sum_lanes<T>(s);
}

// A row of activations that is swept twice. If C > 0, it is loaded once into registers.
template <class T, int C>
class RegisterRow {
  public:
    RegisterRow(const T* x, int64_t half) : x_(x), half_(half) {
        if constexpr (C > 0)
            for_half<T, C>(
                half, [&](int64_t i, auto n) { pairs_[i / kChunk<T>] = load_pair(x, i, half, n); });
    }

    template <class Count>
    Pair<T> operator()(int64_t i, Count n) const {
        if constexpr (C > 0)
            return pairs_[i / kChunk<T>];
        else
            return load_pair(x_, i, half_, n);
    }

  private:
    const T* x_;
    int64_t half_;
    Pair<T> pairs_[std::max(C, 1)];
};

template <class T, Op op, bool norm_first, int C>
MVSPLIT_ROW void forward_row(const T* x, T* y, acc_t<T>* rstd, const HeadRow<T>& h, double eps) {
    const RegisterRow<T, C> row(x, h.half);
    Acc<T> scale(1);
    if constexpr (op != Op::rope) {
        const acc_t<T> squares = sum_half<T, C>(h.half, [&](int64_t i, auto n, Acc<T>& s) {
            const Pair<T> p = row(i, n);
            if constexpr (op == Op::rope_qk_norm && !norm_first)
                s = fmadd(fmadd(p.a, p.a, p.b * p.b), load_acc<T>(h.squares + i, n), s);
            else
                s = fmadd(p.a, p.a, fmadd(p.b, p.b, s));
        });
        *rstd = acc_t<T>(1) / std::sqrt(squares / h.Dh + acc_t<T>(eps));
        scale = Acc<T>(*rstd);
    }
    for_half<T, C>(h.half, [&](int64_t i, auto n) {
        Pair<T> p = row(i, n);
        const auto multiply_weight = [&] {
            if (!h.weight) return;
            const Pair<T> w = load_pair_acc<T>(h.weight, i, h.half, n);
            p = {p.a * w.a, p.b * w.b};
        };
        if constexpr (op != Op::rope) p = {p.a * scale, p.b * scale};
        if constexpr (op != Op::rope && norm_first) multiply_weight();
        if constexpr (op != Op::qk_norm)
            p = rotate<T>(p, load_acc<T>(h.cos + i, n), load_acc<T>(h.sin + i, n));
        if constexpr (op != Op::rope && !norm_first) multiply_weight();
        store(y + i, p.a, n);
        store(y + h.half + i, p.b, n);
    });
}

// Backward of rotation first without a weight, where n is y.
template <class T, Op op, int C>
MVSPLIT_ROW void backward_row(const T* dy, const T* y, acc_t<T> rstd, T* dx, const HeadRow<T>& h) {
    const RegisterRow<T, C> g(dy, h.half), k(y, h.half);
    const acc_t<T> dots = sum_half<T, C>(h.half, [&](int64_t i, auto n, Acc<T>& s) {
        const Pair<T> p = g(i, n), q = k(i, n);
        s = fmadd(p.a, q.a, fmadd(p.b, q.b, s));
    });
    const Acc<T> r(rstd), c(rstd * dots / h.Dh);
    for_half<T, C>(h.half, [&](int64_t i, auto n) {
        const Pair<T> p = g(i, n), q = k(i, n);
        Pair<T> d = {p.a * r - q.a * c, p.b * r - q.b * c};
        if constexpr (op == Op::rope_qk_norm)
            d = unrotate<T>(d, load_acc<T>(h.cos + i, n), load_acc<T>(h.sin + i, n));
        store(dx + i, d.a, n);
        store(dx + h.half + i, d.b, n);
    });
}

// Backward of all other cases: n is computed from x. `scratch` holds g and n, 4*half elements.
template <class T, Op op, bool norm_first>
MVSPLIT_ROW void backward_from_x_row(const T* dy, const T* x, acc_t<T> rstd, T* dx,
                                     acc_t<T>* dweight, acc_t<T>* scratch, const HeadRow<T>& h) {
    constexpr bool rotates = op == Op::rope_qk_norm;
    const int64_t half = h.half;
    acc_t<T>*gs = scratch, *ns = scratch + 2 * half;
    const Acc<T> r(rstd);
    const acc_t<T> dots = sum_row<T>(half, [&](int64_t i, auto n, Acc<T>& s) {
        Pair<T> g = load_pair(dy, i, half, n), k = load_pair(x, i, half, n);
        if constexpr (rotates) {
            const Acc<T> c = load_acc<T>(h.cos + i, n), s = load_acc<T>(h.sin + i, n);
            if constexpr (norm_first)
                g = unrotate<T>(g, c, s);
            else
                k = rotate<T>(k, c, s);
        }
        k = {k.a * r, k.b * r};
        if (h.weight) {
            const Pair<T> w = load_pair_acc<T>(h.weight, i, half, n);
            acc_t<T>* error = dweight + 2 * half;
            for (const auto& [column, term] :
                 {std::pair{i, g.a * k.a}, std::pair{half + i, g.b * k.b}}) {
                auto dw = load_sum<T>(dweight + column, error + column, n);
                store_sum<T>(dweight + column, error + column, dw += term, n);
            }
            g = {g.a * w.a, g.b * w.b};
        }
        s = fmadd(g.a, k.a, fmadd(g.b, k.b, s));
        store_acc<T>(gs + i, g.a, n), store_acc<T>(gs + half + i, g.b, n);
        store_acc<T>(ns + i, k.a, n), store_acc<T>(ns + half + i, k.b, n);
    });
    const Acc<T> mean(dots / h.Dh);
    for_chunks<T>(half, [&](int64_t i, auto n) {
        const Pair<T> g = load_pair_acc<T>(gs, i, half, n), k = load_pair_acc<T>(ns, i, half, n);
        Pair<T> d = {r * (g.a - k.a * mean), r * (g.b - k.b * mean)};
        if constexpr (rotates && !norm_first)
            d = unrotate<T>(d, load_acc<T>(h.cos + i, n), load_acc<T>(h.sin + i, n));
        store(dx + i, d.a, n);
        store(dx + half + i, d.b, n);
    });
}

}  // namespace

MVSPLIT_KERNELS_END
