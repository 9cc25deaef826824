/* C API of dfkd_fast's CUDA kernels for devices of compute capability 9.0. The formulas are those of dfkd_fast.ops.
 *
 * Pointers are device pointers aligned to 16 bytes. Tensors are contiguous unless strides are arguments. The functions
 * allocate nothing, do not synchronize, and return a cudaError_t.
 *
 * Each launcher lists the sizes and options that it supports. For others it returns DFKD_INVALID, and
 * dfkd_unsupported_reason() names the argument and its limit. The scratch functions return 0 bytes for them.
 */
#pragma once

#include <stdint.h>

#define DFKD_INVALID 1 /* cudaErrorInvalidValue */

enum dfkd_dtype { DFKD_FLOAT32 = 0, DFKD_FLOAT16 = 1, DFKD_BFLOAT16 = 2 };

#ifdef __cplusplus
extern "C" {
#endif

/* The reason for the last DFKD_INVALID on this thread. */
const char* dfkd_unsupported_reason(void);
/* Used by launchers: sets the reason (printf format) and returns DFKD_INVALID. */
#ifdef __GNUC__
__attribute__((format(printf, 1, 2)))
#endif
int dfkd_unsupported(const char* format, ...);

/* ---- contrastive_loss: NT-Xent over 2N vectors of D elements, float16 or bfloat16 -------------------------------
 *
 * anchors, positives (N, D): any strides, in elements, aligned to the dtype; fastest if rows are contiguous and aligned
 * to 16 bytes. reduction: a dfkd_reduction. out: a scalar, or (A,) for DFKD_NONE. saved (A,): base-2 logsumexp of each
 * anchor, for backward. A = N, or 2N if symmetric. scratch: dfkd_contrastive_loss_scratch() bytes.
 * Supports N from 129 to 2^23, D up to 128, normalize != 0, and log2(e) / temperature <= 48 (temperature >= 0.0300562).
 */
enum dfkd_reduction { DFKD_MEAN = 0, DFKD_SUM = 1, DFKD_NONE = 2 };
int64_t dfkd_contrastive_loss_scratch(int64_t count, int64_t dim, int symmetric);
int dfkd_contrastive_loss(const void* anchors, const void* positives, int64_t count, int64_t dim, int64_t anchors_row,
                          int64_t anchors_column, int64_t positives_row, int64_t positives_column, int dtype,
                          float temperature, int symmetric, int normalize, int reduction, float* out, float* saved,
                          void* scratch, void* stream);
/* grad_output: gradient of out, with stride grad_output_row if out is (A,). d_anchors, d_positives (N, D): any strides;
 * null if no gradient is needed. */
int64_t dfkd_contrastive_loss_backward_scratch(int64_t count, int64_t dim, int symmetric, int needs_grad_anchors,
                                               int needs_grad_positives);
int dfkd_contrastive_loss_backward(const float* grad_output, int64_t grad_output_row, const void* anchors,
                                   const void* positives, const float* saved, int64_t count, int64_t dim,
                                   int64_t anchors_row, int64_t anchors_column, int64_t positives_row,
                                   int64_t positives_column, int dtype, float temperature, int symmetric, int normalize,
                                   int reduction, void* d_anchors, void* d_positives, int64_t d_anchors_row,
                                   int64_t d_anchors_column, int64_t d_positives_row, int64_t d_positives_column,
                                   void* scratch, void* stream);

/* ---- spatial_attention ------------------------------------------------------------------------------------------
 *
 * features, out, grad_output, d_features (samples, positions, channels) and hidden, d_hidden (samples, positions,
 * maps): contiguous, which is channels-last, of one dtype, float16 or bfloat16. weight (channels, maps) may have
 * another dtype; the bias cancels in the softmax. form: 0 spatial, 1 spatial_mean1 (2, channel, is not supported).
 * saved (2, samples, channels) float32: row_max and row_sum of the softmax.
 * Supports channels up to 256, maps up to 64, multiples of 8. Backward is a cooperative launch of up to 132 blocks. */
int dfkd_spatial_attention(const void* features, const void* hidden, const void* weight, int64_t samples,
                           int64_t channels, int64_t maps, int64_t positions, int dtype, int weight_dtype, float scale,
                           int form, void* out, void* saved, void* stream);
/* Gradients that are not needed are null. d_weight has the dtype of weight; d_bias is zero. */
int64_t dfkd_spatial_attention_backward_scratch(int64_t samples, int64_t channels, int64_t maps, int64_t positions,
                                                int form);
int dfkd_spatial_attention_backward(const void* grad_output, const void* features, const void* hidden,
                                    const void* weight, const void* saved, int64_t samples, int64_t channels,
                                    int64_t maps, int64_t positions, int dtype, int weight_dtype, int bias_dtype,
                                    float scale, int form, void* d_features, void* d_hidden, void* d_weight,
                                    void* d_bias, void* scratch, void* stream);

/* ---- high_order_attention ---------------------------------------------------------------------------------------
 *
 * x, y, grad_output, dx (positions, channels): channels-last maps with positions = N H W. proj_weight, dproj
 * (order (order + 1) / 2, hidden, channels); out_weight, dout (order, channels, hidden). All contiguous and of one
 * dtype, float16 or bfloat16. mode: 0 joint, 1 per_order. result: 0 features, 1 the attention map.
 * Supports order up to 3, up to 2^30 positions, channels up to 512 and hidden up to 128, both multiples of 8. */
int dfkd_high_order_attention(const void* x, const void* proj_weight, const void* out_weight, int64_t positions,
                              int64_t channels, int64_t hidden, int64_t order, int dtype, int mode, int result,
                              void* y, void* stream);
/* dx, dproj, dout: null if not needed. Without positions, dproj and dout are zero. form: 0 selected by size; 1 one pass
 * (joint, channels <= 128 and hidden <= 32); 2 intermediate gradients go through memory; 3 the same in taller tiles
 * (joint, channels > 128 or hidden > 32). */
int64_t dfkd_high_order_attention_backward_scratch(int64_t positions, int64_t channels, int64_t hidden, int64_t order,
                                                   int mode, int needs_grad_x, int needs_grad_proj,
                                                   int needs_grad_out, int form);
int dfkd_high_order_attention_backward(const void* grad_output, const void* x, const void* proj_weight,
                                       const void* out_weight, int64_t positions, int64_t channels, int64_t hidden,
                                       int64_t order, int dtype, int mode, int result, int form, void* dx, void* dproj,
                                       void* dout, void* scratch, void* stream);

/* ---- recording launches -----------------------------------------------------------------------------------------
 *
 * Between dfkd_record(launches, capacity) and dfkd_record(NULL, 0), the functions above record their launches on this
 * thread and execute nothing. Pointers are checked only for null and alignment. No device or driver is needed. */
typedef struct dfkd_launch {
  const void* kernel; /* for cudaFuncGetAttributes of the runtime that is linked into this library */
  uint32_t grid[3], block[3];
  int64_t shared;      /* dynamic shared memory, bytes */
  int32_t cluster;     /* blocks along x; 1 without clusters */
  int32_t cooperative; /* 0 or 1 */
} dfkd_launch;
void dfkd_record(dfkd_launch* to, int64_t capacity);
/* The number of launches since dfkd_record, which may exceed the capacity; -1 if not recording. */
int64_t dfkd_recorded(void);
/* Used by launchers: returns 0 if not recording, otherwise records the launch and returns 1. */
int dfkd_record_launch(const dfkd_launch* launch);
/* The mangled name of a kernel; null for another address. */
const char* dfkd_kernel_name(const void* kernel);
/* Writes up to `capacity` mangled names and returns the number of kernels. */
int64_t dfkd_kernel_names(const char** to, int64_t capacity);
/* The resources of a launch on the current device. Returns a cudaError_t. */
typedef struct dfkd_resources {
  int32_t registers;
  int64_t static_shared, local; /* bytes per block, bytes per thread */
  int32_t blocks_per_multiprocessor, active_clusters; /* concurrent ones: per SM, on the device */
  int32_t threads_per_multiprocessor, multiprocessors; /* of the device */
} dfkd_resources;
int dfkd_resources_of(const dfkd_launch* launch, dfkd_resources* to);

#ifdef __cplusplus
}
#endif
