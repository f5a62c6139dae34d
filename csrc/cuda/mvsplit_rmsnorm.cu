// MV-Split residual with RMSNorm (arXiv 2605.06169). J is the token mean of a segment, P = I - J.
//
//   z = x + beta * P f + alpha * J (f - x)      y = z * rstd * weight
//     = x + beta * f + shift                    shift = (alpha - beta) * jf - alpha * jx
//
//   dz = rstd * (g - n * mean_d(g * n))     g = dy * weight    n = z * rstd    jdz = J dz
//   dx = dz - alpha * jdz                   dalpha = sum_{b,s} Ts * jdz * (jf - jx)
//   df = beta * dz + (alpha - beta) * jdz   dbeta = sum dz * (f - jf)     dweight = sum dy * n
//
// dbeta sums dz * (f - jf) directly. If the token mean dominates f, sum dz * f minus the part of
// the mean would be a small difference of large numbers.
//
// Two plans compute the same formulas. mvsplit_cluster.cuh reads each tensor once (3 passes
// forward, 5 backward) and needs a segment that fits the shared memory of a cluster.
// mvsplit_sweeps.cuh reads twice (5 passes, and 7 or 8) and supports any length and any GPU.
#include <common.cuh>
#include <sum_rows.cuh>

constexpr int MOST_SEGMENTS = 64;

// Tokens [begin, end) of each sample; `index` is the row of the segment in jx and jf.
struct Segment {
    int begin, end, index, unused;
};

DEVICE A shift_of(A alpha, A beta, A jx, A jf) { return (alpha - beta) * jf - alpha * jx; }

#if CLUSTER
#include <mvsplit_cluster.cuh>
#else
#include <mvsplit_sweeps.cuh>
#endif
