// What the kernels of spatial_attention, forward and backward, have in common: tiles, copies, the expand product.
//
// A block of eight warps takes tiles of one sample's positions by a block of channels, which its warps share out:
// `slices` of them side by side along channels, 32 each, the rest along positions, 16 ROWS each. A warp's logits are
//
//   l (position, channel) = h (position, k) w (channel, k)
//
// in mma.sync accumulators, the columns of whose four tiles are given channels in such an order that a lane holds eight
// neighbouring ones of two positions: 16 bytes of a channels-last map. So maps are copied by the lane that wants them
// into shared memory of its own, a tile ahead and with nothing to wait for but itself, and results go straight out.
// Narrow maps and the weight, which all warps want, are in shared memory in rows whose odd number of 16-byte units
// keeps matrix loads free of bank conflicts.
#pragma once

#include "device.h"

namespace dfkd::spatial {

enum Form { kSpatial = 0, kSpatialMean1 = 1, kChannel = 2 };

constexpr int kWarps = 8, kThreads = kWarps * kLanes;
constexpr int kSlice = 32;     // channels of a warp
constexpr int kMaxMaps = 128;  // more narrow maps than this leave no room for anything else in shared memory
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = __builtin_huge_valf();

// Blocks go by the number of multiprocessors. Tests, where blocks run in turn, have one: loops go round in small maps.
#ifdef DFKD_HOST
constexpr int kProcessors = 1;
#else
constexpr int kProcessors = 132;
#endif

struct alignas(16) Vector {
  uint32_t words[4];
};
struct alignas(16) Numbers {
  float at[4];
};

// ---- arithmetic ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }  // a NaN counts for nothing

// exp(x) for x <= 0 without the care for denormal results, which are nothing beside the 1 that every softmax has.
__device__ __forceinline__ float exp_below(float x) { return exp2_flushed(x * kLog2E); }

// What to measure exponentials from: the maximum, unless there is none yet.
__device__ __forceinline__ float base_of(float top) { return top == -kInfinity ? 0.0f : top; }

template <typename T>
__device__ __forceinline__ void unpack(float (&values)[8], const Vector& from) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = to_float(T{static_cast<uint16_t>(from.words[i])});
    values[2 * i + 1] = to_float(T{static_cast<uint16_t>(from.words[i] >> 16)});
  }
}

template <typename T>
__device__ __forceinline__ Vector round_all(const float (&values)[8]) {
  Vector to;
#pragma unroll
  for (int i = 0; i < 4; ++i) to.words[i] = pack_rounded<T>(values[2 * i], values[2 * i + 1]);
  return to;
}

__device__ __forceinline__ void read_numbers(float (&values)[8], const float* from) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Numbers half = *reinterpret_cast<const Numbers*>(from + 4 * i);
#pragma unroll
    for (int j = 0; j < 4; ++j) values[4 * i + j] = half.at[j];
  }
}

// Parameters may be of another type than maps: a network's own, under autocast.
__device__ __forceinline__ float read_as(const void* from, int64_t at, int dtype) {
  if (dtype == DFKD_FLOAT32) return static_cast<const float*>(from)[at];
  if (dtype == DFKD_FLOAT16) return to_float(static_cast<const float16*>(from)[at]);
  return to_float(static_cast<const bfloat16*>(from)[at]);
}
__device__ __forceinline__ void write_as(void* to, int64_t at, int dtype, float value) {
  if (dtype == DFKD_FLOAT32) {
    static_cast<float*>(to)[at] = value;
  } else if (dtype == DFKD_FLOAT16) {
    static_cast<float16*>(to)[at] = from_float<float16>(value);
  } else {
    static_cast<bfloat16*>(to)[at] = from_float<bfloat16>(value);
  }
}

// ---- the problem, and how it is cut ---------------------------------------------------------------------------------

template <typename T>
struct Problem {
  const T *features, *hidden, *upstream;
  const void *weight, *bias;
  int64_t samples, positions;
  int channels, maps;  // C and K
  int weight_dtype, bias_dtype;
  int slices;        // warps along channels
  int chunks, each;  // of a sample, each a block's work; tiles of a chunk
  float scale;       // all that the softmax is multiplied by

  __host__ __device__ int steps() const { return (maps + 15) / 16; }
  __host__ __device__ int stride() const { return 16 * steps() + 8; }  // of a row of narrow maps or weights
  __host__ __device__ int width() const { return kSlice * slices; }    // channels of a block
  __host__ __device__ int blocks() const { return (channels + width() - 1) / width(); }
  // Positions of a tile where a warp has so many times 16.
  __host__ __device__ int rows(int each_warp) const { return 16 * each_warp * (kWarps / slices); }
  // Bytes in shared memory. After each eight rows of the weight a gap, for the order in which columns have channels.
  __host__ __device__ int weight_bytes() const { return 2 * (width() * stride() + width() / 8 * 16); }
  __host__ __device__ int hidden_bytes(int each_warp) const { return 2 * rows(each_warp) * stride(); }
};

// Enough blocks to fill the device `waves` times over, in tiles of one sample.
template <typename T>
void cut(Problem<T>& x, int each_warp, int64_t beside, int waves) {
  const int64_t tiles = (x.positions + x.rows(each_warp) - 1) / x.rows(each_warp);
  const int64_t wanted = static_cast<int64_t>(waves) * kProcessors / (beside > 0 ? beside : 1);
  const int64_t each = (tiles + (wanted > 1 ? wanted : 1) - 1) / (wanted > 1 ? wanted : 1);
  x.each = static_cast<int>(each);
  x.chunks = static_cast<int>((tiles + each - 1) / each);
}

inline bool supported(int64_t samples, int64_t channels, int64_t maps, int64_t positions, int form) {
  const int64_t most = form == kChannel ? (maps > 64 ? 4 : kWarps) * kSlice : int64_t{1} << 20;
  return samples >= 0 && samples < (int64_t{1} << 24) && positions > 0 && positions < (int64_t{1} << 31) &&
         channels > 0 && channels <= most && maps > 0 && maps <= kMaxMaps && form >= kSpatial && form <= kChannel;
}

template <typename T>
Problem<T> problem(const void* features, const void* hidden, const void* upstream, const void* weight,
                   const void* bias, int64_t samples, int64_t channels, int64_t maps, int64_t positions,
                   int weight_dtype, int bias_dtype, double scale, int form) {
  Problem<T> x{};
  x.features = static_cast<const T*>(features);
  x.hidden = static_cast<const T*>(hidden);
  x.upstream = static_cast<const T*>(upstream);
  x.weight = weight;
  x.bias = form == kChannel ? bias : nullptr;  // cancels in a softmax over positions
  x.samples = samples;
  x.positions = positions;
  x.channels = static_cast<int>(channels);
  x.maps = static_cast<int>(maps);
  x.weight_dtype = weight_dtype;
  x.bias_dtype = bias_dtype;
  x.slices = maps > 64 ? 4 : channels <= 2 * kSlice ? 2 : channels <= 4 * kSlice ? 4 : 8;
  x.scale = static_cast<float>(form == kSpatialMean1 ? scale * static_cast<double>(positions) : scale);
  return x;
}

// Scratch memory comes in parts that begin at 16 bytes.
constexpr int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// ---- a block's place ------------------------------------------------------------------------------------------------

struct Place {
  int warp, lane, g, t;  // g and t: row and pair of columns of a fragment
  int slice, group;      // of the warp, along channels and positions
  int channel;           // the block's first
  int64_t sample;
  int chunk, first, count;  // the chunk's first tile, and how many

  // One of the lane's eight channels' first, within the block.
  __device__ __forceinline__ int column() const { return kSlice * slice + 8 * t; }
};

// The pass that ran before left in cache what its last blocks read: a second pass begins there.
template <typename T>
__device__ __forceinline__ Place find_place(const Problem<T>& x, int each_warp, bool reverse) {
  Place at;
  const int thread = static_cast<int>(threadIdx.x);
  at.warp = thread / kLanes;
  at.lane = thread % kLanes;
  at.g = at.lane / 4;
  at.t = at.lane % 4;
  at.slice = at.warp % x.slices;
  at.group = at.warp / x.slices;
  at.channel = static_cast<int>(blockIdx.y) * x.width();
  const int block = static_cast<int>(reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  at.sample = block / x.chunks;
  at.chunk = block % x.chunks;
  at.first = at.chunk * x.each;
  const int tiles = static_cast<int>((x.positions + x.rows(each_warp) - 1) / x.rows(each_warp));
  at.count = tiles - at.first < x.each ? tiles - at.first : x.each;
  return at;
}

// How many positions of a tile there are from the lane's first row on, 0 or less for none.
template <int ROWS, typename T>
__device__ __forceinline__ int rows_left(const Problem<T>& x, const Place& at, int tile) {
  const int rows = x.rows(ROWS);
  const int64_t left = x.positions - static_cast<int64_t>(tile) * rows;
  return (left < rows ? static_cast<int>(left) : rows) - 16 * ROWS * at.group - at.g;
}
// Where in a map of features the lane's eight channels of its first row begin.
template <int ROWS, typename T>
__device__ __forceinline__ int64_t first_element(const Problem<T>& x, const Place& at, int tile) {
  const int64_t position = static_cast<int64_t>(tile) * x.rows(ROWS) + 16 * ROWS * at.group + at.g;
  return (at.sample * x.positions + position) * x.channels + at.channel + at.column();
}

// ---- copies into shared memory --------------------------------------------------------------------------------------

// Eight elements to 16 bytes of shared memory, of which those below `left` exist.
template <typename T>
__device__ __forceinline__ void copy_some(void* to, const T* from, int left) {
  Vector v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < left ? from[2 * i].bits : 0u, high = 2 * i + 1 < left ? from[2 * i + 1].bits : 0u;
    v.words[i] = low | (high << 16);
  }
  *static_cast<Vector*>(to) = v;
}

// Where a lane has its eight channels of one of its rows of one of the maps.
template <int ROWS>
__device__ __forceinline__ unsigned char* slot(unsigned char* ring, const Place& at, int map, int row) {
  return ring + (((map * kWarps + at.warp) * 2 * ROWS + row) * kLanes + at.lane) * 16;
}
template <int ROWS>
constexpr int ring_bytes(int maps) {
  return maps * kWarps * 2 * ROWS * kLanes * 16;
}

// Begin to copy a tile: the lane's own part of the features and, with MAPS == 2, of the upstream gradient, and the
// narrow maps of all warps. Zeros where there is nothing.
template <int MAPS, int ROWS, typename T>
__device__ __forceinline__ void fetch(const Problem<T>& x, const Place& at, int tile, unsigned char* ring, T* hidden) {
  const int rows = x.rows(ROWS);
  const int64_t position = static_cast<int64_t>(tile) * rows;
  const int left = x.positions - position < rows ? static_cast<int>(x.positions - position) : rows;
  const int64_t start = at.sample * x.positions + position;
  const int channel = at.channel + at.column();
  if constexpr (MAPS > 0) {
#pragma unroll
    for (int map = 0; map < MAPS; ++map) {
      const T* from = (map == 0 ? x.features : x.upstream) + start * x.channels;
#pragma unroll
      for (int i = 0; i < 2 * ROWS; ++i) {
        const int row = 16 * ROWS * at.group + 8 * i + at.g;
        const bool valid = row < left && channel < x.channels;
        const T* source = valid ? from + (row * x.channels + channel) : from;
        if (x.channels % 8 == 0) {
          copy_async_16(slot<ROWS>(ring, at, map, i), source, valid);
        } else {
          copy_some(slot<ROWS>(ring, at, map, i), source, valid ? x.channels - channel : 0);
        }
      }
    }
  }
  const T* from = x.hidden + start * x.maps;
  const int units = 2 * x.steps();
  for (int i = static_cast<int>(threadIdx.x); i < rows * units; i += kThreads) {
    const int row = i / units, k = 8 * (i - row * units);
    const bool valid = row < left && k < x.maps;
    const T* source = valid ? from + (row * x.maps + k) : from;
    if (x.maps % 8 == 0) {
      copy_async_16(hidden + (row * x.stride() + k), source, valid);
    } else {
      copy_some(hidden + (row * x.stride() + k), source, valid ? x.maps - k : 0);
    }
  }
  commit_copies();
}

// A lane's eight channels out to a map, those of them that exist.
template <typename T>
__device__ __forceinline__ void write_row(T* to, const Vector& value, int channels, int channel) {
  if (channels % 8 == 0) {
    *reinterpret_cast<Vector*>(to) = value;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (channel + i < channels) to[i] = T{static_cast<uint16_t>(value.words[i / 2] >> (16 * (i % 2)))};
    }
  }
}

template <typename T>
__device__ __forceinline__ int weight_row(const Problem<T>& x, int channel) {
  return channel * x.stride() + channel / 8 * 16;
}

// The block's part of the weight, in the type of the products.
template <typename T>
__device__ __forceinline__ void fetch_weight(const Problem<T>& x, const Place& at, T* weight) {
#pragma unroll 4
  for (int c = at.warp; c < x.width(); c += kWarps) {
    const int channel = at.channel + c;
    for (int k = at.lane; k < 16 * x.steps(); k += kLanes) {
      const bool valid = channel < x.channels && k < x.maps;
      const int64_t from = static_cast<int64_t>(channel) * x.maps + k;
      weight[weight_row(x, c) + k] = from_float<T>(valid ? read_as(x.weight, from, x.weight_dtype) : 0.0f);
    }
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

// Logits of a warp, of 16 COUNT of its rows from 16 `first` on. logits[r][j] has rows g and g + 8 of the r-th 16 and
// channels 8 t + 2 j and the next of its slice: logits[r][j][2 half + e] is row 16 r + 8 half + g of them and channel
// 8 t + 2 j + e.
template <int ROWS, int COUNT, typename T>
__device__ __forceinline__ void multiply(float (&logits)[COUNT][4][4], const Problem<T>& x, const Place& at, int first,
                                         const T* hidden, const T* weight) {
#pragma unroll
  for (int r = 0; r < COUNT; ++r) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) logits[r][j][i] = 0.0f;
    }
  }
  const int row = at.lane % 8, which = at.lane / 8;
  const int channel = kSlice * at.slice + 8 * (row / 2) + row % 2 + 2 * (which / 2);
  const T* columns = weight + (weight_row(x, channel) + 8 * (which % 2));
  const T* lines = hidden + ((16 * (ROWS * at.group + first) + at.lane % 16) * x.stride() + 8 * (at.lane / 16));
  for (int step = 0; step < x.steps(); ++step) {
    uint32_t right[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) load_matrices(right[j], columns + (4 * j * x.stride() + 16 * step));
#pragma unroll
    for (int r = 0; r < COUNT; ++r) {
      uint32_t left[4];
      load_matrices(left, lines + (16 * r * x.stride() + 16 * step));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t both[2] = {right[j / 2][2 * (j % 2)], right[j / 2][2 * (j % 2) + 1]};
        mma_16x8x16<T>(logits[r][j], left, both);
      }
    }
  }
}

// q of a lane's eight channels of one of its rows. Rounded, for where a share of nearly 1 leaves little of q - D.
template <int ROWS, typename T>
__device__ __forceinline__ void read_q(float (&q)[8], unsigned char* ring, const Place& at, int row, float scale) {
  float f[8], g[8];
  unpack<T>(f, *reinterpret_cast<const Vector*>(slot<ROWS>(ring, at, 0, row)));
  unpack<T>(g, *reinterpret_cast<const Vector*>(slot<ROWS>(ring, at, 1, row)));
#pragma unroll
  for (int i = 0; i < 8; ++i) q[i] = rounded_product(scale, g[i] * f[i]);
}

// ---- softmax over channels ------------------------------------------------------------------------------------------

// Over neighbouring lanes of four, which share a row.
__device__ __forceinline__ float row_max(float x) {
  x = larger(x, __shfl_xor_sync(kAll, x, 1));
  return larger(x, __shfl_xor_sync(kAll, x, 2));
}

// Logits with the bias, and minus infinity beyond the last channel.
template <int ROWS, typename T>
__device__ __forceinline__ void add_bias(float (&logits)[ROWS][4][4], const Problem<T>& x, const Place& at,
                                         const float* biases) {
  float bias[8];
  read_numbers(bias, biases + at.column());
  const int left = x.channels - at.channel - at.column();
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int c = 2 * (i / 4) + i % 2;
      logits[r][i / 4][i % 4] = c < left ? logits[r][i / 4][i % 4] + bias[c] : -kInfinity;
    }
  }
}

// What the warps that share a row tell each other of their channels: maximum, sum of exponentials below it and the
// sum of these times q, each (slice, row of the tile).
struct Shares {
  float *tops, *totals, *slopes;
};
constexpr int kSharesBytes = 3 * 4 * kWarps * 32;  // at 32 rows a warp

__device__ __forceinline__ Shares shares(void* at) {
  float* numbers = static_cast<float*>(at);
  return {numbers, numbers + kWarps * 32, numbers + 2 * kWarps * 32};
}

// Logits to their softmax over all channels of a position; with BACKWARD also slopes[r][half], the sum of the softmax
// times q there. Each warp exponentiates below the maximum of its own channels, so that one barrier does for all.
// Logits are of 16 COUNT of the warp's rows, from 16 `from` on.
template <bool BACKWARD, int ROWS, int COUNT, typename T>
__device__ __forceinline__ void softmax_over_channels(float (&logits)[COUNT][4][4], float (&slopes)[COUNT][2],
                                                      const Problem<T>& x, const Place& at, int from,
                                                      unsigned char* ring, const Shares& shared) {
  float tops[COUNT][2];
  const int first = 16 * (ROWS * at.group + from) + at.g, rows = x.rows(ROWS);
#pragma unroll
  for (int r = 0; r < COUNT; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -kInfinity, total = 0.0f, slope = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) top = larger(top, logits[r][i / 2][2 * half + i % 2]);
      tops[r][half] = top = row_max(top);
      const float base = base_of(top);
      float q[8];
      if constexpr (BACKWARD) read_q<ROWS, T>(q, ring, at, 2 * (from + r) + half, x.scale);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& value = logits[r][i / 2][2 * half + i % 2];
        value = exp_below(value - base);
        total += value;
        if constexpr (BACKWARD) slope += value * q[i];
      }
      total = warp_sum<4>(total);
      if constexpr (BACKWARD) slope = warp_sum<4>(slope);
      if (at.t == 0) {
        const int to = at.slice * rows + first + 8 * (2 * r + half);
        shared.tops[to] = top;
        shared.totals[to] = total;
        if constexpr (BACKWARD) shared.slopes[to] = slope;
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < COUNT; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 8 * (2 * r + half);
      float top = -kInfinity, total = 0.0f, slope = 0.0f;
      for (int slice = 0; slice < x.slices; ++slice) top = larger(top, shared.tops[slice * rows + row]);
      const float base = base_of(top);
      for (int slice = 0; slice < x.slices; ++slice) {
        const float share = exp_below(shared.tops[slice * rows + row] - base);
        total += shared.totals[slice * rows + row] * share;
        if constexpr (BACKWARD) slope += shared.slopes[slice * rows + row] * share;
      }
      const float inverse = 1.0f / total, share = exp_below(tops[r][half] - base) * inverse;
#pragma unroll
      for (int i = 0; i < 8; ++i) logits[r][i / 2][2 * half + i % 2] *= share;
      if constexpr (BACKWARD) slopes[r][half] = slope * inverse;
    }
  }
}

// Sums over positions: over the rows of a warp.
__device__ __forceinline__ float column_sum(float x) {
#pragma unroll
  for (int distance = 4; distance < kLanes; distance *= 2) x += __shfl_xor_sync(kAll, x, distance);
  return x;
}

}  // namespace dfkd::spatial
