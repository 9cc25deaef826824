// Spatial attention: code shared by the forward and backward kernels: tiling, the logits GEMM, the weight gradients.
//
// A tile is 64, 128 or 256 positions of one sample by all channels, of which there are at most 256. Four consumer
// warpgroups process it. Each has one box of 64 positions x 64 channels, 8 KB, which TMA loads with the 128-byte
// swizzle: warpgroup w has the channels from 64 (w % channel_blocks) and the positions from 64 (w / channel_blocks).
//
// A lane's accumulator fragment has two of every eight columns, which would be scattered channels. The rows of the
// weight, the N dimension of the logits GEMM, are therefore permuted in shared memory (channel_of_column): a lane then
// holds 16 consecutive channels of two positions, as two 16-byte chunks per position. Eight neighboring lanes hold 64
// channels of two positions and access shared memory without bank conflicts.
#pragma once

#include "sm90.h"

namespace dfkd::spatial {

// kSpatialMean1 multiplies the softmax over P positions by P, so that its mean is 1.
enum Form { kSpatial = 0, kSpatialMean1 = 1, kChannel = 2 };

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = __builtin_huge_valf();

template <typename T, int N>
struct alignas(sizeof(T) * N) AlignedArray {
  T at[N];
};
using Float4 = AlignedArray<float, 4>;
using Uint4 = AlignedArray<uint32_t, 4>;

// ---- element-wise functions -----------------------------------------------------------------------------------------

// exp(x) for x <= 0. Denormal results may flush to zero: every softmax sum is at least 1.
__device__ __forceinline__ float exp_nonpositive(float x) { return exp2_approx_ftz(x * kLog2E); }

// The maximum to subtract in the exponent: 0 instead of -inf, because -inf - (-inf) is NaN.
__device__ __forceinline__ float finite_max(float row_max) { return row_max == -kInfinity ? 0.0f : row_max; }

template <typename T>
__device__ __forceinline__ void unpack8(float (&values)[8], const Uint4& from) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = to_float(T{static_cast<uint16_t>(from.at[i])});
    values[2 * i + 1] = to_float(T{static_cast<uint16_t>(from.at[i] >> 16)});
  }
}

template <typename T>
__device__ __forceinline__ Uint4 pack8(const float (&values)[8]) {
  Uint4 to;
#pragma unroll
  for (int i = 0; i < 4; ++i) to.at[i] = pack_rn<T>(values[2 * i], values[2 * i + 1]);
  return to;
}

// Under autocast, parameters may have another dtype than the feature maps.
__device__ __forceinline__ float load_as(const void* from, int64_t i, int dtype) {
  if (dtype == DFKD_FLOAT32) return static_cast<const float*>(from)[i];
  if (dtype == DFKD_FLOAT16) return to_float(static_cast<const float16*>(from)[i]);
  return to_float(static_cast<const bfloat16*>(from)[i]);
}
__device__ __forceinline__ void store_as(void* to, int64_t i, int dtype, float value) {
  if (dtype == DFKD_FLOAT32) {
    static_cast<float*>(to)[i] = value;
  } else if (dtype == DFKD_FLOAT16) {
    static_cast<float16*>(to)[i] = from_float<float16>(value);
  } else {
    static_cast<bfloat16*>(to)[i] = from_float<bfloat16>(value);
  }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

constexpr int kConsumerWarpgroups = 4, kConsumerThreads = kConsumerWarpgroups * kWarpgroupSize;
constexpr int kConsumerWarps = kConsumerThreads / kWarpSize;
constexpr int kBlockThreads = kConsumerThreads + kWarpgroupSize;  // plus a producer warpgroup
constexpr int kProducerRegisters = 32, kConsumerRegisters = 112;
constexpr int kBox = 64, kBoxBytes = 2 * kBox * kBox;
constexpr int kTileBytes = kConsumerWarpgroups * kBoxBytes;  // of features or grad_output
constexpr int kMaxChannels = 256, kMaxHidden = 64;
constexpr int kMaxSmemBytes = 232448;  // per block

struct Tiling {
  int positions, tiles;  // per sample
  int samples, channels, hidden;
  int channel_blocks;  // of 64 channels: 1, 2 or 4
  int row_blocks;      // of 64 positions per tile: 4 / channel_blocks
  int hidden_width;    // hidden, padded to 16, 32 or 64

  __host__ __device__ int tile_rows() const { return kBox * row_blocks; }
  __host__ __device__ int padded_channels() const { return kBox * channel_blocks; }
  __host__ __device__ int hidden_box_bytes() const { return 2 * kBox * hidden_width; }  // 64 positions or channels
  __host__ __device__ int hidden_tile_bytes() const { return row_blocks * hidden_box_bytes(); }
  __host__ __device__ int weight_bytes() const { return channel_blocks * hidden_box_bytes(); }
};

// The factor of the softmax: `scale`, multiplied by the number of positions for kSpatialMean1.
inline float softmax_scale(float scale, int form, int64_t positions) {
  const double factor = form == kSpatialMean1 ? static_cast<double>(positions) : 1.0;
  return static_cast<float>(static_cast<double>(scale) * factor);
}

inline int require_parameter_dtype(const char* name, int dtype) {
  if (dtype >= DFKD_FLOAT32 && dtype <= DFKD_BFLOAT16) return 0;
  return dfkd_unsupported("dtype of %s must be float32, float16 or bfloat16", name);
}

// Returns 0 if the kernels support the sizes and the form, else DFKD_INVALID with the reason.
inline int require_supported(int64_t samples, int64_t channels, int64_t hidden, int64_t positions, int form) {
  constexpr int64_t kMax = (int64_t{1} << 30) - 1;  // tiles and positions are 32-bit integers
  if (form == kChannel) return dfkd_unsupported("form is 'channel'; the kernel supports 'spatial' and 'spatial_mean1'");
  int status = require_size("form", form, kSpatial, kSpatialMean1);
  if (!status) status = require_size("N of features (N, C, H, W)", samples, 0, (1 << 24) - 1);
  if (!status) status = require_size("C of features (N, C, H, W)", channels, 8, kMaxChannels, 8);
  if (!status) status = require_size("K of hidden (N, K, H, W)", hidden, 8, kMaxHidden, 8);
  if (!status) status = require_size("H W of features (N, C, H, W)", positions, 1, kMax);
  if (!status) status = require_size("N H W / 64 of features", samples * ((positions + kBox - 1) / kBox), 0, kMax);
  return status;
}

inline Tiling make_tiling(int64_t samples, int64_t channels, int64_t hidden, int64_t positions) {
  Tiling tiling{};
  tiling.positions = static_cast<int>(positions);
  tiling.samples = static_cast<int>(samples);
  tiling.channels = static_cast<int>(channels);
  tiling.hidden = static_cast<int>(hidden);
  tiling.channel_blocks = channels <= kBox ? 1 : channels <= 2 * kBox ? 2 : 4;
  tiling.row_blocks = kConsumerWarpgroups / tiling.channel_blocks;
  tiling.hidden_width = hidden <= 16 ? 16 : hidden <= 32 ? 32 : 64;
  tiling.tiles = (positions + tiling.tile_rows() - 1) / tiling.tile_rows();
  return tiling;
}

// The TMA descriptor of a channels-last map [samples, positions, channels], with boxes of `rows` positions.
template <int WIDTH>
int make_box_map(TensorMap* to, const void* base, const Tiling& tiling, int channels, int rows) {
  return make_tensor_map<WIDTH>(to, base, {channels, tiling.positions, tiling.samples}, channels,
                                static_cast<int64_t>(tiling.positions) * channels, {WIDTH, rows, 1});
}

// Calls f with hidden_width as a constant.
template <typename F>
int dispatch_hidden_width(int hidden_width, F f) {
  if (hidden_width == 16) return f(std::integral_constant<int, 16>{});
  if (hidden_width == 32) return f(std::integral_constant<int, 32>{});
  return f(std::integral_constant<int, 64>{});
}

// The channel, within its block of 64, of a column of the logits GEMM: a lane's columns 8 n + 2 t + e, n < 8 and e < 2,
// are channels 16 t + 2 n + e.
__device__ __forceinline__ int channel_of_column(int column) {
  return 16 * (column % 8 / 2) + 2 * (column / 8) + column % 2;
}

// Stores the weight to shared memory as swizzled boxes of 64 channels. Called by all consumer threads, which then call
// fence_proxy_async() and wait at a barrier.
template <typename T, int HIDDEN>
__device__ __forceinline__ void store_weight(const Tiling& tiling, const void* weight, int dtype, T* to) {
  constexpr int kChunks = HIDDEN / 8;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < tiling.padded_channels() * kChunks; i += kConsumerThreads) {
    const int column = i / kChunks, chunk = i % kChunks, channel_block = column / kBox;
    const int channel = kBox * channel_block + channel_of_column(column % kBox);
    float values[8];
    const bool valid = channel < tiling.channels && 8 * chunk < tiling.hidden;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      values[k] = valid ? load_as(weight, static_cast<int64_t>(channel) * tiling.hidden + 8 * chunk + k, dtype) : 0.0f;
    }
    T* chunk_smem = to + channel_block * (kBox * HIDDEN) + swizzle_offset<HIDDEN>(column % kBox, chunk);
    *reinterpret_cast<Uint4*>(chunk_smem) = pack8<T>(values);
  }
}

struct ConsumerCoords {
  int warpgroup, warp, lane, g, t;  // warp: within the warpgroup; g, t: row and column pair of an accumulator fragment
  int channel_block, row_block;     // of the warpgroup's box
  int thread;                       // within the block

  __device__ __forceinline__ explicit ConsumerCoords(const Tiling& tiling) {
    thread = static_cast<int>(threadIdx.x);
    warpgroup = __shfl_sync(kFullMask, thread / kWarpgroupSize, 0);  // tells the compiler that it is warp-uniform
    warp = thread % kWarpgroupSize / kWarpSize;
    lane = thread % kWarpSize;
    g = lane / 4;
    t = lane % 4;
    channel_block = warpgroup % tiling.channel_blocks;
    row_block = warpgroup / tiling.channel_blocks;
  }
  // Returns a copy, so that the compiler recomputes values derived from it and keeps none in registers across a loop.
  __device__ __forceinline__ ConsumerCoords reload() const {
    ConsumerCoords copy = *this;
#ifndef DFKD_HOST
    asm volatile("" : "+r"(copy.g), "+r"(copy.t), "+r"(copy.warp));
#endif
    return copy;
  }
  // The lane's first row of the warpgroup's 64. Its second is 8 further.
  __device__ __forceinline__ int row() const { return 16 * warp + g; }
};

// load_hidden() issues the TMA loads of a tile of hidden, load_tile() those of features or grad_output. Called by one
// thread.
__device__ __forceinline__ void load_hidden(const Tiling& tiling, unsigned char* to, const TensorMap& hidden, int row,
                                            int sample, Barrier* full) {
#pragma unroll 1
  for (int i = 0; i < tiling.row_blocks; ++i) {
    tma_load(to + i * tiling.hidden_box_bytes(), hidden, 0, row + kBox * i, sample, full);
  }
}
__device__ __forceinline__ void load_tile(const Tiling& tiling, unsigned char* to, const TensorMap& from, int row,
                                          int sample, Barrier* full) {
#pragma unroll 1
  for (int i = 0; i < kConsumerWarpgroups; ++i) {
    tma_load(to + i * kBoxBytes, from, kBox * (i % tiling.channel_blocks), row + kBox * (i / tiling.channel_blocks),
             sample, full);
  }
}

// logits = hidden weight^T of a warpgroup's box: logits[n][2 half + e] is position row() + 8 half, channel
// 16 t + 2 n + e. Positions past the end become -inf; valid_rows counts the valid ones from the lane's first row.
template <typename T, int HIDDEN>
__device__ __forceinline__ void compute_logits(float (&logits)[8][4], const void* hidden, const void* weight,
                                               int valid_rows) {
  const uint64_t a = make_smem_desc<HIDDEN>(hidden), b = make_smem_desc<HIDDEN>(weight);
  warpgroup_fence_operand(logits);
  warpgroup_arrive();
#pragma unroll
  for (int step = 0; step < HIDDEN / 16; ++step) {
    wgmma<T, kBox>(logits, advance_desc(a, 32 * step), advance_desc(b, 32 * step), step > 0);
  }
  warpgroup_commit_batch();
  warpgroup_wait<0>();
  warpgroup_fence_operand(logits);
  if (valid_rows > 8) return;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    if (8 * (i % 4 / 2) >= valid_rows) logits[i / 4][i % 4] = -kInfinity;
  }
}

// A lane's 16-byte chunk of a box: position row() + 8 half, channels from 16 t + 8 chunk.
__device__ __forceinline__ Uint4* smem_chunk(unsigned char* box, const ConsumerCoords& coords, int half, int chunk) {
  return reinterpret_cast<Uint4*>(box + 2 * swizzle_offset<kBox>(coords.row() + 8 * half, 2 * coords.t + chunk));
}

// The index of a channel's softmax statistics. It avoids bank conflicts between the four lanes of a row, which read
// channels 16 apart, and keeps aligned groups of four contiguous.
__device__ __forceinline__ int stats_index(int channel) { return channel ^ (channel / 32 % 2 * 4); }

// Statistics of a lane's channels 16 t + 4 quad to 16 t + 4 quad + 3.
__device__ __forceinline__ Float4 load_stats(const float* stats, const ConsumerCoords& coords, int quad) {
  const int index = kBox * coords.channel_block + stats_index(16 * coords.t + 4 * quad);
  return *reinterpret_cast<const Float4*>(stats + index);
}

// The sum over the 8 rows of a warp's fragment.
__device__ __forceinline__ float sum_over_rows(float x) {
#pragma unroll
  for (int distance = 4; distance < kWarpSize; distance *= 2) x += __shfl_xor_sync(kFullMask, x, distance);
  return x;
}

// ---- backward only: a stage holds features (then dl), grad_output (then df) and hidden ------------------------------

// One step of a butterfly reduce-scatter of 16 channels over the 8 rows of a fragment: two lanes exchange halves of
// 2 COUNT sums, and each keeps COUNT. After steps with COUNT = 8, 4 and 2, sums[0] and sums[1] are channels 2 g and
// 2 g + 1.
template <int COUNT>
__device__ __forceinline__ void reduce_scatter(float (&sums)[16], int lane) {
  const bool upper = (lane & (2 * COUNT)) != 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const float kept = upper ? sums[i + COUNT] : sums[i], sent = upper ? sums[i] : sums[i + COUNT];
    sums[i] = kept + __shfl_xor_sync(kFullMask, sent, 2 * COUNT);
  }
}

// A warp's partial sums of delta for its 64 channels, stored over its own rows of features.
__device__ __forceinline__ float* warp_partials(unsigned char* stage, int warpgroup, int warp) {
  return reinterpret_cast<float*>(stage + warpgroup * kBoxBytes + warp * (kBoxBytes / 4));
}

// dw += dl^T hidden, of the warpgroup's box.
template <typename T, int HIDDEN>
__device__ __forceinline__ void accumulate_dw(const Tiling& tiling, const ConsumerCoords& coords, unsigned char* stage,
                                              float (&dw)[HIDDEN / 8][4]) {
  const unsigned char* hidden = stage + 2 * kTileBytes + coords.row_block * tiling.hidden_box_bytes();
  const uint64_t a = make_smem_desc<kBox>(stage + coords.warpgroup * kBoxBytes, kBoxBytes);
  const uint64_t b = make_smem_desc<HIDDEN>(hidden, kBoxBytes);
  warpgroup_fence_operand(dw);
  warpgroup_arrive();
#pragma unroll
  for (int step = 0; step < kBox / 16; ++step) {
    wgmma<T, HIDDEN, true, true>(dw, advance_desc(a, 32 * kBox * step), advance_desc(b, 32 * HIDDEN * step), true);
  }
  warpgroup_commit_batch();
  warpgroup_wait<0>();
  warpgroup_fence_operand(dw);
}

// dh = dl weight of 64 positions: one warpgroup sums over all channels.
template <typename T, int HIDDEN>
__device__ __forceinline__ void compute_dh(const Tiling& tiling, const ConsumerCoords& coords, unsigned char* stage,
                                           const unsigned char* weight, int row, T* to) {
  float dh[HIDDEN / 8][4] = {};
#pragma unroll 1
  for (int i = 0; i < tiling.channel_blocks; ++i) {
    warpgroup_fence_operand(dh);
    warpgroup_arrive();
    const uint64_t a = make_smem_desc<kBox>(stage + (coords.row_block * tiling.channel_blocks + i) * kBoxBytes);
    const uint64_t b = make_smem_desc<HIDDEN>(weight + i * tiling.hidden_box_bytes(), kBoxBytes);
#pragma unroll
    for (int step = 0; step < kBox / 16; ++step) {
      wgmma<T, HIDDEN, false, true>(dh, advance_desc(a, 32 * step), advance_desc(b, 32 * HIDDEN * step), true);
    }
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(dh);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int position = row + coords.row() + 8 * half;
    if (position >= tiling.positions) continue;
    T* const out = to + static_cast<int64_t>(position) * tiling.hidden + 2 * coords.t;
#pragma unroll
    for (int n = 0; n < HIDDEN / 8; ++n) {
      if (8 * n < tiling.hidden) {
        *reinterpret_cast<uint32_t*>(out + 8 * n) = pack_rn<T>(dh[n][2 * half], dh[n][2 * half + 1]);
      }
    }
  }
}

}  // namespace dfkd::spatial
