/* The CUDA kernels of dfkd_fast, to be launched from any language: raw pointers, sizes, a stream.
 *
 * Pointers are to device memory, aligned to 16 bytes, of contiguous tensors unless strides are arguments; nothing is
 * allocated, and nothing waits. Each function returns a cudaError_t: 0, or why nothing was launched. The formulas are
 * those of dfkd_fast.ops, whose docstrings define them.
 */
#pragma once

#include <stdint.h>

#define DFKD_INVALID 1 /* cudaErrorInvalidValue */

enum dfkd_dtype { DFKD_FLOAT32 = 0, DFKD_FLOAT16 = 1, DFKD_BFLOAT16 = 2 };

#ifdef __cplusplus
extern "C" {
#endif

#ifdef __cplusplus
}
#endif
