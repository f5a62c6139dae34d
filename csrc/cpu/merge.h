// Rows of a residual merge, shared by mvsplit_rmsnorm.cpp and residual_rmsnorm.cpp.
//
//     z = x + beta*f, with MV-Split z = (x + shift) + beta*(f - jf), shift and jf of the segment
//     y = z * rstd * weight    rstd = rsqrt(mean_d z^2 + eps)
//     dz = rstd * (g - n * mean_d(g*n)),  n = z * rstd,  g = dy * weight,  dweight = sum dy * n
#pragma once

#include "kernels.h"
#include "vec.h"

MVSPLIT_KERNELS_BEGIN

namespace {

// Parameter vectors of D elements. A null beta or weight is 1, a null shift or jf is 0.
template <class T>
struct RowParams {
    const acc_t<T>* beta = nullptr;
    const acc_t<T>* shift = nullptr;
    const acc_t<T>* jf = nullptr;
    const acc_t<T>* weight = nullptr;
};

// Return z. The mean of f is subtracted from f first: if it is large, beta*f plus a vector that
// contains -beta*jf would be a small difference of large rounded numbers.
template <class T, bool has_beta, bool has_means, class Count>
Acc<T> merged(const T* x, const T* f, const RowParams<T>& p, int64_t i, Count n) {
    Acc<T> z = load(x + i, n), added = load(f + i, n);
    if constexpr (has_means) {
        z = z + load_acc<T>(p.shift + i, n);
        added = added - load_acc<T>(p.jf + i, n);
    }
    if constexpr (has_beta)
        return fmadd(load_acc<T>(p.beta + i, n), added, z);
    else
        return z + added;
}

// Compute one row of y and return its rstd. `scratch` keeps z (D elements) in L1 between the two
// sweeps.
template <class T, bool has_beta, bool has_means>
MVSPLIT_ROW acc_t<T> forward_row(const T* x, const T* f, T* y, const RowParams<T>& p,
                                 acc_t<T>* scratch, int64_t D, double eps) {
    const acc_t<T> squares = sum_row<T>(D, [&](int64_t i, auto n, Acc<T>& s) {
        const Acc<T> z = merged<T, has_beta, has_means>(x, f, p, i, n);
        s = fmadd(z, z, s);
        store_acc<T>(scratch + i, z, n);
    });
    const acc_t<T> rstd = acc_t<T>(1) / std::sqrt(squares / D + acc_t<T>(eps));
    const Acc<T> r(rstd);
    for_chunks<T>(D, [&](int64_t i, auto n) {
        Acc<T> v = load_acc<T>(scratch + i, n) * r;
        if (p.weight) v = v * load_acc<T>(p.weight + i, n);
        store(y + i, v, n);
    });
    return rstd;
}

// n of one row: y itself if there is no weight, else computed again from x and f, because y / weight
// could divide by zero.
template <class T, bool has_beta, bool has_means, bool from_x>
struct NormalisedRow {
    const T* saved;  // x if from_x, else y
    const T* f;
    acc_t<T> rstd;

    template <class Count>
    Acc<T> operator()(const RowParams<T>& p, int64_t i, Count n) const {
        if constexpr (from_x)
            return merged<T, has_beta, has_means>(saved, f, p, i, n) * Acc<T>(rstd);
        else
            return load(saved + i, n);
    }
};

template <class T, bool has_weight, class Count>
Acc<T> weighted(const T* dy, const RowParams<T>& p, int64_t i, Count n) {
    if constexpr (has_weight)
        return load(dy + i, n) * load_acc<T>(p.weight + i, n);
    else
        return load(dy + i, n);
}

// Return mean_d(g*n) of one row.
template <class T, bool has_weight, class Norm>
MVSPLIT_ROW acc_t<T> mean_dot(const T* dy, const Norm& norm, const RowParams<T>& p, int64_t D) {
    const acc_t<T> dots = sum_row<T>(D, [&](int64_t i, auto n, Acc<T>& s) {
        s = fmadd(weighted<T, has_weight>(dy, p, i, n), norm(p, i, n), s);
    });
    return dots / D;
}

// dz = rstd*g - (rstd*mean)*n with the two scalars of one row.
template <class T>
struct Dz {
    Acc<T> rstd, rstd_mean;
    Dz(acc_t<T> r, acc_t<T> mean) : rstd(r), rstd_mean(r * mean) {}
    Dz() = default;
    Acc<T> operator()(const Acc<T>& g, const Acc<T>& n) const { return g * rstd - n * rstd_mean; }
};

// Call f with a flag as a compile-time constant.
template <class F>
void with_flag(bool flag, const F& f) {
    flag ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace

MVSPLIT_KERNELS_END
