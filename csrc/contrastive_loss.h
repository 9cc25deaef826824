// What the two directions of contrastive_loss share: what they serve, rows in, and tiles on their way to the tensor
// cores.
//
// One warp of a block fetches, two warpgroups multiply. The vectors that prepare() left in memory come in tiles of 128
// by copies through one map: in panels of 64 elements as products take them, through a ring of stages with a barrier
// each way. Rows come the same way, from the ring into registers, where they are the products' left operand.
#pragma once

#include "sm90.h"

namespace dfkd::contrastive {

constexpr int kTile = 128;                      // vectors in a tile, of rows as of columns
constexpr int kPanelBytes = kTile * 64 * 2;
constexpr int kNumberBytes = kTile * 4;         // of one number of each vector of a tile
constexpr int kRoles = 3 * kWarpgroupSize;          // threads: those that fetch, of which one does, and two warpgroups
constexpr int kFetching = 24, kMultiplying = 240;  // registers of their threads

#ifdef DFKD_HOST
// Tests set them: fewer multiprocessors split the work otherwise, fewer vectors are served, and less fits in cache.
inline int num_sms = 132;
inline int64_t smallest = 129, cached_bytes = int64_t{20} << 20;
#else
// Of an H200. The scratch that a launch needs must not depend on the card, and fewer or more cost little.
constexpr int num_sms = 132;
constexpr int64_t smallest = 129;  // N; fewer vectors are left to Triton
// So many bytes of vectors stay in either half of the second-level cache, wherever blocks are in them.
constexpr int64_t cached_bytes = int64_t{20} << 20;
#endif

constexpr double kLog2OfE = 1.4426950408889634;
// Keeps weights of a softmax over a million vectors among float16's normal numbers, and a weight of two below its end.
constexpr float kLift = 16384.0f;
// Below this bound of |s|, sums of 2^s over any number of vectors are far from the ends of float32.
constexpr double kBound = 48.0;

#ifdef DFKD_HOST
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
#else
__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
#endif

__device__ __forceinline__ float infinity() { return float_of(0x7f800000u); }
__device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }  // a NaN stays

struct alignas(8) Two {
  float x, y;
};
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};
template <typename T>
struct alignas(16) Eight {
  T x[8];
};

// floor(log2(x)) for x >= 0; 0 for 0.
__device__ __forceinline__ int exponent(float x) {
  const bool denormal = x < 1.1754943508222875e-38f;
  const int bits = static_cast<int>(bits_of(denormal ? x * 16777216.0f : x));
  return x == 0.0f ? 0 : (bits >> 23) - (denormal ? 151 : 127);
}
// x 2^k, by halves: 2^k itself may not exist in float32.
__device__ __forceinline__ float times_power(float x, int k) {
  const int half = k >> 1;
  return x * float_of(static_cast<uint32_t>(half + 127) << 23) * float_of(static_cast<uint32_t>(k - half + 127) << 23);
}

// Over groups of GROUP neighbouring lanes, a power of two that is known at run time alone.
__device__ __forceinline__ float group_sum(float x, int group) {
  for (int distance = group / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kFullMask, x, distance);
  return x;
}
__device__ __forceinline__ float group_max(float x, int group) {
  for (int distance = group / 2; distance > 0; distance /= 2) x = larger(x, __shfl_xor_sync(kFullMask, x, distance));
  return x;
}

// ---- the vectors: rows of two tensors, one after the other ----------------------------------------------------------

// Elements, or gradients of them. A null pointer is a side that nobody wants.
template <typename T>
struct Sides {
  T *first, *second;
  int64_t first_row, first_column, second_row, second_column;
  int count, dim;
  bool aligned;  // rows of whole aligned pieces of 16 bytes

  __device__ __forceinline__ T* at(int row, int column) const {
    const bool in_first = row < count;
    T* base = in_first ? first : second;
    if (base == nullptr) return nullptr;
    return base + ((in_first ? row : row - count) * (in_first ? first_row : second_row) +
                   column * (in_first ? first_column : second_column));
  }
};

template <typename T>
Sides<T> sides(T* first, T* second, int64_t first_row, int64_t first_column, int64_t second_row, int64_t second_column,
               int64_t count, int64_t dim) {
  const auto whole = [dim](const void* base, int64_t row, int64_t column) {
    return base == nullptr ||
           (reinterpret_cast<uintptr_t>(base) % 16 == 0 && column == 1 && row % 8 == 0 && dim % 8 == 0);
  };
  return {first,       second,        first_row,
          first_column, second_row,   second_column,
          static_cast<int>(count),    static_cast<int>(dim),
          whole(first, first_row, first_column) && whole(second, second_row, second_column)};
}

// Elements column to column + 7 of a row; zero outside.
template <typename T>
__device__ __forceinline__ Eight<T> load_eight(const Sides<const T>& from, int row, int column) {
  Eight<T> piece;
#pragma unroll
  for (int e = 0; e < 8; ++e) piece.x[e] = T{0};
  if (row >= 2 * from.count || column >= from.dim) return piece;
  const T* at = from.at(row, column);
  if (from.aligned) return *reinterpret_cast<const Eight<T>*>(at);
  const int64_t step = row < from.count ? from.first_column : from.second_column;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (column + e < from.dim) piece.x[e] = at[e * step];
  }
  return piece;
}

// y = 2^k v of eight elements, and their share of |y|^2.
template <typename T>
__device__ __forceinline__ Eight<T> scale_eight(Eight<T> piece, int k, float& square) {
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const float y = times_power(to_float(piece.x[e]), k);
    square += y * y;
    piece.x[e] = from_float<T>(y);
  }
  return piece;
}
template <typename T>
__device__ __forceinline__ float largest_of(const Eight<T>& piece, float largest) {
#pragma unroll
  for (int e = 0; e < 8; ++e) largest = larger(largest, fabsf(to_float(piece.x[e])));
  return largest;
}
__device__ __forceinline__ float inverse_length(float square, float largest) {
  return largest == 0.0f ? 0.0f : rsqrt_exact(square);
}

// g over its unit, 0 for what is no anchor: of the order of one, since it is rounded with the weights.
__device__ __forceinline__ float gain_of(const float* grad_output, int64_t stride, int row, int anchors, bool elementwise,
                                         float unit) {
  if (row >= anchors) return 0.0f;
  if (!elementwise) return 1.0f;
  return unit == 0.0f ? 0.0f : grad_output[row * stride] / unit;
}

// Whether [a, a + a_length) and [b, b + b_length) have something in common.
__device__ __forceinline__ bool meet(int a, int a_length, int b, int b_length) {
  return a < b + b_length && b < a + a_length;
}

// ---- reductions over a block, of which every thread must ask -------------------------------------------------------

// The first thread has the sum.
__device__ __forceinline__ float block_sum(float x) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarpSize;
  x = warp_sum(x);
  if (thread % kWarpSize == 0) shared[thread / kWarpSize] = x;
  __syncthreads();
  return warp_sum(thread < warps ? shared[thread] : 0.0f);
}

// The largest absolute value, for every thread.
__device__ __forceinline__ float block_largest(const float* values, int64_t stride, int count) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  float largest = 0.0f;
  for (int i = thread; i < count; i += threads) largest = larger(largest, fabsf(values[i * stride]));
  largest = warp_max(largest);
  if (thread % kWarpSize == 0) shared[thread / kWarpSize] = largest;
  __syncthreads();
  return warp_max(thread % kWarpSize < threads / kWarpSize ? shared[thread % kWarpSize] : 0.0f);
}

// ---- any number of vectors: y and numbers of each row in memory -----------------------------------------------------

// Arrays of `padded` numbers: r, and for backward k, g over its unit, L, g 2^-L, and that times r.
enum Number { kInverse = 0, kPower = 1, kGain = 2, kLevel = 3, kShare = 4, kScaledShare = 5, kNumbers = 6 };

// One group of lanes per row; rows past the last vector are zeros for a tile to end in. Static: each file that launches
// it has its own.
template <typename T>
static __global__ void __launch_bounds__(256)
    prepare(Sides<const T> from, T* vectors, float* numbers, const float* saved, const float* grad_output,
            int64_t grad_output_stride, const float* unit, int anchors, int width, int padded, int group,
            int elementwise) {
  const int row = static_cast<int>((blockIdx.x * int64_t{256} + threadIdx.x) / group);
  const int member = static_cast<int>(threadIdx.x) % group;
  const bool here = row < padded;
  T* to = vectors + static_cast<int64_t>(here ? row : 0) * width;
  float largest = 0.0f, square = 0.0f;
  if (here) {
    for (int column = 8 * member; column < width; column += 8 * group) {
      largest = largest_of(load_eight(from, row, column), largest);
    }
  }
  largest = group_max(largest, group);
  const int k = -exponent(largest);
  if (here) {
    for (int column = 8 * member; column < width; column += 8 * group) {
      const Eight<T> piece = load_eight(from, row, column);
      *reinterpret_cast<Eight<T>*>(to + column) = scale_eight(piece, k, square);
    }
  }
  square = group_sum(square, group);
  const float inverse = inverse_length(square, largest);
  if (!here || member != 0) return;
  numbers[kInverse * static_cast<int64_t>(padded) + row] = inverse;
  if (saved == nullptr) return;
  const float gain = gain_of(grad_output, grad_output_stride, row, anchors, elementwise, elementwise ? *unit : 1.0f);
  const float level = row < anchors ? saved[row] : infinity();
  numbers[kPower * static_cast<int64_t>(padded) + row] = static_cast<float>(k);
  numbers[kGain * static_cast<int64_t>(padded) + row] = gain;
  numbers[kLevel * static_cast<int64_t>(padded) + row] = level;
  const float share = gain * exp2_approx_ftz(-level);
  numbers[kShare * static_cast<int64_t>(padded) + row] = share * kLift;
  numbers[kScaledShare * static_cast<int64_t>(padded) + row] = share * (inverse * kLift);
}

// ---- plans ----------------------------------------------------------------------------------------------------------

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Sizes, and where parts lie in scratch.
struct Plan {
  int64_t anchors, width, padded;
  int slab;                            // elements of a padded row: 64 or 128
  int rows;                            // of a block
  int64_t blocks;                      // of rows, on each side
  int64_t span, chunks;                // tiles of columns in a unit; units of a row block
  int64_t numbers, parts, extra, bytes;  // offsets in scratch, where the vectors come first
};

inline Plan plan_rows(int64_t count, int64_t dim, int symmetric) {
  Plan plan{};
  plan.anchors = symmetric ? 2 * count : count;
  plan.slab = dim <= 64 ? 64 : 128;
  plan.width = plan.slab;
  plan.padded = round_up(2 * count + 256, 64);  // a tile of rows begins before 2 N
  plan.numbers = plan.padded * plan.width * 2;
  return plan;
}

template <typename T>
int launch_prepare(const Plan& plan, const Sides<const T>& from, void* scratch, const float* saved,
                   const float* grad_output, int64_t grad_output_stride, const float* unit, bool elementwise,
                   void* stream) {
  int group = 8;
  while (group < kWarpSize && 8 * group < plan.width) group *= 2;
  unsigned char* memory = static_cast<unsigned char*>(scratch);
  return launch(prepare<T>, static_cast<unsigned>(divide_up(plan.padded * group, 256)), 256, 0, stream, from,
                reinterpret_cast<T*>(memory), reinterpret_cast<float*>(memory + plan.numbers), saved, grad_output,
                grad_output_stride, unit, plan.anchors, plan.width, plan.padded, group, elementwise);
}

// ---- what is served -------------------------------------------------------------------------------------------------

constexpr int64_t kMostCount = int64_t{1} << 23;  // a block's tiles are counted in 32 bits

// 0 where sizes and options are served, otherwise DFKD_INVALID with the reason.
inline int require_sizes(int64_t count, int64_t dim) {
  const int status = require_size("N of anchors (N, D)", count, smallest, kMostCount);
  return status ? status : require_size("D of anchors (N, D)", dim, 1, 128);
}
inline int require_options(double temperature, int normalize) {
  if (!normalize) return dfkd_unsupported("normalize is False; the kernel supports True");
  if (temperature > 0 && kLog2OfE / temperature <= kBound) return 0;
  return dfkd_unsupported("temperature is %g; the kernel supports %.7g and more", temperature, kLog2OfE / kBound);
}

// ---- the ring -------------------------------------------------------------------------------------------------------

// Where a role is in it. A stage: a tile of SLAB / 64 panels, and ARRAYS numbers of each of its vectors.
template <int SLAB, int ARRAYS>
struct Ring : PipelineState {
  static constexpr int kStages = SLAB == 128 ? 6 : 8;
  static constexpr int kTileBytes = SLAB / 64 * kPanelBytes;
  static constexpr int kBytes = kStages * (kTileBytes + ARRAYS * kNumberBytes + 2 * static_cast<int>(sizeof(Barrier)));

  __device__ __forceinline__ int offset() const { return index * kTileBytes; }
  __device__ __forceinline__ unsigned char* tile() const { return shared_memory() + offset(); }
  __device__ __forceinline__ float* numbers() const {
    return reinterpret_cast<float*>(shared_memory() + kStages * kTileBytes + index * ARRAYS * kNumberBytes);
  }
  __device__ __forceinline__ Barrier* full() const {
    return reinterpret_cast<Barrier*>(shared_memory() + kStages * (kTileBytes + ARRAYS * kNumberBytes)) + index;
  }
  __device__ __forceinline__ Barrier* empty() const { return full() + kStages; }

  __device__ __forceinline__ void advance() { PipelineState::advance(kStages); }

  // By all threads of the block, before anything else.
  __device__ __forceinline__ void begin() const {
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

  // By one thread: vectors from `row` on, and numbers of theirs, or the vectors alone.
  __device__ __forceinline__ void fetch(const TensorMap& map, int row, const float* const (&arrays)[ARRAYS]) {
    begin_tile(map, row, ARRAYS * kNumberBytes);
#pragma unroll
    for (int array = 0; array < ARRAYS; ++array) {
      cp_async_bulk(numbers() + array * kTile, arrays[array] + row, kNumberBytes, full());
    }
    advance();
  }
  __device__ __forceinline__ void fetch(const TensorMap& map, int row) {
    begin_tile(map, row, 0);
    advance();
  }
  __device__ __forceinline__ void begin_tile(const TensorMap& map, int row, int more) const {
    mbarrier_wait(empty(), phase ^ 1);
    mbarrier_arrive_expect_tx(full(), kTileBytes + more);
#pragma unroll
    for (int panel = 0; panel < SLAB / 64; ++panel) {
      tma_load(tile() + panel * kPanelBytes, map, 64 * panel, row, 0, full());
    }
  }

  // By the threads that multiply.
  __device__ __forceinline__ void wait_full() const { mbarrier_wait(full(), phase); }
  __device__ __forceinline__ void release() const {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) mbarrier_arrive(empty());
  }
};

// 16 rows of the tile at an offset in shared memory, from ROW on, as a warp's part of the left operand.
template <int SLAB>
__device__ __forceinline__ void load_rows(uint32_t (&own)[SLAB / 16][4], int tile, int row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int first = tile + 2 * swizzle_offset<64>(row + lane % 16, lane / 16);  // two chunks further is this with other bits
#pragma unroll
  for (int k = 0; k < SLAB / 16; ++k) {
    ldmatrix(own[k], shared_memory() + (first ^ (k % 4 * 32)) + k / 4 * kPanelBytes);
  }
}

// s = rows times the tile's vectors, asynchronously.
template <typename T, int SLAB>
__device__ __forceinline__ void multiply_rows(float (&s)[kTile / 8][4], uint32_t (&own)[SLAB / 16][4],
                                              const unsigned char* tile) {
#pragma unroll
  for (int k = 0; k < SLAB / 16; ++k) {
    wgmma<T, kTile>(s, own[k], advance_desc(make_smem_desc<64>(tile + k / 4 * kPanelBytes), k % 4 * 32), k > 0);
  }
}

// Which warpgroup this is, in a way that tells the compiler that a warp agrees; and the first of the thread's rows in
// 64 of its warpgroup.
__device__ __forceinline__ int my_warpgroup() {
  return __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / kWarpgroupSize, 0);
}
__device__ __forceinline__ int my_row() {
  return static_cast<int>(threadIdx.x) % kWarpgroupSize / kWarpSize * 16 + static_cast<int>(threadIdx.x) % kWarpSize / 4;
}

// The two warpgroups ask for products in turn, each for all that it can: left to themselves they may do the same at the
// same time, and the tensor cores wait while both take exponentials. The second one lets the first begin, which awaits
// the turn that nobody takes.
__device__ __forceinline__ void await_turn(int warpgroup) { named_barrier_sync(warpgroup, 2 * kWarpgroupSize); }
__device__ __forceinline__ void pass_turn(int warpgroup) { named_barrier_arrive(3 - warpgroup, 2 * kWarpgroupSize); }
__device__ __forceinline__ void begin_turns(int warpgroup) {
  if (warpgroup == 2) pass_turn(warpgroup);
}
__device__ __forceinline__ void end_turns(int warpgroup) {
  if (warpgroup == 1) await_turn(warpgroup);
}

// ---- launches -------------------------------------------------------------------------------------------------------

// Of the vectors in scratch, in tiles.
inline int map_vectors(TensorMap* map, const Plan& plan, const void* vectors) {
  return make_tensor_map<64>(map, vectors, {plan.width, plan.padded, 1}, plan.width, plan.width * plan.padded,
                             {64, kTile, 1});
}

}  // namespace dfkd::contrastive
