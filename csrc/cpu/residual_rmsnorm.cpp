// y = RMSNorm(x + scale * f) * weight, the plain residual merge that MV-Split is compared with.
//     dx = dz     df = scale * dz     dscale = sum dz * f     dweight = sum dy * n
// Bytes, in N*D*sizeof(T): forward must move 3 (x, f, y); backward 3 for a plain residual (dy, y,
// dx, which is also df), 5 with a scale (dy, x, f, dx, df), 4 with only a weight (dy, x, f, dx).
// The kernels move exactly that: the second sweep over a row reads L1. With a scale backward reads
// f in any case, and reading x instead of y gives n without the rounding of y at no extra cost.
// Launch: at::parallel_for over rows forward, over tasks of rows_per_task() rows backward.
// Preconditions: contiguous activations.
// Deterministic: a task leaves one partial row per parameter gradient; they are added in order.
#include "merge.h"

MVSPLIT_KERNELS_BEGIN

namespace {

template <class T, bool has_scale>
void forward(const MergeArgs& a) {
    const int64_t D = a.D;
    const RowParams<T> p{static_cast<const acc_t<T>*>(a.beta), nullptr, nullptr,
                         static_cast<const acc_t<T>*>(a.weight)};
    at::parallel_for(0, a.B * a.T, 16, [&](int64_t begin, int64_t end) {
        std::vector<acc_t<T>> scratch(D);
        for (int64_t r = begin; r < end; ++r)
            static_cast<acc_t<T>*>(a.rstd)[r] = forward_row<T, has_scale, false>(
                static_cast<const T*>(a.x) + r * D, static_cast<const T*>(a.f) + r * D,
                static_cast<T*>(a.out) + r * D, p, scratch.data(), D, a.eps);
    });
}

// `sums` holds dscale if there is a scale, then dweight if there is a weight, each followed by the
// errors of a CompensatedSum.
template <class T, bool has_scale, bool has_weight>
MVSPLIT_ROW void backward_row(const MergeArgs& a, const RowParams<T>& p, int64_t r,
                              acc_t<T>* sums) {
    constexpr bool from_x = has_scale || has_weight;
    const int64_t D = a.D;
    const auto* dy = static_cast<const T*>(a.dy) + r * D;
    const auto* f = a.f ? static_cast<const T*>(a.f) + r * D : nullptr;
    const auto* saved = static_cast<const T*>(from_x ? a.x : a.y) + r * D;
    auto* dx = static_cast<T*>(a.dx) + r * D;
    const acc_t<T> rstd = static_cast<const acc_t<T>*>(a.rstd)[r];
    const NormalisedRow<T, has_scale, false, from_x> norm{saved, f, rstd};
    const Dz<T> dz(rstd, mean_dot<T, has_weight>(dy, norm, p, D));
    const auto add = [D](acc_t<T>* sum, int64_t i, const Acc<T>& term, auto n) {
        auto total = load_sum<T>(sum + i, sum + D + i, n);
        store_sum<T>(sum + i, sum + D + i, total += term, n);
    };
    for_chunks<T>(D, [&](int64_t i, auto n) {
        const Acc<T> nr = norm(p, i, n);
        const Acc<T> d = dz(weighted<T, has_weight>(dy, p, i, n), nr);
        store(dx + i, d, n);
        if constexpr (has_scale) {
            store(static_cast<T*>(a.df) + r * D + i, d * load_acc<T>(p.beta + i, n), n);
            add(sums, i, d * load(f + i, n), n);
        }
        if constexpr (has_weight) add(sums + 2 * D * has_scale, i, load(dy + i, n) * nr, n);
    });
}

template <class T, bool has_scale, bool has_weight>
void backward(const MergeArgs& a) {
    using A = acc_t<T>;
    const int64_t N = a.B * a.T, D = a.D, rows = rows_per_task(N), tasks = at::divup(N, rows);
    const RowParams<T> p{static_cast<const A*>(a.beta), nullptr, nullptr,
                         static_cast<const A*>(a.weight)};
    constexpr int64_t sums = 2 * (has_scale + has_weight);
    std::vector<A> partials(tasks * sums * D, 0);
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            A* const partial = partials.data() + task * sums * D;
            for (int64_t r = task * rows; r < std::min(N, (task + 1) * rows); ++r)
                backward_row<T, has_scale, has_weight>(a, p, r, partial);
            for (int64_t i = 0; i < sums; i += 2)
                finish_sums<T>(partial + i * D, partial + (i + 1) * D, D);
        }
    });
    const auto add_partials = [&](void* out, int64_t index) {
        add_rows<T>(static_cast<A*>(out), partials.data() + index * 2 * D, tasks, sums * D, D);
    };
    if (has_scale) add_partials(a.dbeta, 0);
    if (has_weight) add_partials(a.dweight, has_scale);
}

}  // namespace

void residual_rmsnorm_fwd(const MergeArgs& a, c10::ScalarType dtype) {
    dispatch(dtype, [&](auto t) {
        a.beta ? forward<decltype(t), true>(a) : forward<decltype(t), false>(a);
    });
}

void residual_rmsnorm_bwd(const MergeArgs& a, c10::ScalarType dtype) {
    dispatch(dtype, [&](auto t) {
        using T = decltype(t);
        with_flag(a.beta, [&](auto scale) {
            with_flag(a.weight, [&](auto weight) { backward<T, scale.value, weight.value>(a); });
        });
    });
}

MVSPLIT_KERNELS_END
