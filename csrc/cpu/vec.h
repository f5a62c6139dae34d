// Vectors, sums and loops shared by the CPU kernels.
//
// A chunk is one hardware vector of the storage type T (32 bfloat16 with AVX-512). In registers it
// is an Acc<T>: the same lanes in float (double for double), in one or two hardware vectors.
#pragma once

#include <ATen/cpu/vec/vec.h>  // before functional.h, because the two include each other

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

// Everything in this file and in the kernels is in this namespace. Each instruction set has its
// own, so that the linker cannot merge a baseline function with an AVX-512 one.
#define MVSPLIT_KERNELS_BEGIN \
    namespace mvsplit {       \
    namespace CPU_CAPABILITY {
#define MVSPLIT_KERNELS_END \
    }                       \
    }

// Inline everything that a function over a row calls. A vector that is passed to a call goes
// through memory, which halves the speed of the rotation.
#define MVSPLIT_ROW [[gnu::flatten]]

MVSPLIT_KERNELS_BEGIN

namespace vec = at::vec;

template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr int kChunk = vec::Vectorized<T>::size();
template <class T>
constexpr int kParts = kChunk<T> / vec::Vectorized<acc_t<T>>::size();
template <class T>
using Acc = vec::VectorizedN<acc_t<T>, kParts<T>>;

// The length of a full chunk is a compile-time constant; the tail of a row has a run-time length.
template <class T>
using Full = std::integral_constant<int, kChunk<T>>;

// Call f(offset, length) for each chunk of a row of n elements.
template <class T, class F>
inline void for_chunks(int64_t n, const F& f) {
    int64_t i = 0;
    for (; i + kChunk<T> <= n; i += kChunk<T>) f(i, Full<T>{});
    if (i < n) f(i, static_cast<int>(n - i));
}

inline void load_half_chunk(const c10::BFloat16* p, vec::Vectorized<float>& v) {
    vec::load_fp32_from_bf16(p, v);
}
inline void load_half_chunk(const c10::Half* p, vec::Vectorized<float>& v) {
    vec::load_fp32_from_fp16(p, v);
}

// Activations: T in memory, Acc<T> in registers. Lanes past a tail's length are zero.
template <class T, class Count>
inline Acc<T> load(const T* p, Count n) {
    using V = vec::Vectorized<T>;
    if constexpr (!std::is_same_v<Count, Full<T>>) {
        alignas(64) T full[kChunk<T>];
        V::set(V(T(0)), V::loadu(p, n), n).store(full);
        return load(full, Full<T>{});
    } else if constexpr (kParts<T> == 1) {
        return Acc<T>(V::loadu(p));
    } else {
        // Half a chunk at a time: the conversion then reads memory and needs no shuffle.
        Acc<T> a;
        load_half_chunk(p, a[0]);
        load_half_chunk(p + kChunk<T> / 2, a[1]);
        return a;
    }
}

// Round to the nearest value of T, ties to even.
template <class T>
inline vec::Vectorized<T> round_to(const Acc<T>& a) {
    if constexpr (kParts<T> == 1) return a[0];
#ifdef __AVX512BF16__
    else if constexpr (std::is_same_v<T, c10::BFloat16>)
        // One instruction; rounding in software takes 20. It rounds subnormal numbers (below 1.2e-38)
        // to zero; a test for them would take a tenth of the time of each kernel.
        return (__m512i)_mm512_cvtne2ps_pbh(a[1], a[0]);
#endif
    else
        return vec::convert<T, 1, float, 2>(a);
}

template <class T, class Count>
inline void store(T* p, const Acc<T>& a, Count n) {
    const vec::Vectorized<T> v = round_to<T>(a);
    if constexpr (std::is_same_v<Count, Full<T>>)
        v.store(p);
    else
        v.store(p, n);
}

// Parameters, statistics and scratch: acc_t<T> in memory, the lanes of a chunk of T in registers.
template <class T, class Count>
inline Acc<T> load_acc(const acc_t<T>* p, Count n) {
    if constexpr (std::is_same_v<Count, Full<T>>) {
        return Acc<T>::loadu(p);
    } else {
        using V = vec::Vectorized<acc_t<T>>;
        Acc<T> a;
        for (int i = 0; i < kParts<T>; ++i) {
            const int m = std::min<int>(std::max<int>(n - i * V::size(), 0), V::size());
            a[i] = m > 0 ? V::set(V(0), V::loadu(p + i * V::size(), m), m) : V(0);
        }
        return a;
    }
}

template <class T, class Count>
inline void store_acc(acc_t<T>* p, const Acc<T>& a, Count n) {
    if constexpr (std::is_same_v<Count, Full<T>>)
        a.store(p);
    else
        a.store(p, n);
}

// Sum over the lanes.
template <class T>
inline acc_t<T> sum_lanes(const Acc<T>& a) {
    using V = vec::Vectorized<acc_t<T>>;
    V v = a[0];
    for (int i = 1; i < kParts<T>; ++i) v = v + a[i];
    return vec::vec_reduce_all<acc_t<T>>([](const V& p, const V& q) { return p + q; }, v);
}

// Call f with a value of the C++ type of a dtype.
template <class F>
inline void dispatch(c10::ScalarType dtype, const F& f) {
    switch (dtype) {
        case c10::ScalarType::Float:
            return f(float{});
        case c10::ScalarType::BFloat16:
            return f(c10::BFloat16{});
        case c10::ScalarType::Half:
            return f(c10::Half{});
        case c10::ScalarType::Double:
            return f(double{});
        default:
            TORCH_CHECK(false,
                        "mvsplit_ops: the CPU kernels take float32, bfloat16, float16 and float64, "
                        "got ",
                        toString(dtype));
    }
}

// Rows per task of a kernel that sums a parameter gradient over the rows. The count depends only on
// the shape, so the order of each sum does not depend on the number of threads. There are at most
// 256 partial rows, and each is written once for at least 32 rows read.
inline int64_t rows_per_task(int64_t rows) { return std::max<int64_t>(32, at::divup(rows, 256)); }

// A compensated sum: `error` collects what the additions to `sum` round away, so the error of value()
// does not grow with the number of terms. `error` is not added to the next term, because that would
// make each addition wait for four others.
template <class T>
struct CompensatedSum {
    Acc<T> sum{0}, error{0};

    CompensatedSum& operator+=(const Acc<T>& v) {
        const Acc<T> total = sum + v;
        error = error + (v - (total - sum));
        sum = total;
        return *this;
    }

    // An infinite sum has a NaN in `error`, but stays infinite as that of eager code.
    Acc<T> value() const {
        const Acc<T> total = sum + error;
        return Acc<T>::blendv(total, sum, total.isnan());
    }
};

template <class T, class Count>
inline CompensatedSum<T> load_sum(const acc_t<T>* sum, const acc_t<T>* error, Count n) {
    return {load_acc<T>(sum, n), load_acc<T>(error, n)};
}

template <class T, class Count>
inline void store_sum(acc_t<T>* sum, acc_t<T>* error, const CompensatedSum<T>& c, Count n) {
    store_acc<T>(sum, c.sum, n);
    store_acc<T>(error, c.error, n);
}

// Replace each of n sums by its value().
template <class T>
inline void finish_sums(acc_t<T>* sum, const acc_t<T>* error, int64_t n) {
    for_chunks<T>(n, [&](int64_t i, auto count) {
        store_acc<T>(sum + i, load_sum<T>(sum + i, error + i, count).value(), count);
    });
}

// Return the sum of a row of n elements. add(i, count, s) adds the terms of the chunk at i to s. A
// plain sum errs by as many roundings as the row has chunks if its elements are equal. Here chunks
// are added in a tree (chains of 4 to a pair, 4 pairs to a block), and the blocks are compensated.
template <class T, class F>
inline acc_t<T> sum_row(int64_t n, const F& add) {
    constexpr int64_t chunk = kChunk<T>, pair = 8 * chunk, block = 4 * pair;
    CompensatedSum<T> total;
    for (int64_t i = 0; i < n;) {
        Acc<T> sum(0);
        for (const int64_t end = std::min(n, i + block); i + pair <= end; i += pair) {
            Acc<T> even(0), odd(0);
            for (int64_t j = i; j < i + pair; j += 2 * chunk)
                add(j, Full<T>{}, even), add(j + chunk, Full<T>{}, odd);
            sum = sum + (even + odd);
        }
        if (n - i < pair) {
            Acc<T> rest(0);
            for_chunks<T>(n - i, [&](int64_t j, auto count) { add(i + j, count, rest); });
            sum = sum + rest;
            i = n;
        }
        if (n <= block) return sum_lanes<T>(sum);
        total += sum;
    }
    return sum_lanes<T>(total.value());
}

// Split the columns [0, D) over the threads and call f(column, length) for each chunk.
template <class T, class F>
void for_columns(int64_t D, const F& f) {
    at::parallel_for(0, at::divup(D, kChunk<T>), 1, [&](int64_t begin, int64_t end) {
        const int64_t d0 = begin * kChunk<T>;
        for_chunks<T>(std::min(D, end * kChunk<T>) - d0, [&](int64_t i, auto n) { f(d0 + i, n); });
    });
}

// Return the sum of `count` rows of n columns. The sums of 4 rows are compensated.
template <class T, class Count>
inline Acc<T> sum_of_rows(const acc_t<T>* rows, int64_t count, int64_t stride, Count n) {
    CompensatedSum<T> total;
    const auto row = [&](int64_t r) { return load_acc<T>(rows + r * stride, n); };
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) total += (row(r) + row(r + 1)) + (row(r + 2) + row(r + 3));
    for (; r < count; ++r) total += row(r);
    return total.value();
}

// out[d] = partials[0][d] + partials[1][d] + ..., in an order that depends only on the count.
template <class T>
inline void add_rows(acc_t<T>* out, const acc_t<T>* partials, int64_t count, int64_t stride,
                     int64_t width) {
    for_columns<T>(width, [&](int64_t d, auto n) {
        store_acc<T>(out + d, sum_of_rows<T>(partials + d, count, stride, n), n);
    });
}

MVSPLIT_KERNELS_END
