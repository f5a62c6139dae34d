// MV-Split residual with RMSNorm (arXiv 2605.06169), J the token mean of a segment, P = I - J.
//
//   z = x + beta * P f + alpha * J (f - x)      y = z * rstd * weight
//     = x + beta * f + shift                    shift = (alpha - beta) * jf - alpha * jx
//
//   dz = rstd * (g - n * mean_d(g * n))     g = dy * weight    n = z * rstd    jdz = J dz
//   dx = dz - alpha * jdz                   dalpha = sum_{b,s} Ts * jdz * (jf - jx)
//   df = beta * dz + (alpha - beta) * jdz   dbeta = sum dz * (f - jf)     dweight = sum dy * n
//
// dbeta is summed of centred f: where the token mean dominates, sum dz * f less its mean's part
// would be the small difference of large numbers.
//
// Two plans, one numerics: mvsplit_cluster.cuh reads every tensor once (3 passes forward, 5
// backward) and needs a segment to fit the shared memory of a cluster; mvsplit_sweeps.cuh reads
// twice (5 and 8) and takes any length, and any GPU.
#include <common.cuh>
#include <sum_rows.cuh>

constexpr int MOST_SEGMENTS = 64;

// Tokens [begin, end) of every sample; `index` is the segment's place among jx, jf.
struct Segment {
    int begin, end, index, unused;
};

DEVICE A shift_of(A alpha, A beta, A jx, A jf) { return (alpha - beta) * jf - alpha * jx; }

#if CLUSTER
#include <mvsplit_cluster.cuh>
#else
#include <mvsplit_sweeps.cuh>
#endif
