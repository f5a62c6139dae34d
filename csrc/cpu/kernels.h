// Arguments of the CPU kernels and the table of their entry points.
//
// The kernels are compiled once per instruction set (setup.py); host/instruction_set.cpp chooses
// one of the tables at run time.
//
// B batch, T tokens, D width, H heads, Dh head width, F SwiGLU width, S segments, N = B*T.
// Pointers are void because every kernel serves float, bfloat16, half and double. "acc" marks data
// of the accumulator dtype: double if the activations are double, else float.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace mvsplit {

// Rows of one tensor: row r starts at data + r * stride elements and is contiguous.
struct Rows {
    void* data = nullptr;
    int64_t stride = 0;
};

// Table of cos or of sin: the value of pair i of token t of sample b is at
// data + b*sample + t*token + i*pair elements. Any stride may be zero.
struct Table {
    const void* data = nullptr;
    int64_t sample = 0, token = 0, pair = 0;
};

// Rotation of pairs, used by rope and rope_qk_norm.
struct Rotation {
    Table cos, sin;
    c10::ScalarType dtype = c10::ScalarType::Float;  // of both tables
    bool interleaved = false;
    bool conjugate = false;  // rotate by -theta
};

// One of q and k. The heads of a token are adjacent in a row.
struct Heads {
    Rows in;     // forward: x.  backward: dy
    Rows saved;  // backward: x with a weight or norm first, else y
    Rows out;    // forward: y.  backward: dx
    int64_t heads = 0;
    const void* weight = nullptr;  // acc [Dh] or null
    void* rstd = nullptr;          // acc [N, heads]
    void* dweight = nullptr;       // acc [Dh] or null
};

struct HeadArgs {
    Heads parts[2];  // q and k; rope uses only the first
    int count = 1;   // of `parts` in use
    int64_t B = 0, T = 0, Dh = 0;
    Rotation rotation;
    bool norm_first = false;
    double eps = 0;
};

// Gate and value are two tensors, or the halves of one packed tensor in either order.
struct SwigluArgs {
    Rows gate, value;    // [N, F]
    Rows y;              // [N, F], forward only
    Rows dy;             // [N, F], this and the next two backward only
    Rows dgate, dvalue;  // [N, F]
    int64_t N = 0, F = 0;
};

// The MV-Split and the plain residual merge. Activations are contiguous [N, D].
struct MergeArgs {
    const void* x = nullptr;  // null in a backward that reads y
    const void* f = nullptr;
    const void* y = nullptr;  // backward that reads y as n
    const void* dy = nullptr;
    const void* alpha = nullptr;   // acc [D]
    const void* beta = nullptr;    // acc [D]; the `scale` of residual_rmsnorm, null for 1
    const void* weight = nullptr;  // acc [D] or null
    void* out = nullptr;           // y of forward
    void* rstd = nullptr;          // acc [N]
    void* jx = nullptr;            // acc [B, S, D]
    void* jf = nullptr;            // acc [B, S, D]
    bool jx_is_input = false;      // forward reads jx and does not compute it
    void* jy = nullptr;            // acc [B, S, D] or null
    void* dx = nullptr;
    void* df = nullptr;       // null if scale is null: df equals dx
    void* dalpha = nullptr;   // acc [D], zero on entry
    void* dbeta = nullptr;    // acc [D], zero on entry
    void* dweight = nullptr;  // acc [D], zero on entry
    int64_t B = 0, T = 0, D = 0;
    const int64_t* segments = nullptr;  // S token counts that sum to T
    int64_t S = 0;
    double eps = 0;
};

// The kernels of one instruction set.
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
