// Conversion of tensors into the pointers and strides that a CPU kernel takes.
//
// mvsplit_ops/_check.py reports wrong arguments to users. The checks here only guarantee memory
// safety: a direct call of a backward op cannot access memory outside its tensors.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "cpu/kernels.h"

namespace mvsplit {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// Return the dtype of sums and statistics of an activation.
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
                " must be a CPU tensor of shape ", sizes, ", got shape ", t.sizes(), " on ",
                t.device());
}

inline void check_like(const char* name, const Tensor& t, const Tensor& like,
                       at::IntArrayRef sizes) {
    check_shape(name, t, sizes);
    TORCH_CHECK(t.scalar_type() == like.scalar_type(), "mvsplit_ops: ", name, " must be ",
                like.scalar_type(), " as the other activations, got ", t.scalar_type());
}

// Return the data of a parameter or statistic, contiguous and in the accumulator dtype. `owner`
// receives the tensor that holds them and must outlive the kernel.
inline void* acc_data(const char* name, const Tensor& t, at::IntArrayRef sizes,
                      c10::ScalarType dtype, Tensor& owner) {
    check_shape(name, t, sizes);
    owner = t.to(dtype).contiguous();
    return owner.data_ptr();
}

inline void* acc_data(const char* name, const OptTensor& t, at::IntArrayRef sizes,
                      c10::ScalarType dtype, Tensor& owner) {
    return t ? acc_data(name, *t, sizes, dtype, owner) : nullptr;
}

// Return the stride between rows if dims [0, lead) of t collapse into one dim of rows and the
// elements of a row (the dims from `lead` on) are contiguous; otherwise nothing. A view of a packed
// projection and a row expanded over the batch have such a stride.
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

// Return the rows of t. If its layout has no constant row stride, `t` is replaced by a contiguous
// copy.
inline Rows rows(Tensor& t, int64_t lead) {
    auto stride = row_stride(t, lead);
    if (!stride) {
        t = t.contiguous();
        stride = row_stride(t, lead);
    }
    return {t.data_ptr(), *stride};
}

// Return the rows that begin `offset` elements after those of t.
inline Rows shifted(const Rows& rows, const Tensor& t, int64_t offset) {
    return {static_cast<char*>(rows.data) + offset * t.element_size(), rows.stride};
}

}  // namespace mvsplit
