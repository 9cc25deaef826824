// Registers the launchers as torch operators, torch.ops.dfkd_fast_cuda.
//
// They use torch's stable ABI, so one build works with torch 2.11 and later. Python defines the public operators
// dfkd_fast::op with autograd and fake implementations, allocates their outputs, and calls these operators to fill
// them. Unsupported arguments raise with the launcher's reason.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "launchers.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;
using torch::stable::Tensor;

int dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DFKD_FLOAT32;
    case ScalarType::Half:
      return DFKD_FLOAT16;
    case ScalarType::BFloat16:
      return DFKD_BFLOAT16;
    default:
      STD_TORCH_CHECK(false, "dfkd_fast: expected float32, float16 or bfloat16");
  }
  return -1;
}

// Null for an empty tensor, which stands for a gradient that is not needed.
void* output_ptr(const Tensor& x) { return x.numel() ? x.mutable_data_ptr() : nullptr; }

void require_cuda(const Tensor& x) { STD_TORCH_CHECK(x.is_cuda(), "dfkd_fast: expected a CUDA tensor"); }

void require_same(const Tensor& x, const Tensor& y, const char* name) {
  STD_TORCH_CHECK(x.dim() == y.dim() && x.size(0) == y.size(0) && x.size(1) == y.size(1), "dfkd_fast: ", name,
                  " has another shape");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "dfkd_fast: ", name, " has another dtype");
  STD_TORCH_CHECK(x.get_device() == y.get_device(), "dfkd_fast: ", name, " is on another device");
}

void require_rows(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous(), "dfkd_fast: ", name, " must be a contiguous (N, H W, C)");
}

void* stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &stream));
  return stream;
}

// A scratch buffer on x's device from torch's caching allocator.
Tensor scratch_of(const Tensor& x, int64_t bytes) {
  return torch::stable::new_empty(x, {bytes > 0 ? bytes : 1}, ScalarType::Byte);
}

void check(int status, const char* op) {
  STD_TORCH_CHECK(status != DFKD_INVALID, "dfkd_fast: ", op, ": ", dfkd_unsupported_reason());
  STD_TORCH_CHECK(status == 0, "dfkd_fast: ", op, " failed to launch with CUDA error ", status);
}

int64_t stride_of(const Tensor& x, int64_t dim) { return x.dim() > dim ? x.stride(dim) : 0; }

// ---- contrastive_loss -----------------------------------------------------------------------------------------------

void contrastive_loss(const Tensor& anchors, const Tensor& positives, double temperature, bool symmetric,
                      bool normalize, int64_t reduction, const Tensor& out, const Tensor& saved) {
  require_cuda(anchors);
  require_same(anchors, positives, "positives");
  const DeviceGuard guard(anchors.get_device());
  const int64_t count = anchors.size(0), dim = anchors.size(1);
  const Tensor scratch = scratch_of(anchors, dfkd_contrastive_loss_scratch(count, dim, symmetric));
  check(dfkd_contrastive_loss(anchors.data_ptr(), positives.data_ptr(), count, dim, anchors.stride(0),
                              anchors.stride(1), positives.stride(0), positives.stride(1), dtype_of(anchors),
                              static_cast<float>(temperature), symmetric, normalize, static_cast<int>(reduction),
                              out.mutable_data_ptr<float>(), saved.mutable_data_ptr<float>(), scratch.data_ptr(),
                              stream_of(anchors)),
        "contrastive_loss");
}

void contrastive_loss_backward(const Tensor& grad_output, const Tensor& anchors, const Tensor& positives,
                               const Tensor& saved, double temperature, bool symmetric, bool normalize,
                               int64_t reduction, const Tensor& d_anchors, const Tensor& d_positives) {
  require_cuda(anchors);
  require_same(anchors, positives, "positives");
  const DeviceGuard guard(anchors.get_device());
  const int64_t count = anchors.size(0), dim = anchors.size(1);
  void *to_anchors = output_ptr(d_anchors), *to_positives = output_ptr(d_positives);
  const int64_t bytes =
      dfkd_contrastive_loss_backward_scratch(count, dim, symmetric, to_anchors != nullptr, to_positives != nullptr);
  const Tensor scratch = scratch_of(anchors, bytes);
  check(dfkd_contrastive_loss_backward(
            grad_output.const_data_ptr<float>(), stride_of(grad_output, 0), anchors.data_ptr(), positives.data_ptr(),
            saved.const_data_ptr<float>(), count, dim, anchors.stride(0), anchors.stride(1), positives.stride(0),
            positives.stride(1), dtype_of(anchors), static_cast<float>(temperature), symmetric, normalize,
            static_cast<int>(reduction), to_anchors, to_positives, stride_of(d_anchors, 0), stride_of(d_anchors, 1),
            stride_of(d_positives, 0), stride_of(d_positives, 1), scratch.data_ptr(), stream_of(anchors)),
        "contrastive_loss_backward");
}

// ---- spatial_attention: maps as contiguous (N, H W, C) --------------------------------------------------------------

void spatial_attention(const Tensor& features, const Tensor& hidden, const Tensor& weight, double scale, int64_t form,
                       const Tensor& out, const Tensor& saved) {
  require_cuda(features);
  require_rows(features, "features");
  require_rows(hidden, "hidden");
  require_rows(out, "out");
  const DeviceGuard guard(features.get_device());
  const int64_t samples = features.size(0), positions = features.size(1), channels = features.size(2);
  check(dfkd_spatial_attention(features.data_ptr(), hidden.data_ptr(), weight.data_ptr(), samples, channels,
                               hidden.size(2), positions, dtype_of(features), dtype_of(weight),
                               static_cast<float>(scale), static_cast<int>(form), out.mutable_data_ptr(),
                               output_ptr(saved), stream_of(features)),
        "spatial_attention");
}

void spatial_attention_backward(const Tensor& grad_output, const Tensor& features, const Tensor& hidden,
                                const Tensor& weight, const Tensor& saved, double scale, int64_t form,
                                const Tensor& d_features, const Tensor& d_hidden, const Tensor& d_weight,
                                const Tensor& d_bias) {
  require_cuda(features);
  require_rows(grad_output, "grad_output");
  require_rows(features, "features");
  require_rows(hidden, "hidden");
  const DeviceGuard guard(features.get_device());
  const int64_t samples = features.size(0), positions = features.size(1), channels = features.size(2);
  const int64_t maps = hidden.size(2);
  const int attention_form = static_cast<int>(form);
  const Tensor scratch =
      scratch_of(features, dfkd_spatial_attention_backward_scratch(samples, channels, maps, positions, attention_form));
  check(dfkd_spatial_attention_backward(grad_output.data_ptr(), features.data_ptr(), hidden.data_ptr(),
                                        weight.data_ptr(), saved.data_ptr(), samples, channels, maps, positions,
                                        dtype_of(features), dtype_of(weight), dtype_of(d_bias),
                                        static_cast<float>(scale), attention_form, output_ptr(d_features),
                                        output_ptr(d_hidden), output_ptr(d_weight), output_ptr(d_bias),
                                        scratch.data_ptr(), stream_of(features)),
        "spatial_attention_backward");
}

// ---- high_order_attention: maps as contiguous (N, H W, C) -----------------------------------------------------------

constexpr int kFormBySize = 0;

void high_order_attention(const Tensor& x, const Tensor& proj_weight, const Tensor& out_weight, int64_t mode,
                          int64_t result, const Tensor& y) {
  require_cuda(x);
  require_rows(x, "x");
  require_rows(y, "y");
  const DeviceGuard guard(x.get_device());
  const int64_t positions = x.size(0) * x.size(1), channels = x.size(2);
  const int64_t order = out_weight.size(0), hidden = out_weight.size(2);
  check(dfkd_high_order_attention(x.data_ptr(), proj_weight.data_ptr(), out_weight.data_ptr(), positions, channels,
                                  hidden, order, dtype_of(x), static_cast<int>(mode), static_cast<int>(result),
                                  y.mutable_data_ptr(), stream_of(x)),
        "high_order_attention");
}

void high_order_attention_backward(const Tensor& grad_output, const Tensor& x, const Tensor& proj_weight,
                                   const Tensor& out_weight, int64_t mode, int64_t result, const Tensor& dx,
                                   const Tensor& dproj, const Tensor& dout) {
  require_cuda(x);
  require_rows(grad_output, "grad_output");
  require_rows(x, "x");
  const DeviceGuard guard(x.get_device());
  const int64_t positions = x.size(0) * x.size(1), channels = x.size(2);
  const int64_t order = out_weight.size(0), hidden = out_weight.size(2);
  const int gate_mode = static_cast<int>(mode);
  void *to_x = output_ptr(dx), *to_proj = output_ptr(dproj), *to_out = output_ptr(dout);
  const int64_t bytes =
      dfkd_high_order_attention_backward_scratch(positions, channels, hidden, order, gate_mode, to_x != nullptr,
                                                 to_proj != nullptr, to_out != nullptr, kFormBySize);
  const Tensor scratch = scratch_of(x, bytes);
  check(dfkd_high_order_attention_backward(grad_output.data_ptr(), x.data_ptr(), proj_weight.data_ptr(),
                                           out_weight.data_ptr(), positions, channels, hidden, order, dtype_of(x),
                                           gate_mode, static_cast<int>(result), kFormBySize, to_x, to_proj, to_out,
                                           scratch.data_ptr(), stream_of(x)),
        "high_order_attention_backward");
}

}  // namespace

STABLE_TORCH_LIBRARY(dfkd_fast_cuda, library) {
  library.def(
      "high_order_attention(Tensor x, Tensor proj_weight, Tensor out_weight, int mode, int result, Tensor(a!) y) "
      "-> ()");
  library.def(
      "high_order_attention_backward(Tensor grad_output, Tensor x, Tensor proj_weight, Tensor out_weight, int mode, "
      "int result, Tensor(a!) dx, Tensor(b!) dproj, Tensor(c!) dout) -> ()");
  library.def(
      "contrastive_loss(Tensor anchors, Tensor positives, float temperature, bool symmetric, bool normalize, "
      "int reduction, Tensor(a!) out, Tensor(b!) saved) -> ()");
  library.def(
      "contrastive_loss_backward(Tensor grad_output, Tensor anchors, Tensor positives, Tensor saved, "
      "float temperature, bool symmetric, bool normalize, int reduction, Tensor(a!) d_anchors, Tensor(b!) d_positives) "
      "-> ()");
  library.def(
      "spatial_attention(Tensor features, Tensor hidden, Tensor weight, float scale, int form, Tensor(a!) out, "
      "Tensor(b!) saved) -> ()");
  library.def(
      "spatial_attention_backward(Tensor grad_output, Tensor features, Tensor hidden, Tensor weight, Tensor saved, "
      "float scale, int form, Tensor(a!) d_features, Tensor(b!) d_hidden, Tensor(c!) d_weight, Tensor(d!) d_bias) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dfkd_fast_cuda, CUDA, library) {
  library.impl("high_order_attention", TORCH_BOX(&high_order_attention));
  library.impl("high_order_attention_backward", TORCH_BOX(&high_order_attention_backward));
  library.impl("contrastive_loss", TORCH_BOX(&contrastive_loss));
  library.impl("contrastive_loss_backward", TORCH_BOX(&contrastive_loss_backward));
  library.impl("spatial_attention", TORCH_BOX(&spatial_attention));
  library.impl("spatial_attention_backward", TORCH_BOX(&spatial_attention_backward));
}
