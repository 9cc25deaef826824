// Shared by the forward and backward of contrastive_loss: supported sizes, the preprocessing of vectors, and the
// pipeline that feeds the tensor cores.
//
// The kernels are warp specialized: one producer warpgroup, of which one thread issues TMA loads, and two consumer
// warpgroups that issue wgmma. preprocess() writes the scaled vectors to scratch. TMA loads them in tiles of 128
// vectors, as swizzled boxes of 64 elements of each, through a multi-stage mbarrier pipeline. The rows of a block come
// through the same pipeline, and the consumers copy them from shared memory to registers.
#pragma once

#include "sm90.h"

namespace dfkd::contrastive {

constexpr int kTile = 128;  // vectors per tile, of rows and of columns
constexpr int kBoxBytes = kTile * 64 * 2;
constexpr int kStatBytes = kTile * 4;  // one float32 statistic per vector of a tile
constexpr int kNumThreads = 3 * kWarpgroupSize;
constexpr int kProducerRegs = 24, kConsumerRegs = 240;

#ifdef DFKD_HOST
// Set by tests, to split the work differently and to support small N.
inline int num_sms = 132;
inline int64_t min_count = 129, l2_bytes = int64_t{20} << 20;
#else
constexpr int num_sms = 132;       // of an H200; a constant, because the scratch size must not depend on the device
constexpr int64_t min_count = 129;  // Triton computes smaller N
constexpr int64_t l2_bytes = int64_t{20} << 20;  // vectors of this size stay in both partitions of the L2 cache
#endif

constexpr double kLog2OfE = 1.4426950408889634;
// Backward scales its weights by this: in float16, those of a million vectors stay normal, and a weight of 2 finite.
constexpr float kWeightScale = 16384.0f;
// With |s| up to this bound, sums of 2^s neither overflow nor underflow float32 for any number of vectors.
constexpr double kMaxLogit = 48.0;

__device__ __forceinline__ float infinity() { return std::bit_cast<float>(0x7f800000u); }
__device__ __forceinline__ float max_nan(float a, float b) { return b > a || b != b ? b : a; }  // propagates NaN

struct alignas(8) Float2 {
  float x, y;
};
template <typename T>
struct alignas(4 * sizeof(T)) Vec4 {
  T x[4];
};
template <typename T>
struct alignas(16) Vec8 {
  T x[8];
};

// floor(log2(x)) for x > 0, and 0 for x = 0.
__device__ __forceinline__ int floor_log2(float x) {
  const bool denormal = x < 1.1754943508222875e-38f;
  const int bits = static_cast<int>(std::bit_cast<uint32_t>(denormal ? x * 16777216.0f : x));
  return x == 0.0f ? 0 : (bits >> 23) - (denormal ? 151 : 127);
}
__device__ __forceinline__ float power_of_two(int k) {
  return std::bit_cast<float>(static_cast<uint32_t>(k + 127) << 23);
}
// x 2^k in two steps, because 2^k may exceed float32.
__device__ __forceinline__ float scale_by_power_of_two(float x, int k) {
  return x * power_of_two(k >> 1) * power_of_two(k - (k >> 1));
}

// Reductions over groups of adjacent lanes. The group size is a power of two.
__device__ __forceinline__ float group_sum(float x, int group) {
  for (int distance = group / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kFullMask, x, distance);
  return x;
}
__device__ __forceinline__ float group_max(float x, int group) {
  for (int distance = group / 2; distance > 0; distance /= 2) x = max_nan(x, __shfl_xor_sync(kFullMask, x, distance));
  return x;
}

// ---- the vectors: the rows of anchors (side 0), then those of positives (side 1) ------------------------------------

// Two strided tensors (N, D): vectors or their gradients. A null pointer stands for a gradient that is not needed.
template <typename T>
struct TensorPair {
  T* data[2];
  int64_t row_stride[2], column_stride[2];
  int count, dim;
  bool vectorized;  // rows consist of aligned chunks of 16 bytes

  __device__ __forceinline__ T* at(int row, int column) const {
    const bool second = row >= count;
    T* base = second ? data[1] : data[0];
    if (base == nullptr) return nullptr;
    return base + (second ? row - count : row) * (second ? row_stride[1] : row_stride[0]) + column * step(row);
  }
  // The distance between elements of a row. Indexing by a variable would copy the struct to the stack.
  __device__ __forceinline__ int64_t step(int row) const { return row < count ? column_stride[0] : column_stride[1]; }
};

template <typename T>
TensorPair<T> make_pair(T* anchors, T* positives, int64_t anchors_row, int64_t anchors_column, int64_t positives_row,
                        int64_t positives_column, int64_t count, int64_t dim) {
  const auto vectorized = [dim](const void* data, int64_t row, int64_t column) {
    return data == nullptr ||
           (reinterpret_cast<uintptr_t>(data) % 16 == 0 && column == 1 && row % 8 == 0 && dim % 8 == 0);
  };
  return {{anchors, positives},
          {anchors_row, positives_row},
          {anchors_column, positives_column},
          static_cast<int>(count),
          static_cast<int>(dim),
          vectorized(anchors, anchors_row, anchors_column) && vectorized(positives, positives_row, positives_column)};
}

// Elements column to column + 7 of a row, zero outside of the tensor.
template <typename T>
__device__ __forceinline__ Vec8<T> load_vec8(const TensorPair<const T>& input, int row, int column) {
  Vec8<T> v;
#pragma unroll
  for (int e = 0; e < 8; ++e) v.x[e] = T{0};
  if (row >= 2 * input.count || column >= input.dim) return v;
  const T* pointer = input.at(row, column);
  if (input.vectorized) return *reinterpret_cast<const Vec8<T>*>(pointer);
  const int64_t stride = input.step(row);
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (column + e < input.dim) v.x[e] = pointer[e * stride];
  }
  return v;
}

// Returns y = 2^k v, and adds |y|^2 to `square`.
template <typename T>
__device__ __forceinline__ Vec8<T> scale_vec8(Vec8<T> v, int k, float& square) {
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const float y = scale_by_power_of_two(to_float(v.x[e]), k);
    square += y * y;
    v.x[e] = from_float<T>(y);
  }
  return v;
}
template <typename T>
__device__ __forceinline__ float amax_vec8(const Vec8<T>& v, float amax) {
#pragma unroll
  for (int e = 0; e < 8; ++e) amax = max_nan(amax, fabsf(to_float(v.x[e])));
  return amax;
}

// Whether [a, a + a_length) and [b, b + b_length) overlap.
__device__ __forceinline__ bool overlaps(int a, int a_length, int b, int b_length) {
  return a < b + b_length && b < a + a_length;
}

// ---- reductions over a block, called by all of its threads ----------------------------------------------------------

// Thread 0 gets the sum.
__device__ __forceinline__ float block_sum(float x) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarpSize;
  x = warp_sum(x);
  if (thread % kWarpSize == 0) shared[thread / kWarpSize] = x;
  __syncthreads();
  return warp_sum(thread < warps ? shared[thread] : 0.0f);
}

// Every thread gets the largest absolute value.
__device__ __forceinline__ float block_amax(const float* values, int64_t stride, int count) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  float amax = 0.0f;
  for (int i = thread; i < count; i += threads) amax = max_nan(amax, fabsf(values[i * stride]));
  amax = warp_max(amax);
  if (thread % kWarpSize == 0) shared[thread / kWarpSize] = amax;
  __syncthreads();
  return warp_max(thread % kWarpSize < threads / kWarpSize ? shared[thread % kWarpSize] : 0.0f);
}

// ---- preprocessing --------------------------------------------------------------------------------------------------

// Row statistics, each an array of `padded_rows`, in the notation of the .cu files: r, and for backward k, g, L, g 2^-L
// and g 2^-L r. g is divided by its amax (1 for a scalar loss). The last two are multiplied by kWeightScale.
enum RowStat { kInverseNorm, kExponent, kGrad, kLse, kGradExp, kScaledGradExp, kNumRowStats };

// Writes the scaled vectors y (padded_rows, padded_dim) and row_stats (kNumRowStats, padded_rows). Each row is computed
// by a group of lanes; rows beyond the last vector are zero. It is static because both .cu files define it.
template <typename T>
static __global__ void __launch_bounds__(256)
    preprocess(TensorPair<const T> input, T* vectors, float* row_stats, const float* saved_lse,
               const float* grad_output, int64_t grad_output_stride, const float* grad_amax, int anchors,
               int padded_dim, int64_t padded_rows, int group, int elementwise) {
  const int row = static_cast<int>((blockIdx.x * int64_t{256} + threadIdx.x) / group);
  const int lane = static_cast<int>(threadIdx.x) % group;
  const bool valid = row < padded_rows;
  T* y = vectors + static_cast<int64_t>(valid ? row : 0) * padded_dim;
  float amax = 0.0f, square = 0.0f;
  if (valid) {
    for (int column = 8 * lane; column < padded_dim; column += 8 * group) {
      amax = amax_vec8(load_vec8(input, row, column), amax);
    }
  }
  amax = group_max(amax, group);
  const int k = -floor_log2(amax);
  if (valid) {
    for (int column = 8 * lane; column < padded_dim; column += 8 * group) {
      *reinterpret_cast<Vec8<T>*>(y + column) = scale_vec8(load_vec8(input, row, column), k, square);
    }
  }
  square = group_sum(square, group);
  if (!valid || lane != 0) return;
  const float inverse_norm = amax == 0.0f ? 0.0f : 1.0f / sqrtf(square);
  row_stats[kInverseNorm * padded_rows + row] = inverse_norm;
  if (saved_lse == nullptr) return;
  const float grad_scale = elementwise ? *grad_amax : 1.0f;
  float grad = 0.0f;
  if (row < anchors && grad_scale != 0.0f) {
    grad = elementwise ? grad_output[row * grad_output_stride] / grad_scale : 1.0f;
  }
  const float lse = row < anchors ? saved_lse[row] : infinity(), grad_exp = grad * exp2_approx_ftz(-lse);
  row_stats[kExponent * padded_rows + row] = static_cast<float>(k);
  row_stats[kGrad * padded_rows + row] = grad;
  row_stats[kLse * padded_rows + row] = lse;
  row_stats[kGradExp * padded_rows + row] = grad_exp * kWeightScale;
  row_stats[kScaledGradExp * padded_rows + row] = grad_exp * (inverse_norm * kWeightScale);
}

// ---- launch configuration -------------------------------------------------------------------------------------------

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Sizes, and byte offsets in scratch. The scaled vectors come first; `extra` holds the other buffers of each pass.
struct Config {
  int64_t anchors, padded_rows, padded_dim;  // padded_dim is 64 or 128
  int64_t splits;                            // partial results per row
  int64_t stats_offset, partials_offset, extra_offset, bytes;
};

inline Config base_config(int64_t count, int64_t dim, int symmetric) {
  Config config{};
  config.anchors = symmetric ? 2 * count : count;
  config.padded_rows = round_up(2 * count + 256, 64);  // a block of up to 256 rows may start at row 2 N - 1
  config.padded_dim = dim <= 64 ? 64 : 128;
  config.stats_offset = config.padded_rows * config.padded_dim * 2;
  return config;
}

template <typename T>
int launch_preprocess(const Config& config, const TensorPair<const T>& input, void* scratch, const float* saved_lse,
                      const float* grad_output, int64_t grad_output_stride, const float* grad_amax, bool elementwise,
                      void* stream) {
  int group = 8;
  while (group < kWarpSize && 8 * group < config.padded_dim) group *= 2;
  unsigned char* memory = static_cast<unsigned char*>(scratch);
  return launch(preprocess<T>, static_cast<unsigned>(divide_up(config.padded_rows * group, 256)), 256, 0, stream, input,
                reinterpret_cast<T*>(memory), reinterpret_cast<float*>(memory + config.stats_offset), saved_lse,
                grad_output, grad_output_stride, grad_amax, config.anchors, config.padded_dim, config.padded_rows,
                group, elementwise);
}

constexpr int64_t kMaxCount = int64_t{1} << 23;  // the tiles of a block are counted in 32 bits

// Returns 0 for supported arguments, otherwise DFKD_INVALID with the reason.
inline int require_sizes(int64_t count, int64_t dim) {
  const int status = require_size("N of anchors (N, D)", count, min_count, kMaxCount);
  return status ? status : require_size("D of anchors (N, D)", dim, 1, 128);
}
inline int require_options(double temperature, int normalize) {
  if (!normalize) return dfkd_unsupported("normalize is False; the kernel supports True");
  if (temperature > 0 && kLog2OfE / temperature <= kMaxLogit) return 0;
  return dfkd_unsupported("temperature is %g; the kernel supports %.7g and more", temperature, kLog2OfE / kMaxLogit);
}

// ---- the pipeline ---------------------------------------------------------------------------------------------------

// A producer's or consumer's state of the pipeline. A stage holds a tile of vectors in DIM / 64 boxes, NUM_STATS row
// statistics of each vector, and a full and an empty barrier.
template <int DIM, int NUM_STATS>
struct Pipeline : PipelineState {
  static constexpr int kStages = DIM == 128 ? 6 : 8;
  static constexpr int kTileBytes = DIM / 64 * kBoxBytes;
  static constexpr int kBytes = kStages * (kTileBytes + NUM_STATS * kStatBytes + 2 * static_cast<int>(sizeof(Barrier)));

  __device__ __forceinline__ int offset() const { return index * kTileBytes; }
  __device__ __forceinline__ unsigned char* tile() const { return shared_memory() + offset(); }
  __device__ __forceinline__ float* stats() const {
    return reinterpret_cast<float*>(shared_memory() + kStages * kTileBytes + index * NUM_STATS * kStatBytes);
  }
  __device__ __forceinline__ Barrier* full() const {
    return reinterpret_cast<Barrier*>(shared_memory() + kStages * (kTileBytes + NUM_STATS * kStatBytes)) + index;
  }
  __device__ __forceinline__ Barrier* empty() const { return full() + kStages; }

  __device__ __forceinline__ void advance() { PipelineState::advance(kStages); }

  // Called by all threads of the block, once.
  __device__ __forceinline__ void init() const {
    if (threadIdx.x == 0) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        mbarrier_init(full() + stage, 1);
        mbarrier_init(empty() + stage, 2 * kWarpgroupSize / kWarpSize);
      }
      fence_barrier_init();
    }
    __syncthreads();
  }

  // Called by the producer thread: loads the tile that begins at `row`, with or without row statistics.
  __device__ __forceinline__ void load(const TensorMap& map, int row, const float* const (&stat_arrays)[NUM_STATS]) {
    acquire_and_load(map, row, NUM_STATS * kStatBytes);
#pragma unroll
    for (int i = 0; i < NUM_STATS; ++i) {
      cp_async_bulk(stats() + i * kTile, stat_arrays[i] + row, kStatBytes, full());
    }
    advance();
  }
  __device__ __forceinline__ void load(const TensorMap& map, int row) {
    acquire_and_load(map, row, 0);
    advance();
  }
  __device__ __forceinline__ void acquire_and_load(const TensorMap& map, int row, int stat_bytes) const {
    mbarrier_wait(empty(), phase ^ 1);
    mbarrier_arrive_expect_tx(full(), kTileBytes + stat_bytes);
#pragma unroll
    for (int box = 0; box < DIM / 64; ++box) {
      tma_load(tile() + box * kBoxBytes, map, 64 * box, row, 0, full());
    }
  }

  // Called by the consumer warpgroups.
  __device__ __forceinline__ void consumer_wait() const { mbarrier_wait(full(), phase); }
  __device__ __forceinline__ void consumer_release() const {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) mbarrier_arrive(empty());
  }
};

// Copies a warp's 16 rows, from `row` on, to the register operand of wgmma. `tile` is a byte offset in shared memory.
template <int DIM>
__device__ __forceinline__ void load_row_fragment(uint32_t (&fragment)[DIM / 16][4], int tile, int row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  // XOR with 32 k moves the swizzled offset by 2 k chunks of 16 bytes.
  const int first = tile + 2 * swizzle_offset<64>(row + lane % 16, lane / 16);
#pragma unroll
  for (int k = 0; k < DIM / 16; ++k) {
    ldmatrix(fragment[k], shared_memory() + (first ^ (k % 4 * 32)) + k / 4 * kBoxBytes);
  }
}

// Issues acc_s = rows x (vectors of the tile)^T.
template <typename T, int DIM>
__device__ __forceinline__ void issue_similarities(float (&acc_s)[kTile / 8][4], uint32_t (&rows)[DIM / 16][4],
                                                   const unsigned char* tile) {
#pragma unroll
  for (int k = 0; k < DIM / 16; ++k) {
    wgmma<T, kTile>(acc_s, rows[k], advance_desc(make_smem_desc<64>(tile + k / 4 * kBoxBytes), k % 4 * 32), k > 0);
  }
}

// The warpgroup index. The shuffle tells the compiler that it is uniform in a warp.
__device__ __forceinline__ int canonical_warp_group_idx() {
  return __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / kWarpgroupSize, 0);
}
// The first of the thread's two rows in an accumulator fragment of 64 rows.
__device__ __forceinline__ int fragment_row() {
  const int thread = static_cast<int>(threadIdx.x);
  return thread % kWarpgroupSize / kWarpSize * 16 + thread % kWarpSize / 4;
}

// Named barriers order the consumer warpgroups (1 and 2) as in FlashAttention-3: while one issues its wgmma, the other
// computes exponentials. Otherwise both might do the same at the same time. mma_init() lets warpgroup 1 begin, and
// mma_finish() consumes the last arrival.
__device__ __forceinline__ void warp_scheduler_barrier_sync(int warpgroup) {
  named_barrier_sync(warpgroup, 2 * kWarpgroupSize);
}
__device__ __forceinline__ void warp_scheduler_barrier_arrive(int warpgroup) {
  named_barrier_arrive(3 - warpgroup, 2 * kWarpgroupSize);
}
__device__ __forceinline__ void mma_init(int warpgroup) {
  if (warpgroup == 2) warp_scheduler_barrier_arrive(warpgroup);
}
__device__ __forceinline__ void mma_finish(int warpgroup) {
  if (warpgroup == 1) warp_scheduler_barrier_sync(warpgroup);
}

// The TMA descriptor of the scaled vectors in scratch.
inline int make_vectors_map(TensorMap* map, const Config& config, const void* vectors) {
  return make_tensor_map<64>(map, vectors, {config.padded_dim, config.padded_rows, 1}, config.padded_dim,
                             config.padded_dim * config.padded_rows, {64, kTile, 1});
}

}  // namespace dfkd::contrastive
