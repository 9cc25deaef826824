/* The CUDA kernels of dfkd_fast, for devices of compute capability 9.0, callable from any language: raw pointers,
 * sizes, a stream.
 *
 * Pointers are to device memory, aligned to 16 bytes, of contiguous tensors unless strides are arguments; nothing is
 * allocated, and nothing waits. Each function returns a cudaError_t: 0, or why nothing was launched. The formulas are
 * those of dfkd_fast.ops, whose docstrings define them.
 *
 * A launcher serves only some sizes and options, listed at each. For others it returns DFKD_INVALID, and dfkd_unsupported_reason()
 * names the argument and its limit; the functions that return bytes of scratch then return 0.
 */
#pragma once

#include <stdint.h>

#define DFKD_INVALID 1 /* cudaErrorInvalidValue */

enum dfkd_dtype { DFKD_FLOAT32 = 0, DFKD_FLOAT16 = 1, DFKD_BFLOAT16 = 2 };

#ifdef __cplusplus
extern "C" {
#endif

/* Why the last call on this thread that returned DFKD_INVALID did so. */
const char* dfkd_unsupported_reason(void);
/* For a launcher: records the reason, formatted as by printf, and returns DFKD_INVALID. */
#ifdef __GNUC__
__attribute__((format(printf, 1, 2)))
#endif
int dfkd_unsupported(const char* format, ...);

/* ---- contrastive_loss: NT-Xent over 2N vectors of D elements, float16 or bfloat16 -------------------------------
 *
 * anchors, positives (N, D): any strides, in elements, and no alignment but to the type; fastest with rows of whole
 * aligned pieces of 16 bytes. reduction is a dfkd_reduction. out: a scalar, or (A,) for DFKD_NONE; saved (A,): L, for
 * backward; A = N, or 2N where symmetric. scratch: dfkd_contrastive_loss_scratch bytes.
 * Serves N from 129 to 2^23, D up to 128, normalize other than 0, and log2(e) / temperature <= 48 (temperatures from
 * 0.0300562 on). */
enum dfkd_reduction { DFKD_MEAN = 0, DFKD_SUM = 1, DFKD_NONE = 2 };
int64_t dfkd_contrastive_loss_scratch(int64_t count, int64_t dim, int symmetric);
int dfkd_contrastive_loss(const void* anchors, const void* positives, int64_t count, int64_t dim, int64_t anchors_row,
                          int64_t anchors_column, int64_t positives_row, int64_t positives_column, int dtype,
                          float temperature, int symmetric, int normalize, int reduction, float* out, float* saved,
                          void* scratch, void* stream);
/* grad_output: of out, with grad_output_row between its elements where it has more than one. d_anchors, d_positives (N, D):
 * in the dtype, any strides; null where no gradient is needed. */
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
 * features, out, grad_output, d_features (samples, positions, channels) and hidden, d_hidden (samples, positions, maps),
 * all contiguous: channels-last maps; dtype is theirs, float16 or bfloat16. weight (channels, maps) may have another
 * type; a bias cancels. form: 0 spatial, 1 spatial_mean1 (2, channel, is not served). saved (2, samples, channels)
 * float32: maxima and sums of exponentials.
 * Serves channels up to 256 and maps up to 64, both multiples of 8. Backward is a cooperative launch of 132 blocks. */
int dfkd_spatial_attention(const void* features, const void* hidden, const void* weight, int64_t samples,
                           int64_t channels, int64_t maps, int64_t positions, int dtype, int weight_dtype, float scale,
                           int form, void* out, void* saved, void* stream);
/* Its gradients; null for those not needed. d_weight has the type of weight, d_bias that of bias and is zero. scratch:
 * as many bytes as the function of that name says. */
int64_t dfkd_spatial_attention_backward_scratch(int64_t samples, int64_t channels, int64_t maps, int64_t positions,
                                                int form);
int dfkd_spatial_attention_backward(const void* grad_output, const void* features, const void* hidden, const void* weight,
                                    const void* saved, int64_t samples, int64_t channels, int64_t maps,
                                    int64_t positions, int dtype, int weight_dtype, int bias_dtype, float scale,
                                    int form, void* d_features, void* d_hidden, void* d_weight, void* d_bias,
                                    void* scratch, void* stream);

/* ---- high_order_attention ---------------------------------------------------------------------------------------
 *
 * x, y, grad_output, dx (positions, channels) contiguous: channels-last maps, positions = N H W; proj_weight, dproj
 * (order (order + 1) / 2, hidden, channels), out_weight, dout (order, channels, hidden), contiguous. All of them are of
 * one dtype, float16 or bfloat16. mode: 0 joint, 1 per_order. result: 0 features, 1 the map.
 * Serves order up to 3, up to 2^30 positions, channels up to 512 and hidden up to 128, both multiples of 8. */
int dfkd_high_order_attention(const void* x, const void* proj_weight, const void* out_weight, int64_t positions,
                              int64_t channels, int64_t hidden, int64_t order, int dtype, int mode, int result,
                              void* y, void* stream);
/* grad_output: the gradient of y, or of the map. dx, dproj, dout: null for those not needed. No positions: dproj and dout
 * are filled with zeros. form: 0 as the sizes suggest; 1 everything in one pass, joint with channels <= 128 and
 * hidden <= 32 only; 2 the chain of products, through memory; 3 that in taller tiles, joint with channels > 128 or
 * hidden > 32 only. scratch: as many bytes as the function of that name says. */
int64_t dfkd_high_order_attention_backward_scratch(int64_t positions, int64_t channels, int64_t hidden, int64_t order,
                                                   int mode, int needs_grad_x, int needs_grad_proj, int needs_grad_out, int form);
int dfkd_high_order_attention_backward(const void* grad_output, const void* x, const void* proj_weight,
                                       const void* out_weight, int64_t positions, int64_t channels, int64_t hidden,
                                       int64_t order, int dtype, int mode, int result, int form, void* dx, void* dproj,
                                       void* dout, void* scratch, void* stream);

/* ---- what would be launched -------------------------------------------------------------------------------------
 *
 * While a record is set on the calling thread, every function above writes down what it would launch, and launches
 * nothing: its pointers need not be valid, but null or aligned as they would be. Neither a device nor a driver is
 * needed. null ends a record. */
typedef struct dfkd_launch {
  const void* kernel; /* as cudaFuncGetAttributes takes it, of the runtime that is linked here */
  uint32_t grid[3], block[3];
  int64_t shared;      /* dynamic, bytes */
  int32_t cluster;     /* blocks along x, 1 for none */
  int32_t cooperative; /* 0 or 1 */
} dfkd_launch;
void dfkd_record(dfkd_launch* to, int64_t capacity);
/* How many launches since then, which may be more than capacity; -1 without a record. */
int64_t dfkd_recorded(void);
/* For a launcher: 0 without a record, else 1, and the launch is in it. */
int dfkd_record_launch(const dfkd_launch* launch);
/* The kernel's name as the compiler mangled it; null for another address. */
const char* dfkd_kernel_name(const void* kernel);
/* Writes the names of all kernels, as mangled, as far as capacity goes; returns how many there are. */
int64_t dfkd_kernel_names(const char** to, int64_t capacity);
/* What a launch takes of the current device; blocks and clusters are those that run at the same time on one
 * multiprocessor, and on all of them. Returns a cudaError_t. */
typedef struct dfkd_resources {
  int32_t registers;
  int64_t static_shared, local; /* bytes: a block's, a thread's */
  int32_t blocks_per_multiprocessor, active_clusters;
  int32_t threads_per_multiprocessor, multiprocessors; /* of the device */
} dfkd_resources;
int dfkd_resources_of(const dfkd_launch* launch, dfkd_resources* to);

#ifdef __cplusplus
}
#endif
