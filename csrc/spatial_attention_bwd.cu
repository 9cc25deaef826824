// The gate of the spatial attention modules, backward. With logits l and softmax s as in spatial_attention.cu, made
// anew, and g the upstream gradient:
//
//   q = scale g f      D = sum of s q over the softmax      dl = s (q - D)
//   df = g + g scale s      dh = w^T dl      dw = sum over positions of dl h      db = sum over positions of dl
//
//   over positions  slopes     D of each chunk of a sample's positions: reads f, g and h
//                   gradients  merges the chunks', then all the rest, in reverse: what slopes read last is in cache
//   over channels   gradients  alone, where D is a sum within the block
//   sum_parts       adds up the blocks' dw and db; sum_blocks their dh, where channels take more than one block
//
// dl is rounded to the type of the maps, as the products that follow it in PyTorch take it, and passes through shared
// memory: from there dh wants all channels of a position, which are with several warps, and dw wants it transposed.
// In a two-byte type 10 N C P bytes of features and gradients (6 where the second pass is from cache), 6 N K P of
// narrow ones, 4 C K written and read a chunk for dw; 8 N C P K operations and 2 N C P exponentials. Memory is the
// limit. At the paper's shapes blocks use 79 to 112 KB of shared memory, most of it two tiles of f and g, and at most
// 128 registers a thread: two blocks of a multiprocessor with 227 KB.
//
// The plain form, for sm_80 and later: mma.sync and cp.async. Not yet run on a card.
#include "spatial_attention.h"

namespace {

using namespace dfkd;
using namespace dfkd::spatial;

constexpr int kRows = 2;   // times 16 positions a warp
constexpr int kWaves = 2;  // blocks of a multiprocessor

template <typename T>
int slopes_bytes(const Problem<T>& x) {
  return 2 * ring_bytes<kRows>(2) + 2 * x.hidden_bytes(kRows) + x.weight_bytes() + 2 * 4 * x.width();
}

// Maximum and 1 / sum of a block's channels, from what forward saved.
template <typename T>
__device__ __forceinline__ void read_saved(const Problem<T>& x, const Place& at, const float* saved, float* tops,
                                           float* inverses) {
  const int c = static_cast<int>(threadIdx.x), channel = at.channel + c;
  if (c < x.width()) {
    const bool valid = channel < x.channels;
    tops[c] = valid ? saved[at.sample * x.channels + channel] : 0.0f;
    inverses[c] = valid ? 1.0f / saved[(x.samples + at.sample) * x.channels + channel] : 0.0f;
  }
}

// Sums over a warp's positions to those over the block's: out[c] of its channels. sums: room for 32 a warp.
template <typename T>
__device__ __forceinline__ void add_columns(const Problem<T>& x, const Place& at, const float (&columns)[8],
                                            float* sums, float* out) {
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const float sum = column_sum(columns[c]);
    if (at.g == 0) sums[kSlice * at.warp + 8 * at.t + c] = sum;
  }
  __syncthreads();
  const int c = static_cast<int>(threadIdx.x);
  if (c < x.width() && at.channel + c < x.channels) {
    float sum = 0.0f;
    for (int i = c; i < kWarps * kSlice; i += x.width()) sum += sums[i];
    out[at.channel + c] = sum;
  }
}

// parts: D, (samples, chunks, channels).
template <typename T>
__global__ void __launch_bounds__(kThreads, kWaves) slopes(Problem<T> x, const float* saved, float* parts) {
  unsigned char* ring = shared_memory();
  T* hidden = reinterpret_cast<T*>(ring + 2 * ring_bytes<kRows>(2));
  T* weight = hidden + x.hidden_bytes(kRows);
  float* tops = reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(weight) + x.weight_bytes());
  float* inverses = tops + x.width();
  const Place at = find_place(x, kRows, false);
  fetch<2, kRows>(x, at, at.first, ring, hidden);
  fetch_weight(x, at, weight);
  read_saved(x, at, saved, tops, inverses);
  float slope[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int tile = 0; tile < at.count; ++tile) {
    wait_copies<0>();
    __syncthreads();
    if (tile + 1 < at.count) {
      const int buffer = (tile + 1) % 2;
      fetch<2, kRows>(x, at, at.first + tile + 1, ring + buffer * ring_bytes<kRows>(2),
                      hidden + buffer * (x.hidden_bytes(kRows) / 2));
    }
    unsigned char* maps = ring + tile % 2 * ring_bytes<kRows>(2);
    float logits[kRows][4][4];
    multiply<kRows>(logits, x, at, 0, hidden + tile % 2 * (x.hidden_bytes(kRows) / 2), weight);
    float top[8], inverse[8];
    read_numbers(top, tops + at.column());
    read_numbers(inverse, inverses + at.column());
    const int left = rows_left<kRows>(x, at, at.first + tile);
#pragma unroll
    for (int i = 0; i < 2 * kRows; ++i) {
      if (8 * i < left) {
        float q[8];
        read_q<kRows, T>(q, maps, at, i, x.scale);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          slope[j] += exp_below(logits[i / 2][j / 2][2 * (i % 2) + j % 2] - top[j]) * inverse[j] * q[j];
        }
      }
    }
  }
  __syncthreads();
  add_columns(x, at, slope, reinterpret_cast<float*>(ring), parts + (at.sample * x.chunks + at.chunk) * x.channels);
}

// Where results go; null for what is not wanted.
template <typename T>
struct Results {
  T *features, *hidden;
  float* hidden_blocks;  // (blocks of channels, samples, positions, maps) in place of hidden, where they are several
  float* parts;          // a row a chunk: gradient of the weight, then of the bias
  int want_weight, want_bias;
};

// dl of a block's tile, (position, channel), in units of 16 bytes, so placed that neither the lanes that write them nor
// matrix loads along positions meet in a bank.
template <typename T>
__device__ __forceinline__ T* unit_at(T* tile, const Problem<T>& x, int row, int unit) {
  const int turned = unit ^ (((row >> 1) & 3) | ((row & 1) << 2));
  return tile + (row * 4 * x.slices + turned) * 8;
}

template <typename T>
int gradients_bytes(const Problem<T>& x, bool over_channels) {
  return slopes_bytes(x) + 4 * x.width() + 2 * x.rows(kRows) * x.width() + (over_channels ? kSharesBytes : 0);
}

// The gradient of a block's narrow maps: each warp takes 16 positions by 8 maps at a time, over all channels.
template <int COLUMNS, typename T>
__device__ __forceinline__ void hidden_gradient(const Problem<T>& x, const Place& at, int tile, T* slopes,
                                                const T* weight, const Results<T>& to) {
  const int rows = x.rows(kRows) / 16, first_map = 8 * COLUMNS * static_cast<int>(blockIdx.z);
  const int columns = (x.maps - first_map + 7) / 8 < COLUMNS ? (x.maps - first_map + 7) / 8 : COLUMNS;
  for (int task = at.warp; task < rows * columns; task += kWarps) {
    const int row = 16 * (task % rows), map = first_map + 8 * (task / rows);
    float sums[4] = {0, 0, 0, 0};
    for (int channel = 0; channel < x.width(); channel += 32) {
      uint32_t left[2][4], right[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrices(left[i], unit_at(slopes, x, row + at.lane % 16, channel / 8 + 2 * i + at.lane / 16));
      }
      load_matrices<true>(right, weight + (weight_row(x, channel + at.lane) + map));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t both[2] = {right[2 * i], right[2 * i + 1]};
        mma_16x8x16<T>(sums, left[i], both);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t position = static_cast<int64_t>(tile) * x.rows(kRows) + row + 8 * half + at.g;
      const int k = map + 2 * at.t;
      if (position < x.positions && k < x.maps) {
        const int64_t place = (at.sample * x.positions + position) * x.maps + k;
        if (to.hidden_blocks != nullptr) {
          float* out = to.hidden_blocks + blockIdx.y * (x.samples * x.positions * x.maps) + place;
          out[0] = sums[2 * half];
          if (k + 1 < x.maps) out[1] = sums[2 * half + 1];
        } else if (x.maps % 2 == 0) {
          *reinterpret_cast<uint32_t*>(to.hidden + place) = pack_rounded<T>(sums[2 * half], sums[2 * half + 1]);
        } else {
          to.hidden[place] = from_float<T>(sums[2 * half]);
          if (k + 1 < x.maps) to.hidden[place + 1] = from_float<T>(sums[2 * half + 1]);
        }
      }
    }
  }
}

// Eight COLUMNS of narrow maps a block for the gradients of narrow maps and weight: with more of them than that, blocks
// along z share out a tile.
template <typename T, bool CHANNEL, int COLUMNS>
__global__ void __launch_bounds__(kThreads, kWaves)
    gradients(Problem<T> x, const float* saved, const float* slope_parts, Results<T> to) {
  unsigned char* ring = shared_memory();
  T* hidden = reinterpret_cast<T*>(ring + 2 * ring_bytes<kRows>(2));
  T* weight = hidden + x.hidden_bytes(kRows);
  T* tile_slopes = reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(weight) + x.weight_bytes());
  float* tops = reinterpret_cast<float*>(tile_slopes + x.rows(kRows) * x.width());
  float *inverses = tops + x.width(), *sums = inverses + x.width();
  const Place at = find_place(x, kRows, true);
  fetch<2, kRows>(x, at, at.first, ring, hidden);
  fetch_weight(x, at, weight);
  const bool narrow = to.hidden != nullptr || to.hidden_blocks != nullptr || to.parts != nullptr;
  const int c = static_cast<int>(threadIdx.x);
  if constexpr (CHANNEL) {
    if (c < x.width()) {
      const bool valid = x.bias != nullptr && at.channel + c < x.channels;
      tops[c] = valid ? read_as(x.bias, at.channel + c, x.bias_dtype) : 0.0f;
    }
  } else {
    read_saved(x, at, saved, tops, inverses);
    if (c < x.width()) {
      float sum = 0.0f;
      if (narrow && at.channel + c < x.channels) {
        const float* from = slope_parts + at.sample * x.chunks * x.channels + at.channel + c;
#pragma unroll 4
        for (int i = 0; i < x.chunks; ++i) sum += from[static_cast<int64_t>(i) * x.channels];
      }
      sums[c] = sum;
    }
  }
  const int channel = at.channel + at.column(), first_map = 8 * COLUMNS * static_cast<int>(blockIdx.z);
  float dw[2][COLUMNS][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dw[m][n][i] = 0.0f;
    }
  }
  float db[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int tile = 0; tile < at.count; ++tile) {
    wait_copies<0>();
    __syncthreads();
    if (tile + 1 < at.count) {
      const int buffer = (tile + 1) % 2;
      fetch<2, kRows>(x, at, at.first + tile + 1, ring + buffer * ring_bytes<kRows>(2),
                      hidden + buffer * (x.hidden_bytes(kRows) / 2));
    }
    unsigned char* maps = ring + tile % 2 * ring_bytes<kRows>(2);
    const T* narrow_maps = hidden + tile % 2 * (x.hidden_bytes(kRows) / 2);
    const int left = rows_left<kRows>(x, at, at.first + tile);
    const int64_t first_out = first_element<kRows>(x, at, at.first + tile);
    // 16 rows at a time, which leaves registers for the rest.
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) {
      float logits[1][4][4], slope[1][2];
      multiply<kRows>(logits, x, at, r, narrow_maps, weight);
      float top[8], inverse[8], column_slope[8];
      if constexpr (CHANNEL) {
        add_bias(logits, x, at, tops);
        softmax_over_channels<true, kRows>(logits, slope, x, at, r, maps, shares(sums + x.width()));
      } else {
        read_numbers(top, tops + at.column());
        read_numbers(inverse, inverses + at.column());
        read_numbers(column_slope, sums + at.column());
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int line = 2 * r + i;  // of eight rows
        float values[8];
        Vector rounded = {{0, 0, 0, 0}};
        if (8 * line < left) {
          if constexpr (!CHANNEL) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              float& s = logits[0][j / 2][2 * i + j % 2];
              s = exp_below(s - top[j]) * inverse[j];
            }
          }
          if (to.features != nullptr && blockIdx.z == 0 && channel < x.channels) {
            unpack<T>(values, *reinterpret_cast<const Vector*>(slot<kRows>(maps, at, 1, line)));
#pragma unroll
            for (int j = 0; j < 8; ++j) values[j] += values[j] * (x.scale * logits[0][j / 2][2 * i + j % 2]);
            write_row<T>(to.features + first_out + 8 * line * x.channels, round_all<T>(values), x.channels, channel);
          }
          if (narrow) {
            read_q<kRows, T>(values, maps, at, line, x.scale);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              const float d = CHANNEL ? slope[0][i] : column_slope[j];
              values[j] = logits[0][j / 2][2 * i + j % 2] * (values[j] - d);
              if constexpr (CHANNEL) db[j] += values[j];
            }
            rounded = round_all<T>(values);
          }
        }
        if (narrow) {
          const int to_row = 16 * kRows * at.group + 8 * line + at.g;
          *reinterpret_cast<Vector*>(unit_at(tile_slopes, x, to_row, 4 * at.slice + at.t)) = rounded;
        }
      }
    }
    if (!narrow) continue;
    __syncthreads();
    if (to.hidden != nullptr || to.hidden_blocks != nullptr) {
      hidden_gradient<COLUMNS>(x, at, at.first + tile, tile_slopes, weight, to);
    }
    if (to.want_weight) {
      const int row = 16 * kRows * at.group + at.lane % 8, which = at.lane / 8;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        uint32_t a[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int unit = 4 * at.slice + 2 * m + which % 2;
          load_matrices<true>(a[m], unit_at(tile_slopes, x, row + 16 * r + 8 * (which / 2), unit));
        }
#pragma unroll
        for (int n = 0; n < COLUMNS; n += 2) {
          const int map = first_map + 8 * n;
          if (map >= x.maps) continue;
          uint32_t b[4];
          const int line = row + 16 * r + 8 * (which % 2);
          load_matrices<true>(b, narrow_maps + (line * x.stride() + map + 8 * (which / 2)));
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t both[2] = {b[2 * i], b[2 * i + 1]};
#pragma unroll
            for (int m = 0; m < 2; ++m) mma_16x8x16<T>(dw[m][n + i], a[m], both);
          }
        }
      }
    }
  }
  if (to.parts == nullptr) return;
  __syncthreads();
  const int64_t weights = to.want_weight ? static_cast<int64_t>(x.channels) * x.maps : 0;
  float* part = to.parts + (at.sample * x.chunks + at.chunk) * (weights + (CHANNEL && to.want_bias ? x.channels : 0));
  float* room = reinterpret_cast<float*>(ring);
  if (to.want_weight) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int line = kSlice * at.warp + 16 * m + 8 * (i / 2) + at.g;
          room[line * 8 * COLUMNS + 8 * n + 2 * at.t + i % 2] = dw[m][n][i];
        }
      }
    }
    __syncthreads();
    for (int i = c; i < x.width() * 8 * COLUMNS; i += kThreads) {
      const int line = i / (8 * COLUMNS), map = first_map + i % (8 * COLUMNS);
      if (at.channel + line >= x.channels || map >= x.maps) continue;
      float sum = 0.0f;
      for (int group = 0; group < kWarps / x.slices; ++group) sum += room[group * x.width() * 8 * COLUMNS + i];
      part[static_cast<int64_t>(at.channel + line) * x.maps + map] = sum;
    }
    __syncthreads();
  }
  if constexpr (CHANNEL) {
    if (to.want_bias && blockIdx.z == 0) add_columns(x, at, db, room, part + weights);
  }
}

constexpr int kSumThreads = 512;

// Add up `count` rows of `width`: first `weights` numbers for the weight, then `biases` for the bias, 0 beyond `width`.
__global__ void __launch_bounds__(kSumThreads) sum_parts(const float* parts, int64_t count, int64_t width,
                                                         int64_t weights, int64_t biases, void* d_weight,
                                                         void* d_bias, int weight_dtype, int bias_dtype) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % kLanes, warp = static_cast<int>(threadIdx.x) / kLanes;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kLanes + lane;
  float sum = 0.0f;
  if (at < width) {
#pragma unroll 8
    for (int64_t row = warp; row < count; row += kSumThreads / kLanes) sum += parts[row * width + at];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp == 0 && at < weights + biases) {
    float total = 0.0f;
    for (int i = 0; i < kSumThreads / kLanes; ++i) total += sums[i * kLanes + lane];
    if (at < weights) {
      write_as(d_weight, at, weight_dtype, total);
    } else {
      write_as(d_bias, at - weights, bias_dtype, total);
    }
  }
}

// The narrow maps' gradient from that of each block of channels.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_blocks(const float* parts, int blocks, int64_t count, T* out) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (at >= count) return;
  float sum = 0.0f;
  for (int i = 0; i < blocks; ++i) sum += parts[i * count + at];
  out[at] = from_float<T>(sum);
}

// Bytes of scratch: D of chunks, the gradients of the weight and bias of chunks, those of narrow maps of blocks.
template <typename T>
struct Scratch {
  int64_t slopes, parts, hidden;

  explicit Scratch(const Problem<T>& x) {
    const int64_t chunks = x.samples * x.chunks, channels = x.channels;
    slopes = aligned(4 * chunks * channels);
    parts = aligned(4 * chunks * channels * (x.maps + 1));
    hidden = x.blocks() > 1 ? aligned(4 * x.samples * x.positions * x.maps * x.blocks()) : 0;
  }
};

// Blocks along z: for each eight COLUMNS of narrow maps.
int shares_of_maps(int64_t maps) { return static_cast<int>((maps + 31) / 32); }

template <typename T>
int run(Problem<T>& x, int form, const float* saved, void* d_features, void* d_hidden, void* d_weight, void* d_bias,
        void* scratch, void* stream) {
  const bool over_channels = form == kChannel, want_bias = over_channels && d_bias != nullptr;
  const unsigned beside = static_cast<unsigned>(x.blocks());
  const Scratch<T> room(x);
  float* slope_parts = static_cast<float*>(scratch);
  float* parts = slope_parts + room.slopes / 4;
  const bool sums = d_weight != nullptr || want_bias;
  Results<T> to{};
  to.features = static_cast<T*>(d_features);
  if (x.blocks() > 1 && d_hidden != nullptr) {
    to.hidden_blocks = parts + room.parts / 4;
  } else {
    to.hidden = static_cast<T*>(d_hidden);
  }
  to.parts = sums ? parts : nullptr;
  to.want_weight = d_weight != nullptr;
  to.want_bias = want_bias;
  const bool narrow = d_hidden != nullptr || sums;
  const unsigned chunks = static_cast<unsigned>(x.samples * x.chunks);
  int error = 0;
  if (chunks > 0 && narrow && !over_channels) {
    error = launch(slopes<T>, dim3(chunks, beside), kThreads, static_cast<size_t>(slopes_bytes(x)), stream, x, saved,
                   slope_parts);
    if (error != 0) return error;
  }
  if (chunks > 0 && (narrow || d_features != nullptr)) {
    const auto kernel = over_channels ? (x.maps <= 16 ? gradients<T, true, 2> : gradients<T, true, 4>)
                                      : (x.maps <= 16 ? gradients<T, false, 2> : gradients<T, false, 4>);
    const unsigned shared_out = narrow ? static_cast<unsigned>(shares_of_maps(x.maps)) : 1u;
    error = launch(kernel, dim3(chunks, beside, shared_out), kThreads,
                   static_cast<size_t>(gradients_bytes(x, over_channels)), stream, x, saved, slope_parts, to);
    if (error != 0) return error;
  }
  if (to.hidden_blocks != nullptr && chunks > 0) {
    const int64_t count = x.samples * x.positions * x.maps;
    error = launch(sum_blocks<T>, dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)), kThreads, 0, stream,
                   to.hidden_blocks, x.blocks(), count, static_cast<T*>(d_hidden));
    if (error != 0) return error;
  }
  const int64_t weights = d_weight == nullptr ? 0 : static_cast<int64_t>(x.channels) * x.maps;
  const int64_t biases = d_bias == nullptr ? 0 : x.channels, width = weights + (want_bias ? biases : 0);
  if (weights + biases == 0) return 0;
  return launch(sum_parts, dim3(static_cast<unsigned>((weights + biases + kLanes - 1) / kLanes)), kSumThreads,
                static_cast<size_t>(4 * kSumThreads), stream, parts, x.samples * x.chunks, width, weights, biases,
                d_weight, d_bias, x.weight_dtype, x.bias_dtype);
}

}  // namespace

extern "C" {

int64_t dfkd_spatial_attention_backward_scratch(int64_t samples, int64_t channels, int64_t maps, int64_t positions,
                                                int form) {
  if (!supported(samples, channels, maps, positions, form)) return 0;
  Problem<float16> x = problem<float16>(nullptr, nullptr, nullptr, nullptr, nullptr, samples, channels, maps,
                                        positions, 0, 0, 0.0, form);
  cut(x, kRows, samples * x.blocks() * shares_of_maps(maps), kWaves);
  const Scratch<float16> room(x);
  return room.slopes + room.parts + room.hidden;
}

int dfkd_spatial_attention_backward(const void* upstream, const void* features, const void* hidden, const void* weight,
                                    const void* bias, const void* saved, int64_t samples, int64_t channels,
                                    int64_t maps, int64_t positions, int dtype, int weight_dtype, int bias_dtype,
                                    float scale, int form, void* d_features, void* d_hidden, void* d_weight,
                                    void* d_bias, void* scratch, void* stream) {
  if (!supported(samples, channels, maps, positions, form)) return DFKD_INVALID;
  return with_type(dtype, [=](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) != 2) {
      return DFKD_INVALID;
    } else {
      Problem<T> x = problem<T>(features, hidden, upstream, weight, bias, samples, channels, maps, positions,
                                weight_dtype, bias_dtype, scale, form);
      cut(x, kRows, samples * x.blocks() * shares_of_maps(maps), kWaves);
      return run(x, form, static_cast<const float*>(saved), d_features, d_hidden, d_weight, d_bias, scratch, stream);
    }
  });
}
}
