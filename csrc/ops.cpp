// The kernels as operators of torch, in a library of their own: torch.ops.dfkd_fast_cuda.
//
// On torch's stable ABI, so that one build serves torch 2.11 and later. Python keeps defining dfkd_fast::op with its
// autograd and fake implementations; its launch functions call these, which fill results that were allocated there.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "launchers.h"

namespace {

using torch::headeronly::ScalarType;
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
      STD_TORCH_CHECK(false, "dfkd_fast: float32, float16 or bfloat16 is needed");
  }
  return -1;
}

// Of a result that is not wanted, which has no elements, there is no pointer.
void* result(const Tensor& x) { return x.numel() ? x.mutable_data_ptr() : nullptr; }
const void* optional(const std::optional<Tensor>& x) { return x.has_value() ? x->data_ptr() : nullptr; }

void require_cuda(const Tensor& x) { STD_TORCH_CHECK(x.is_cuda(), "dfkd_fast: a CUDA tensor is needed"); }

void* stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &stream));
  return stream;
}

// Bytes of x's device that live until the caller's stream is done with them, as every tensor's do.
Tensor scratch_of(const Tensor& x, int64_t bytes) {
  return torch::stable::new_empty(x, {bytes > 0 ? bytes : 1}, ScalarType::Byte);
}

void check(int status, const char* op) {
  STD_TORCH_CHECK(status != DFKD_INVALID, "dfkd_fast: ", op, " does not support these arguments");
  STD_TORCH_CHECK(status == 0, "dfkd_fast: ", op, " was not launched, CUDA error ", status);
}

}  // namespace
