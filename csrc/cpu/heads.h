// Rotation and RMSNorm of head rows, shared by rope.cpp, qk_norm.cpp and rope_qk_norm.cpp.
//
// R rotates the pairs (i, i + Dh/2) by theta, or by -theta if `conjugate` is set:
//     o1 = x1*cos - x2*sin     o2 = x2*cos + x1*sin
// Rotation first:  y = w * n,  n = R x * rstd.     Norm first:  y = R (w * n),  n = x * rstd.
// cos^2 + sin^2 need not be 1 (YaRN scales the tables, bfloat16 rounds them):
//     |R p|^2 = (cos^2 + sin^2) |p|^2.
// Backward: g = dy (rotation first) or R^T dy (norm first), dw = sum g*n, g *= w,
//     d = rstd * (g - n * mean(g*n)),  dx = R^T d (rotation first) or d (norm first).
// With rotation first and no weight n is the output, so backward reads dy, y and rstd. Otherwise
// forward saves x, and backward computes n again.
//
// Bytes, in N*H*Dh*sizeof(T) per tensor: forward must move 2 (x, y), backward 3 (dy, x or y, dx);
// the kernels move exactly that. The second sweep over a row of Dh elements reads L1, and the cos
// and sin of a token are read and converted once for all heads of q and k. Interleaved pairs
// (2i, 2i+1) are rearranged into halves in L1 before the row is computed, and back afterwards; so is
// a row of odd Dh (qk_norm only), whose second half gets a zero at its end.
//
// Launch: at::parallel_for over tasks of 32 tokens forward, of rows_per_task() tokens backward.
// Preconditions: the elements of a token (heads, Dh) are contiguous; Dh is even if there are tables.
// Deterministic: each task leaves one partial row of dw, and the partial rows are added in order.
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

// Rows in the order of the kernels: two halves of ceil(Dh/2) elements.
class Order {
  public:
    Order(const HeadArgs& a) : interleaved_(a.rotation.interleaved), Dh_(a.Dh) {}

    // Return whether rows have another order in memory.
    bool rearranges() const { return interleaved_ || Dh_ % 2; }

    int64_t width() const { return Dh_ + Dh_ % 2; }

    template <class T>
    void to_halves(const T* in, T* out) const {
        const int64_t half = width() / 2;
        if (!interleaved_) {
            std::copy(in, in + Dh_, out);
            std::fill(out + Dh_, out + width(), T(0));
        } else {
            for (int64_t i = 0; i < half; ++i) out[i] = in[2 * i], out[half + i] = in[2 * i + 1];
        }
    }

    template <class T>
    void from_halves(const T* in, T* out) const {
        const int64_t half = width() / 2;
        if (!interleaved_)
            std::copy(in, in + Dh_, out);
        else
            for (int64_t i = 0; i < half; ++i) out[2 * i] = in[i], out[2 * i + 1] = in[half + i];
    }

  private:
    bool interleaved_;
    int64_t Dh_;
};

// Call task(first token, end, task index) for N tokens in tasks of `rows` tokens.
template <class F>
void for_token_tasks(int64_t N, int64_t rows, const F& task) {
    at::parallel_for(0, at::divup(N, rows), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) task(i * rows, std::min(N, (i + 1) * rows), i);
    });
}

// The table rows of one token and the values derived from them, computed once for all heads.
template <class T>
class TokenTables {
  public:
    TokenTables(const HeadArgs& a, bool squares) : a_(a), squares_(squares ? a.Dh / 2 : 0) {}

    void set_row(int64_t row, HeadRow<T>* h) {
        const Rotation& r = a_.rotation;
        if (!r.cos.data) return;
        h->cos = convert(r.cos, row, false, cos_);
        h->sin = convert(r.sin, row, r.conjugate, sin_);
        if (squares_.empty()) return;
        for (int64_t i = 0; i < h->half; ++i)
            squares_[i] = h->cos[i] * h->cos[i] + h->sin[i] * h->sin[i];
        h->squares = squares_.data();
    }

  private:
    using A = acc_t<T>;

    // Return the row of a token as contiguous A, in `buffer` unless the table has it so.
    const A* convert(const Table& table, int64_t row, bool negate, std::vector<A>& buffer) {
        const int64_t offset = row / a_.T * table.sample + row % a_.T * table.token;
        const bool same = a_.rotation.dtype == c10::CppTypeToScalarType<A>::value;
        if (same && table.pair == 1 && !negate) return static_cast<const A*>(table.data) + offset;
        buffer.resize(a_.Dh / 2);
        dispatch(a_.rotation.dtype, [&](auto t) {
            const auto* in = static_cast<const decltype(t)*>(table.data) + offset;
            const A sign = negate ? -1 : 1;
            const auto copy = [&](auto pair) {
                for (size_t i = 0; i < buffer.size(); ++i)
                    buffer[i] = sign * static_cast<A>(in[i * pair]);
            };
            if (table.pair == 1)
                copy(std::integral_constant<int64_t, 1>{});  // a loop of vectors
            else
                copy(table.pair);
        });
        return buffer.data();
    }

    const HeadArgs& a_;
    std::vector<A> cos_, sin_, squares_;
};

// Return a weight in the order of halves.
template <class T>
std::vector<acc_t<T>> weight_in_halves(const Order& order, const void* weight) {
    if (!weight) return {};
    std::vector<acc_t<T>> out(order.width());
    order.to_halves(static_cast<const acc_t<T>*>(weight), out.data());
    return out;
}

// Call f with the C of for_half as a constant. Only bfloat16 with AVX2 or AVX-512, the case of
// training, is specialised.
template <class T, class F>
void with_chunks([[maybe_unused]] int64_t Dh, const F& f) {
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<T, c10::BFloat16>) {
        const int64_t pair = 2 * kChunk<T>, chunks = Dh % pair ? 0 : Dh / pair;
        if (chunks == 1) return f(std::integral_constant<int, 1>{});
        if (chunks == 2) return f(std::integral_constant<int, 2>{});
        if (chunks == 4) return f(std::integral_constant<int, 4>{});
    }
#endif
    f(std::integral_constant<int, 0>{});
}

template <class T, Op op, bool norm_first, int C>
void forward_chunked(const HeadArgs& a) {
    const Order order(a);
    std::vector<acc_t<T>> weights[2];
    for (int i = 0; i < a.count; ++i) weights[i] = weight_in_halves<T>(order, a.parts[i].weight);
    for_token_tasks(a.B * a.T, 32, [&](int64_t begin, int64_t end, int64_t) {
        TokenTables<T> tables(a, op == Op::rope_qk_norm && !norm_first);
        HeadRow<T> h(a.Dh);
        std::vector<T> in(order.width()), out(order.width());  // only if order.rearranges()
        for (int64_t row = begin; row < end; ++row) {
            tables.set_row(row, &h);
            for (int i = 0; i < a.count; ++i) {
                const Heads& p = a.parts[i];
                const T* x = static_cast<const T*>(p.in.data) + row * p.in.stride;
                T* y = static_cast<T*>(p.out.data) + row * p.out.stride;
                auto* rstd = static_cast<acc_t<T>*>(p.rstd) + (p.rstd ? row * p.heads : 0);
                h.weight = p.weight ? weights[i].data() : nullptr;
                for (int64_t j = 0; j < p.heads; ++j, x += a.Dh, y += a.Dh, ++rstd) {
                    if (!order.rearranges()) {
                        forward_row<T, op, norm_first, C>(x, y, rstd, h, a.eps);
                        continue;
                    }
                    order.to_halves(x, in.data());
                    forward_row<T, op, norm_first, C>(in.data(), out.data(), rstd, h, a.eps);
                    order.from_halves(out.data(), y);
                }
            }
        }
    });
}

template <class T, Op op, bool norm_first>
void forward(const HeadArgs& a) {
    with_chunks<T>(a.Dh, [&](auto c) { forward_chunked<T, op, norm_first, c>(a); });
}

// Backward of the heads of one token, in one of q and k.
template <class T, Op op, bool norm_first, int C>
class BackwardToken {
  public:
    BackwardToken(const Order& order)
        : order_(order), scratch_(2 * order.width()), halves_(3 * order.width()) {}

    void operator()(const Heads& p, int64_t row, const HeadRow<T>& h, acc_t<T>* dweight) {
        const T* dy = static_cast<const T*>(p.in.data) + row * p.in.stride;
        const T* saved = static_cast<const T*>(p.saved.data) + row * p.saved.stride;
        T* dx = static_cast<T*>(p.out.data) + row * p.out.stride;
        const auto* rstd = static_cast<const acc_t<T>*>(p.rstd) + row * p.heads;
        T *g = halves_.data(), *k = g + order_.width(), *d = k + order_.width();
        for (int64_t j = 0; j < p.heads; ++j, dy += h.Dh, saved += h.Dh, dx += h.Dh) {
            if (!order_.rearranges()) {
                one_row(dy, saved, dx, rstd[j], h, dweight);
                continue;
            }
            order_.to_halves(dy, g), order_.to_halves(saved, k);
            one_row(g, k, d, rstd[j], h, dweight);
            order_.from_halves(d, dx);
        }
    }

  private:
    void one_row(const T* g, const T* k, T* d, acc_t<T> rstd, const HeadRow<T>& h,
                 acc_t<T>* dweight) {
        if (h.weight || norm_first)
            backward_from_x_row<T, op, norm_first>(g, k, rstd, d, dweight, scratch_.data(), h);
        else
            backward_row<T, op, C>(g, k, rstd, d, h);
    }

    const Order& order_;
    std::vector<acc_t<T>> scratch_;
    std::vector<T> halves_;  // only if order.rearranges()
};

template <class T, Op op, bool norm_first, int C>
void backward_chunked(const HeadArgs& a) {
    const Order order(a);
    const int64_t N = a.B * a.T, rows = rows_per_task(N), tasks = at::divup(N, rows);
    const int64_t width = order.width();
    std::vector<acc_t<T>> weights[2], partials[2];  // per task: sums of dweight, and their errors
    for (int i = 0; i < a.count; ++i) {
        weights[i] = weight_in_halves<T>(order, a.parts[i].weight);
        if (a.parts[i].weight) partials[i].assign(tasks * 2 * width, 0);
    }
    for_token_tasks(N, rows, [&](int64_t begin, int64_t end, int64_t task) {
        TokenTables<T> tables(a, false);
        HeadRow<T> h(a.Dh);
        BackwardToken<T, op, norm_first, C> backward_token(order);
        acc_t<T>* dweight[2] = {};
        for (int i = 0; i < a.count; ++i)
            if (a.parts[i].weight) dweight[i] = &partials[i][task * 2 * width];
        for (int64_t row = begin; row < end; ++row) {
            tables.set_row(row, &h);
            for (int i = 0; i < a.count; ++i) {
                h.weight = dweight[i] ? weights[i].data() : nullptr;
                backward_token(a.parts[i], row, h, dweight[i]);
            }
        }
        for (acc_t<T>* sums : dweight)
            if (sums) finish_sums<T>(sums, sums + width, width);
    });
    for (int i = 0; i < a.count; ++i) {
        if (!a.parts[i].weight) continue;
        std::vector<acc_t<T>> total(width);
        add_rows<T>(total.data(), partials[i].data(), tasks, 2 * width, width);
        order.from_halves(total.data(), static_cast<acc_t<T>*>(a.parts[i].dweight));
    }
}

template <class T, Op op, bool norm_first>
void backward(const HeadArgs& a) {
    with_chunks<T>(a.Dh, [&](auto c) { backward_chunked<T, op, norm_first, c>(a); });
}

}  // namespace

MVSPLIT_KERNELS_END
