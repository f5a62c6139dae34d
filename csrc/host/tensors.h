// Tensors in, pointers out: what the bindings in module.cpp need to call a kernel.
//
// Users' mistakes are told in mvsplit_ops/_check.py; the checks here keep a direct call of a
// backward op inside its tensors.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "cpu/kernels.h"

namespace mvsplit {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

const Kernels& kernels();  // of the instruction set in use

// Accumulator dtype of an activation dtype.
inline c10::ScalarType acc_dtype(const Tensor& t) {
    return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline Tensor empty_acc(const Tensor& like, at::IntArrayRef sizes) {
    return at::empty(sizes, like.options().dtype(acc_dtype(like)));
}

inline Tensor zeros_acc(const Tensor& like, at::IntArrayRef sizes) {
    return at::zeros(sizes, like.options().dtype(acc_dtype(like)));
}

inline void check_shape(const char* name, const Tensor& t, at::IntArrayRef sizes) {
    TORCH_CHECK(t.device().is_cpu() && t.sizes() == sizes, "mvsplit_ops: ", name,
                " must be a CPU tensor ", sizes, ", got ", t.sizes(), " on ", t.device());
}

inline void check_like(const char* name, const Tensor& t, const Tensor& like,
                       at::IntArrayRef sizes) {
    check_shape(name, t, sizes);
    TORCH_CHECK(t.scalar_type() == like.scalar_type(), "mvsplit_ops: ", name, " must be ",
                like.scalar_type(), ", got ", t.scalar_type());
}

// A parameter or statistic as a contiguous accumulator tensor; `keep` owns it while the kernel
// runs.
inline void* acc_data(const char* name, const Tensor& t, at::IntArrayRef sizes,
                      c10::ScalarType dtype, Tensor& keep) {
    check_shape(name, t, sizes);
    keep = t.to(dtype).contiguous();
    return keep.data_ptr();
}

inline void* acc_data(const char* name, const OptTensor& t, at::IntArrayRef sizes,
                      c10::ScalarType dtype, Tensor& keep) {
    return t ? acc_data(name, *t, sizes, dtype, keep) : nullptr;
}

// Stride between rows when dims [0, lead) of t collapse into rows whose elements (dims from lead
// on) are contiguous: a view of a packed projection, or a row expanded over the batch. Else
// nothing.
inline std::optional<int64_t> row_stride(const Tensor& t, int64_t lead) {
    int64_t inner = 1;
    for (int64_t d = t.dim() - 1; d >= lead; --d) {
        if (t.size(d) != 1 && t.stride(d) != inner) return std::nullopt;
        inner *= t.size(d);
    }
    int64_t stride = inner, span = -1;
    for (int64_t d = lead - 1; d >= 0; --d) {
        if (t.size(d) == 1) continue;
        if (span < 0)
            stride = t.stride(d);
        else if (t.stride(d) != span)
            return std::nullopt;
        span = t.stride(d) * t.size(d);
    }
    return stride;
}

// Rows of t; a layout that rows cannot describe is copied once, and `t` then holds the copy.
inline Rows rows(Tensor& t, int64_t lead) {
    auto stride = row_stride(t, lead);
    if (!stride) {
        t = t.contiguous();
        stride = row_stride(t, lead);
    }
    return {t.data_ptr(), *stride};
}

}  // namespace mvsplit
