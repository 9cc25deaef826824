// What the two directions of contrastive_loss share: rows in, tiles, plans of launches. Formulas: contrastive_loss.cu.
#pragma once

#include "device.h"

namespace dfkd::contrastive {

constexpr double kLog2OfE = 1.4426950408889634;
constexpr float kLog2 = 0.6931471805599453f;
// Keeps weights of a softmax over a million vectors among float16's normal numbers, and a weight of two below its end.
constexpr float kLift = 16384.0f;
constexpr float kLowest = -3.0e38f;
// Below this bound of |s|, sums of 2^(2 s) over any number of vectors are far from the ends of float32.
constexpr double kBound = 48.0;
constexpr int kColumns = 64;  // vectors in a tile of columns

#ifdef DFKD_HOST

// Tests set them: fewer processors split columns otherwise, less shared memory leaves few vectors to the general form.
inline int processors = 132;
inline int64_t most_shared = 160 * 1024;
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
inline float logarithm(float x) { return std::log2(x); }

#else

// Of an H200. What scratch a launch needs must not depend on the card, and fewer or more processors cost little.
constexpr int processors = 132;
constexpr int64_t most_shared = 160 * 1024;
__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
// By the row, not by the element: exact where one term is all there is.
__device__ __forceinline__ float logarithm(float x) { return log2f(x); }

#endif

__device__ __forceinline__ float infinity() { return float_of(0x7f800000u); }
__device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }  // a NaN stays

template <bool VALUE>
struct Constant {
  static constexpr bool value = VALUE;
};

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
  for (int distance = group / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAll, x, distance);
  return x;
}
__device__ __forceinline__ float group_max(float x, int group) {
  for (int distance = group / 2; distance > 0; distance /= 2) x = larger(x, __shfl_xor_sync(kAll, x, distance));
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
__device__ __forceinline__ float gain_of(const float* upstream, int64_t stride, int row, int anchors, bool elementwise,
                                         float unit) {
  if (row >= anchors) return 0.0f;
  if (!elementwise) return 1.0f;
  return unit == 0.0f ? 0.0f : upstream[row * stride] / unit;
}

// ---- tiles in shared memory -----------------------------------------------------------------------------------------

// Rows of a multiple of 64 elements lie 16 bytes further apart, so that eight rows of one column of 16-byte pieces fall
// into different banks. Exchanging pieces within rows would do without these bytes, but costs registers for addresses.
constexpr int pitch(int width) { return width + 8; }
template <typename T>
__device__ __forceinline__ T* piece_at(T* tile, int row, int piece, int width) {
  return tile + row * pitch(width) + 8 * piece;
}

template <int ROWS, int SLAB, int THREADS, typename T>
__device__ __forceinline__ void copy_tile(T* to, const T* from, int width) {
  constexpr int kPieces = SLAB / 8;
  static_assert(ROWS * kPieces % THREADS == 0 && THREADS % kPieces == 0);
  const int row = static_cast<int>(threadIdx.x) / kPieces, piece = static_cast<int>(threadIdx.x) % kPieces;
  from += static_cast<int64_t>(row) * width + 8 * piece;
  to = piece_at(to, row, piece, SLAB);
  const int64_t step = static_cast<int64_t>(THREADS / kPieces) * width;
#pragma unroll 4
  for (int i = 0; i < ROWS * kPieces / THREADS; ++i) {  // not all at once: their addresses take registers
    copy_async_16(to, from, true);
    from += step;
    to = piece_at(to, THREADS / kPieces, 0, SLAB);
  }
}

// The numbers of a tile's columns, ARRAYS of them, each at its own distance.
template <int ARRAYS>
__device__ __forceinline__ void copy_numbers(float* to, const float* const (&from)[ARRAYS], int column) {
  constexpr int kPieces = kColumns / 4;
  const int array = static_cast<int>(threadIdx.x) / kPieces, piece = static_cast<int>(threadIdx.x) % kPieces;
#pragma unroll
  for (int a = 0; a < ARRAYS; ++a) {
    if (array == a) copy_async_16(to + a * kColumns + 4 * piece, from[a] + column + 4 * piece, true);
  }
}

// Rows of a from ROW on, 16 elements from STEP * 16 on, as the left operand.
template <typename T>
__device__ __forceinline__ void load_left(uint32_t (&r)[4], T* tile, int row, int step, int width) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  load_matrices(r, piece_at(tile, row + lane % 16, 2 * step + lane / 16, width));
}
// 16 rows of b as 16 columns of the right operand b^T: r[0], r[1] of the first eight, r[2], r[3] of the others.
template <typename T>
__device__ __forceinline__ void load_right(uint32_t (&r)[4], T* tile, int row, int step, int width) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  load_matrices(r, piece_at(tile, row + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2, width));
}
// 16 rows of b and its columns from 8 * PIECE on as they are: r[0], r[1] of the first eight columns, r[2], r[3].
template <typename T>
__device__ __forceinline__ void load_right_as_is(uint32_t (&r)[4], T* tile, int row, int piece, int width) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  load_matrices<true>(r, piece_at(tile, row + lane % 16, piece + lane / 16, width));
}

// s += a b^T over 16 elements, for 16 M rows of a, as left operands, and 8 N of b from ROW on.
template <typename T, int M, int N>
__device__ __forceinline__ void multiply(float (&s)[M][N][4], const uint32_t (&left)[M][4], T* b, int row, int step,
                                         int width) {
  static_assert(N % 2 == 0);
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    uint32_t r[4];
    load_right(r, b, row + 8 * n, step, width);
    const uint32_t even[2] = {r[0], r[1]}, odd[2] = {r[2], r[3]};
#pragma unroll
    for (int m = 0; m < M; ++m) {
      mma_16x8x16<T>(s[m][n], left[m], even);
      mma_16x8x16<T>(s[m][n + 1], left[m], odd);
    }
  }
}

template <int M, int N>
__device__ __forceinline__ void clear(float (&s)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
    }
  }
}

// Whether [a, a + a_length) and [b, b + b_length) have something in common.
__device__ __forceinline__ bool meet(int a, int a_length, int b, int b_length) {
  return a < b + b_length && b < a + a_length;
}

// ---- reductions over a block, of which every thread must ask -------------------------------------------------------

// The first thread has the sum.
__device__ __forceinline__ float block_sum(float x) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kLanes;
  x = warp_sum(x);
  if (thread % kLanes == 0) shared[thread / kLanes] = x;
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
  if (thread % kLanes == 0) shared[thread / kLanes] = largest;
  __syncthreads();
  return warp_max(thread % kLanes < threads / kLanes ? shared[thread % kLanes] : 0.0f);
}

// ---- few vectors: all of them in one block's shared memory ----------------------------------------------------------

// Begins to fetch v, ROWS rows of WIDTH elements, zero outside; wait_copies<0>() and a barrier end it.
template <typename T>
__device__ __forceinline__ void fetch_all(T* y, const Sides<const T>& from, int rows, int width) {
  const int pieces = width / 8;
  for (int i = static_cast<int>(threadIdx.x); i < rows * pieces; i += static_cast<int>(blockDim.x)) {
    const int row = i / pieces, piece = i % pieces;
    T* to = piece_at(y, row, piece, width);
    if (from.aligned) {
      const bool valid = row < 2 * from.count && 8 * piece < from.dim;
      copy_async_16(to, valid ? from.at(row, 8 * piece) : from.first, valid);
    } else {
      *reinterpret_cast<Eight<T>*>(to) = load_eight(from, row, 8 * piece);
    }
  }
  commit_copies();
}

// v becomes y where it lies; r and, where wanted, k of each row.
template <typename T>
__device__ __forceinline__ void scale_all(T* y, float* inverses, int* powers, int rows, int width, bool normalize) {
  int group = 1;
  while (group < kLanes && 8 * group < width) group *= 2;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, member = lane % group, at_once = kLanes / group;
  const int warp = static_cast<int>(threadIdx.x) / kLanes, warps = static_cast<int>(blockDim.x) / kLanes;
  for (int base = warp * at_once; base < rows; base += warps * at_once) {  // rows is a multiple of 32
    const int row = base + lane / group;
    float inverse = 1.0f;
    int k = 0;
    if (normalize) {
      float largest = 0.0f, square = 0.0f;
      for (int piece = member; piece < width / 8; piece += group) {
        largest = largest_of(*reinterpret_cast<const Eight<T>*>(piece_at(y, row, piece, width)), largest);
      }
      largest = group_max(largest, group);
      k = -exponent(largest);
      for (int piece = member; piece < width / 8; piece += group) {
        Eight<T>* here = reinterpret_cast<Eight<T>*>(piece_at(y, row, piece, width));
        *here = scale_eight(*here, k, square);
      }
      inverse = inverse_length(group_sum(square, group), largest);
    }
    if (member == 0) {
      inverses[row] = inverse;
      if (powers != nullptr) powers[row] = k;
    }
  }
}

// ---- any number of vectors: y and numbers of each row in memory -----------------------------------------------------

// Arrays of `padded` numbers: r, and for backward k, g over its unit, L, g 2^-L, and that times r.
enum Number { kInverse = 0, kPower = 1, kGain = 2, kLevel = 3, kShare = 4, kScaledShare = 5, kNumbers = 6 };

// One group of lanes a row; rows past the last vector are zeros for a tile to end in. Static: each file that launches
// it has its own, for its own architectures.
template <typename T>
static __global__ void __launch_bounds__(256)
    prepare(Sides<const T> from, T* vectors, float* numbers, const float* saved, const float* upstream,
            int64_t upstream_stride, const float* unit, int anchors, int width, int padded, int group, int normalize,
            int elementwise) {
  const int row = static_cast<int>((blockIdx.x * int64_t{256} + threadIdx.x) / group);
  const int member = static_cast<int>(threadIdx.x) % group;
  float inverse = 1.0f;
  int k = 0;
  const bool here = row < padded;
  T* to = vectors + static_cast<int64_t>(here ? row : 0) * width;
  float largest = 0.0f, square = 0.0f;
  if (here && normalize) {
    for (int column = 8 * member; column < width; column += 8 * group) {
      largest = largest_of(load_eight(from, row, column), largest);
    }
  }
  largest = group_max(largest, group);
  if (normalize) k = -exponent(largest);
  if (here) {
    for (int column = 8 * member; column < width; column += 8 * group) {
      const Eight<T> piece = load_eight(from, row, column);
      *reinterpret_cast<Eight<T>*>(to + column) = normalize ? scale_eight(piece, k, square) : piece;
    }
  }
  square = group_sum(square, group);
  if (normalize) inverse = inverse_length(square, largest);
  if (!here || member != 0) return;
  numbers[kInverse * static_cast<int64_t>(padded) + row] = inverse;
  if (saved == nullptr) return;
  const float gain = gain_of(upstream, upstream_stride, row, anchors, elementwise, elementwise ? *unit : 1.0f);
  const float level = row < anchors ? saved[row] : infinity();
  numbers[kPower * static_cast<int64_t>(padded) + row] = static_cast<float>(k);
  numbers[kGain * static_cast<int64_t>(padded) + row] = gain;
  numbers[kLevel * static_cast<int64_t>(padded) + row] = level;
  const float share = gain * exp2_flushed(-level);
  numbers[kShare * static_cast<int64_t>(padded) + row] = share * kLift;
  numbers[kScaledShare * static_cast<int64_t>(padded) + row] = share * (inverse * kLift);
}

// ---- plans ----------------------------------------------------------------------------------------------------------

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// How many tiles of columns a block takes: of those of each side, the times are estimated for up to 32 chunks.
inline int64_t tiles_a_block(int64_t blocks, int sides, const int64_t (&tiles)[2], int64_t available) {
  const int64_t longest = sides == 2 && tiles[1] > tiles[0] ? tiles[1] : tiles[0];
  if (blocks * sides >= 2 * available) return longest;
  int64_t best = longest, best_time = 0;
  for (int64_t chunks = 1; chunks <= 32; ++chunks) {
    const int64_t span = divide_up(longest, chunks);
    int64_t programs = 0;
    for (int side = 0; side < sides; ++side) programs += blocks * divide_up(tiles[side], span);
    const int64_t time = divide_up(programs, available) * (span + 4);  // a block's start costs some tiles' time
    if (chunks == 1 || time < best_time) best = span, best_time = time;
  }
  return best;
}

// Sizes of the general form, and where its parts lie in scratch.
struct Plan {
  int64_t anchors, width, padded;
  int slab;          // elements of a row in shared memory at a time: all, or 128 of a wide row
  bool wide;
  int rows;          // of a block
  int64_t blocks;    // of rows, on each side
  int64_t span, chunks, chunks_of[2];
  int64_t numbers, parts, extra, bytes;  // offsets in scratch, where the vectors come first
};

inline Plan plan_rows(int64_t count, int64_t dim, int symmetric) {
  Plan plan{};
  plan.anchors = symmetric ? 2 * count : count;
  plan.wide = dim > 128;
  plan.slab = dim <= 64 ? 64 : 128;
  plan.width = plan.wide ? round_up(dim, 128) : plan.slab;
  plan.padded = round_up(2 * count + 256, kColumns);  // a tile of rows begins before 2 N
  plan.numbers = plan.padded * plan.width * 2;
  return plan;
}

template <typename T>
int launch_prepare(const Plan& plan, const Sides<const T>& from, void* scratch, const float* saved,
                   const float* upstream, int64_t upstream_stride, const float* unit, bool normalize, bool elementwise,
                   void* stream) {
  int group = 8;
  while (group < kLanes && 8 * group < plan.width) group *= 2;
  unsigned char* memory = static_cast<unsigned char*>(scratch);
  return launch(prepare<T>, static_cast<unsigned>(divide_up(plan.padded * group, 256)), 256, 0, stream, from,
                reinterpret_cast<T*>(memory), reinterpret_cast<float*>(memory + plan.numbers), saved, upstream,
                upstream_stride, unit, plan.anchors, plan.width, plan.padded, group, normalize, elementwise);
}

// Sizes that the kernels' 32-bit indices of rows hold.
inline bool sizes_fit(int64_t count, int64_t dim) {
  return count >= 0 && dim >= 0 && count <= (int64_t{1} << 29) && dim <= (int64_t{1} << 30);
}

}  // namespace dfkd::contrastive
