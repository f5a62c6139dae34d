// MV-Split residual with RMSNorm (arXiv 2605.06169), J the token mean of a segment, P = I - J:
//     z = x + beta * P f + alpha * J (f - x),  y = z * rstd * weight
// With the means jx, jf of a segment of Ts tokens and one vector, shift, per segment:
//     shift = alpha*(jf - jx)     z = (x + shift) + beta*(f - jf)
//     dx = dz - alpha*jdz     df = beta*dz + (alpha - beta)*jdz     jdz = mean_t dz
//     dalpha = sum Ts*jdz*(jf - jx)     dbeta = sum dz*(f - jf)     dweight = sum dy*n
// dbeta sums dz*(f - jf) directly. If the token mean dominates f, sum dz*f minus the part of the
// mean would be a small difference of large numbers.
//
// Bytes, in N*D*sizeof(T): forward must move 3 (x, f, y), backward 5 (f, dy, y, dx, df; x instead
// of y with a weight). Both sweep twice, first for sums over tokens, then for the result. They
// process waves of samples whose tensors fit the L2 caches of the cores, so that the second sweep
// does not read memory and the kernels move exactly those bytes. For a larger sample forward moves
// 5, backward 7 (8 with a weight).
// Launch: at::parallel_for over tasks of 32 tokens of one segment, for any number of threads.
// Preconditions: contiguous activations; dalpha, dbeta and dweight are zero on entry.
// Deterministic: the column sums of a task are one partial row, and partial rows are added in
// order, so results do not depend on the number of threads.
#include "merge.h"

MVSPLIT_KERNELS_BEGIN

namespace {

constexpr int64_t kTaskTokens = 32;
constexpr int64_t kHalfTask = kTaskTokens / 2;
constexpr int64_t kCacheBytes = 1 << 20;  // L2 of one core: 1 to 2 MiB on current servers
constexpr int kGroup = 4;                 // rows per load and store of the column sums

struct Task {
    int64_t segment, begin, end;  // tokens of a sample
};

// The tasks of one sample, and the number of samples in a wave.
struct Plan {
    std::vector<Task> tasks;
    std::vector<int64_t> first;  // first task of each segment, and the count of tasks
    int64_t wave;

    Plan(const MergeArgs& a, int64_t sample_bytes) {
        int64_t t = 0;
        for (int64_t s = 0; s < a.S; ++s) {
            first.push_back(tasks.size());
            for (const int64_t end = t + a.segments[s]; t < end; t = tasks.back().end)
                tasks.push_back({s, t, std::min(t + kTaskTokens, end)});
        }
        first.push_back(tasks.size());
        wave = std::max<int64_t>(
            1, at::get_num_threads() * kCacheBytes / std::max<int64_t>(sample_bytes, 1));
    }
    int64_t count() const { return tasks.size(); }
    int64_t tasks_of(int64_t segment) const { return first[segment + 1] - first[segment]; }
};

template <class F>
void for_waves(const MergeArgs& a, const Plan& plan, const F& f) {
    for (int64_t b = 0; b < a.B; b += plan.wave) f(b, std::min(a.B, b + plan.wave));
}

// Call f(sample, its index in the wave, the task, the index of the task in the wave) for the tasks
// of samples [b0, b1).
template <class F>
void for_tasks(const Plan& plan, int64_t b0, int64_t b1, const F& f) {
    at::parallel_for(0, (b1 - b0) * plan.count(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            f(b0 + i / plan.count(), i / plan.count(), plan.tasks[i % plan.count()], i);
    });
}

// The pointers of MergeArgs with their types.
template <class T>
struct Views {
    using A = acc_t<T>;
    const T *x, *f, *y, *dy;
    const A *alpha, *beta, *weight;
    A *rstd, *jx, *jf;
    Views(const MergeArgs& a)
        : x(static_cast<const T*>(a.x)),
          f(static_cast<const T*>(a.f)),
          y(static_cast<const T*>(a.y)),
          dy(static_cast<const T*>(a.dy)),
          alpha(static_cast<const A*>(a.alpha)),
          beta(static_cast<const A*>(a.beta)),
          weight(static_cast<const A*>(a.weight)),
          rstd(static_cast<A*>(a.rstd)),
          jx(static_cast<A*>(a.jx)),
          jf(static_cast<A*>(a.jf)) {}
};

// Column sums over the rows of a task, added in a tree: 4 rows to a group, 4 groups to a half, two
// halves. The sum of equal rows is then exact, and a term is rounded 7 times. The first half adds up
// in `sums`, the second in `scratch`, and the last group adds the two.
template <class T>
class GroupSums {
  public:
    // `row` of the `rows` rows of the task is the first of the group.
    GroupSums(acc_t<T>* sums, acc_t<T>* scratch, int64_t row, int64_t rows) {
        const bool second_half = row >= kHalfTask, last = row + kGroup >= rows;
        acc_t<T>* const half = second_half ? scratch : sums;
        if (row % kHalfTask) earlier_ = half;
        if (second_half && last) first_half_ = sums;
        out_ = second_half && last ? sums : half;
    }

    // Add the sum of the group at columns [column, column + n).
    template <class Count>
    void add(int64_t column, Acc<T> s, Count n) const {
        if (earlier_) s = s + load_acc<T>(earlier_ + column, n);
        if (first_half_) s = s + load_acc<T>(first_half_ + column, n);
        store_acc<T>(out_ + column, s, n);
    }

  private:
    const acc_t<T>*earlier_ = nullptr, *first_half_ = nullptr;  // sums to add, or null
    acc_t<T>* out_;
};

// Write the column sums of `rows` rows of x to sums[0..D). `scratch` has D elements.
template <class T>
MVSPLIT_ROW void sum_columns(const T* x, int64_t rows, int64_t D, acc_t<T>* sums,
                             acc_t<T>* scratch) {
    for (int64_t r = 0; r < rows; r += kGroup, x += kGroup * D) {
        const int64_t count = std::min<int64_t>(kGroup, rows - r);
        const GroupSums<T> group(sums, scratch, r, rows);
        for_chunks<T>(D, [&](int64_t i, auto n) {
            Acc<T> s(0);
            for (int64_t k = 0; k < count; ++k) s = s + load(x + k * D + i, n);
            group.add(i, s, n);
        });
    }
}

// Store the shift of a (sample, segment) at columns [d, d+n).
template <class T, class Count>
void store_shift(const Views<T>& v, int64_t unit, int64_t D, int64_t d, acc_t<T>* shift, Count n) {
    const Acc<T> jx = load_acc<T>(v.jx + unit * D + d, n), jf = load_acc<T>(v.jf + unit * D + d, n);
    store_acc<T>(shift + d, load_acc<T>(v.alpha + d, n) * (jf - jx), n);
}

template <class T>
void forward(const MergeArgs& a) {
    using A = acc_t<T>;
    const Views<T> v(a);
    const int64_t D = a.D;
    const Plan plan(a, 2 * a.T * D * sizeof(T));
    const int64_t wave = std::min(plan.wave, a.B);
    std::vector<A> partials(wave * plan.count() * 2 * D), shifts(wave * a.S * D);
    A* const jy = static_cast<A*>(a.jy);
    // The mean of segment s of a sample of the wave, from the partial rows of its tasks.
    const auto mean = [&](int64_t in_wave, int64_t s, const A* rows, int64_t d, auto n) {
        const A* first = rows + (in_wave * plan.count() + plan.first[s]) * 2 * D + d;
        return sum_of_rows<T>(first, plan.tasks_of(s), 2 * D, n) /
               Acc<T>(static_cast<A>(a.segments[s]));
    };
    for_waves(a, plan, [&](int64_t b0, int64_t b1) {
        for_tasks(plan, b0, b1, [&](int64_t b, int64_t, const Task& t, int64_t i) {
            const int64_t row = b * a.T + t.begin, rows = t.end - t.begin;
            std::vector<A> scratch(D);
            if (!a.jx_is_input)
                sum_columns(v.x + row * D, rows, D, &partials[i * 2 * D], scratch.data());
            sum_columns(v.f + row * D, rows, D, &partials[(i * 2 + 1) * D], scratch.data());
        });
        for_columns<T>(D, [&](int64_t d, auto n) {
            for (int64_t b = b0; b < b1; ++b)
                for (int64_t s = 0; s < a.S; ++s) {
                    const int64_t unit = b * a.S + s, in_wave = b - b0;
                    if (!a.jx_is_input)
                        store_acc<T>(v.jx + unit * D + d, mean(in_wave, s, &partials[0], d, n), n);
                    store_acc<T>(v.jf + unit * D + d, mean(in_wave, s, &partials[D], d, n), n);
                    store_shift(v, unit, D, d, &shifts[(in_wave * a.S + s) * D], n);
                }
        });
        for_tasks(plan, b0, b1, [&](int64_t b, int64_t in_wave, const Task& t, int64_t i) {
            std::vector<A> scratch(D);
            const RowParams<T> p{v.beta, &shifts[(in_wave * a.S + t.segment) * D],
                                 v.jf + (b * a.S + t.segment) * D, v.weight};
            T* const y = static_cast<T*>(a.out) + b * a.T * D;
            for (int64_t row = t.begin; row < t.end; ++row)
                v.rstd[b * a.T + row] =
                    forward_row<T, true, true>(v.x + (b * a.T + row) * D, v.f + (b * a.T + row) * D,
                                               y + row * D, p, scratch.data(), D, a.eps);
            if (jy)
                sum_columns(y + t.begin * D, t.end - t.begin, D, &partials[i * 2 * D],
                            scratch.data());
        });
        if (jy)
            for_columns<T>(D, [&](int64_t d, auto n) {
                for (int64_t b = b0; b < b1; ++b)
                    for (int64_t s = 0; s < a.S; ++s)
                        store_acc<T>(jy + (b * a.S + s) * D + d,
                                     mean(b - b0, s, &partials[0], d, n), n);
            });
    });
}

// First backward sweep over the rows of one task. Computes mean_d(g*n) of each row and the column
// sums of dz, dz*(f - jf) and, with a weight, dy*n.
template <class T, bool has_weight>
MVSPLIT_ROW void sum_gradients(const Views<T>& v, const RowParams<T>& p, int64_t begin, int64_t end,
                               int64_t D, acc_t<T>* means, acc_t<T>* sums, acc_t<T>* scratch) {
    using Norm = NormalisedRow<T, true, true, has_weight>;
    const T* saved = has_weight ? v.x : v.y;
    for (int64_t row = begin; row < end; row += kGroup) {
        const int count = std::min<int64_t>(kGroup, end - row);
        const GroupSums<T> group(sums, scratch, row - begin, end - begin);
        Norm norm[kGroup];
        Dz<T> dz[kGroup];
        for (int k = 0; k < count; ++k) {
            const int64_t r = row + k;
            norm[k] = Norm{saved + r * D, v.f + r * D, v.rstd[r]};
            means[r] = mean_dot<T, has_weight>(v.dy + r * D, norm[k], p, D);
            dz[k] = Dz<T>(v.rstd[r], means[r]);
        }
        for_chunks<T>(D, [&](int64_t i, auto n) {
            Acc<T> sdz(0), sdzf(0), sdyn(0);
            const Acc<T> mean_f = load_acc<T>(p.jf + i, n);
            for (int k = 0; k < count; ++k) {
                const int64_t at = (row + k) * D;
                const Acc<T> nk = norm[k](p, i, n);
                const Acc<T> d = dz[k](weighted<T, has_weight>(v.dy + at, p, i, n), nk);
                sdz = sdz + d;
                sdzf = fmadd(d, load(v.f + at + i, n) - mean_f, sdzf);
                if constexpr (has_weight) sdyn = fmadd(load(v.dy + at + i, n), nk, sdyn);
            }
            group.add(i, sdz, n), group.add(D + i, sdzf, n);
            if constexpr (has_weight) group.add(2 * D + i, sdyn, n);
        });
    }
}

// Vectors of the second sweep, one pair per segment: to_dx = alpha*jdz, to_df = (alpha - beta)*jdz,
// with dx = dz - to_dx and df = beta*dz + to_df.
template <class T>
struct MeanGradients {
    const acc_t<T>*to_dx, *to_df;
};

template <class T, bool has_weight>
MVSPLIT_ROW void apply_gradients(const Views<T>& v, const RowParams<T>& p,
                                 const MeanGradients<T>& mean, int64_t begin, int64_t end,
                                 int64_t D, const acc_t<T>* means, T* dx, T* df) {
    for (int64_t row = begin; row < end; ++row) {
        const NormalisedRow<T, true, true, has_weight> norm{(has_weight ? v.x : v.y) + row * D,
                                                            v.f + row * D, v.rstd[row]};
        const Dz<T> dz(v.rstd[row], means[row]);
        for_chunks<T>(D, [&](int64_t i, auto n) {
            const Acc<T> d = dz(weighted<T, has_weight>(v.dy + row * D, p, i, n), norm(p, i, n));
            store(dx + row * D + i, d - load_acc<T>(mean.to_dx + i, n), n);
            store(df + row * D + i,
                  fmadd(load_acc<T>(p.beta + i, n), d, load_acc<T>(mean.to_df + i, n)), n);
        });
    }
}

template <class T, bool has_weight>
void backward(const MergeArgs& a) {
    using A = acc_t<T>;
    const Views<T> v(a);
    const int64_t D = a.D, width = (has_weight ? 3 : 2) * D;
    const Plan plan(a, 3 * a.T * D * sizeof(T));
    const int64_t wave = std::min(plan.wave, a.B);
    std::vector<A> partials(wave * plan.count() * width), means(a.B * a.T);
    std::vector<A> shifts(has_weight ? wave * a.S * D : 0), mean_gradients(wave * a.S * 2 * D);
    A* const out[3] = {static_cast<A*>(a.dalpha), static_cast<A*>(a.dbeta),
                       static_cast<A*>(a.dweight)};
    std::vector<A> errors(width);  // of the sums in `out`, kept from wave to wave
    const auto params = [&](int64_t b, int64_t in_wave, int64_t s) {
        return RowParams<T>{v.beta, has_weight ? &shifts[(in_wave * a.S + s) * D] : nullptr,
                            v.jf + (b * a.S + s) * D, v.weight};
    };
    for_waves(a, plan, [&](int64_t b0, int64_t b1) {
        const int64_t units = (b1 - b0) * a.S;
        if (has_weight)
            for_columns<T>(D, [&](int64_t d, auto n) {
                for (int64_t u = 0; u < units; ++u)
                    store_shift(v, b0 * a.S + u, D, d, &shifts[u * D], n);
            });
        for_tasks(plan, b0, b1, [&](int64_t b, int64_t in_wave, const Task& t, int64_t i) {
            std::vector<A> scratch(width);
            sum_gradients<T, has_weight>(v, params(b, in_wave, t.segment), b * a.T + t.begin,
                                         b * a.T + t.end, D, means.data(), &partials[i * width],
                                         scratch.data());
        });
        for_columns<T>(D, [&](int64_t d, auto n) {
            const Acc<T> alpha = load_acc<T>(v.alpha + d, n), beta = load_acc<T>(v.beta + d, n);
            CompensatedSum<T> total[3];
            for (int i = 0; i < (has_weight ? 3 : 2); ++i)
                total[i] = load_sum<T>(out[i] + d, &errors[i * D + d], n);
            for (int64_t u = 0; u < units; ++u) {
                const int64_t s = u % a.S, first = u / a.S * plan.count() + plan.first[s];
                const auto column_sum = [&](int64_t i) {
                    const A* rows = &partials[first * width + i * D + d];
                    return sum_of_rows<T>(rows, plan.tasks_of(s), width, n);
                };
                const Acc<T> sdz = column_sum(0);
                const Acc<T> jx = load_acc<T>(v.jx + (b0 * a.S + u) * D + d, n);
                const Acc<T> jf = load_acc<T>(v.jf + (b0 * a.S + u) * D + d, n);
                const Acc<T> jdz = sdz / Acc<T>(static_cast<A>(a.segments[s]));
                total[0] += sdz * (jf - jx);
                for (int i = 1; i < (has_weight ? 3 : 2); ++i) total[i] += column_sum(i);
                store_acc<T>(&mean_gradients[u * 2 * D + d], alpha * jdz, n);
                store_acc<T>(&mean_gradients[(u * 2 + 1) * D + d], (alpha - beta) * jdz, n);
            }
            for (int i = 0; i < (has_weight ? 3 : 2); ++i)
                store_sum<T>(out[i] + d, &errors[i * D + d], total[i], n);
        });
        for_tasks(plan, b0, b1, [&](int64_t b, int64_t in_wave, const Task& t, int64_t) {
            const A* to_dx = &mean_gradients[(in_wave * a.S + t.segment) * 2 * D];
            apply_gradients<T, has_weight>(v, params(b, in_wave, t.segment), {to_dx, to_dx + D},
                                           b * a.T + t.begin, b * a.T + t.end, D, means.data(),
                                           static_cast<T*>(a.dx), static_cast<T*>(a.df));
        });
    });
    for (int i = 0; i < (has_weight ? 3 : 2); ++i) finish_sums<T>(out[i], &errors[i * D], D);
}

}  // namespace

void mvsplit_rmsnorm_fwd(const MergeArgs& a, c10::ScalarType dtype) {
    dispatch(dtype, [&](auto t) { forward<decltype(t)>(a); });
}

void mvsplit_rmsnorm_bwd(const MergeArgs& a, c10::ScalarType dtype) {
    dispatch(dtype, [&](auto t) {
        a.weight ? backward<decltype(t), true>(a) : backward<decltype(t), false>(a);
    });
}

MVSPLIT_KERNELS_END
