// What the kernels of spatial_attention, forward and backward, share: tiles, panels, the expand product.
//
// A block of four warpgroups takes tiles of one sample's positions by all channels, at most 256, in `panels` of 64:
// each warpgroup has one panel of 64 positions by 64 channels, warpgroup w that of channels 64 (w % panels) on and
// positions 64 (w / panels) on. TMA brings panels as wgmma takes them (sm90.h), 8 KB each.
//
// A lane's accumulators are two columns of each eight. The weight's rows, the products' columns, are therefore put into
// shared memory in such an order (channel_of) that a lane holds 16 neighbouring channels of two positions, two chunks
// of 16 bytes, and that eight neighbouring lanes, two positions of 64 channels, meet in no bank.
#pragma once

#include "sm90.h"

namespace dfkd::spatial {

enum Form { kSpatial = 0, kSpatialMean1 = 1, kChannel = 2 };

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = __builtin_huge_valf();

struct alignas(16) Vector {
  uint32_t words[4];
};
struct alignas(16) Numbers {
  float at[4];
};

// ---- arithmetic ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }  // a NaN counts for nothing

// exp(x) for x <= 0 without the care for denormal results, which are nothing beside the 1 that every softmax has.
__device__ __forceinline__ float exp_below(float x) { return exp2_approx_ftz(x * kLog2E); }

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
  for (int i = 0; i < 4; ++i) to.words[i] = pack_rn<T>(values[2 * i], values[2 * i + 1]);
  return to;
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

// ---- tiles ----------------------------------------------------------------------------------------------------------

constexpr int kGroups = 4, kConsumers = kGroups * kWarpgroupSize, kConsumerWarps = kConsumers / kWarpSize;
constexpr int kBlockThreads = kConsumers + kWarpgroupSize;  // one more warpgroup, of which single threads copy
constexpr int kCopyRegisters = 32, kConsumerRegisters = 112;
constexpr int kPanel = 64, kPanelBytes = 2 * kPanel * kPanel;
constexpr int kTileBytes = kGroups * kPanelBytes;  // of one map
constexpr int kMostChannels = 256, kMostNarrow = 64;
constexpr int kSharedMemory = 232448;  // of a block

// How a call is cut into tiles.
struct Cut {
  int positions, tiles;  // of a sample
  int samples, channels, maps;
  int panels;  // 1, 2 or 4
  int strips;  // of 64 positions, that a tile has: the warpgroups that share a panel
  int narrow;  // width of a panel of narrow maps: 16, 32 or 64

  __host__ __device__ int rows() const { return kPanel * strips; }
  __host__ __device__ int width() const { return kPanel * panels; }
  __host__ __device__ int narrow_bytes() const { return 2 * kPanel * narrow; }  // of 64 positions or 64 channels
  __host__ __device__ int hidden_bytes() const { return strips * narrow_bytes(); }
  __host__ __device__ int weight_bytes() const { return panels * narrow_bytes(); }
};

// All that the softmax is multiplied by.
inline float scale_of(float scale, int form, int64_t positions) {
  const double by = form == kSpatialMean1 ? static_cast<double>(positions) : 1.0;
  return static_cast<float>(static_cast<double>(scale) * by);
}

inline int require_parameter(const char* name, int dtype) {
  if (dtype >= DFKD_FLOAT32 && dtype <= DFKD_BFLOAT16) return 0;
  return dfkd_unsupported("dtype of %s must be float32, float16 or bfloat16", name);
}

// 0 where sizes and form are served, otherwise DFKD_INVALID with the reason.
inline int require_served(int64_t samples, int64_t channels, int64_t maps, int64_t positions, int form) {
  constexpr int64_t kMost = (int64_t{1} << 30) - 1;  // tiles and positions are counted in 32 bits
  if (form == kChannel) return dfkd_unsupported("form is 'channel'; the kernel supports 'spatial' and 'spatial_mean1'");
  int status = require_size("form", form, kSpatial, kSpatialMean1);
  if (!status) status = require_size("N of features (N, C, H, W)", samples, 0, (1 << 24) - 1);
  if (!status) status = require_size("C of features (N, C, H, W)", channels, 8, kMostChannels, 8);
  if (!status) status = require_size("K of hidden (N, K, H, W)", maps, 8, kMostNarrow, 8);
  if (!status) status = require_size("H W of features (N, C, H, W)", positions, 1, kMost);
  if (!status) status = require_size("N H W / 64 of features", samples * ((positions + kPanel - 1) / kPanel), 0, kMost);
  return status;
}

// Scratch memory comes in parts that begin at 16 bytes.
constexpr int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

inline Cut cut_tiles(int64_t samples, int64_t channels, int64_t maps, int64_t positions) {
  Cut x{};
  x.positions = static_cast<int>(positions);
  x.samples = static_cast<int>(samples);
  x.channels = static_cast<int>(channels);
  x.maps = static_cast<int>(maps);
  x.panels = channels <= kPanel ? 1 : channels <= 2 * kPanel ? 2 : 4;
  x.strips = kGroups / x.panels;
  x.narrow = maps <= 16 ? 16 : maps <= 32 ? 32 : 64;
  x.tiles = (positions + x.rows() - 1) / x.rows();
  return x;
}

// Of a channels-last map (samples, positions, channels), in tiles of so many positions.
template <int WIDTH>
int map_of(TensorMap* to, const void* base, const Cut& x, int channels, int rows) {
  return make_tensor_map<WIDTH>(to, base, {channels, x.positions, x.samples}, channels,
                                static_cast<int64_t>(x.positions) * channels,
                                {WIDTH, rows, 1});
}

// Call f with the width of a panel of narrow maps as a constant.
template <typename F>
int with_width(int narrow, F f) {
  switch (narrow) {
    case 16:
      return f(std::integral_constant<int, 16>{});
    case 32:
      return f(std::integral_constant<int, 32>{});
    default:
      return f(std::integral_constant<int, 64>{});
  }
}

// The channel of its panel that a column of products has. A lane's columns 8 n + 2 t + e, for n < 8 and e < 2, are
// channels 16 t + 2 n + e.
__device__ __forceinline__ int channel_of(int column) {
  return 16 * (column % 8 / 2) + 2 * (column / 8) + column % 2;
}

// The weight in panels of 64 columns, by all consumers; then fence_proxy_async() and a barrier.
template <typename T, int NARROW>
__device__ __forceinline__ void write_weight(const Cut& x, const void* weight, int dtype, T* to) {
  constexpr int kChunks = NARROW / 8;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < x.width() * kChunks; i += kConsumers) {
    const int column = i / kChunks, chunk = i % kChunks, panel = column / kPanel;
    const int channel = kPanel * panel + channel_of(column % kPanel);
    float values[8];
    const bool valid = channel < x.channels && 8 * chunk < x.maps;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      values[k] = valid ? read_as(weight, static_cast<int64_t>(channel) * x.maps + 8 * chunk + k, dtype) : 0.0f;
    }
    T* at = to + panel * (kPanel * NARROW) + swizzle_offset<NARROW>(column % kPanel, chunk);
    *reinterpret_cast<Vector*>(at) = round_all<T>(values);
  }
}

// A consumer's place.
struct Seat {
  int group, warp, lane, g, t;  // warp: of the warpgroup; g and t: row and pair of columns of a fragment
  int panel, strip;             // of the warpgroup: which 64 channels, which 64 positions
  int number;                   // of the thread in its block

  __device__ __forceinline__ explicit Seat(const Cut& x) {
    number = static_cast<int>(threadIdx.x);
    group = __shfl_sync(kFullMask, number / kWarpgroupSize, 0);  // which compilers then know to be the same for a warp
    warp = number % kWarpgroupSize / kWarpSize;
    lane = number % kWarpSize;
    g = lane / 4;
    t = lane % 4;
    panel = group % x.panels;
    strip = group / x.panels;
  }
  // The same, but that compilers do not keep what follows from it in registers over a loop.
  __device__ __forceinline__ Seat anew() const {
    Seat at = *this;
#ifndef DFKD_HOST
    asm volatile("" : "+r"(at.g), "+r"(at.t), "+r"(at.warp));
#endif
    return at;
  }
  // Of the lane's first row within the warpgroup's; the second is 8 further.
  __device__ __forceinline__ int row() const { return 16 * warp + g; }
};

// Logits of a warpgroup: logits[n][2 half + e] is row() + 8 half, channel 16 t + 2 n + e of its panel.
template <typename T, int NARROW>
__device__ __forceinline__ void expand(float (&logits)[8][4], const void* hidden, const void* weight) {
  const uint64_t a = make_smem_desc<NARROW>(hidden), b = make_smem_desc<NARROW>(weight);
  warpgroup_fence_operand(logits);
  warpgroup_arrive();
#pragma unroll
  for (int step = 0; step < NARROW / 16; ++step) {
    wgmma<T, kPanel>(logits, advance_desc(a, 32 * step), advance_desc(b, 32 * step), step > 0);
  }
  warpgroup_commit_batch();
  warpgroup_wait<0>();
  warpgroup_fence_operand(logits);
}

// Logits of positions that there are not to minus infinity, for no share in a softmax. left: of the lane's first row.
__device__ __forceinline__ void leave_out(float (&logits)[8][4], int left) {
  if (left > 8) return;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    if (8 * (i % 4 / 2) >= left) logits[i / 4][i % 4] = -kInfinity;
  }
}

// The lane's chunk of a panel: row() + 8 half, channels 16 t + 8 which on.
__device__ __forceinline__ Vector* chunk_of(unsigned char* panel, const Seat& at, int half, int which) {
  return reinterpret_cast<Vector*>(panel + 2 * swizzle_offset<kPanel>(at.row() + 8 * half, 2 * at.t + which));
}

// Where among numbers of channels that of one is: so that the four channels of which lanes of one row want numbers at
// the same time, 16 apart, meet in no bank. Four neighbouring ones, from a multiple of four on, stay neighbours.
__device__ __forceinline__ int place_of_number(int channel) { return channel ^ (channel / 32 % 2 * 4); }

// Numbers of the lane's channels 16 t + 4 quad on of its panel.
__device__ __forceinline__ Numbers numbers_of(const float* numbers, const Seat& at, int quad) {
  return *reinterpret_cast<const Numbers*>(numbers + kPanel * at.panel + place_of_number(16 * at.t + 4 * quad));
}

// ---- for backward only: in a stage dl lies where f was, then comes g, and narrow maps are last --------------

// Sums over positions: over the rows of a warp.
__device__ __forceinline__ float column_sum(float x) {
#pragma unroll
  for (int distance = 4; distance < kWarpSize; distance *= 2) x += __shfl_xor_sync(kFullMask, x, distance);
  return x;
}

struct alignas(8) Pair {
  float at[2];
};

// Over two lanes, each of which is left with one half of the COUNT * 2 channels: after 8, 4 and 2 lanes of eight rows
// have 2 g and the next of them.
template <int COUNT>
__device__ __forceinline__ void fold(float (&sums)[16], int lane) {
  const bool upper = (lane & (2 * COUNT)) != 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const float kept = upper ? sums[i + COUNT] : sums[i], sent = upper ? sums[i] : sums[i + COUNT];
    sums[i] = kept + __shfl_xor_sync(kFullMask, sent, 2 * COUNT);
  }
}

// Where in a stage a warp leaves its sums, in its own rows of f: of the panel's 64 channels.
__device__ __forceinline__ float* sums_of(unsigned char* stage, int group, int warp) {
  return reinterpret_cast<float*>(stage + group * kPanelBytes + warp * (kPanelBytes / 4));
}

// dw of the warpgroup's channels and positions, added to what there is.
template <typename T, int NARROW>
__device__ __forceinline__ void add_weight(const Cut& x, const Seat& at, unsigned char* stage,
                                           float (&dw)[NARROW / 8][4]) {
  const uint64_t a = make_smem_desc<kPanel>(stage + at.group * kPanelBytes, kPanelBytes);
  const uint64_t b = make_smem_desc<NARROW>(stage + 2 * kTileBytes + at.strip * x.narrow_bytes(), kPanelBytes);
  warpgroup_fence_operand(dw);
  warpgroup_arrive();
#pragma unroll
  for (int step = 0; step < kPanel / 16; ++step) {
    wgmma<T, NARROW, true, true>(dw, advance_desc(a, 32 * kPanel * step), advance_desc(b, 32 * NARROW * step), true);
  }
  warpgroup_commit_batch();
  warpgroup_wait<0>();
  warpgroup_fence_operand(dw);
}

// dh of all the strip's positions, by one warpgroup for all channels.
template <typename T, int NARROW>
__device__ __forceinline__ void make_hidden(const Cut& x, const Seat& at, unsigned char* stage,
                                            const unsigned char* weight, int row, T* to) {
  float dh[NARROW / 8][4];
#pragma unroll
  for (int i = 0; i < NARROW / 2; ++i) dh[i / 4][i % 4] = 0.0f;
#pragma unroll 1
  for (int panel = 0; panel < x.panels; ++panel) {
    warpgroup_fence_operand(dh);
    warpgroup_arrive();
    const uint64_t a = make_smem_desc<kPanel>(stage + (at.strip * x.panels + panel) * kPanelBytes);
    const uint64_t b = make_smem_desc<NARROW>(weight + panel * x.narrow_bytes(), kPanelBytes);
#pragma unroll
    for (int step = 0; step < kPanel / 16; ++step) {
      wgmma<T, NARROW, false, true>(dh, advance_desc(a, 32 * step), advance_desc(b, 32 * NARROW * step), true);
    }
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(dh);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int position = row + at.row() + 8 * half;
    if (position >= x.positions) continue;
    T* const out = to + static_cast<int64_t>(position) * x.maps + 2 * at.t;
#pragma unroll
    for (int n = 0; n < NARROW / 8; ++n) {
      if (8 * n < x.maps) {
        *reinterpret_cast<uint32_t*>(out + 8 * n) = pack_rn<T>(dh[n][2 * half], dh[n][2 * half + 1]);
      }
    }
  }
}

}  // namespace dfkd::spatial
