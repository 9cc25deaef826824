// Mixed high-order attention, backward in one pass: joint gates of order 3, up to 64 channels and 16 hidden units.
//
// Not yet run on a card. Wide maps with few channels: x and the gradient are read once and dx is written once, 6 P C
// bytes in a two-byte type, and 36 KB of weights' gradients a block; 16.5 P C^2 operations for K = C / 4, the factors
// being computed twice. A block keeps the weights in shared memory and their gradients in registers while it walks over
// tiles of 64 positions, 16 a warp. All products but those over positions take their left operand from registers, most
// from accumulators as they lie; for the products over positions du, a and dl pass through shared memory, and each warp
// has 16 channels. What limits it beside memory are the loads of right operands from shared memory, which 16 rows a
// warp use once each.
#pragma once

#include "high_order_attention.h"

namespace dfkd::high_order {

constexpr int kOnceOrder = 3, kOnceFactors = factors_of(kOnceOrder), kOnceChannels = 64, kOnceUnits = 16;
constexpr int kOnceRows = 64, kOnceTile = kOnceRows * kOnceChannels;
constexpr size_t kOnceShared =
    2 * static_cast<size_t>((kOnceFactors + kOnceOrder) * kOnceUnits * (kOnceChannels + kOnceRows) + 5 * kOnceTile);

// dx may be null; parts get dproj (factors, hidden, channels), where wanted, and from out_at on dout (order, channels,
// hidden) of each block, size numbers a block.
template <typename T>
__global__ void __launch_bounds__(128, 2)
    once_kernel(const T* upstream, const T* x, const T* proj, const T* out, T* dx, float* parts, int64_t count,
                int channels, int hidden, int map, int want_proj, int want_out, int64_t out_at, int64_t size) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kLanes, lane = thread % kLanes;
  T* const proj_tile = reinterpret_cast<T*>(shared_memory());                 // (factors, units, 64)
  T* const out_tile = proj_tile + kOnceFactors * kOnceUnits * kOnceChannels;  // order x (channels, 16)
  T* const du_tile = out_tile + kOnceOrder * kOnceUnits * kOnceChannels;      // factors x (rows, 16)
  T* const a_tile = du_tile + kOnceFactors * kOnceUnits * kOnceRows;          // order x (rows, 16)
  T* const dx_tile = a_tile + kOnceOrder * kOnceUnits * kOnceRows;            // (rows, 64), as are the next
  T* const x_tiles = dx_tile + kOnceTile;
  T* const g_tiles = x_tiles + 2 * kOnceTile;
  const int64_t tiles = (count + kOnceRows - 1) / kOnceRows;

  // A warp copies its own rows.
  const auto load = [&](int stage, int64_t tile) {
    const int64_t row0 = tile * kOnceRows + 16 * warp, from = row0 * channels;
    const int to = stage * kOnceTile + 16 * warp * 64;
    load_rows<64>(x_tiles + to, 16, x + from, channels, count - row0, channels, lane, kLanes, x);
    load_rows<64>(g_tiles + to, 16, upstream + from, channels, count - row0, channels, lane, kLanes, upstream);
  };
  load_panel<64>(proj_tile, kOnceFactors * kOnceUnits, channels, thread, 128, proj, [=](int row) {
    const int unit = row % kOnceUnits;
    return unit < hidden ? proj + (row / kOnceUnits * hidden + unit) * channels : nullptr;
  });
  load_panel<16>(out_tile, kOnceOrder * kOnceChannels, hidden, thread, 128, out, [=](int row) {
    const int channel = row % kOnceChannels;
    return channel < channels ? out + (row / kOnceChannels * channels + channel) * hidden : nullptr;
  });
  load(0, blockIdx.x);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  float dproj[kOnceFactors][2][4] = {}, dout[kOnceOrder][2][4] = {};  // the latter transposed: (units, channels)
  int stage = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, stage = 1 - stage) {
    if (tile + gridDim.x < tiles) load(1 - stage, tile + gridDim.x);
    commit_copies();
    T* const x_tile = x_tiles + stage * kOnceTile;
    T* const g_tile = g_tiles + stage * kOnceTile;
    uint32_t features[4][4], slopes[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) load_a<64>(features[k], x_tile, 16 * warp, 2 * k);

    const auto factors_from = [&](auto& u, int first) {
#pragma unroll
      for (auto& factor : u) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) factor[n][e] = 0.0f;
        }
      }
      int f = first;
#pragma unroll
      for (auto& factor : u) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          uint32_t b[2][2];
          load_b<64>(b, proj_tile, f * kOnceUnits, 2 * k);
          mma_16x8x16<T>(factor[0], features[k], b[0]);
          mma_16x8x16<T>(factor[1], features[k], b[1]);
        }
        ++f;
      }
    };
    // An operand of 16 x 16, the first index of whose registers is its row half, to this warp's rows of a panel.
    const auto keep = [&](T* panel, const uint32_t(&values)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * warp + 8 * (i % 2) + lane / 4;
        *reinterpret_cast<uint32_t*>(panel + at<16>(row, i / 2) + 2 * (lane % 4)) = values[i];
      }
    };

    float logits[8][4] = {};
    for_orders<kOnceOrder>([&](auto order, auto first) {
      constexpr int kOrder = order, kFirst = first;
      float u[kOrder][2][4];
      factors_from(u, kFirst);
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float z[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float each[kOrder];
#pragma unroll
          for (int j = 0; j < kOrder; ++j) each[j] = u[j][i / 2][2 * (i % 2) + e];
          z[e] = product_of(each);
        }
        a[i] = pack_rounded<T>(positive(z[0], z[0]), positive(z[1], z[1]));
      }
      if (want_out) keep(a_tile + (kOrder - 1) * kOnceRows * 16, a);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b[2][2];
        load_b<16>(b, out_tile, (kOrder - 1) * kOnceChannels + 16 * n, 0);
        mma_16x8x16<T>(logits[2 * n], a, b[0]);
        mma_16x8x16<T>(logits[2 * n + 1], a, b[1]);
      }
    });

    // From logits to dl, which replaces g, and g A.
    float gradient[8][4];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * warp + 8 * half + lane / 4, column = 8 * n + 2 * (lane % 4);
        float value[2] = {1.0f, 1.0f}, g[2], dl[2];
        if (!map) unpack<T>(*pair_at(x_tile, row, column), value);
        unpack<T>(*pair_at(g_tile, row, column), g);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float logit = logits[n][2 * half + e];
          dl[e] = g[e] * value[e] * spread(logit);
          gradient[n][2 * half + e] = map ? 0.0f : g[e] * sigmoid(logit);
        }
        slopes[n / 2][n % 2 * 2 + half] = pack_rounded<T>(dl[0], dl[1]);
        *pair_at(g_tile, row, column) = slopes[n / 2][n % 2 * 2 + half];
      }
    }

    for_orders<kOnceOrder>([&](auto order, auto first) {
      constexpr int kOrder = order, kFirst = first;
      float u[kOrder][2][4], da[2][4] = {};
      factors_from(u, kFirst);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t b[2][2];
        load_b_transposed<16>(b, out_tile, (kOrder - 1) * kOnceChannels + 16 * k, 0);
        mma_16x8x16<T>(da[0], slopes[k], b[0]);
        mma_16x8x16<T>(da[1], slopes[k], b[1]);
      }
#pragma unroll
      for (int j = 0; j < kOrder; ++j) {
        uint32_t du[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float value[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float each[kOrder];
#pragma unroll
            for (int other = 0; other < kOrder; ++other) each[other] = u[other][i / 2][2 * (i % 2) + e];
            value[e] = positive(product_of(each), da[i / 2][2 * (i % 2) + e]) * others(each, j);
          }
          du[i] = pack_rounded<T>(value[0], value[1]);
        }
        if (want_proj) keep(du_tile + (kFirst + j) * kOnceRows * 16, du);
        if (dx == nullptr) continue;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          uint32_t b[2][2];
          load_b_transposed<64>(b, proj_tile, (kFirst + j) * kOnceUnits, 2 * n);
          mma_16x8x16<T>(gradient[2 * n], du, b[0]);
          mma_16x8x16<T>(gradient[2 * n + 1], du, b[1]);
        }
      }
    });

    if (dx != nullptr) {
      const int64_t row0 = tile * kOnceRows + 16 * warp;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          *pair_at(dx_tile, 16 * warp + 8 * half + lane / 4, 8 * n + 2 * (lane % 4)) =
              pack_rounded<T>(gradient[n][2 * half], gradient[n][2 * half + 1]);
        }
      }
      __syncwarp();
      store_rows(dx_tile + 16 * warp * 64, 16, dx + row0 * channels, channels, count - row0, channels, lane, kLanes);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kOnceRows / 16; ++k) {
      uint32_t a[4], b[2][2];
      if (want_proj) {
        load_b_transposed<64>(b, x_tile, 16 * k, 2 * warp);
#pragma unroll
        for (int f = 0; f < kOnceFactors; ++f) {
          load_a_transposed<16>(a, du_tile, f * kOnceRows + 16 * k, 0);
          mma_16x8x16<T>(dproj[f][0], a, b[0]);
          mma_16x8x16<T>(dproj[f][1], a, b[1]);
        }
      }
      if (want_out) {
        load_b_transposed<64>(b, g_tile, 16 * k, 2 * warp);
#pragma unroll
        for (int r = 0; r < kOnceOrder; ++r) {
          load_a_transposed<16>(a, a_tile, r * kOnceRows + 16 * k, 0);
          mma_16x8x16<T>(dout[r][0], a, b[0]);
          mma_16x8x16<T>(dout[r][1], a, b[1]);
        }
      }
    }
    wait_copies<0>();
    __syncthreads();  // nobody uses this tile any more, and the next one is there
  }

  float* const to = parts + blockIdx.x * size;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int unit = 8 * (e / 2) + lane / 4, channel = 16 * warp + 8 * n + 2 * (lane % 4) + e % 2;
      if (unit >= hidden || channel >= channels) continue;
      if (want_proj) {
#pragma unroll
        for (int f = 0; f < kOnceFactors; ++f) to[(f * hidden + unit) * channels + channel] = dproj[f][n][e];
      }
      if (want_out) {
#pragma unroll
        for (int r = 0; r < kOnceOrder; ++r) to[out_at + (r * channels + channel) * hidden + unit] = dout[r][n][e];
      }
    }
  }
}

// Blocks of the form, 0 where it does not serve; sizes are padded.
inline int64_t once_blocks(const Problem& p, int form) {
  const bool fits =
      p.order == kOnceOrder && p.gates == 1 && p.channels <= kOnceChannels && p.hidden <= kOnceUnits && p.count > 0;
  if (!fits || (form != kAutomatic && form != kWhole)) return 0;
  const int64_t tiles = divide_up(p.count, kOnceRows), most = 2 * kProcessors;
  return tiles < most ? tiles : most;
}

}  // namespace dfkd::high_order
