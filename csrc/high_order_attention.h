// Mixed high-order attention: tiles in shared memory, and the two kernels that forward and backward share.
//
// Maps are rows of C numbers, one a position. Inside the kernels C and K are multiples of 8, so that every row begins
// at 16 bytes: the launchers copy maps and weights to padded ones where they are not.
#pragma once

#include "device.h"

namespace dfkd::high_order {

constexpr int kLargestOrder = 4;
constexpr int kDepth = 32;        // of a stage, along the dimension that a product sums over
constexpr int kStages = 3;        // of copies under way
constexpr int kHiddenWidth = 32;  // hidden units of a block in hidden_kernel
constexpr int kBlockRows = 64, kBlockColumns = 128;  // of a block in gate_kernel and input_kernel
#ifdef DFKD_HOST
constexpr int kProcessors = 1, kSums = 8;  // so that small tests reach every loop
#else
// Of the card that this is written for, and blocks for the sums over positions: the same bits wherever they run.
constexpr int kProcessors = 132, kSums = 2 * kProcessors;
#endif

__host__ __device__ constexpr int factors_of(int order) { return order * (order + 1) / 2; }

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

struct alignas(16) Chunk {
  uint32_t words[4];
};
struct alignas(8) FloatPair {
  float first, second;
};

// ---- tiles in shared memory ----------------------------------------------------------------------------------------

// A panel has rows of WIDTH elements, in chunks of 8 (16 bytes) that are permuted inside each 128 bytes, so that eight
// rows of one chunk, which is what a matrix load takes at once, lie in different banks. It repeats every 16 rows.
template <int WIDTH>
__device__ __forceinline__ int at(unsigned row, unsigned chunk) {
  static_assert(WIDTH == 16 || WIDTH == 32 || WIDTH == 64);
  const unsigned number = row * (WIDTH / 8) + chunk, line = number / 8;
  return static_cast<int>((line * 8 + ((number % 8) ^ (line % (WIDTH == 16 ? 4 : 8)))) * 8);
}

// Begin to copy rows to a panel. row_at gives where a row begins, or null for one of zeros; so are columns beyond.
template <int WIDTH, typename T, typename RowAt>
__device__ __forceinline__ void load_panel(T* panel, int rows, int columns, int thread, int threads, const T* any,
                                           RowAt row_at) {
  constexpr int kChunks = WIDTH / 8;
  for (int i = thread; i < rows * kChunks; i += threads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const T* from = row_at(row);
    const bool inside = from != nullptr && 8 * chunk < columns;
    copy_async_16(panel + at<WIDTH>(row, chunk), inside ? from + 8 * chunk : any, inside);
  }
}

// The same for rows of one matrix, whose first is at from and of which rows_inside exist.
template <int WIDTH, typename T>
__device__ __forceinline__ void load_rows(T* panel, int rows, const T* from, int64_t stride, int64_t rows_inside,
                                          int columns, int thread, int threads, const T* any) {
  load_panel<WIDTH>(panel, rows, columns, thread, threads, any,
                    [=](int row) { return row < rows_inside ? from + row * stride : nullptr; });
}

template <typename T>
__device__ __forceinline__ void store_rows(const T* panel, int rows, T* to, int64_t stride, int64_t rows_inside,
                                           int columns, int thread, int threads) {
  for (int i = thread; i < rows * 8; i += threads) {
    const int row = i / 8, chunk = i % 8;
    if (row < rows_inside && 8 * chunk < columns) {
      *reinterpret_cast<Chunk*>(to + row * stride + 8 * chunk) =
          *reinterpret_cast<const Chunk*>(panel + at<64>(row, chunk));
    }
  }
}

// Operand a (16 x 16) from a panel that has its rows, or its columns, as rows. row, a multiple of 16,
// and chunk are of its first element.
template <int WIDTH, typename T>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const T* panel, int row, int chunk) {
  const unsigned lane = threadIdx.x % kLanes;
  load_matrices(a, panel + row * WIDTH + at<WIDTH>(lane % 16, chunk + lane / 16));
}
template <int WIDTH, typename T>
__device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], const T* panel, int row, int chunk) {
  const unsigned lane = threadIdx.x % kLanes;
  load_matrices<true>(a, panel + row * WIDTH + at<WIDTH>(lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
}

// Operand b (16 x 8) twice, for neighbouring columns, from a panel that has its columns, or its rows, as rows.
template <int WIDTH, typename T>
__device__ __forceinline__ void load_b(uint32_t (&b)[2][2], const T* panel, int row, int chunk) {
  const unsigned lane = threadIdx.x % kLanes;
  uint32_t r[4];
  load_matrices(r, panel + row * WIDTH + at<WIDTH>(lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}
template <int WIDTH, typename T>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[2][2], const T* panel, int row, int chunk) {
  const unsigned lane = threadIdx.x % kLanes;
  uint32_t r[4];
  load_matrices<true>(r, panel + row * WIDTH + at<WIDTH>(lane % 16, chunk + lane / 16));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

// Steps of a product whose operands are copied kStages - 1 steps ahead: load(stage, step) begins copies, use takes
// them.
template <typename Load, typename Use>
__device__ __forceinline__ void pipeline(int steps, Load load, Use use) {
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step, step);
    commit_copies();
  }
  int stage = 0, free = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // shows this step's copies, and that nobody uses those of the step before any more
    if (step + kStages - 1 < steps) load(free, step + kStages - 1);
    commit_copies();
    use(stage, step);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    free = free + 1 == kStages ? 0 : free + 1;
  }
  wait_copies<0>();
}

// Two neighbouring elements in a panel of 64 columns.
template <typename T>
__device__ __forceinline__ uint32_t* pair_at(T* panel, int row, int column) {
  return reinterpret_cast<uint32_t*>(panel + at<64>(row, column / 8) + column % 8);
}
template <typename T>
__device__ __forceinline__ void unpack(uint32_t pair, float (&values)[2]) {
  values[0] = to_float(T{static_cast<uint16_t>(pair & 0xffffu)});
  values[1] = to_float(T{static_cast<uint16_t>(pair >> 16)});
}

// ---- the formulas --------------------------------------------------------------------------------------------------

// x where z is not at or below zero: a NaN in z passes, as torch's relu lets it.
__device__ __forceinline__ float positive(float z, float x) { return z <= 0.0f ? 0.0f : x; }

__device__ __forceinline__ float sigmoid(float logit) { return divide_fast(1.0f, 1.0f + exp_fast(-logit)); }

// A (1 - A) from the exponential below one: 1 - A would lose the digits of a shut gate.
__device__ __forceinline__ float spread(float logit) {
  const float e = exp_fast(-fabsf(logit));
  return divide_fast(e, (1.0f + e) * (1.0f + e));
}

// The product of the factors of one order, all or all but one.
template <int R>
__device__ __forceinline__ float product_of(const float (&u)[R]) {
  float z = u[0];
#pragma unroll
  for (int i = 1; i < R; ++i) z *= u[i];
  return z;
}
template <int R>
__device__ __forceinline__ float others(const float (&u)[R], int but) {
  float z = 1.0f;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    if (i != but) z *= u[i];
  }
  return z;
}

// Call f with every order from 1 to R as a constant, and where its first factor is.
template <int R, typename F>
__device__ __forceinline__ void for_orders(F f) {
  if constexpr (R > 1) for_orders<R - 1>(f);
  f(std::integral_constant<int, R>{}, std::integral_constant<int, factors_of(R - 1)>{});
}

// ---- hidden activations, through memory ----------------------------------------------------------------------------

template <int R>
constexpr int hidden_rows(int warps) {
  return warps * (R == 4 ? 16 : 32);
}
// Elements of one stage.
template <int R, bool GRADIENT>
constexpr int hidden_stage(int warps, int gates) {
  const int product = (hidden_rows<R>(warps) + factors_of(R) * kHiddenWidth) * kDepth;
  return product + (GRADIENT ? (gates * hidden_rows<R>(warps) + R * kHiddenWidth) * kDepth : 0);
}

// a (count, R, K) from x; or, with GRADIENT, du (count, factors, K) from x and dl (count, gates, C). A block has all
// factors of some hidden units, so that their products stay in registers: WARPS x 2 warps, each with 16 of 32 units.
template <typename T, int R, bool GRADIENT, int WARPS>
__global__ void __launch_bounds__(64 * WARPS, 4 / WARPS)
    hidden_kernel(const T* x, const T* slopes, const T* proj, const T* out, T* to, int64_t count, int channels,
                  int hidden, int gates) {
  constexpr int kFactors = factors_of(R), kTiles = R == 4 ? 1 : 2, kRows = hidden_rows<R>(WARPS), kThreads = 64 * WARPS;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kLanes, lane = thread % kLanes;
  const int warp_row = warp / 2 * 16 * kTiles, warp_unit = warp % 2 * 16;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows;
  const int unit0 = static_cast<int>(blockIdx.y) * kHiddenWidth;
  const int stage_size = hidden_stage<R, GRADIENT>(WARPS, gates);
  T* memory = reinterpret_cast<T*>(shared_memory());

  float u[kFactors][kTiles][2][4] = {};
  float da[GRADIENT ? R : 1][kTiles][2][4] = {};

  const auto load = [&](int stage, int step) {
    T* x_panel = memory + stage * stage_size;
    T* proj_panel = x_panel + kRows * kDepth;
    const int channel = step * kDepth, left = channels - channel;
    load_rows<kDepth>(x_panel, kRows, x + row0 * channels + channel, channels, count - row0, left, thread, kThreads, x);
    load_panel<kDepth>(proj_panel, kFactors * kHiddenWidth, left, thread, kThreads, proj, [=](int row) {
      const int unit = unit0 + row % kHiddenWidth;
      const T* from = proj + (static_cast<int64_t>(row / kHiddenWidth) * hidden + unit) * channels + channel;
      return unit < hidden ? from : nullptr;
    });
    if constexpr (GRADIENT) {
      T* slopes_panel = proj_panel + kFactors * kHiddenWidth * kDepth;
      T* out_panel = slopes_panel + gates * kRows * kDepth;
      for (int gate = 0; gate < gates; ++gate) {
        load_rows<kDepth>(slopes_panel + gate * kRows * kDepth, kRows,
                          slopes + (row0 * gates + gate) * channels + channel, static_cast<int64_t>(gates) * channels,
                          count - row0, left, thread, kThreads, x);
      }
      load_panel<kHiddenWidth>(out_panel, R * kDepth, hidden - unit0, thread, kThreads, out, [=](int row) {
        const T* from = out + (static_cast<int64_t>(row / kDepth) * channels + channel + row % kDepth) * hidden + unit0;
        return row % kDepth < left ? from : nullptr;
      });
    }
  };
  const auto use = [&](int stage, int) {
    const T* x_panel = memory + stage * stage_size;
    const T* proj_panel = x_panel + kRows * kDepth;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[kTiles][4], b[2][2];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) load_a<kDepth>(a[m], x_panel, warp_row + 16 * m, 2 * k);
#pragma unroll
      for (int f = 0; f < kFactors; ++f) {
        load_b<kDepth>(b, proj_panel, f * kHiddenWidth + warp_unit, 2 * k);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma_16x8x16<T>(u[f][m][0], a[m], b[0]);
          mma_16x8x16<T>(u[f][m][1], a[m], b[1]);
        }
      }
      if constexpr (GRADIENT) {
        const T* slopes_panel = proj_panel + kFactors * kHiddenWidth * kDepth;
        const T* out_panel = slopes_panel + gates * kRows * kDepth;
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if (r == 0 || gates > 1) {
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
              load_a<kDepth>(a[m], slopes_panel + r * kRows * kDepth, warp_row + 16 * m, 2 * k);
            }
          }
          load_b_transposed<kHiddenWidth>(b, out_panel, r * kDepth + 16 * k, warp_unit / 8);
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            mma_16x8x16<T>(da[r][m][0], a[m], b[0]);
            mma_16x8x16<T>(da[r][m][1], a[m], b[1]);
          }
        }
      }
    }
  };
  pipeline(static_cast<int>((channels + kDepth - 1) / kDepth), load, use);

  const int width = (GRADIENT ? kFactors : R) * hidden;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = row0 + warp_row + 16 * m + 8 * half + lane / 4;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int unit = unit0 + warp_unit + 8 * n + 2 * (lane % 4);
        if (row >= count || unit >= hidden) continue;
        T* const row_to = to + row * width + unit;
        for_orders<R>([&](auto order, auto first) {
          constexpr int kOrder = order, kFirst = first;
          float mine[2][kOrder], z[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int i = 0; i < kOrder; ++i) mine[e][i] = u[kFirst + i][m][n][2 * half + e];
            z[e] = product_of(mine[e]);
          }
          if constexpr (GRADIENT) {
            const float(&gradient)[4] = da[kOrder - 1][m][n];
            const float dz[2] = {positive(z[0], gradient[2 * half]), positive(z[1], gradient[2 * half + 1])};
#pragma unroll
            for (int i = 0; i < kOrder; ++i) {
              *reinterpret_cast<uint32_t*>(row_to + (kFirst + i) * hidden) =
                  pack_rounded<T>(dz[0] * others(mine[0], i), dz[1] * others(mine[1], i));
            }
          } else {
            *reinterpret_cast<uint32_t*>(row_to + (kOrder - 1) * hidden) =
                pack_rounded<T>(positive(z[0], z[0]), positive(z[1], z[1]));
          }
        });
      }
    }
  }
}

// ---- the gate, from hidden activations in memory -------------------------------------------------------------------

constexpr int kGateStage = (kBlockRows + kBlockColumns) * kDepth;
constexpr size_t gate_shared(bool gradient) {
  return 2 * static_cast<size_t>(kStages * kGateStage + (gradient ? 2 : 1) * kBlockRows * kBlockColumns);
}

// From a (count, order, K) to the result; or, with GRADIENT, to dl (count, gates, C), and to y, where it is not null,
// the part g A of the gradient of x. EACH: a gate an order. Four warps with 32 rows and 64 columns each.
template <typename T, bool GRADIENT, bool EACH>
__global__ void __launch_bounds__(128, 2)
    gate_kernel(const T* upstream, const T* x, const T* rectified, const T* out, T* y, T* slopes, int64_t count,
                int channels, int hidden, int order, int map) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kLanes, lane = thread % kLanes;
  const int warp_row = warp / 2 * 32, panel = warp % 2;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kBlockRows;
  const int column0 = static_cast<int>(blockIdx.y) * kBlockColumns;
  T* memory = reinterpret_cast<T*>(shared_memory());
  T* x_tile = memory + kStages * kGateStage;
  T* g_tile = x_tile + kBlockRows * kBlockColumns;
  const int units = (hidden + kDepth - 1) / kDepth, gates = EACH ? order : 1;

  // They arrive with the first step of the product.
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const int64_t from = row0 * channels + column0 + 64 * p;
    const int left = channels - column0 - 64 * p;
    if (!map) {
      load_rows<64>(x_tile + p * kBlockRows * 64, kBlockRows, x + from, channels, count - row0, left, thread, 128, x);
    }
    if constexpr (GRADIENT) {
      load_rows<64>(g_tile + p * kBlockRows * 64, kBlockRows, upstream + from, channels, count - row0, left, thread,
                    128, upstream);
    }
  }

  float logits[2][8][4] = {};
  float gate[EACH ? 2 : 1][8][4] = {};

  // Calls f(m, n, i, row, column) for each pair of elements; i is where its first is in a tile of registers.
  const auto each_pair = [&](auto f) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          f(m, n, 2 * half, warp_row + 16 * m + 8 * half + lane / 4, 8 * n + 2 * (lane % 4));
        }
      }
    }
  };
  T* const my_x = x_tile + panel * kBlockRows * 64;
  T* const my_g = g_tile + panel * kBlockRows * 64;
  const auto slope = [&](int m, int n, int i, int row, int column, float (&dl)[2]) {
    float value[2] = {1.0f, 1.0f}, g[2];
    if (!map) unpack<T>(*pair_at(my_x, row, column), value);
    unpack<T>(*pair_at(my_g, row, column), g);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      dl[e] = g[e] * value[e] * spread(logits[m][n][i + e]);
      if constexpr (EACH) dl[e] /= static_cast<float>(gates);
    }
  };

  const auto load = [&](int stage, int step) {
    T* a_panel = memory + stage * kGateStage;
    const int r = step / units, unit = step % units * kDepth;
    load_rows<kDepth>(a_panel, kBlockRows, rectified + (row0 * order + r) * hidden + unit,
                      static_cast<int64_t>(order) * hidden, count - row0, hidden - unit, thread, 128, rectified);
    load_rows<kDepth>(a_panel + kBlockRows * kDepth, kBlockColumns,
                      out + (static_cast<int64_t>(r) * channels + column0) * hidden + unit, hidden, channels - column0,
                      hidden - unit, thread, 128, out);
  };
  const auto use = [&](int stage, int step) {
    const T* a_panel = memory + stage * kGateStage;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[2][4], b[2][2];
      load_a<kDepth>(a[0], a_panel, warp_row, 2 * k);
      load_a<kDepth>(a[1], a_panel, warp_row + 16, 2 * k);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        load_b<kDepth>(b, a_panel + kBlockRows * kDepth, 64 * panel + 16 * n, 2 * k);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_16x8x16<T>(logits[m][2 * n], a[m], b[0]);
          mma_16x8x16<T>(logits[m][2 * n + 1], a[m], b[1]);
        }
      }
    }
    if constexpr (EACH) {
      if (step % units != units - 1) return;
      const int r = step / units;
      each_pair([&](int m, int n, int i, int row, int column) {
        if constexpr (GRADIENT) {
          float dl[2];
          slope(m, n, i, row, column, dl);
          const int c = column0 + 64 * panel + column;
          if (row0 + row < count && c < channels) {
            *reinterpret_cast<uint32_t*>(slopes + ((row0 + row) * gates + r) * channels + c) =
                pack_rounded<T>(dl[0], dl[1]);
          }
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          gate[m][n][i + e] += sigmoid(logits[m][n][i + e]);
          logits[m][n][i + e] = 0.0f;
        }
      });
    }
  };
  pipeline(order * units, load, use);

  // Each thread replaces in shared memory the elements that it alone reads.
  each_pair([&](int m, int n, int i, int row, int column) {
    float opened[2], value[2] = {1.0f, 1.0f};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if constexpr (EACH) {
        opened[e] = gate[m][n][i + e] / static_cast<float>(gates);
      } else {
        opened[e] = sigmoid(logits[m][n][i + e]);
      }
    }
    if constexpr (GRADIENT) {
      if constexpr (!EACH) {
        float dl[2];
        slope(m, n, i, row, column, dl);
        *pair_at(my_x, row, column) = pack_rounded<T>(dl[0], dl[1]);
      }
      unpack<T>(*pair_at(my_g, row, column), value);
      *pair_at(my_g, row, column) = pack_rounded<T>(value[0] * opened[0], value[1] * opened[1]);
    } else {
      if (!map) unpack<T>(*pair_at(my_x, row, column), value);
      *pair_at(my_x, row, column) = pack_rounded<T>(value[0] * opened[0], value[1] * opened[1]);
    }
  });
  __syncthreads();
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const int64_t to = row0 * channels + column0 + 64 * p;
    const int left = channels - column0 - 64 * p;
    if (GRADIENT && !EACH) {
      store_rows(x_tile + p * kBlockRows * 64, kBlockRows, slopes + to, channels, count - row0, left, thread, 128);
    }
    if (y != nullptr) {
      store_rows((GRADIENT ? g_tile : x_tile) + p * kBlockRows * 64, kBlockRows, y + to, channels, count - row0, left,
                 thread, 128);
    }
  }
}

// ---- launches of both ----------------------------------------------------------------------------------------------

enum Form { kAutomatic = 0, kWhole = 1, kSplit = 2, kSplitTall = 3 };

struct Problem {
  int64_t count;
  int channels, hidden, order, gates, map;
};

// Whether 32-bit sizes of one row, of the weights and of a grid suffice.
inline bool served(int64_t positions, int64_t channels, int64_t hidden, int64_t order) {
  return positions >= 0 && channels > 0 && hidden > 0 && order > 0 && order <= kLargestOrder && channels < (1 << 20) &&
         hidden < (1 << 20) && channels * hidden < (1 << 27) && positions < (int64_t{1} << 35);
}

// Whether a block of hidden_kernel takes 128 rows: where that leaves work for every processor.
inline bool tall(const Problem& p, int form) {
  if (p.order != 3) return false;
  if (form != kAutomatic) return form == kSplitTall;
  return divide_up(p.count, 128) * divide_up(p.hidden, kHiddenWidth) >= kProcessors;
}

template <typename T, bool GRADIENT, int R, int WARPS>
int launch_hidden_of(const Problem& p, const T* x, const T* slopes, const T* proj, const T* out, T* to, void* stream) {
  const dim3 blocks(static_cast<unsigned>(divide_up(p.count, hidden_rows<R>(WARPS))),
                    static_cast<unsigned>(divide_up(p.hidden, kHiddenWidth)));
  const size_t shared = 2 * static_cast<size_t>(kStages * hidden_stage<R, GRADIENT>(WARPS, p.gates));
  return launch(hidden_kernel<T, R, GRADIENT, WARPS>, blocks, dim3(64 * WARPS), shared, stream, x, slopes, proj, out,
                to, p.count, p.channels, p.hidden, p.gates);
}
template <typename T, bool GRADIENT>
int launch_hidden(const Problem& p, int form, const T* x, const T* slopes, const T* proj, const T* out, T* to,
                  void* stream) {
  switch (p.order) {
    case 1:
      return launch_hidden_of<T, GRADIENT, 1, 2>(p, x, slopes, proj, out, to, stream);
    case 2:
      return launch_hidden_of<T, GRADIENT, 2, 2>(p, x, slopes, proj, out, to, stream);
    case 3:
      return tall(p, form) ? launch_hidden_of<T, GRADIENT, 3, 4>(p, x, slopes, proj, out, to, stream)
                           : launch_hidden_of<T, GRADIENT, 3, 2>(p, x, slopes, proj, out, to, stream);
    default:
      return launch_hidden_of<T, GRADIENT, 4, 2>(p, x, slopes, proj, out, to, stream);
  }
}

// The form without gradient, for both launchers, in high_order_attention.cu: its kernels exist once.
int rectified(const Problem& p, int form, const float16* x, const float16* proj, const float16* out, float16* to,
              void* stream);
int rectified(const Problem& p, int form, const bfloat16* x, const bfloat16* proj, const bfloat16* out, bfloat16* to,
              void* stream);

template <typename T, bool GRADIENT>
int launch_gate(const Problem& p, const T* upstream, const T* x, const T* rectified, const T* out, T* y, T* slopes,
                void* stream) {
  const dim3 blocks(static_cast<unsigned>(divide_up(p.count, kBlockRows)),
                    static_cast<unsigned>(divide_up(p.channels, kBlockColumns)));
  return launch(p.gates > 1 ? gate_kernel<T, GRADIENT, true> : gate_kernel<T, GRADIENT, false>, blocks, dim3(128),
                gate_shared(GRADIENT), stream, upstream, x, rectified, out, y, slopes, p.count, p.channels, p.hidden,
                p.order, p.map);
}

// ---- padding -------------------------------------------------------------------------------------------------------

// Matrices (outer, rows, columns) with others sizes: cut off, or filled up with zeros.
template <typename T>
__global__ void resize_kernel(const T* from, T* to, int64_t size, int64_t rows_from, int64_t columns_from,
                              int64_t rows_to, int64_t columns_to) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
    const int64_t column = i % columns_to, row = i / columns_to % rows_to, outer = i / columns_to / rows_to;
    T value{};
    if (row < rows_from && column < columns_from) value = from[(outer * rows_from + row) * columns_from + column];
    to[i] = value;
  }
}

template <typename T>
int resize(const T* from, T* to, int64_t outer, int64_t rows_from, int64_t columns_from, int64_t rows_to,
           int64_t columns_to, void* stream) {
  const int64_t size = outer * rows_to * columns_to, blocks = divide_up(size, 256);
  return launch(resize_kernel<T>, dim3(static_cast<unsigned>(blocks < 2048 ? blocks : 2048)), dim3(256), 0, stream,
                from, to, size, rows_from, columns_from, rows_to, columns_to);
}

// Parts of the scratch one after the other; without a base only their size.
struct Parts {
  unsigned char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t elements) {
    T* const part = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += round_up(elements * static_cast<int64_t>(sizeof(T)), 16);
    return part;
  }
};

}  // namespace dfkd::high_order
