// The gate of the spatial attention modules, forward: logits l = w h of narrow maps h (N, K, P) and a weight (C, K),
// their softmax s over positions or channels, out = f + scale s f for features f (N, C, P). All maps channels-last.
//
//   over positions  statistics  of each chunk of a sample's positions the largest logit of a channel and the sum of
//                               exponentials below it: reads h
//                   gate        merges the chunks', then reads f and h, makes the logits anew and writes out
//   over channels   gate        alone: a block has all channels of its positions
//
// In a two-byte type 4 N C P bytes of f and out and 2 N K P of h, the second time in reverse and so partly from cache;
// 4 N C P K operations and 2 N C P exponentials (and an eighth more in statistics, which follows a running maximum).
// Memory is the limit: at K = C / 8 the floor of exponentials, 16 a clock and multiprocessor, is about half of that of
// the bytes, products come far below. Logits are never rounded; sums are made in a fixed order.
//
// Over channels that block has at most 256 of them, and 128 where narrow maps are more than 64. At the paper's shapes
// (K = C / 8, C from 64 to 256) blocks use 21 to 61 KB of shared memory, and at most 128 registers a thread: two blocks
// of a multiprocessor, each with a tile in work and one under way.
//
// The plain form, for sm_80 and later: mma.sync and cp.async. Not yet run on a card.
#include "spatial_attention.h"

namespace {

using namespace dfkd;
using namespace dfkd::spatial;

constexpr int kStatisticsRows = 4;  // times 16 positions a warp: the more, the fewer exponentials for running maxima
constexpr int kGateRows = 2;
constexpr int kStatisticsWaves = 2, kGateWaves = 2;  // blocks of a multiprocessor

template <typename T>
int statistics_bytes(const Problem<T>& x) {
  return 2 * x.hidden_bytes(kStatisticsRows) + x.weight_bytes() + 2 * 4 * kWarps * kSlice;
}

// parts: maxima and sums, each (samples, chunks, channels).
template <typename T>
__global__ void __launch_bounds__(kThreads, kStatisticsWaves) statistics(Problem<T> x, float* parts) {
  constexpr int ROWS = kStatisticsRows;
  T* hidden = reinterpret_cast<T*>(shared_memory());
  T* weight = hidden + x.hidden_bytes(ROWS);
  float* tops = reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(weight) + x.weight_bytes());
  float* totals = tops + kWarps * kSlice;
  const Place at = find_place(x, ROWS, false);
  fetch<0, ROWS>(x, at, at.first, nullptr, hidden);
  fetch_weight(x, at, weight);
  float top[8], total[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    top[i] = -kInfinity;
    total[i] = 0.0f;
  }
  for (int tile = 0; tile < at.count; ++tile) {
    wait_copies<0>();
    __syncthreads();
    if (tile + 1 < at.count) {
      fetch<0, ROWS>(x, at, at.first + tile + 1, nullptr, hidden + (tile + 1) % 2 * (x.hidden_bytes(ROWS) / 2));
    }
    float logits[ROWS][4][4];
    multiply<ROWS>(logits, x, at, 0, hidden + tile % 2 * (x.hidden_bytes(ROWS) / 2), weight);
    const int left = rows_left<ROWS>(x, at, at.first + tile);
    if (left < 16 * ROWS - at.g) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          if (16 * r + 8 * (i % 4 / 2) >= left) logits[r][i / 4][i % 4] = -kInfinity;
        }
      }
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      float now = top[c];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        now = larger(now, larger(logits[r][c / 2][c % 2], logits[r][c / 2][2 + c % 2]));
      }
      const float base = base_of(now);
      float sum = 0.0f;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        sum += exp_below(logits[r][c / 2][c % 2] - base) + exp_below(logits[r][c / 2][2 + c % 2] - base);
      }
      total[c] = total[c] * exp_below(top[c] - base) + sum;
      top[c] = now;
    }
  }
#pragma unroll
  for (int c = 0; c < 8; ++c) {
#pragma unroll
    for (int distance = 4; distance < kLanes; distance *= 2) {
      const float other = __shfl_xor_sync(kAll, top[c], distance), sum = __shfl_xor_sync(kAll, total[c], distance);
      const float now = larger(top[c], other), base = base_of(now);
      const float mine = total[c] * exp_below(top[c] - base), others = sum * exp_below(other - base);
      total[c] = mine + others;
      top[c] = now;
    }
    if (at.g == 0) {
      tops[kSlice * at.warp + 8 * at.t + c] = top[c];
      totals[kSlice * at.warp + 8 * at.t + c] = total[c];
    }
  }
  __syncthreads();
  const int c = static_cast<int>(threadIdx.x);
  if (c < x.width() && at.channel + c < x.channels) {
    // Warps of one slice, each with its positions, stand `slices` apart.
    float largest = -kInfinity, sum = 0.0f;
    for (int i = c; i < kWarps * kSlice; i += x.width()) largest = larger(largest, tops[i]);
    for (int i = c; i < kWarps * kSlice; i += x.width()) sum += totals[i] * exp_below(tops[i] - base_of(largest));
    const int64_t to = (at.sample * x.chunks + at.chunk) * x.channels + at.channel + c;
    parts[to] = largest;
    parts[x.samples * x.chunks * x.channels + to] = sum;
  }
}

template <typename T>
int gate_bytes(const Problem<T>& x, bool over_channels) {
  return 2 * ring_bytes<kGateRows>(1) + 2 * x.hidden_bytes(kGateRows) + x.weight_bytes() + 2 * 4 * x.width() +
         (over_channels ? kSharesBytes : 0);
}

// parts: of so many chunks a sample; saved: maxima and sums merged, each (samples, channels), written too.
template <typename T, bool CHANNEL>
__global__ void __launch_bounds__(kThreads, kGateWaves)
    gate(Problem<T> x, const float* parts, int parts_chunks, float* saved, T* out) {
  constexpr int ROWS = kGateRows;
  unsigned char* ring = shared_memory();
  T* hidden = reinterpret_cast<T*>(ring + 2 * ring_bytes<ROWS>(1));
  T* weight = hidden + x.hidden_bytes(ROWS);
  float* tops = reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(weight) + x.weight_bytes());
  float* inverses = tops + x.width();
  const Place at = find_place(x, ROWS, true);
  fetch<1, ROWS>(x, at, at.first, ring, hidden);
  fetch_weight(x, at, weight);
  const int c = static_cast<int>(threadIdx.x);
  if (c < x.width()) {
    const int channel = at.channel + c;
    float top = 0.0f, inverse = 0.0f;
    if (channel < x.channels) {
      if constexpr (CHANNEL) {
        top = x.bias == nullptr ? 0.0f : read_as(x.bias, channel, x.bias_dtype);
      } else {
        const float* maxima = parts + at.sample * parts_chunks * x.channels + channel;
        const float* sums = maxima + x.samples * parts_chunks * x.channels;
        top = -kInfinity;
        float total = 0.0f;
#pragma unroll 4
        for (int i = 0; i < parts_chunks; ++i) top = larger(top, maxima[static_cast<int64_t>(i) * x.channels]);
#pragma unroll 4
        for (int i = 0; i < parts_chunks; ++i) {
          const int64_t from = static_cast<int64_t>(i) * x.channels;
          total += sums[from] * exp_below(maxima[from] - base_of(top));
        }
        inverse = 1.0f / total;
        if (at.chunk == 0) {
          saved[at.sample * x.channels + channel] = top;
          saved[(x.samples + at.sample) * x.channels + channel] = total;
        }
      }
    }
    tops[c] = top;
    inverses[c] = inverse;
  }
  const int channel = at.channel + at.column();
  for (int tile = 0; tile < at.count; ++tile) {
    wait_copies<0>();
    __syncthreads();
    if (tile + 1 < at.count) {
      const int buffer = (tile + 1) % 2;
      fetch<1, ROWS>(x, at, at.first + tile + 1, ring + buffer * ring_bytes<ROWS>(1),
                     hidden + buffer * (x.hidden_bytes(ROWS) / 2));
    }
    unsigned char* features = ring + tile % 2 * ring_bytes<ROWS>(1);
    float logits[ROWS][4][4];
    multiply<ROWS>(logits, x, at, 0, hidden + tile % 2 * (x.hidden_bytes(ROWS) / 2), weight);
    float top[8], inverse[8];
    if constexpr (CHANNEL) {
      add_bias<ROWS>(logits, x, at, tops);
      float unused[ROWS][2];
      softmax_over_channels<false, ROWS>(logits, unused, x, at, 0, features, shares(inverses + x.width()));
    } else {
      read_numbers(top, tops + at.column());
      read_numbers(inverse, inverses + at.column());
    }
    const int left = rows_left<ROWS>(x, at, at.first + tile);
    T* to = out + first_element<ROWS>(x, at, at.first + tile);
#pragma unroll
    for (int i = 0; i < 2 * ROWS; ++i) {
      if (8 * i < left && channel < x.channels) {
        float y[8];
        unpack<T>(y, *reinterpret_cast<const Vector*>(slot<ROWS>(features, at, 0, i)));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float s = logits[i / 2][j / 2][2 * (i % 2) + j % 2];
          if constexpr (!CHANNEL) s = exp_below(s - top[j]) * inverse[j];
          // Not f * (1 + gate): next to 1 a gate of 1e-6 would lose most of its digits.
          y[j] += y[j] * (x.scale * s);
        }
        write_row<T>(to + 8 * i * x.channels, round_all<T>(y), x.channels, channel);
      }
    }
  }
}

}  // namespace

extern "C" {

int64_t dfkd_spatial_attention_scratch(int64_t samples, int64_t channels, int64_t maps, int64_t positions, int form) {
  if (!supported(samples, channels, maps, positions, form) || form == kChannel) return 0;
  Problem<float16> x = problem<float16>(nullptr, nullptr, nullptr, nullptr, nullptr, samples, channels, maps,
                                        positions, 0, 0, 0.0, form);
  cut(x, kStatisticsRows, samples * x.blocks(), kStatisticsWaves);
  return aligned(2 * 4 * samples * x.chunks * channels);
}

int dfkd_spatial_attention(const void* features, const void* hidden, const void* weight, const void* bias,
                           int64_t samples, int64_t channels, int64_t maps, int64_t positions, int dtype,
                           int weight_dtype, int bias_dtype, float scale, int form, void* out, void* saved,
                           void* scratch, void* stream) {
  if (!supported(samples, channels, maps, positions, form)) return DFKD_INVALID;
  return with_type(dtype, [=](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) != 2) {
      return DFKD_INVALID;
    } else {
      if (samples == 0) return 0;
      Problem<T> x = problem<T>(features, hidden, nullptr, weight, bias, samples, channels, maps, positions,
                                weight_dtype, bias_dtype, scale, form);
      const unsigned beside = static_cast<unsigned>(x.blocks());
      int parts = 0;
      if (form != kChannel) {
        cut(x, kStatisticsRows, samples * beside, kStatisticsWaves);
        parts = x.chunks;
        const int error = launch(statistics<T>, dim3(static_cast<unsigned>(samples * parts), beside), kThreads,
                                 static_cast<size_t>(statistics_bytes(x)), stream, x, static_cast<float*>(scratch));
        if (error != 0) return error;
      }
      cut(x, kGateRows, samples * beside, kGateWaves);
      return launch(form == kChannel ? gate<T, true> : gate<T, false>,
                    dim3(static_cast<unsigned>(samples * x.chunks), beside), kThreads,
                    static_cast<size_t>(gate_bytes(x, form == kChannel)), stream, x, static_cast<float*>(scratch),
                    parts, static_cast<float*>(saved), static_cast<T*>(out));
    }
  });
}
}
