// Python bindings of the CPU kernels, the module mvsplit_ops._C (typed in mvsplit_ops/_C.pyi).
//
// Each operator has a forward and a backward function that check their tensors, allocate the
// results and call the kernel of the instruction set in use. mvsplit_ops/_register.py registers
// them with torch.library as backend `cpu`, together with the other backends.
#include <torch/extension.h>

#include "host/instruction_set.h"
#include "host/tensors.h"

namespace mvsplit {

namespace {

// ---- Operators on heads: rope, qk_norm, rope_qk_norm ----

Table make_table(const Tensor& t) {
    const bool per_sample = t.dim() == 3 && t.size(0) > 1;
    return {t.const_data_ptr(), per_sample ? t.stride(0) : 0, t.stride(-2), t.stride(-1)};
}

Rotation make_rotation(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved,
                       bool conjugate) {
    const int64_t B = x.size(0), T = x.size(1), Dh = x.size(3);
    const bool shared = cos.dim() == 2 || (cos.dim() == 3 && cos.size(0) == 1);
    TORCH_CHECK(cos.device().is_cpu() && sin.device().is_cpu() && cos.sizes() == sin.sizes() &&
                    cos.scalar_type() == sin.scalar_type() && Dh % 2 == 0 &&
                    (shared || (cos.dim() == 3 && cos.size(0) == B)) && cos.size(-1) == Dh / 2 &&
                    cos.size(-2) >= T,
                "mvsplit_ops: cos and sin must be CPU tensors (T, Dh/2), (1, T, Dh/2) or "
                "(B, T, Dh/2) of one dtype, with even Dh, for x of shape ",
                x.sizes(), "; got ", cos.scalar_type(), " ", cos.sizes(), " and ",
                sin.scalar_type(), " ", sin.sizes());
    return {make_table(cos), make_table(sin), cos.scalar_type(), interleaved, conjugate};
}

HeadArgs make_head_args(const Tensor& x) {
    TORCH_CHECK(x.dim() == 4, "mvsplit_ops: expected a tensor (B, T, H, Dh), got shape ",
                x.sizes());
    HeadArgs a;
    a.B = x.size(0), a.T = x.size(1), a.Dh = x.size(3);
    return a;
}

Tensor rope(Tensor x, const Tensor& cos, const Tensor& sin, bool interleaved, bool conjugate) {
    HeadArgs a = make_head_args(x);
    a.rotation = make_rotation(x, cos, sin, interleaved, conjugate);
    Tensor y = at::empty(x.sizes(), x.options());
    a.parts[0].heads = x.size(2);
    a.parts[0].in = rows(x, 2), a.parts[0].out = rows(y, 2);
    kernels().rope(a, x.scalar_type());
    return y;
}

Tensor rope_bwd(const Tensor& dy, const Tensor& cos, const Tensor& sin, bool interleaved,
                bool conjugate) {
    return rope(dy, cos, sin, interleaved, !conjugate);
}

// The tensors of q or of k. They own the memory that the kernel accesses.
struct HeadTensors {
    Tensor in, saved, out, rstd, weight, dweight;
};

// Allocate the results of q (i = 0) or k (i = 1) and set their part of `a`.
HeadTensors set_forward(const Tensor& x, const OptTensor& weight, HeadArgs& a, int i) {
    check_like("k", x, x, {a.B, a.T, x.size(2), a.Dh});
    HeadTensors p;
    p.in = x;
    p.out = at::empty(x.sizes(), x.options());
    p.rstd = empty_acc(x, {a.B, a.T, x.size(2)});
    Heads& h = a.parts[i];
    h.heads = x.size(2);
    h.in = rows(p.in, 2), h.out = rows(p.out, 2);
    h.rstd = p.rstd.data_ptr();
    h.weight = acc_data("weight", weight, {a.Dh}, acc_dtype(x), p.weight);
    return p;
}

// Allocate the gradients of q (i = 0) or k (i = 1) and set their part of `a`. `saved` is x with a
// weight or norm first, else y.
HeadTensors set_backward(const Tensor& dy, const Tensor& saved, const Tensor& rstd,
                         const OptTensor& weight, HeadArgs& a, int i) {
    check_like("dy", dy, saved, {a.B, a.T, saved.size(2), a.Dh});
    check_like("y", saved, dy, {a.B, a.T, saved.size(2), a.Dh});
    HeadTensors p;
    p.in = dy, p.saved = saved;
    p.out = at::empty(dy.sizes(), dy.options());
    Heads& h = a.parts[i];
    h.heads = dy.size(2);
    h.in = rows(p.in, 2), h.saved = rows(p.saved, 2), h.out = rows(p.out, 2);
    h.rstd = acc_data("rstd", rstd, {a.B, a.T, dy.size(2)}, acc_dtype(dy), p.rstd);
    h.weight = acc_data("weight", weight, {a.Dh}, acc_dtype(dy), p.weight);
    p.dweight = zeros_acc(dy, {weight ? a.Dh : 0});
    h.dweight = p.dweight.data_ptr();
    return p;
}

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

FourTensors norm_forward(HeadArgs& a, Kernels::HeadFn kernel, const Tensor& q, const Tensor& k,
                         const OptTensor& q_weight, const OptTensor& k_weight, double eps) {
    check_like("k", k, q, {a.B, a.T, k.size(2), a.Dh});
    a.count = 2, a.eps = eps;
    const HeadTensors qs = set_forward(q, q_weight, a, 0);
    const HeadTensors ks = set_forward(k, k_weight, a, 1);
    kernel(a, q.scalar_type());
    return {qs.out, ks.out, qs.rstd, ks.rstd};
}

FourTensors norm_backward(HeadArgs& a, Kernels::HeadFn kernel, const Tensor& dq, const Tensor& dk,
                          const Tensor& q, const Tensor& k, const Tensor& q_rstd,
                          const Tensor& k_rstd, const OptTensor& q_weight,
                          const OptTensor& k_weight) {
    check_like("dk", dk, dq, {a.B, a.T, dk.size(2), a.Dh});
    a.count = 2;
    const HeadTensors qs = set_backward(dq, q, q_rstd, q_weight, a, 0);
    const HeadTensors ks = set_backward(dk, k, k_rstd, k_weight, a, 1);
    kernel(a, dq.scalar_type());
    return {qs.out, ks.out, qs.dweight, ks.dweight};
}

FourTensors qk_norm_fwd(const Tensor& q, const Tensor& k, const OptTensor& q_weight,
                        const OptTensor& k_weight, double eps) {
    HeadArgs a = make_head_args(q);
    return norm_forward(a, kernels().qk_norm_fwd, q, k, q_weight, k_weight, eps);
}

FourTensors qk_norm_bwd(const Tensor& dq, const Tensor& dk, const Tensor& q, const Tensor& k,
                        const Tensor& q_rstd, const Tensor& k_rstd, const OptTensor& q_weight,
                        const OptTensor& k_weight) {
    HeadArgs a = make_head_args(dq);
    return norm_backward(a, kernels().qk_norm_bwd, dq, dk, q, k, q_rstd, k_rstd, q_weight,
                         k_weight);
}

FourTensors rope_qk_norm_fwd(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                             const OptTensor& q_weight, const OptTensor& k_weight, double eps,
                             bool interleaved, bool conjugate, bool norm_first) {
    HeadArgs a = make_head_args(q);
    a.rotation = make_rotation(q, cos, sin, interleaved, conjugate);
    a.norm_first = norm_first;
    return norm_forward(a, kernels().rope_qk_norm_fwd, q, k, q_weight, k_weight, eps);
}

FourTensors rope_qk_norm_bwd(const Tensor& dq, const Tensor& dk, const Tensor& q, const Tensor& k,
                             const Tensor& cos, const Tensor& sin, const Tensor& q_rstd,
                             const Tensor& k_rstd, const OptTensor& q_weight,
                             const OptTensor& k_weight, bool interleaved, bool conjugate,
                             bool norm_first) {
    HeadArgs a = make_head_args(dq);
    a.rotation = make_rotation(dq, cos, sin, interleaved, conjugate);
    a.norm_first = norm_first;
    return norm_backward(a, kernels().rope_qk_norm_bwd, dq, dk, q, k, q_rstd, k_rstd, q_weight,
                         k_weight);
}

// ---- swiglu ----

// Gate and value as rows of F. If `up` is null, they are the halves of x, else x and up.
struct GateAndValue {
    Rows gate, value;
    std::vector<int64_t> sizes;  // (.., F)
    int64_t N, F;
};

GateAndValue make_gate_and_value(Tensor& x, OptTensor& up, bool gate_first) {
    TORCH_CHECK(x.dim() >= 1 && (up || x.size(-1) % 2 == 0),
                "mvsplit_ops: expected a tensor (..., ", up ? "F" : "2F", "), got shape ",
                x.sizes());
    GateAndValue p;
    p.sizes = x.sizes().vec();
    if (up)
        check_like("up", *up, x, p.sizes);
    else
        p.sizes.back() /= 2;
    p.F = p.sizes.back();
    p.N = p.F ? c10::multiply_integers(p.sizes) / p.F : 0;
    p.gate = rows(x, x.dim() - 1);
    p.value = up ? rows(*up, up->dim() - 1) : shifted(p.gate, x, p.F);
    if (!up && !gate_first) std::swap(p.gate, p.value);
    return p;
}

Tensor swiglu_fwd(Tensor x, OptTensor up, bool gate_first) {
    const GateAndValue p = make_gate_and_value(x, up, gate_first);
    Tensor y = at::empty(p.sizes, x.options());
    SwigluArgs a;
    a.gate = p.gate, a.value = p.value, a.y = rows(y, y.dim() - 1), a.N = p.N, a.F = p.F;
    kernels().swiglu_fwd(a, x.scalar_type());
    return y;
}

std::tuple<Tensor, Tensor> swiglu_bwd(Tensor dy, Tensor x, OptTensor up, bool gate_first) {
    const GateAndValue p = make_gate_and_value(x, up, gate_first);
    check_like("dy", dy, x, p.sizes);
    Tensor dx = at::empty(x.sizes(), x.options());
    OptTensor dup;
    if (up) dup = at::empty(p.sizes, x.options());
    const GateAndValue d = make_gate_and_value(dx, dup, gate_first);
    SwigluArgs a;
    a.gate = p.gate, a.value = p.value, a.dy = rows(dy, dy.dim() - 1);
    a.dgate = d.gate, a.dvalue = d.value, a.N = p.N, a.F = p.F;
    kernels().swiglu_bwd(a, x.scalar_type());
    return {dx, dup ? *dup : at::empty({0}, x.options())};
}

// ---- Residual merges: mvsplit_rmsnorm, residual_rmsnorm ----

// Arguments of a merge and the tensors that own the memory which the kernel accesses.
struct Merge {
    MergeArgs args;
    Tensor x, f, y, dy, alpha, beta, weight, rstd, jx, jf;
    std::vector<int64_t> segments;
    c10::ScalarType acc;

    explicit Merge(const Tensor& t) : acc(acc_dtype(t)) {
        TORCH_CHECK(t.dim() == 3, "mvsplit_ops: expected a tensor (B, T, D), got shape ",
                    t.sizes());
        args.B = t.size(0), args.T = t.size(1), args.D = t.size(2);
    }

    const void* activation(const char* name, const Tensor& t, const Tensor& like, Tensor& owner) {
        check_like(name, t, like, {args.B, args.T, args.D});
        owner = t.contiguous();
        return owner.data_ptr();
    }

    void set_segments(const std::vector<int64_t>& counts) {
        int64_t total = 0;
        for (const int64_t n : counts) {
            TORCH_CHECK(n > 0, "mvsplit_ops: each segment must have at least one token, got ",
                        counts);
            total += n;
        }
        TORCH_CHECK(total == args.T, "mvsplit_ops: segments must sum to T = ", args.T, ", got ",
                    counts);
        segments = counts;
        args.segments = segments.data(), args.S = segments.size();
    }

    void set_saved(const Tensor& saved, const Tensor& like, bool is_x) {
        if (is_x)
            args.x = activation("x", saved, like, x);
        else
            args.y = activation("y", saved, like, y);
    }
};

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors mvsplit_rmsnorm_fwd(const Tensor& x, const Tensor& f, const Tensor& alpha,
                                const Tensor& beta, const OptTensor& weight, const OptTensor& jx,
                                const std::vector<int64_t>& segments, double eps, bool carry) {
    Merge m(x);
    MergeArgs& a = m.args;
    m.set_segments(segments);
    Tensor y = at::empty(x.sizes(), x.options()), rstd = empty_acc(x, {a.B, a.T});
    Tensor jf = empty_acc(x, {a.B, a.S, a.D});
    Tensor new_jx = jx ? empty_acc(x, {0}) : empty_acc(x, {a.B, a.S, a.D});
    Tensor jy = carry ? empty_acc(x, {a.B, a.S, a.D}) : empty_acc(x, {0});
    a.x = m.activation("x", x, x, m.x), a.f = m.activation("f", f, x, m.f);
    a.alpha = acc_data("alpha", alpha, {a.D}, m.acc, m.alpha);
    a.beta = acc_data("beta", beta, {a.D}, m.acc, m.beta);
    a.weight = acc_data("weight", weight, {a.D}, m.acc, m.weight);
    a.out = y.data_ptr(), a.rstd = rstd.data_ptr(), a.jf = jf.data_ptr(), a.eps = eps;
    a.jx = jx ? acc_data("jx", jx, {a.B, a.S, a.D}, m.acc, m.jx) : new_jx.data_ptr();
    a.jx_is_input = jx.has_value(), a.jy = carry ? jy.data_ptr() : nullptr;
    kernels().mvsplit_rmsnorm_fwd(a, x.scalar_type());
    return {y, jy, rstd, new_jx, jf};
}

FiveTensors mvsplit_rmsnorm_bwd(const Tensor& dy, const Tensor& saved, const Tensor& f,
                                const Tensor& alpha, const Tensor& beta, const OptTensor& weight,
                                const Tensor& rstd, const Tensor& jx, const Tensor& jf,
                                const std::vector<int64_t>& segments) {
    Merge m(dy);
    MergeArgs& a = m.args;
    m.set_segments(segments);
    Tensor dx = at::empty(dy.sizes(), dy.options()), df = at::empty(dy.sizes(), dy.options());
    Tensor dalpha = zeros_acc(dy, {a.D}), dbeta = zeros_acc(dy, {a.D});
    Tensor dweight = zeros_acc(dy, {weight ? a.D : 0});
    a.dy = m.activation("dy", dy, dy, m.dy), a.f = m.activation("f", f, dy, m.f);
    m.set_saved(saved, dy, weight.has_value());
    a.alpha = acc_data("alpha", alpha, {a.D}, m.acc, m.alpha);
    a.beta = acc_data("beta", beta, {a.D}, m.acc, m.beta);
    a.weight = acc_data("weight", weight, {a.D}, m.acc, m.weight);
    a.rstd = acc_data("rstd", rstd, {a.B, a.T}, m.acc, m.rstd);
    a.jx = acc_data("jx", jx, {a.B, a.S, a.D}, m.acc, m.jx);
    a.jf = acc_data("jf", jf, {a.B, a.S, a.D}, m.acc, m.jf);
    a.dx = dx.data_ptr(), a.df = df.data_ptr();
    a.dalpha = dalpha.data_ptr(), a.dbeta = dbeta.data_ptr(), a.dweight = dweight.data_ptr();
    kernels().mvsplit_rmsnorm_bwd(a, dy.scalar_type());
    return {dx, df, dalpha, dbeta, dweight};
}

std::tuple<Tensor, Tensor> residual_rmsnorm_fwd(const Tensor& x, const Tensor& f,
                                                const OptTensor& scale, const OptTensor& weight,
                                                double eps) {
    Merge m(x);
    MergeArgs& a = m.args;
    Tensor y = at::empty(x.sizes(), x.options()), rstd = empty_acc(x, {a.B, a.T});
    a.x = m.activation("x", x, x, m.x), a.f = m.activation("f", f, x, m.f);
    a.beta = acc_data("scale", scale, {a.D}, m.acc, m.beta);
    a.weight = acc_data("weight", weight, {a.D}, m.acc, m.weight);
    a.out = y.data_ptr(), a.rstd = rstd.data_ptr(), a.eps = eps;
    kernels().residual_rmsnorm_fwd(a, x.scalar_type());
    return {y, rstd};
}

FourTensors residual_rmsnorm_bwd(const Tensor& dy, const Tensor& saved, const OptTensor& f,
                                 const OptTensor& scale, const OptTensor& weight,
                                 const Tensor& rstd) {
    Merge m(dy);
    MergeArgs& a = m.args;
    TORCH_CHECK(
        f || (!scale && !weight),
        "mvsplit_ops: residual_rmsnorm_bwd needs f if there is a scale or a weight, got none");
    Tensor dx = at::empty(dy.sizes(), dy.options());
    Tensor df = scale ? at::empty(dy.sizes(), dy.options()) : at::empty({0}, dy.options());
    Tensor dscale = zeros_acc(dy, {scale ? a.D : 0}), dweight = zeros_acc(dy, {weight ? a.D : 0});
    a.dy = m.activation("dy", dy, dy, m.dy);
    if (f) a.f = m.activation("f", *f, dy, m.f);
    m.set_saved(saved, dy, scale || weight);
    a.beta = acc_data("scale", scale, {a.D}, m.acc, m.beta);
    a.weight = acc_data("weight", weight, {a.D}, m.acc, m.weight);
    a.rstd = acc_data("rstd", rstd, {a.B, a.T}, m.acc, m.rstd);
    a.dx = dx.data_ptr(), a.df = scale ? df.data_ptr() : nullptr;
    a.dbeta = dscale.data_ptr(), a.dweight = dweight.data_ptr();
    kernels().residual_rmsnorm_bwd(a, dy.scalar_type());
    return {dx, df, dscale, dweight};
}

}  // namespace

}  // namespace mvsplit

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    using namespace mvsplit;
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.doc() = "CPU kernels of mvsplit_ops.";
    m.def("rope_fwd", &rope, release());
    m.def("rope_bwd", &rope_bwd, release());
    m.def("qk_norm_fwd", &qk_norm_fwd, release());
    m.def("qk_norm_bwd", &qk_norm_bwd, release());
    m.def("rope_qk_norm_fwd", &rope_qk_norm_fwd, release());
    m.def("rope_qk_norm_bwd", &rope_qk_norm_bwd, release());
    m.def("swiglu_fwd", &swiglu_fwd, release());
    m.def("swiglu_bwd", &swiglu_bwd, release());
    m.def("mvsplit_rmsnorm_fwd", &mvsplit_rmsnorm_fwd, release());
    m.def("mvsplit_rmsnorm_bwd", &mvsplit_rmsnorm_bwd, release());
    m.def("residual_rmsnorm_fwd", &residual_rmsnorm_fwd, release());
    m.def("residual_rmsnorm_bwd", &residual_rmsnorm_bwd, release());
    m.def("capabilities", &capabilities,
          "Return the instruction sets that were compiled in and that this processor runs.");
    m.def("capability", &capability, "Return the instruction set in use.");
    m.def("set_capability", &set_capability,
          "Use another of capabilities(), for example in a test.");
}
