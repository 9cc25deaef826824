// Mixed high-order attention, backward on sm_90a: the chain from features to gradients of the features, for wide maps.
//
// Sizes inside are padded to C = 128 RANKS channels and K = 32 RANKS hidden units of each order: tiles have zeros
// where there is nothing, and factors that are zero have gradients that are.
#pragma once

#include "high_order_attention.h"

namespace dfkd::high_order::back {

constexpr int kSliceChannels = 128, kSliceUnits = 32;  // of each block of a cluster
constexpr int kPanelBytes = 64 * 64 * 2;               // 64 rows of 64 elements

// A PipelineState of STAGES in one number, as registers are few.
template <int STAGES>
struct PackedPipelineState {
  unsigned place = 0;  // 2 stage + parity

  __device__ __forceinline__ int stage() const { return static_cast<int>(place / 2); }
  __device__ __forceinline__ int parity() const { return static_cast<int>(place % 2); }
  __device__ __forceinline__ void next() {
    place += 2;
    if (place >= 2 * STAGES) place = place % 2 ^ 1;
  }
};

// Two ones.
template <typename T>
constexpr uint32_t kOnePair = std::is_same_v<T, bfloat16> ? 0x3f803f80u : 0x3c003c00u;

// A and its slope A (1 - A) from one exponential, of what is not above zero.
__device__ __forceinline__ void open_gate(float logit, float& gate, float& slope) {
  const float e = exp2_approx_ftz(-kLog2E * fabsf(logit)), d = reciprocal_fast(1.0f + e);
  gate = logit < 0.0f ? e * d : d;
  slope = e * d * d;
}

// threadIdx.x, read here and now: what is computed of it is not kept in registers from elsewhere.
__device__ __forceinline__ int thread_anew() {
#ifdef DFKD_HOST
  return static_cast<int>(threadIdx.x);
#else
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#endif
}

// Pairs of neighbouring elements of a thread's fragments in a panel of 64 rows of WIDTH: row 16 w + g of its warpgroup,
// or the one 8 further, columns 8 n + 2 t and the next. Only exclusive or puts n into place: no address need be kept.
template <int WIDTH>
struct Pairs {
  int place;

  __device__ __forceinline__ Pairs() {
    const int thread = thread_anew();
    const int row = thread % kWarpgroupSize / kWarpSize * 16 + thread % kWarpSize / 4;
    place = 2 * swizzle_offset<WIDTH>(row, 0) + thread % 4 * 4;
  }
  __device__ __forceinline__ uint32_t* at(unsigned char* panel, int half, int n) const {
    return reinterpret_cast<uint32_t*>(panel + (place ^ (16 * n)) + half * 8 * WIDTH * 2);
  }
};

// Calls use(n, half, x, g) for the pairs of a thread in panels of x, or ones where features has no bits, and of the
// gradient. BATCH of each are read at a time, before use writes to shared memory.
template <typename T, int BATCH, typename Use>
__device__ __forceinline__ void each_pair(const Pairs<64>& wide, unsigned char* x_panel, unsigned char* g_panel,
                                          uint32_t features, Use use) {
#pragma unroll
  for (int begin = 0; begin < 16; begin += BATCH) {
    uint32_t x[BATCH], g[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int n = (begin + i) / 2, half = (begin + i) % 2;
      x[i] = (*wide.at(x_panel, half, n) & features) | (kOnePair<T> & ~features);
      g[i] = *wide.at(g_panel, half, n);
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) use((begin + i) / 2, (begin + i) % 2, x[i], g[i]);
  }
}

// Gradients of the factors of one order from these factors and da, both of two hidden units, to be rounded.
template <typename T, int R>
__device__ __forceinline__ void factor_gradients(const float (&u)[2][R], const float (&da)[2], uint32_t (&du)[R]) {
  const float dz[2] = {positive(product_of(u[0]), da[0]), positive(product_of(u[1]), da[1])};
#pragma unroll
  for (int i = 0; i < R; ++i) du[i] = pack_rn<T>(dz[0] * others(u[0], i), dz[1] * others(u[1], i));
}

// From a warpgroup's factors of 8 CHUNKS hidden units of each: a to chunks from `first` on of three panels of 64 x 32,
// and two of a factor at a time, rounded, to keep(f, n, half).
template <typename T, int CHUNKS, typename Keep>
__device__ __forceinline__ void rectify_slice(const float (&u)[kFactors * CHUNKS][4], unsigned char* panels, int first,
                                              Keep keep) {
  const Pairs<32> narrow;
#pragma unroll
  for (int n = 0; n < CHUNKS; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for_orders<kOrders>([&](auto order, auto begin) {
        constexpr int kOrder = order, kFirst = begin;
        float z[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float mine[kOrder];
#pragma unroll
          for (int i = 0; i < kOrder; ++i) mine[i] = u[CHUNKS * (kFirst + i) + n][2 * half + e];
          z[e] = product_of(mine);
        }
        *narrow.at(panels + (kOrder - 1) * 64 * 32 * 2, half, first + n) =
            pack_rn<T>(positive(z[0], z[0]), positive(z[1], z[1]));
      });
#pragma unroll
      for (int f = 0; f < kFactors; ++f) {
        keep(f, n, half) = pack_rn<T>(u[CHUNKS * f + n][2 * half], u[CHUNKS * f + n][2 * half + 1]);
      }
    }
  }
}

// Their gradients, from what was kept and da, to six panels of 64 x 32.
template <typename T, int CHUNKS, typename Keep>
__device__ __forceinline__ void factor_gradients_slice(Keep keep, const float (&da)[kOrders * CHUNKS][4],
                                                       unsigned char* panels, int first) {
  const Pairs<32> narrow;
#pragma unroll
  for (int n = 0; n < CHUNKS; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for_orders<kOrders>([&](auto order, auto begin) {
        constexpr int kOrder = order, kFirst = begin;
        float u[2][kOrder];
#pragma unroll
        for (int i = 0; i < kOrder; ++i) {
          float pair[2];
          unpack_pair<T>(keep(kFirst + i, n, half), pair);
          u[0][i] = pair[0], u[1][i] = pair[1];
        }
        const float(&gradient)[4] = da[CHUNKS * (kOrder - 1) + n];
        uint32_t du[kOrder];
        factor_gradients<T>(u, {gradient[2 * half], gradient[2 * half + 1]}, du);
#pragma unroll
        for (int i = 0; i < kOrder; ++i) *narrow.at(panels + (kFirst + i) * 64 * 32 * 2, half, first + n) = du[i];
      });
    }
  }
}

// ---- the chain ------------------------------------------------------------------------------------------------------

// Tensors and tiles of a launch. What hidden activations go through memory: a (positions, 3, K), dl (positions, gates,
// C) and du (positions, 6, K).
struct ChainMaps {
  TensorMap x, proj_units, a, out_channels, x_slice, grad_output, slopes, out_units, factors, proj_channels;
  TensorMap a_to, slopes_to, factors_to, dx_to;
};

// A cluster of RANKS blocks has GROUPS x 64 positions. Each block computes 32 hidden units of every factor and 128
// channels of logits and dx: GROUPS warpgroups with 64 positions each. EACH: a gate an order. features: all bits, or
// none where the result is the map.
template <int RANKS, int GROUPS, bool EACH>
struct Chain {
  static constexpr int kRows = 64 * GROUPS, kRowsOfRank = kRows / RANKS;
  static constexpr int kChannels = kSliceChannels * RANKS, kUnits = kSliceUnits * RANKS;
  static constexpr int kUnitWidth = RANKS == 1 ? 32 : 64;  // of a panel of a, which has one order
  static constexpr int kGates = EACH ? kOrders : 1;
  static constexpr int kLeft = GROUPS * kPanelBytes, kRight = kFactors * kSliceUnits * 64 * 2;
  static constexpr int kStages = GROUPS == 2 ? 4 : 3, kStage = kLeft + kRight;
  static constexpr int kKeptOfGroup = kFactors * kSliceUnits * 64 * 2;  // du, the largest of what a warpgroup stores
  static constexpr int kKept = kStages * kStage, kBarriers = kKept + GROUPS * kKeptOfGroup;
  static constexpr size_t kShared = kBarriers + 8 * (2 * kStages + 3);
  static constexpr int kPanels = kChannels / 64, kLogitSteps = kUnits / kUnitWidth;  // of one order
  static constexpr int kInputSteps = kFactors * kUnits / 64;
  static constexpr int kThreads = kWarpgroupSize * (GROUPS + 1);
};

template <typename T, int RANKS, int GROUPS, bool EACH>
__global__ void __launch_bounds__(kWarpgroupSize * (GROUPS + 1), 1)
    chain_wgmma(const __grid_constant__ ChainMaps maps, int tiles, int order, uint32_t features, int needs_grad_factors,
                 int needs_grad_x) {
  using Sizes = Chain<RANKS, GROUPS, EACH>;
  const int thread = static_cast<int>(threadIdx.x), group = thread / kWarpgroupSize, lane = thread % kWarpSize;
  const int warp = thread / kWarpSize % 4;
  unsigned char* const memory = shared_memory();
  Barrier* const full = reinterpret_cast<Barrier*>(memory + Sizes::kBarriers);
  Barrier* const empty = full + Sizes::kStages;
  Barrier* const ready = empty + Sizes::kStages;  // a, dl and du of the whole cluster are in memory
  const int first_tile = static_cast<int>(blockIdx.x) / RANKS, tile_step = static_cast<int>(gridDim.x) / RANKS;

  if (thread == 0) {
    for (int i = 0; i < Sizes::kStages; ++i) {
      mbarrier_init(full + i, 2);
      mbarrier_init(empty + i, 4 * GROUPS * RANKS);
    }
    for (int i = 0; i < 3; ++i) mbarrier_init(ready + i, GROUPS * RANKS);
    fence_barrier_init();
  }
  if constexpr (RANKS == 1) {
    __syncthreads();
  } else {
    cluster_sync();
  }

  PackedPipelineState<Sizes::kStages> ring;
  if (group == GROUPS) {
    warpgroup_reg_dealloc<GROUPS == 2 ? 40 : 32>();
    const int rank = RANKS == 1 ? 0 : cluster_rank();
    // One thread brings left operands, which wait for other blocks, and one the right ones ahead of it.
    const auto acquire = [&](int bytes) {
      mbarrier_wait(empty + ring.stage(), ring.parity() ^ 1);
      mbarrier_arrive_expect_tx(full + ring.stage(), bytes);
      return memory + ring.stage() * Sizes::kStage;
    };
    if (warp == 0 && lane == 0) {
      prefetch_tensormap(maps.proj_units);
      prefetch_tensormap(maps.out_channels);
      prefetch_tensormap(maps.grad_output);
      prefetch_tensormap(maps.out_units);
      prefetch_tensormap(maps.proj_channels);
      const int channel = kSliceChannels * rank, unit = kSliceUnits * rank;
      for (int tile = first_tile; tile < tiles; tile += tile_step) {
        const auto right = [&](const TensorMap& from, int bytes, int x, int y, int z) {
          unsigned char* const to = acquire(bytes) + Sizes::kLeft;
          tma_load(to, from, x, y, z, full + ring.stage());
          ring.next();
        };
        for (int panel = 0; panel < Sizes::kPanels; ++panel) {
          right(maps.proj_units, Sizes::kRight, 64 * panel, unit, 0);
        }
        for (int r = 0; r < kOrders; ++r) {
          for (int step = 0; step < Sizes::kLogitSteps; ++step) {
            right(maps.out_channels, kSliceChannels * Sizes::kUnitWidth * 2, Sizes::kUnitWidth * step, channel, r);
          }
          if (!EACH && r < kOrders - 1) continue;
          for (int panel = 0; panel < 2; ++panel) {
            right(maps.grad_output, Sizes::kLeft, channel + 64 * panel, Sizes::kRows * tile, 0);
          }
        }
        for (int r = 0; needs_grad_factors && r < Sizes::kGates; ++r) {
          for (int panel = 0; panel < Sizes::kPanels; ++panel) {
            right(maps.out_units, (EACH ? 1 : kOrders) * kSliceUnits * 64 * 2, unit, 64 * panel, r);
          }
        }
        for (int step = 0; needs_grad_x && step < Sizes::kInputSteps; ++step) {
          unsigned char* const to = acquire(2 * kPanelBytes) + Sizes::kLeft;
          const int y = 64 * step % Sizes::kUnits, z = 64 * step / Sizes::kUnits;
          for (int p = 0; p < 2; ++p) {
            tma_load(to + p * kPanelBytes, maps.proj_channels, channel + 64 * p, y, z, full + ring.stage());
          }
          ring.next();
        }
      }
    } else if (warp == 1 && lane == 0) {
      prefetch_tensormap(maps.x);
      prefetch_tensormap(maps.a);
      prefetch_tensormap(maps.x_slice);
      prefetch_tensormap(maps.slopes);
      int parity = 0;
      for (int tile = first_tile; tile < tiles; tile += tile_step, parity ^= 1) {
        // Each block of the cluster brings its part of what all of them need.
        const auto left = [&](const TensorMap& from, int width, int x) {
          const int part = rank * Sizes::kRowsOfRank, row = Sizes::kRows * tile + part;
          unsigned char* const to = acquire(Sizes::kRows * width * 2) + part * width * 2;
          if constexpr (RANKS == 1) {
            tma_load(to, from, x, row, 0, full + ring.stage());
          } else {
            tma_load_multicast((1u << RANKS) - 1, to, from, x, row, 0, full + ring.stage());
          }
          ring.next();
        };
        const auto wait_ready = [&](int which) {
          mbarrier_wait_cluster(ready + which, parity);
          fence_proxy_async_global();
        };
        for (int panel = 0; panel < Sizes::kPanels; ++panel) left(maps.x, 64, 64 * panel);
        wait_ready(0);
        for (int r = 0; r < kOrders; ++r) {
          for (int step = 0; step < Sizes::kLogitSteps; ++step) {
            left(maps.a, Sizes::kUnitWidth, r * Sizes::kUnits + Sizes::kUnitWidth * step);
          }
          if (!EACH && r < kOrders - 1) continue;
          for (int panel = 0; panel < 2; ++panel) {
            unsigned char* const to = acquire(Sizes::kLeft);
            tma_load(to, maps.x_slice, kSliceChannels * rank + 64 * panel, Sizes::kRows * tile, 0,
                     full + ring.stage());
            ring.next();
          }
        }
        wait_ready(1);
        for (int panel = 0; needs_grad_factors && panel < Sizes::kGates * Sizes::kPanels; ++panel) {
          left(maps.slopes, 64, 64 * panel);
        }
        if (needs_grad_factors) wait_ready(2);
        for (int step = 0; needs_grad_x && step < Sizes::kInputSteps; ++step) left(maps.factors, 64, 64 * step);
      }
    }
  } else {
    warpgroup_reg_alloc<GROUPS == 2 ? 232 : 160>();
    // Which warpgroup this is, and what it stores; read where they are used, as registers are few.
    const auto mine = [] { return thread_anew() / kWarpgroupSize; };
    const auto panels = [=] { return memory + Sizes::kKept + mine() * Sizes::kKeptOfGroup; };
    const auto slice = [] { return RANKS == 1 ? 0 : cluster_rank(); };
    const auto elected = [] { return thread_anew() % kWarpgroupSize == 0; };
    if (thread % kWarpgroupSize == 0) {
      prefetch_tensormap(maps.a_to);
      prefetch_tensormap(maps.slopes_to);
    }

    const auto release = [&](int stage) {
      if constexpr (RANKS == 1) {
        if (thread_anew() % kWarpSize == 0) mbarrier_arrive(empty + stage);
      } else {
        const int other = thread_anew() % kWarpSize;
        if (other < RANKS) mbarrier_arrive_cluster_relaxed(empty + stage, other);
      }
    };
    // d += the sum of so many steps: issue(left, right) asks for the products of one.
    const auto products = [&](auto& d, int steps, auto issue) {
      int before = 0;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        mbarrier_wait(full + ring.stage(), ring.parity());
        unsigned char* const at_stage = memory + ring.stage() * Sizes::kStage;
        warpgroup_fence_operand(d);
        warpgroup_arrive();
        issue(at_stage, at_stage + Sizes::kLeft);
        warpgroup_commit_batch();
        if (step > 0) {
          warpgroup_wait<1>();
          release(before);
        }
        before = ring.stage();
        ring.next();
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(d);
      release(before);
    };
    // Before panels of this warpgroup are written, and after it: store them, and tell the cluster where they are next.
    const auto begin_panels = [&] {
      if (elected()) tma_store_wait_read<0>();
      named_barrier_sync(1 + mine(), kWarpgroupSize);
    };
    const auto end_panels = [&](int tell, auto store) {
      fence_proxy_async();
      named_barrier_sync(1 + mine(), kWarpgroupSize);
      if (elected()) {
        store();
        tma_store_commit();
        if (tell >= 0) {
          tma_store_wait<0>();
          fence_proxy_async_global();
        }
      }
      const int other = thread_anew() % kWarpgroupSize;
      if (tell >= 0 && other < kWarpSize) {
        __syncwarp();
        if constexpr (RANKS == 1) {
          if (other == 0) mbarrier_arrive(ready + tell);
        } else {
          if (other < RANKS) mbarrier_arrive_cluster(ready + tell, other);
        }
      }
    };

#pragma unroll 1
    for (int tile = first_tile; tile < tiles; tile += tile_step) {
      const auto row0 = [=] { return Sizes::kRows * tile + 64 * mine(); };
      // In registers, of two units: n and the half are the last index. Where these are few, two factors lie where dl is
      // not and their gradients will be.
      constexpr int kInRegisters = GROUPS == 2 ? kFactors : kFactors - 2;
      uint32_t factors[kInRegisters * 2][4];
      const auto in_factors = [&] {
        return [&factors, pairs = Pairs<32>(), to = panels()](int f, int n, int half) -> uint32_t& {
          if (f >= kInRegisters) return *pairs.at(to + f * 64 * kSliceUnits * 2, half, n);
          return factors[f * 2 % (kInRegisters * 2) + n / 2][n % 2 * 2 + half];
        };
      };
      {
        float u[kFactors * kSliceUnits / 8][4] = {};
        products(u, Sizes::kPanels, [&](unsigned char* left, unsigned char* right) {
          const uint64_t a = make_smem_desc<64>(left + mine() * kPanelBytes), b = make_smem_desc<64>(right);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            wgmma<T, kFactors * kSliceUnits>(u, advance_desc(a, 32 * k), advance_desc(b, 32 * k), true);
          }
        });
        begin_panels();
        rectify_slice<T, 4>(u, panels(), 0, in_factors());
        warpgroup_fence_operand(factors);  // rounded here, not where they are used
        end_panels(0, [&] {
          for (int r = 0; r < kOrders; ++r) {
            tma_store(maps.a_to, panels() + r * 64 * kSliceUnits * 2, r * Sizes::kUnits + kSliceUnits * slice(),
                      row0(), 0);
          }
        });
      }

      uint32_t through[8][4];  // g A, of two elements
      {
        float gates[EACH ? 16 : 1][4] = {};
#pragma unroll 1
        for (int r = 0; r < Sizes::kGates; ++r) {
          [[maybe_unused]] const float share = r < order ? 1.0f / static_cast<float>(order) : 0.0f;
          float logits[16][4] = {};
          products(logits, (EACH ? 1 : kOrders) * Sizes::kLogitSteps,
                   [&](unsigned char* left, unsigned char* right) {
                     constexpr int kWidth = Sizes::kUnitWidth;
                     const uint64_t a = make_smem_desc<kWidth>(left + mine() * 64 * kWidth * 2);
                     const uint64_t b = make_smem_desc<kWidth>(right);
#pragma unroll
                     for (int k = 0; k < kWidth / 16; ++k) {
                       wgmma<T, kSliceChannels>(logits, advance_desc(a, 32 * k), advance_desc(b, 32 * k), true);
                     }
                   });
          begin_panels();
#pragma unroll
          for (int p = 0; p < 2; ++p) {
            mbarrier_wait(full + ring.stage(), ring.parity());
            unsigned char* const x_panel = memory + ring.stage() * Sizes::kStage + mine() * kPanelBytes;
            unsigned char* const g_panel = x_panel + Sizes::kLeft;
            const Pairs<64> wide;
            unsigned char* const dl_panel = panels() + p * kPanelBytes;
            const auto use = [&](int n, int half, uint32_t x_pair, uint32_t g_pair) {
              float value[2], g[2], dl[2], opened[2];
              unpack_pair<T>(x_pair, value);
              unpack_pair<T>(g_pair, g);
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                float slope;
                open_gate(logits[8 * p + n][2 * half + e], opened[e], slope);
                dl[e] = g[e] * value[e] * slope;
                if constexpr (EACH) {
                  dl[e] *= share;
                  float& sum = gates[8 * p + n][2 * half + e];
                  sum += opened[e] * share;
                  if (r == kOrders - 1) sum *= g[e];
                }
              }
              *wide.at(dl_panel, half, n) = pack_rn<T>(dl[0], dl[1]);
              if constexpr (!EACH) {
                through[4 * p + n / 2][n % 2 * 2 + half] = pack_rn<T>(g[0] * opened[0], g[1] * opened[1]);
              }
            };
            each_pair<T, 8>(wide, x_panel, g_panel, features, use);
            __syncwarp();
            release(ring.stage());
            ring.next();
          }
          end_panels(r == Sizes::kGates - 1 ? 1 : -1, [&] {
            for (int p = 0; p < 2; ++p) {
              tma_store(maps.slopes_to, panels() + p * kPanelBytes,
                        r * Sizes::kChannels + kSliceChannels * slice() + 64 * p, row0(), 0);
            }
          });
        }
        if constexpr (EACH) {
#pragma unroll
          for (int n = 0; n < 16; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              through[n / 2][n % 2 * 2 + half] = pack_rn<T>(gates[n][2 * half], gates[n][2 * half + 1]);
            }
          }
        }
        warpgroup_fence_operand(through);
      }
      if (!needs_grad_factors) continue;

      {
        float da[kOrders][kSliceUnits / 8][4] = {};
        auto& all = reinterpret_cast<float(&)[kOrders * kSliceUnits / 8][4]>(da);
        if constexpr (EACH) {
#pragma unroll
          for (int r = 0; r < kOrders; ++r) {
            products(da[r], Sizes::kPanels, [&](unsigned char* left, unsigned char* right) {
              const uint64_t a = make_smem_desc<64>(left + mine() * kPanelBytes), b = make_smem_desc<32>(right, 4096);
#pragma unroll
              for (int k = 0; k < 4; ++k) {
                wgmma<T, kSliceUnits, false, true>(da[r], advance_desc(a, 32 * k), advance_desc(b, 1024 * k), true);
              }
            });
          }
        } else {
          products(all, Sizes::kPanels, [&](unsigned char* left, unsigned char* right) {
            const uint64_t a = make_smem_desc<64>(left + mine() * kPanelBytes), b = make_smem_desc<32>(right, 4096);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              wgmma<T, kOrders * kSliceUnits, false, true>(all, advance_desc(a, 32 * k), advance_desc(b, 1024 * k),
                                                           true);
            }
          });
        }
        begin_panels();
        factor_gradients_slice<T, 4>(in_factors(), all, panels(), 0);
        end_panels(2, [&] {
          for (int f = 0; f < kFactors; ++f) {
            tma_store(maps.factors_to, panels() + f * 64 * kSliceUnits * 2,
                      f * Sizes::kUnits + kSliceUnits * slice(), row0(), 0);
          }
        });
      }
      if (!needs_grad_x) continue;

      float dx[16][4] = {};
      products(dx, Sizes::kInputSteps, [&](unsigned char* left, unsigned char* right) {
        const uint64_t a = make_smem_desc<64>(left + mine() * kPanelBytes), b = make_smem_desc<64>(right, kPanelBytes);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          wgmma<T, kSliceChannels, false, true>(dx, advance_desc(a, 32 * k), advance_desc(b, 2048 * k), true);
        }
      });
      begin_panels();
      const Pairs<64> wide;
      unsigned char* const dx_panels = panels();
#pragma unroll
      for (int n = 0; n < 16; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float before[2];
          unpack_pair<T>(through[n / 2][n % 2 * 2 + half] & features, before);
          *wide.at(dx_panels + n / 8 * kPanelBytes, half, n % 8) =
              pack_rn<T>(before[0] + dx[n][2 * half], before[1] + dx[n][2 * half + 1]);
        }
      }
      end_panels(-1, [&] {
        for (int p = 0; p < 2; ++p) {
          tma_store(maps.dx_to, panels() + p * kPanelBytes, kSliceChannels * slice() + 64 * p, row0(), 0);
        }
      });
    }
    if (elected()) tma_store_wait<0>();
  }
  if constexpr (RANKS > 1) cluster_sync();
}

}  // namespace dfkd::high_order::back
