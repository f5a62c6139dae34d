// y = silu(gate) * value,  s = sigmoid(gate); gate and value are rows of F, of two tensors or packed
// dgate = dy * value * s * (1 + gate * (1 - s))     dvalue = dy * gate * s
// Bytes, in N*F*sizeof(T): forward must move 3 (2 read, 1 written), backward 5 (3 read, 2 written);
// these kernels move exactly that. Forward saves only gate and value.
// Launch: at::parallel_for over rows, at least 4096 elements of y per task.
// Preconditions: rows are contiguous. Deterministic: no sums.
#include <limits>

#include "kernels.h"
#include "vec.h"

MVSPLIT_KERNELS_BEGIN

namespace {

// Return exp(-g) = 2^(n + r) with an integer n and |r| <= 1/2. The Taylor series of 2^r ends at
// r^5 for 16-bit storage (relative error below 3e-6, 1/600 of a bfloat16 and 1/160 of a half
// rounding) and at r^7 for float (6e-9, 1/10 of a rounding), for which log2(e) is also split into
// two parts. For a large g, r has no correct digits or is
// infinity - infinity, and is limited to 1: the result is 0 or infinity because of n. NaN stays NaN.
template <class T>
Acc<T> exp_minus(const Acc<T>& g) {
    if constexpr (sizeof(T) == 8) {
        return (Acc<T>(0) - g).exp();
    } else {
#ifdef CPU_CAPABILITY_AVX512
        constexpr bool narrow = sizeof(T) == 2;
        const __m512 high = _mm512_set1_ps(-1.44269504f), low = _mm512_set1_ps(-1.92596303e-8f);
        Acc<T> out;
        for (int i = 0; i < kParts<T>; ++i) {
            const __m512 t = _mm512_mul_ps(g[i], high);
            const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            __m512 r = narrow ? _mm512_sub_ps(t, n)
                              : _mm512_fmadd_ps(g[i], low, _mm512_fmsub_ps(g[i], high, n));
            r = _mm512_range_ps(r, _mm512_set1_ps(1.f), 0b0010);  // smaller magnitude, sign of r
            __m512 p = _mm512_set1_ps(narrow ? 1.33335581e-3f : 1.52527338e-5f);
            if constexpr (!narrow)
                for (const float c : {1.54035304e-4f, 1.33335581e-3f})
                    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
            for (const float c :
                 {9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.f})
                p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
            out[i] = _mm512_scalef_ps(p, n);  // 0 or infinity if the exponent is out of range
        }
        return out;
#else
        if constexpr (sizeof(T) == 2) {
            // exp_u20 ends at the largest float, which times a gate of -1e38 is not near zero.
            const Acc<T> infinity(std::numeric_limits<float>::infinity());
            return Acc<T>::blendv((Acc<T>(0) - g).exp_u20(), infinity, g < Acc<T>(-88.7f));
        }
        return (Acc<T>(0) - g).exp();
#endif
    }
}

template <class T>
Acc<T> sigmoid(const Acc<T>& g) {
    const Acc<T> one(1);
    return one / (one + exp_minus<T>(g));
}

template <class T>
MVSPLIT_ROW void forward_row(const T* gate, const T* value, T* y, int64_t F) {
    for_chunks<T>(F, [&](int64_t i, auto n) {
        const Acc<T> g = load(gate + i, n), v = load(value + i, n);
        store(y + i, g * sigmoid<T>(g) * v, n);
    });
}

template <class T>
MVSPLIT_ROW void backward_row(const T* gate, const T* value, const T* dy, T* dgate, T* dvalue,
                              int64_t F) {
    const Acc<T> one(1);
    for_chunks<T>(F, [&](int64_t i, auto n) {
        const Acc<T> g = load(gate + i, n), v = load(value + i, n), d = load(dy + i, n);
        const Acc<T> s = sigmoid<T>(g), gs = g * s;
        store(dgate + i, d * v * (s + gs * (one - s)), n);
        store(dvalue + i, d * gs, n);
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
        for_rows<T>(a, [&](int64_t r) {
            forward_row(row_of<T>(a.gate, r), row_of<T>(a.value, r), row_of<T>(a.y, r), a.F);
        });
    });
}

void swiglu_bwd(const SwigluArgs& a, c10::ScalarType dtype) {
    dispatch(dtype, [&](auto t) {
        using T = decltype(t);
        for_rows<T>(a, [&](int64_t r) {
            backward_row(row_of<T>(a.gate, r), row_of<T>(a.value, r), row_of<T>(a.dy, r),
                         row_of<T>(a.dgate, r), row_of<T>(a.dvalue, r), a.F);
        });
    });
}

MVSPLIT_KERNELS_END
