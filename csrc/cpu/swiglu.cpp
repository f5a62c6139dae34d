// y = silu(gate) * value,  x = [gate, value] packed in a row of 2F,  s = sigmoid(gate)
// dgate = dy * value * s * (1 + gate * (1 - s))     dvalue = dy * gate * s
// Bytes, in N*F*sizeof(T): forward must move 3 (2 read, 1 written), backward 5 (3 read, 2 written);
// these kernels move exactly that. Nothing is saved but x.
#include "kernels.h"
#include "vec.h"

MVSPLIT_KERNELS_BEGIN

namespace {

template <class T>
Acc<T> sigmoid(const Acc<T>& g) {
    const Acc<T> one(1), zero(0);
    // 20 ulp of float is 1/3000 of a bfloat16 rounding; float and double take the exact exponential.
    if constexpr (sizeof(T) == 2)
        return one / (one + (zero - g).exp_u20());
    else
        return one / (one + (zero - g).exp());
}

template <class T>
void forward_row(const T* x, T* y, int64_t F) {
    for_chunks<T>(F, [&](int64_t i, auto n) {
        const Acc<T> g = load(x + i, n), v = load(x + F + i, n);
        store(y + i, g * sigmoid<T>(g) * v, n);
    });
}

template <class T>
void backward_row(const T* x, const T* dy, T* dx, int64_t F) {
    const Acc<T> one(1);
    for_chunks<T>(F, [&](int64_t i, auto n) {
        const Acc<T> g = load(x + i, n), v = load(x + F + i, n), d = load(dy + i, n);
        const Acc<T> s = sigmoid<T>(g), gs = g * s;
        store(dx + i, d * v * (s + gs * (one - s)), n);
        store(dx + F + i, d * gs, n);
    });
}

template <class T, class Row>
void for_rows(const SwigluArgs& a, const Row& row) {
    const int64_t grain = at::divup(int64_t{4096}, std::max<int64_t>(a.F, 1));
    at::parallel_for(0, a.N, grain, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) row(r);
    });
}

template <class T>
T* row_of(const Rows& rows, int64_t r) {
    return static_cast<T*>(rows.data) + r * rows.stride;
}

}  // namespace

void swiglu_fwd(const SwigluArgs& a, c10::ScalarType dtype) {
    dispatch(dtype, [&](auto t) {
        using T = decltype(t);
        for_rows<T>(a, [&](int64_t r) { forward_row(row_of<T>(a.x, r), row_of<T>(a.out, r), a.F); });
    });
}

void swiglu_bwd(const SwigluArgs& a, c10::ScalarType dtype) {
    dispatch(dtype, [&](auto t) {
        using T = decltype(t);
        for_rows<T>(a, [&](int64_t r) {
            backward_row(row_of<T>(a.x, r), row_of<T>(a.dy, r), row_of<T>(a.out, r), a.F);
        });
    });
}

MVSPLIT_KERNELS_END
