// mvsplit_ops._C: the CPU kernels as Python functions. torch.library registration is in
// mvsplit_ops/_register.py, for every backend at once; these functions are its `cpu` column.
#include <ATen/Version.h>
#include <torch/extension.h>

#include <atomic>
#include <map>
#include <string>

#include "host/tensors.h"

namespace mvsplit {

namespace DEFAULT {
const Kernels& kernels();
}
#ifdef MVSPLIT_X86
namespace AVX2 {
const Kernels& kernels();
}
namespace AVX512 {
const Kernels& kernels();
}
namespace AVX512_BF16 {
const Kernels& kernels();
}
#endif

namespace {

// Instruction sets compiled in that this processor runs.
std::map<std::string, const Kernels*> capabilities() {
    std::map<std::string, const Kernels*> out{{"DEFAULT", &DEFAULT::kernels()}};
#ifdef MVSPLIT_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) out["AVX2"] = &AVX2::kernels();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    if (avx512) out["AVX512"] = &AVX512::kernels();
    if (avx512 && __builtin_cpu_supports("avx512bf16"))
        out["AVX512_BF16"] = &AVX512_BF16::kernels();
#endif
    return out;
}

// PyTorch's own choice where we have it (it may hold AVX-512 back), else the baseline.
const Kernels* preferred() {
    const auto have = capabilities();
    const std::string torch_uses = at::get_cpu_capability();
    for (const auto& name : {torch_uses + "_BF16", torch_uses})
        if (have.count(name)) return have.at(name);
    return have.at("DEFAULT");
}

std::atomic<const Kernels*>& in_use() {
    static std::atomic<const Kernels*> table{preferred()};
    return table;
}

std::vector<std::string> capability_names() {
    std::vector<std::string> names;
    for (const auto& [name, table] : capabilities()) names.push_back(name);
    return names;
}

std::string capability() {
    for (const auto& [name, table] : capabilities())
        if (table == in_use().load()) return name;
    TORCH_INTERNAL_ASSERT(false);
}

void set_capability(const std::string& name) {
    const auto have = capabilities();
    TORCH_CHECK_VALUE(have.count(name), "mvsplit_ops: instruction set must be one of ",
                      capability_names(), " on this processor, got '", name, "'");
    in_use() = have.at(name);
}

// ---- heads: rope, qk_norm, rope_qk_norm

struct Tables {
    Tensor cos, sin;
    Rotation rotation;
};

Tables tables(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved,
              bool inverse) {
    const int64_t B = x.size(0), T = x.size(1), half = x.size(3) / 2;
    TORCH_CHECK(cos.sizes() == sin.sizes() &&
                    (cos.dim() == 2 || (cos.dim() == 3 && cos.size(0) == B)) &&
                    cos.size(-1) == half && cos.size(-2) >= T,
                "mvsplit_ops: cos and sin must be (T, Dh/2) or (B, T, Dh/2), got ", cos.sizes(),
                " and ", sin.sizes());
    Tables t{cos.to(acc_dtype(x)).contiguous(), sin.to(acc_dtype(x)).contiguous(), {}};
    t.rotation = {t.cos.data_ptr(), t.sin.data_ptr(), cos.dim() == 3 ? cos.size(1) * half : 0, half,
                  interleaved,      inverse};
    return t;
}

HeadArgs head_args(const Tensor& x) {
    TORCH_CHECK(x.dim() == 4 && x.size(3) % 2 == 0, "mvsplit_ops: expected (B, T, H, Dh), got ",
                x.sizes());
    HeadArgs a;
    a.B = x.size(0), a.T = x.size(1), a.Dh = x.size(3);
    return a;
}

Tensor rope(Tensor x, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse) {
    HeadArgs a = head_args(x);
    const Tables t = tables(x, cos, sin, interleaved, inverse);
    Tensor y = at::empty(x.sizes(), x.options());
    a.rotation = t.rotation;
    a.parts[0].heads = x.size(2);
    a.parts[0].in = rows(x, 2), a.parts[0].out = rows(y, 2);
    kernels().rope(a, x.scalar_type());
    return y;
}

Tensor rope_bwd(const Tensor& dy, const Tensor& cos, const Tensor& sin, bool interleaved,
                bool inverse) {
    return rope(dy, cos, sin, interleaved, !inverse);
}

// Tensors of q or k that must live until the kernel returns.
struct Part {
    Tensor in, kept, out, rstd, weight, dweight;
};

Part forward_part(const Tensor& x, const OptTensor& weight, HeadArgs& a, int i) {
    check_like("k", x, x, {a.B, a.T, x.size(2), a.Dh});
    Part p;
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

Part backward_part(const Tensor& dy, const Tensor& kept, const Tensor& rstd,
                   const OptTensor& weight, HeadArgs& a, int i) {
    check_like("dy", dy, kept, {a.B, a.T, kept.size(2), a.Dh});
    check_like("y", kept, dy, {a.B, a.T, kept.size(2), a.Dh});
    Part p;
    p.in = dy, p.kept = kept;
    p.out = at::empty(dy.sizes(), dy.options());
    Heads& h = a.parts[i];
    h.heads = dy.size(2);
    h.in = rows(p.in, 2), h.kept = rows(p.kept, 2), h.out = rows(p.out, 2);
    h.rstd = acc_data("rstd", rstd, {a.B, a.T, dy.size(2)}, acc_dtype(dy), p.rstd);
    h.weight = acc_data("weight", weight, {a.Dh}, acc_dtype(dy), p.weight);
    p.dweight = zeros_acc(dy, {weight ? a.Dh : 0});
    h.dweight = p.dweight.data_ptr();
    return p;
}

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four norm_forward(HeadArgs& a, Kernels::HeadFn kernel, const Tensor& q, const Tensor& k,
                  const OptTensor& q_weight, const OptTensor& k_weight, double eps) {
    check_like("k", k, q, {a.B, a.T, k.size(2), a.Dh});
    a.count = 2, a.eps = eps;
    const Part p = forward_part(q, q_weight, a, 0), r = forward_part(k, k_weight, a, 1);
    kernel(a, q.scalar_type());
    return {p.out, r.out, p.rstd, r.rstd};
}

Four norm_backward(HeadArgs& a, Kernels::HeadFn kernel, const Tensor& dq, const Tensor& dk,
                   const Tensor& q, const Tensor& k, const Tensor& q_rstd, const Tensor& k_rstd,
                   const OptTensor& q_weight, const OptTensor& k_weight) {
    check_like("dk", dk, dq, {a.B, a.T, dk.size(2), a.Dh});
    a.count = 2;
    const Part p = backward_part(dq, q, q_rstd, q_weight, a, 0);
    const Part r = backward_part(dk, k, k_rstd, k_weight, a, 1);
    kernel(a, dq.scalar_type());
    return {p.out, r.out, p.dweight, r.dweight};
}

Four qk_norm_fwd(const Tensor& q, const Tensor& k, const OptTensor& q_weight,
                 const OptTensor& k_weight, double eps) {
    HeadArgs a = head_args(q);
    return norm_forward(a, kernels().qk_norm_fwd, q, k, q_weight, k_weight, eps);
}

Four qk_norm_bwd(const Tensor& dq, const Tensor& dk, const Tensor& q, const Tensor& k,
                 const Tensor& q_rstd, const Tensor& k_rstd, const OptTensor& q_weight,
                 const OptTensor& k_weight) {
    HeadArgs a = head_args(dq);
    return norm_backward(a, kernels().qk_norm_bwd, dq, dk, q, k, q_rstd, k_rstd, q_weight,
                         k_weight);
}

Four rope_qk_norm_fwd(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                      const OptTensor& q_weight, const OptTensor& k_weight, double eps,
                      bool interleaved, bool inverse, bool norm_first) {
    HeadArgs a = head_args(q);
    const Tables t = tables(q, cos, sin, interleaved, inverse);
    a.rotation = t.rotation, a.norm_first = norm_first;
    return norm_forward(a, kernels().rope_qk_norm_fwd, q, k, q_weight, k_weight, eps);
}

Four rope_qk_norm_bwd(const Tensor& dq, const Tensor& dk, const Tensor& q, const Tensor& k,
                      const Tensor& cos, const Tensor& sin, const Tensor& q_rstd,
                      const Tensor& k_rstd, const OptTensor& q_weight, const OptTensor& k_weight,
                      bool interleaved, bool inverse, bool norm_first) {
    HeadArgs a = head_args(dq);
    const Tables t = tables(dq, cos, sin, interleaved, inverse);
    a.rotation = t.rotation, a.norm_first = norm_first;
    return norm_backward(a, kernels().rope_qk_norm_bwd, dq, dk, q, k, q_rstd, k_rstd, q_weight,
                         k_weight);
}

// ---- swiglu

Tensor swiglu_fwd(Tensor x) {
    TORCH_CHECK(x.dim() >= 1 && x.size(-1) % 2 == 0, "mvsplit_ops: expected (.., 2F), got ",
                x.sizes());
    auto sizes = x.sizes().vec();
    sizes.back() /= 2;
    Tensor y = at::empty(sizes, x.options());
    SwigluArgs a;
    a.F = sizes.back(), a.N = a.F ? y.numel() / a.F : 0;
    a.x = rows(x, x.dim() - 1), a.out = rows(y, y.dim() - 1);
    kernels().swiglu_fwd(a, x.scalar_type());
    return y;
}

Tensor swiglu_bwd(Tensor dy, Tensor x) {
    auto sizes = x.sizes().vec();
    TORCH_CHECK(x.dim() >= 1 && x.size(-1) % 2 == 0, "mvsplit_ops: expected (.., 2F), got ",
                x.sizes());
    sizes.back() /= 2;
    check_like("dy", dy, x, sizes);
    Tensor dx = at::empty(x.sizes(), x.options());
    SwigluArgs a;
    a.F = sizes.back(), a.N = a.F ? dy.numel() / a.F : 0;
    a.x = rows(x, x.dim() - 1), a.dy = rows(dy, dy.dim() - 1), a.out = rows(dx, dx.dim() - 1);
    kernels().swiglu_bwd(a, x.scalar_type());
    return dx;
}

// ---- merges: mvsplit_rmsnorm, residual_rmsnorm

// Tensors of a merge that must live until the kernel returns.
struct Merge {
    MergeArgs args;
    Tensor x, f, y, dy, alpha, beta, weight, rstd, jx, jf;
    std::vector<int64_t> segments;
    c10::ScalarType acc;

    explicit Merge(const Tensor& t) : acc(acc_dtype(t)) {
        TORCH_CHECK(t.dim() == 3, "mvsplit_ops: expected (B, T, D), got ", t.sizes());
        args.B = t.size(0), args.T = t.size(1), args.D = t.size(2);
    }

    const void* activation(const char* name, const Tensor& t, const Tensor& like, Tensor& keep) {
        check_like(name, t, like, {args.B, args.T, args.D});
        keep = t.contiguous();
        return keep.data_ptr();
    }

    void set_segments(const std::vector<int64_t>& counts) {
        int64_t total = 0;
        for (const int64_t n : counts) {
            TORCH_CHECK(n > 0, "mvsplit_ops: a segment must have a token, got ", counts);
            total += n;
        }
        TORCH_CHECK(total == args.T, "mvsplit_ops: segments ", counts, " must sum to T = ", args.T);
        segments = counts;
        args.segments = segments.data(), args.S = segments.size();
    }

    void set_kept(const Tensor& kept, const Tensor& g, bool is_x) {
        if (is_x)
            args.x = activation("x", kept, g, x);
        else
            args.y = activation("y", kept, g, y);
    }
};

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five mvsplit_rmsnorm_fwd(const Tensor& x, const Tensor& f, const Tensor& alpha, const Tensor& beta,
                         const OptTensor& weight, const OptTensor& given,
                         const std::vector<int64_t>& segments, double eps, bool carry) {
    Merge m(x);
    MergeArgs& a = m.args;
    m.set_segments(segments);
    Tensor y = at::empty(x.sizes(), x.options()), rstd = empty_acc(x, {a.B, a.T});
    Tensor jf = empty_acc(x, {a.B, a.S, a.D});
    Tensor jx = given ? empty_acc(x, {0}) : empty_acc(x, {a.B, a.S, a.D});
    Tensor jy = carry ? empty_acc(x, {a.B, a.S, a.D}) : empty_acc(x, {0});
    a.x = m.activation("x", x, x, m.x), a.f = m.activation("f", f, x, m.f);
    a.alpha = acc_data("alpha", alpha, {a.D}, m.acc, m.alpha);
    a.beta = acc_data("beta", beta, {a.D}, m.acc, m.beta);
    a.weight = acc_data("weight", weight, {a.D}, m.acc, m.weight);
    a.out = y.data_ptr(), a.rstd = rstd.data_ptr(), a.jf = jf.data_ptr(), a.eps = eps;
    a.jx = given ? acc_data("jx", given, {a.B, a.S, a.D}, m.acc, m.jx) : jx.data_ptr();
    a.jx_given = given.has_value(), a.jy = carry ? jy.data_ptr() : nullptr;
    kernels().mvsplit_rmsnorm_fwd(a, x.scalar_type());
    return {y, jy, rstd, jx, jf};
}

Five mvsplit_rmsnorm_bwd(const Tensor& dy, const Tensor& kept, const Tensor& f, const Tensor& alpha,
                         const Tensor& beta, const OptTensor& weight, const Tensor& rstd,
                         const Tensor& jx, const Tensor& jf, const std::vector<int64_t>& segments) {
    Merge m(dy);
    MergeArgs& a = m.args;
    m.set_segments(segments);
    Tensor dx = at::empty(dy.sizes(), dy.options()), df = at::empty(dy.sizes(), dy.options());
    Tensor dalpha = zeros_acc(dy, {a.D}), dbeta = zeros_acc(dy, {a.D});
    Tensor dweight = zeros_acc(dy, {weight ? a.D : 0});
    a.dy = m.activation("dy", dy, dy, m.dy), a.f = m.activation("f", f, dy, m.f);
    m.set_kept(kept, dy, weight.has_value());
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

Four residual_rmsnorm_bwd(const Tensor& dy, const Tensor& kept, const OptTensor& f,
                          const OptTensor& scale, const OptTensor& weight, const Tensor& rstd) {
    Merge m(dy);
    MergeArgs& a = m.args;
    TORCH_CHECK(f || (!scale && !weight), "mvsplit_ops: f is needed with a scale or a weight");
    Tensor dx = at::empty(dy.sizes(), dy.options());
    Tensor df = scale ? at::empty(dy.sizes(), dy.options()) : at::empty({0}, dy.options());
    Tensor dscale = zeros_acc(dy, {scale ? a.D : 0}), dweight = zeros_acc(dy, {weight ? a.D : 0});
    a.dy = m.activation("dy", dy, dy, m.dy);
    if (f) a.f = m.activation("f", *f, dy, m.f);
    m.set_kept(kept, dy, scale || weight);
    a.beta = acc_data("scale", scale, {a.D}, m.acc, m.beta);
    a.weight = acc_data("weight", weight, {a.D}, m.acc, m.weight);
    a.rstd = acc_data("rstd", rstd, {a.B, a.T}, m.acc, m.rstd);
    a.dx = dx.data_ptr(), a.df = scale ? df.data_ptr() : nullptr;
    a.dbeta = dscale.data_ptr(), a.dweight = dweight.data_ptr();
    kernels().residual_rmsnorm_bwd(a, dy.scalar_type());
    return {dx, df, dscale, dweight};
}

}  // namespace

const Kernels& kernels() { return *in_use().load(); }

}  // namespace mvsplit

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    using namespace mvsplit;
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def("rope_fwd", &rope, release()), m.def("rope_bwd", &rope_bwd, release());
    m.def("qk_norm_fwd", &qk_norm_fwd, release()), m.def("qk_norm_bwd", &qk_norm_bwd, release());
    m.def("rope_qk_norm_fwd", &rope_qk_norm_fwd, release());
    m.def("rope_qk_norm_bwd", &rope_qk_norm_bwd, release());
    m.def("swiglu_fwd", &swiglu_fwd, release()), m.def("swiglu_bwd", &swiglu_bwd, release());
    m.def("mvsplit_rmsnorm_fwd", &mvsplit_rmsnorm_fwd, release());
    m.def("mvsplit_rmsnorm_bwd", &mvsplit_rmsnorm_bwd, release());
    m.def("residual_rmsnorm_fwd", &residual_rmsnorm_fwd, release());
    m.def("residual_rmsnorm_bwd", &residual_rmsnorm_bwd, release());
    m.def("capabilities", &capability_names, "Instruction sets built in that this processor runs.");
    m.def("capability", &capability, "The instruction set in use.");
    m.def("set_capability", &set_capability, "Use another of capabilities(), e.g. to test it.");
}
