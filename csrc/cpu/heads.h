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

#include "head_rows.h"

MVSPLIT_KERNELS_BEGIN

namespace {

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

// Call task(first token, end, task index) for N tokens in tasks of `rows` tokens.
template <class F>
void for_token_tasks(int64_t N, int64_t rows, const F& task) {
    at::parallel_for(0, at::divup(N, rows), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) task(i * rows, std::min(N, (i + 1) * rows), i);
    });
}

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
