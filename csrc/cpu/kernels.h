// What a CPU kernel takes and where it is found. The kernels themselves are compiled once per
// instruction set (setup.py); `kernels()` in module.cpp picks one at run time.
//
// B batch, T tokens, D width, H heads, Dh head width, F SwiGLU width, S segments, N = B*T.
// Pointers are void because every kernel serves float, bfloat16, half and double; "acc" says that
// the data are float, or double when the activations are double.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace mvsplit {

// Rows of one tensor: row r starts at data + r * stride elements; a row itself is contiguous.
struct Rows {
    void* data = nullptr;
    int64_t stride = 0;
};

// Rotation of pairs, common to rope and rope_qk_norm. Tables are acc.
struct Rotation {
    const void* cos = nullptr;  // row of token t of sample b at b*batch_stride + t*row_stride
    const void* sin = nullptr;
    int64_t batch_stride = 0;  // 0 when all samples share a table
    int64_t row_stride = 0;
    bool interleaved = false;
    bool inverse = false;  // rotate by -theta
};

// One of q and k: heads of a token lie side by side in a row.
struct Heads {
    Rows in;    // forward: x.  backward: dy
    Rows kept;  // backward: x with a weight or norm first, else y
    Rows out;   // forward: y.  backward: dx
    int64_t heads = 0;
    const void* weight = nullptr;  // acc [Dh] or null
    void* rstd = nullptr;          // acc [N, heads]
    void* dweight = nullptr;       // acc [Dh] or null
};

struct HeadArgs {
    Heads parts[2];  // q and k; rope uses the first alone
    int count = 1;
    int64_t B = 0, T = 0, Dh = 0;
    Rotation rotation;
    bool norm_first = false;
    double eps = 0;
};

struct SwigluArgs {
    Rows x;    // [N, 2F]
    Rows dy;   // [N, F], backward only
    Rows out;  // forward [N, F], backward [N, 2F]
    int64_t N = 0, F = 0;
};

// MV-Split and plain residual merges; activations are contiguous [N, D].
struct MergeArgs {
    const void* x = nullptr;  // null in a backward that reads y
    const void* f = nullptr;
    const void* y = nullptr;  // backward of a merge whose n is y
    const void* dy = nullptr;
    const void* alpha = nullptr;   // acc [D]
    const void* beta = nullptr;    // acc [D]; the `scale` of residual_rmsnorm, null for 1
    const void* weight = nullptr;  // acc [D] or null
    void* out = nullptr;           // forward y
    void* rstd = nullptr;          // acc [N]
    void* jx = nullptr;            // acc [B, S, D]
    void* jf = nullptr;            // acc [B, S, D]
    bool jx_given = false;         // jx is read, not computed
    void* jy = nullptr;            // acc [B, S, D] or null
    void* dx = nullptr;
    void* df = nullptr;       // null when scale is null: df is dx
    void* dalpha = nullptr;   // acc [D], zero on entry
    void* dbeta = nullptr;    // acc [D], zero on entry
    void* dweight = nullptr;  // acc [D], zero on entry
    int64_t B = 0, T = 0, D = 0;
    const int64_t* segments = nullptr;
    int64_t S = 0;
    double eps = 0;
};

// One instruction set's kernels.
struct Kernels {
    using HeadFn = void (*)(const HeadArgs&, c10::ScalarType);
    using SwigluFn = void (*)(const SwigluArgs&, c10::ScalarType);
    using MergeFn = void (*)(const MergeArgs&, c10::ScalarType);
    HeadFn rope;
    HeadFn qk_norm_fwd, qk_norm_bwd;
    HeadFn rope_qk_norm_fwd, rope_qk_norm_bwd;
    SwigluFn swiglu_fwd, swiglu_bwd;
    MergeFn mvsplit_rmsnorm_fwd, mvsplit_rmsnorm_bwd;
    MergeFn residual_rmsnorm_fwd, residual_rmsnorm_bwd;
};

}  // namespace mvsplit
