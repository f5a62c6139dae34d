// MV-Split residual with RMSNorm (arXiv 2605.06169). J is the token mean of a segment, P = I - J.
//
//   z = x + beta * P f + alpha * J (f - x)      y = z * rstd * weight
//     = x + beta * (f - jf) + shift             shift = alpha * (jf - jx)
//
//   dz = rstd * (g - n * mean_d(g * n))     g = dy * weight    n = z * rstd    jdz = J dz
//   dx = dz - alpha * jdz                   dalpha = sum_{b,s} Ts * jdz * (jf - jx)
//   df = beta * (dz - jdz) + alpha * jdz    dbeta = sum dz * (f - jf)     dweight = sum dy * n
//
// f and dz are centred first. If the token mean dominates them, as in a collapsed block, sum dz * f
// minus the part of the mean would be a small difference of large numbers; so would beta * f -
// beta * jf, which 16-bit rows accept (CENTRED in common.cuh).
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

#ifndef LONG
#define LONG 0  // a thread adds more than RUN rows to the sums of columns
#endif

using Total = Sum<LONG || (sizeof(T) > 2)>;  // of sums over the tokens of a segment

DEVICE A shift_of(A alpha, A beta, A jx, A jf) {
    A shift = alpha * (jf - jx);
    return CENTRED ? shift : shift - beta * jf;
}

#if CLUSTER
#include <mvsplit_cluster.cuh>
#else
#include <mvsplit_sweeps.cuh>
#endif
