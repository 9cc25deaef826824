// Mixed high-order attention, forward: y = A x, or A alone; A = sigmoid(sum over r of out_r relu(prod_i proj_r,i x)).
//
// Not yet run on a card. For P positions of C channels, K = C / 4 and order 3: 4 P C bytes in a two-byte type, weights
// apart, and 4.5 P C^2 operations. Two forms, with matrix products of 16-bit values added up in float32:
//
// whole: for up to 128 channels and order 3, where memory is the limit. A block keeps all weights in shared memory;
//   each of its warps takes rows of x (32 of 64 channels, 16 of 128), copying those that it takes next meanwhile, and
//   no intermediate leaves its registers: the accumulators of the factors, multiplied and rectified, are the left
//   operand of the second product as they lie. Warps wait for nobody but themselves.
// split: for more channels, where the products are the limit. a = relu(z) is written once and read by the second
//   product, 0.75 P C numbers for K = C / 4. A block has all six factors of its hidden units, so that z never leaves
//   registers.
//
// a is rounded to the type of the weights before the second product, as the reference rounds it; nothing else is.
#include "high_order_attention.h"

namespace {

using namespace dfkd;
using namespace dfkd::high_order;

constexpr int kWholeWarps = 4, kWholeOrder = 3;
// Blocks a processor that registers are kept down for; ptxas finds no way without spills for more on older ones.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kWholeBlocks = 2;
#else
constexpr int kWholeBlocks = 3;
#endif
constexpr size_t kWholeShared = 113 * 1024;  // two blocks a processor

// Rows of a warp: as many as registers hold the logits of.
constexpr int whole_rows(int panels, bool each) { return panels == 1 && !each ? 32 : 16; }

// PANELS of 64 channels, up to order 3; EACH: a gate an order.
template <typename T, int PANELS, bool EACH>
__global__ void __launch_bounds__(kLanes * kWholeWarps, PANELS == 1 && !EACH ? kWholeBlocks : 2)
    whole_kernel(const T* x, const T* proj, const T* out, T* y, int64_t count, int channels, int hidden, int order,
                 int map) {
  constexpr int kRows = whole_rows(PANELS, EACH), kTiles = kRows / 16, kThreads = kLanes * kWholeWarps;
  constexpr int kColumns = 64 * PANELS, kColumnTiles = kColumns / 8;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kLanes, lane = thread % kLanes;
  const int units = (hidden + 15) / 16 * 16, factors = factors_of(order);
  T* const proj_tile = reinterpret_cast<T*>(shared_memory());         // PANELS x (factors, units, 64)
  T* const out_tile = proj_tile + factors * units * kColumns;         // (order, units / 16) x (kColumns, 16)
  T* const mine = out_tile + order * units * kColumns + warp * 2 * kRows * kColumns;  // 2 x PANELS x (kRows, 64)
  const int64_t tiles = (count + kRows * kWholeWarps - 1) / (kRows * kWholeWarps);

  const auto load = [&](int stage, int64_t tile) {
    const int64_t row0 = (tile * kWholeWarps + warp) * kRows;
#pragma unroll
    for (int p = 0; p < PANELS; ++p) {
      load_rows<64>(mine + (stage * PANELS + p) * kRows * 64, kRows, x + row0 * channels + 64 * p, channels,
                    count - row0, channels - 64 * p, lane, kLanes, x);
    }
  };

  for (int p = 0; p < PANELS; ++p) {
    load_panel<64>(proj_tile + p * factors * units * 64, factors * units, channels - 64 * p, thread, kThreads, proj,
                   [=](int row) {
                     const int factor = row / units, unit = row % units;
                     return unit < hidden ? proj + (factor * hidden + unit) * channels + 64 * p : nullptr;
                   });
  }
  for (int r = 0; r < order; ++r) {
    for (int unit = 0; unit < units; unit += 16) {
      load_rows<16>(out_tile + (r * units + unit) * kColumns, kColumns, out + r * channels * hidden + unit, hidden,
                    channels, hidden - unit, thread, kThreads, out);
    }
  }
  load(0, blockIdx.x);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  int stage = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, stage = 1 - stage) {
    if (tile + gridDim.x < tiles) load(1 - stage, tile + gridDim.x);
    commit_copies();
    T* const x_tile = mine + stage * PANELS * kRows * 64;
    float logits[kTiles][kColumnTiles][4] = {};
    float gate[EACH ? kTiles : 1][kColumnTiles][4] = {};

    for_orders<kWholeOrder>([&](auto r, auto first) {
      constexpr int kOrder = r, kFirst = first;
      if (kOrder > order) return;
      for (int unit = 0; unit < units; unit += 16) {
        float u[kOrder][kTiles][2][4] = {};
#pragma unroll
        for (int k = 0; k < 4 * PANELS; ++k) {
          uint32_t a[kTiles][4], b[2][2];
#pragma unroll
          for (int m = 0; m < kTiles; ++m) load_a<64>(a[m], x_tile, k / 4 * kRows + 16 * m, k % 4 * 2);
#pragma unroll
          for (int i = 0; i < kOrder; ++i) {
            load_b<64>(b, proj_tile, (k / 4 * factors + kFirst + i) * units + unit, k % 4 * 2);
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
              mma_16x8x16<T>(u[i][m][0], a[m], b[0]);
              mma_16x8x16<T>(u[i][m][1], a[m], b[1]);
            }
          }
        }
        uint32_t rectified[kTiles][4];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            float z[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float each[kOrder];
#pragma unroll
              for (int i = 0; i < kOrder; ++i) each[i] = u[i][m][n][e];
              const float product = product_of(each);
              z[e] = positive(product, product);
            }
            rectified[m][2 * n] = pack_rounded<T>(z[0], z[1]);
            rectified[m][2 * n + 1] = pack_rounded<T>(z[2], z[3]);
          }
        }
#pragma unroll
        for (int n = 0; n < kColumnTiles / 2; ++n) {
          uint32_t b[2][2];
          load_b<16>(b, out_tile, (kOrder - 1) * units / 16 * kColumns + unit / 16 * kColumns + 16 * n, 0);
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            mma_16x8x16<T>(logits[m][2 * n], rectified[m], b[0]);
            mma_16x8x16<T>(logits[m][2 * n + 1], rectified[m], b[1]);
          }
        }
      }
      if constexpr (EACH) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              gate[m][n][e] += sigmoid(logits[m][n][e]);
              logits[m][n][e] = 0.0f;
            }
          }
        }
      }
    });

    // Each lane replaces in shared memory the elements that it alone reads from here on.
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t* const pair = pair_at(x_tile + n / 8 * kRows * 64, 16 * m + 8 * half + lane / 4,
                                         n % 8 * 8 + 2 * (lane % 4));
          float value[2] = {1.0f, 1.0f};
          if (!map) unpack<T>(*pair, value);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if constexpr (EACH) {
              value[e] *= gate[m][n][2 * half + e] / static_cast<float>(order);
            } else {
              value[e] *= sigmoid(logits[m][n][2 * half + e]);
            }
          }
          *pair = pack_rounded<T>(value[0], value[1]);
        }
      }
    }
    __syncwarp();
    const int64_t row0 = (tile * kWholeWarps + warp) * kRows;
#pragma unroll
    for (int p = 0; p < PANELS; ++p) {
      store_rows(x_tile + p * kRows * 64, kRows, y + row0 * channels + 64 * p, channels, count - row0,
                 channels - 64 * p, lane, kLanes);
    }
    wait_copies<0>();
    __syncwarp();
  }
}

// Bytes of shared memory; 0 where the form does not serve.
size_t whole_shared(const Problem& p) {
  if (p.channels > 128 || p.order > kWholeOrder) return 0;
  const int panels = p.channels > 64 ? 2 : 1, rows = whole_rows(panels, p.gates > 1);
  const int64_t weights = (factors_of(p.order) + p.order) * round_up(p.hidden, 16);
  const int64_t bytes = 2 * (weights + 2 * kWholeWarps * rows) * 64 * panels;
  return bytes > static_cast<int64_t>(kWholeShared) ? 0 : static_cast<size_t>(bytes);
}

template <typename T, int PANELS>
int launch_whole(const Problem& p, const T* x, const T* proj, const T* out, T* y, void* stream) {
  const int64_t tiles = divide_up(p.count, whole_rows(PANELS, p.gates > 1) * kWholeWarps);
  const int64_t most = (PANELS == 1 && p.gates == 1 ? 3 : 2) * kProcessors;
  return launch(p.gates > 1 ? whole_kernel<T, PANELS, true> : whole_kernel<T, PANELS, false>,
                dim3(static_cast<unsigned>(tiles < most ? tiles : most)), dim3(kLanes * kWholeWarps), whole_shared(p),
                stream, x, proj, out, y, p.count, p.channels, p.hidden, p.order, p.map);
}

// What lies in the scratch; null where it is not needed.
template <typename T>
struct Buffers {
  bool whole;
  int64_t channels, hidden;  // padded
  T *x, *y, *proj, *out, *rectified;
  int64_t bytes;

  Buffers(const Problem& p, int form, void* scratch)
      : channels(round_up(p.channels, 8)), hidden(round_up(p.hidden, 8)) {
    const int64_t factors = factors_of(p.order);
    whole = (form == kAutomatic || form == kWhole) && whole_shared(p) > 0;
    const bool channels_off = channels != p.channels, weights_off = channels_off || hidden != p.hidden;
    Parts parts{static_cast<unsigned char*>(scratch)};
    x = parts.template take<T>(channels_off ? p.count * channels : 0);
    y = parts.template take<T>(channels_off ? p.count * channels : 0);
    proj = parts.template take<T>(weights_off ? factors * hidden * channels : 0);
    out = parts.template take<T>(weights_off ? p.order * channels * hidden : 0);
    rectified = parts.template take<T>(whole ? 0 : p.count * p.order * hidden);
    bytes = parts.used;
  }
};

template <typename T>
int forward(Problem p, int form, const T* x, const T* proj, const T* out, T* y, void* scratch, void* stream) {
  const Buffers<T> buffers(p, form, scratch);
  if ((form == kWhole && !buffers.whole) || (buffers.bytes > 0 && scratch == nullptr)) return DFKD_INVALID;
  const int64_t channels = p.channels, hidden = p.hidden;
  const bool channels_off = buffers.channels != channels, weights_off = channels_off || buffers.hidden != hidden;
  T* to = y;
  if (channels_off) {
    if (int error = resize(x, buffers.x, 1, p.count, channels, p.count, buffers.channels, stream)) return error;
    x = buffers.x;
    to = buffers.y;
  }
  if (weights_off) {
    if (int error = resize(proj, buffers.proj, factors_of(p.order), hidden, channels, buffers.hidden, buffers.channels,
                           stream)) {
      return error;
    }
    if (int error = resize(out, buffers.out, p.order, channels, hidden, buffers.channels, buffers.hidden, stream)) {
      return error;
    }
    proj = buffers.proj;
    out = buffers.out;
  }
  p.channels = static_cast<int>(buffers.channels);
  p.hidden = static_cast<int>(buffers.hidden);
  if (buffers.whole) {
    const int error = p.channels > 64 ? launch_whole<T, 2>(p, x, proj, out, to, stream)
                                      : launch_whole<T, 1>(p, x, proj, out, to, stream);
    if (error) return error;
  } else {
    T* const none = nullptr;
    if (int error = rectified(p, form, x, proj, out, buffers.rectified, stream)) return error;
    if (int error = launch_gate<T, false>(p, none, x, buffers.rectified, out, to, none, stream)) return error;
  }
  return channels_off ? resize(buffers.y, y, 1, p.count, buffers.channels, p.count, channels, stream) : 0;
}

}  // namespace

namespace dfkd::high_order {

int rectified(const Problem& p, int form, const float16* x, const float16* proj, const float16* out, float16* to,
              void* stream) {
  return launch_hidden<float16, false>(p, form, x, nullptr, proj, out, to, stream);
}
int rectified(const Problem& p, int form, const bfloat16* x, const bfloat16* proj, const bfloat16* out, bfloat16* to,
              void* stream) {
  return launch_hidden<bfloat16, false>(p, form, x, nullptr, proj, out, to, stream);
}

}  // namespace dfkd::high_order

extern "C" {

int64_t dfkd_high_order_attention_scratch(int64_t positions, int64_t channels, int64_t hidden, int64_t order, int mode,
                                          int form) {
  if (!served(positions, channels, hidden, order)) return 0;
  const int orders = static_cast<int>(order);
  const Problem p{positions, static_cast<int>(channels), static_cast<int>(hidden), orders, mode ? orders : 1, 0};
  return Buffers<float16>(p, form, nullptr).bytes;
}

int dfkd_high_order_attention(const void* x, const void* proj_weight, const void* out_weight, int64_t positions,
                              int64_t channels, int64_t hidden, int64_t order, int dtype, int mode, int result,
                              int form, void* y, void* scratch, void* stream) {
  if (!served(positions, channels, hidden, order)) return DFKD_INVALID;
  const int orders = static_cast<int>(order);
  const Problem p{positions, static_cast<int>(channels), static_cast<int>(hidden), orders, mode ? orders : 1, result};
  return with_type(dtype, [=](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      if (positions == 0) return 0;
      return forward(p, form, static_cast<const T*>(x), static_cast<const T*>(proj_weight),
                     static_cast<const T*>(out_weight), static_cast<T*>(y), scratch, stream);
    } else {
      return DFKD_INVALID;
    }
  });
}
}
