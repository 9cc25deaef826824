// Mixed high-order attention, backward for sm_90a: the GEMM chain from x to dx, for sizes that the one-pass form does not support.
//
// Sizes are padded to C = 128 RANKS channels and K = 32 RANKS hidden units per order. TMA fills the padding with zeros,
// and zero factors have zero gradients. Notation: high_order_attention_bwd.cu.
#pragma once

#include "high_order_attention.h"

namespace dfkd::high_order::bwd {

constexpr int kBlockChannels = 128, kBlockUnits = 32;  // per block of a cluster
constexpr int kBoxBytes = 64 * 64 * 2;

template <int WIDTH>
using Width = std::integral_constant<int, WIDTH>;

// A PipelineState in one register.
template <int STAGES>
struct PackedPipelineState {
  unsigned state = 0;  // 2 * stage + phase

  __device__ __forceinline__ int stage() const { return static_cast<int>(state / 2); }
  __device__ __forceinline__ int phase() const { return static_cast<int>(state % 2); }
  __device__ __forceinline__ void advance() {
    state += 2;
    if (state >= 2 * STAGES) state = state % 2 ^ 1;
  }
};

template <typename T>
constexpr uint32_t kOnes = std::is_same_v<T, bfloat16> ? 0x3f803f80u : 0x3c003c00u;  // {1, 1}

// Computes A = sigmoid(logit) and A (1 - A) from one exponential of a non-positive number.
__device__ __forceinline__ void sigmoid_backward(float logit, float& gate, float& derivative) {
  const float e = exp2_approx_ftz(-kLog2E * fabsf(logit)), d = rcp_approx(1.0f + e);
  gate = logit < 0.0f ? e * d : d;
  derivative = e * d * d;
}

// Rereads threadIdx.x, so that the compiler recomputes values derived from it instead of keeping them in registers.
__device__ __forceinline__ int reload_thread_idx() {
#ifdef DFKD_HOST
  return static_cast<int>(threadIdx.x);
#else
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#endif
}

// Addresses of a thread's accumulator fragment, in pairs of columns, in a swizzled tile of 64 rows of WIDTH elements:
// row 16 warp + lane / 4 + 8 half, columns 8 n + 2 (lane % 4) and the next. The addresses for all n are one offset with bits toggled (XOR), so only this offset takes a register.
template <int WIDTH>
struct FragmentPairs {
  int offset;

  __device__ __forceinline__ FragmentPairs() {
    const int thread = reload_thread_idx();
    const int row = thread % kWarpgroupSize / kWarpSize * 16 + thread % kWarpSize / 4;
    offset = 2 * swizzle_offset<WIDTH>(row, 0) + thread % 4 * 4;
  }
  __device__ __forceinline__ uint32_t* at(unsigned char* tile, int half, int n) const {
    return reinterpret_cast<uint32_t*>(tile + (offset ^ (16 * n)) + half * 8 * WIDTH * 2);
  }
};

// Calls f(n, half, x, g) for each pair of a thread's fragments of x and grad_output. x is {1, 1} if feature_mask is 0.
// BATCH pairs are loaded before f may write to shared memory.
template <typename T, int BATCH, typename F>
__device__ __forceinline__ void for_each_pair(const FragmentPairs<64>& pairs, unsigned char* x_box,
                                              unsigned char* g_box, uint32_t feature_mask, F f) {
#pragma unroll
  for (int begin = 0; begin < 16; begin += BATCH) {
    uint32_t x[BATCH], g[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int n = (begin + i) / 2, half = (begin + i) % 2;
      x[i] = (*pairs.at(x_box, half, n) & feature_mask) | (kOnes<T> & ~feature_mask);
      g[i] = *pairs.at(g_box, half, n);
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) f((begin + i) / 2, (begin + i) % 2, x[i], g[i]);
  }
}

// Computes du_r,i = da_r [z_r > 0] prod_{j != i} u_r,j for 8 * CHUNKS hidden units. load(factor, n, half, pair) reads a
// pair of units of a factor; store(factor, n, half, du) receives their gradients.
template <typename T, int CHUNKS, typename Load, typename Store>
__device__ __forceinline__ void factor_gradients(const float (&da)[kOrders * CHUNKS][4], Load load, Store store) {
#pragma unroll
  for (int n = 0; n < CHUNKS; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for_each_order<kOrders>([&](auto order, auto first) {
        constexpr int kOrder = order, kFirst = first;
        float u[2][kOrder];
#pragma unroll
        for (int i = 0; i < kOrder; ++i) {
          float pair[2];
          load(kFirst + i, n, half, pair);
          u[0][i] = pair[0], u[1][i] = pair[1];
        }
        const float(&gradient)[4] = da[CHUNKS * (kOrder - 1) + n];
        const float dz[2] = {where_positive(product_of(u[0]), gradient[2 * half]),
                             where_positive(product_of(u[1]), gradient[2 * half + 1])};
#pragma unroll
        for (int i = 0; i < kOrder; ++i) {
          store(kFirst + i, n, half, pack_rn<T>(dz[0] * product_of(u[0], i), dz[1] * product_of(u[1], i)));
        }
      });
    }
  }
}

// Stores a_r of 8 CHUNKS hidden units to three 64 x 32 tiles, from column chunk `first` on, and the rounded factors to
// factor_at(factor, n, half).
template <typename T, int CHUNKS, typename FactorAt>
__device__ __forceinline__ void store_activations(const float (&u)[kFactors * CHUNKS][4], unsigned char* tiles,
                                                  int first, FactorAt factor_at) {
  const FragmentPairs<32> pairs;
  relu_product<T, CHUNKS>(u, [&](int r, int n, int half, uint32_t a) {
    *pairs.at(tiles + r * 64 * 32 * 2, half, first + n) = a;
  });
#pragma unroll
  for (int i = 0; i < kFactors * CHUNKS * 2; ++i) {
    const int f = i % kFactors, n = i / kFactors / 2, half = i / kFactors % 2;
    factor_at(f, n, half) = pack_rn<T>(u[CHUNKS * f + n][2 * half], u[CHUNKS * f + n][2 * half + 1]);
  }
}

// Stores du to six 64 x 32 tiles, from column chunk `first` on. factor_at(factor, n, half) is a pair of units.
template <typename T, int CHUNKS, typename FactorAt>
__device__ __forceinline__ void store_factor_gradients(FactorAt factor_at, const float (&da)[kOrders * CHUNKS][4],
                                                       unsigned char* tiles, int first) {
  const FragmentPairs<32> pairs;
  factor_gradients<T, CHUNKS>(
      da, [&](int f, int n, int half, float(&pair)[2]) { unpack_pair<T>(factor_at(f, n, half), pair); },
      [&](int f, int n, int half, uint32_t du) { *pairs.at(tiles + f * 64 * 32 * 2, half, first + n) = du; });
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

// For P positions, the scratch memory holds a_r as [P, 3, K], dl [P, gates, C] and du [P, 6, K].
struct ChainTensorMaps {
  TensorMap x, proj_units, a, out_channels, x_channels, grad_output, dl, out_units, du, proj_channels;
  TensorMap a_store, dl_store, du_store, dx_store;
};

// A cluster of RANKS blocks processes 64 * CONSUMERS positions. Each block computes 32 hidden units of every factor and
// 128 channels of the logits and dx, with CONSUMERS warpgroups of 64 positions. PER_ORDER: one gate per order.
// The kernel's argument feature_mask: all ones, or 0 if forward returned the gate A instead of A x.
template <int RANKS, int CONSUMERS, bool PER_ORDER>
struct ChainTraits {
  static constexpr int kRows = 64 * CONSUMERS, kRowsPerRank = kRows / RANKS;
  static constexpr int kChannels = kBlockChannels * RANKS, kUnits = kBlockUnits * RANKS;
  static constexpr int kABoxWidth = RANKS == 1 ? 32 : 64;  // columns of a box of a_r, within one order
  static constexpr int kNumGates = PER_ORDER ? kOrders : 1;
  static constexpr int kABytes = CONSUMERS * kBoxBytes, kBBytes = kFactors * kBlockUnits * 64 * 2;
  static constexpr int kStages = CONSUMERS == 2 ? 4 : 3, kStageBytes = kABytes + kBBytes;
  static constexpr int kStoreBytes = kFactors * kBlockUnits * 64 * 2;  // du: the largest tile that a warpgroup stores
  static constexpr int kStoreOffset = kStages * kStageBytes, kBarrierOffset = kStoreOffset + CONSUMERS * kStoreBytes;
  static constexpr size_t kSmemBytes = kBarrierOffset + 8 * (2 * kStages + 3);
  static constexpr int kChannelBlocks = kChannels / 64, kLogitSteps = kUnits / kABoxWidth;  // per order
  static constexpr int kDxSteps = kFactors * kUnits / 64;
  static constexpr int kThreads = kWarpgroupSize * (CONSUMERS + 1);
};

template <typename T, int RANKS, int CONSUMERS, bool PER_ORDER>
__global__ void __launch_bounds__(kWarpgroupSize * (CONSUMERS + 1), 1)
    chain_wgmma(const __grid_constant__ ChainTensorMaps maps, int tiles, int order, uint32_t feature_mask,
                int needs_grad_factors, int needs_grad_x) {
  using Traits = ChainTraits<RANKS, CONSUMERS, PER_ORDER>;
  const int thread = static_cast<int>(threadIdx.x), warpgroup = thread / kWarpgroupSize, lane = thread % kWarpSize;
  const int warp = thread / kWarpSize % 4;
  unsigned char* const smem = shared_memory();
  Barrier* const full = reinterpret_cast<Barrier*>(smem + Traits::kBarrierOffset);
  Barrier* const empty = full + Traits::kStages;
  Barrier* const stored = empty + Traits::kStages;  // the cluster has stored a_r, dl or du to memory: one each
  const int first_tile = static_cast<int>(blockIdx.x) / RANKS, tile_step = static_cast<int>(gridDim.x) / RANKS;

  if (thread == 0) {
    for (int i = 0; i < Traits::kStages; ++i) {
      mbarrier_init(full + i, 2);
      mbarrier_init(empty + i, 4 * CONSUMERS * RANKS);
    }
    for (int i = 0; i < 3; ++i) mbarrier_init(stored + i, CONSUMERS * RANKS);
    fence_barrier_init();
  }
  if constexpr (RANKS == 1) {
    __syncthreads();
  } else {
    cluster_sync();
  }

  PackedPipelineState<Traits::kStages> pipe;
  if (warpgroup == CONSUMERS) {
    warpgroup_reg_dealloc<CONSUMERS == 2 ? 40 : 32>();
    const int rank = RANKS == 1 ? 0 : cluster_rank();
    // One thread loads the left operand of each stage, which other blocks may have to store first. Another runs ahead and
    // loads the right operand.
    const auto producer_acquire = [&](int bytes) {
      mbarrier_wait(empty + pipe.stage(), pipe.phase() ^ 1);
      mbarrier_arrive_expect_tx(full + pipe.stage(), bytes);
      return smem + pipe.stage() * Traits::kStageBytes;
    };
    if (warp == 0 && lane == 0) {
      prefetch_tensormaps(maps.proj_units, maps.out_channels, maps.grad_output, maps.out_units, maps.proj_channels);
      const int channel = kBlockChannels * rank, unit = kBlockUnits * rank;
      for (int tile = first_tile; tile < tiles; tile += tile_step) {
        const auto load_b = [&](const TensorMap& from, int bytes, int x, int y, int z) {
          unsigned char* const to = producer_acquire(bytes) + Traits::kABytes;
          tma_load(to, from, x, y, z, full + pipe.stage());
          pipe.advance();
        };
        for (int c = 0; c < Traits::kChannelBlocks; ++c) {
          load_b(maps.proj_units, Traits::kBBytes, 64 * c, unit, 0);
        }
        for (int r = 0; r < kOrders; ++r) {
          for (int step = 0; step < Traits::kLogitSteps; ++step) {
            load_b(maps.out_channels, kBlockChannels * Traits::kABoxWidth * 2, Traits::kABoxWidth * step, channel, r);
          }
          if (!PER_ORDER && r < kOrders - 1) continue;
          for (int c = 0; c < 2; ++c) {
            load_b(maps.grad_output, Traits::kABytes, channel + 64 * c, Traits::kRows * tile, 0);
          }
        }
        for (int r = 0; needs_grad_factors && r < Traits::kNumGates; ++r) {
          for (int c = 0; c < Traits::kChannelBlocks; ++c) {
            load_b(maps.out_units, (PER_ORDER ? 1 : kOrders) * kBlockUnits * 64 * 2, unit, 64 * c, r);
          }
        }
        for (int step = 0; needs_grad_x && step < Traits::kDxSteps; ++step) {
          unsigned char* const to = producer_acquire(2 * kBoxBytes) + Traits::kABytes;
          const int y = 64 * step % Traits::kUnits, z = 64 * step / Traits::kUnits;
          for (int p = 0; p < 2; ++p) {
            tma_load(to + p * kBoxBytes, maps.proj_channels, channel + 64 * p, y, z, full + pipe.stage());
          }
          pipe.advance();
        }
      }
    } else if (warp == 1 && lane == 0) {
      prefetch_tensormaps(maps.x, maps.a, maps.x_channels, maps.dl);
      int phase = 0;
      for (int tile = first_tile; tile < tiles; tile += tile_step, phase ^= 1) {
        // Each block multicasts its rows to the cluster.
        const auto load_a = [&](const TensorMap& from, int width, int x) {
          const int rank_row = rank * Traits::kRowsPerRank, row = Traits::kRows * tile + rank_row;
          unsigned char* const to = producer_acquire(Traits::kRows * width * 2) + rank_row * width * 2;
          if constexpr (RANKS == 1) {
            tma_load(to, from, x, row, 0, full + pipe.stage());
          } else {
            tma_load_multicast((1u << RANKS) - 1, to, from, x, row, 0, full + pipe.stage());
          }
          pipe.advance();
        };
        const auto wait_stored = [&](int which) {
          mbarrier_wait_cluster(stored + which, phase);
          fence_proxy_async_global();
        };
        for (int c = 0; c < Traits::kChannelBlocks; ++c) load_a(maps.x, 64, 64 * c);
        wait_stored(0);
        for (int r = 0; r < kOrders; ++r) {
          for (int step = 0; step < Traits::kLogitSteps; ++step) {
            load_a(maps.a, Traits::kABoxWidth, r * Traits::kUnits + Traits::kABoxWidth * step);
          }
          if (!PER_ORDER && r < kOrders - 1) continue;
          for (int c = 0; c < 2; ++c) {
            unsigned char* const to = producer_acquire(Traits::kABytes);
            tma_load(to, maps.x_channels, kBlockChannels * rank + 64 * c, Traits::kRows * tile, 0,
                     full + pipe.stage());
            pipe.advance();
          }
        }
        wait_stored(1);
        for (int c = 0; needs_grad_factors && c < Traits::kNumGates * Traits::kChannelBlocks; ++c) {
          load_a(maps.dl, 64, 64 * c);
        }
        if (needs_grad_factors) wait_stored(2);
        for (int step = 0; needs_grad_x && step < Traits::kDxSteps; ++step) load_a(maps.du, 64, 64 * step);
      }
    }
  } else {
    warpgroup_reg_alloc<CONSUMERS == 2 ? 232 : 160>();
    // Recomputed at each use to save registers.
    const auto warpgroup_idx = [] { return reload_thread_idx() / kWarpgroupSize; };
    const auto store_smem = [=] { return smem + Traits::kStoreOffset + warpgroup_idx() * Traits::kStoreBytes; };
    const auto rank = [] { return RANKS == 1 ? 0 : cluster_rank(); };
    const auto elected = [] { return reload_thread_idx() % kWarpgroupSize == 0; };
    if (thread % kWarpgroupSize == 0) {
      prefetch_tensormaps(maps.a_store, maps.dl_store);
    }

    const auto consumer_release = [&](int stage) {
      if constexpr (RANKS == 1) {
        if (reload_thread_idx() % kWarpSize == 0) mbarrier_arrive(empty + stage);
      } else {
        const int other = reload_thread_idx() % kWarpSize;
        if (other < RANKS) mbarrier_arrive_cluster_cta_release(empty + stage, other);
      }
    };
    // d += A B for the operands in the A and B halves of `steps` pipeline stages; each stage has a_width elements
    // of the inner dimension. A (K-major) and B are boxes with a_width and b_width columns. The last three arguments are integral
    // constants.
    const auto mma = [&]<int N>(float(&d)[N][4], int steps, auto a_width, auto b_width, auto b_mn_major) {
      constexpr int kAWidth = a_width, kBWidth = b_width;
      constexpr bool kMnMajor = b_mn_major;
      int prev_stage = 0;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        mbarrier_wait(full + pipe.stage(), pipe.phase());
        unsigned char* const operands = smem + pipe.stage() * Traits::kStageBytes;
        warpgroup_fence_operand(d);
        warpgroup_arrive();
        const uint64_t a = make_smem_desc<kAWidth>(operands + warpgroup_idx() * 64 * kAWidth * 2);
        const uint64_t b = make_smem_desc<kBWidth>(operands + Traits::kABytes, kMnMajor ? 64 * kBWidth * 2 : 16);
#pragma unroll
        for (int k = 0; k < kAWidth / 16; ++k) {
          constexpr int kBStep = kMnMajor ? 32 * kBWidth : 32;
          wgmma<T, 8 * N, false, kMnMajor>(d, advance_desc(a, 32 * k), advance_desc(b, kBStep * k), true);
        }
        warpgroup_commit_batch();
        if (step > 0) {
          warpgroup_wait<1>();
          consumer_release(prev_stage);
        }
        prev_stage = pipe.stage();
        pipe.advance();
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(d);
      consumer_release(prev_stage);
    };
    // begin_store() waits until the last TMA store has read store_smem. issue_store() calls store(), which
    // must store this buffer to memory by TMA. If stored_index >= 0,
    // it also arrives at that barrier of every block in the cluster once the data is in memory.
    const auto begin_store = [&] {
      if (elected()) tma_store_wait_read<0>();
      named_barrier_sync(1 + warpgroup_idx(), kWarpgroupSize);
    };
    const auto issue_store = [&](int stored_index, auto store) {
      fence_proxy_async();
      named_barrier_sync(1 + warpgroup_idx(), kWarpgroupSize);
      if (elected()) {
        store();
        tma_store_commit();
        if (stored_index >= 0) {
          tma_store_wait<0>();
          fence_proxy_async_global();
        }
      }
      const int other = reload_thread_idx() % kWarpgroupSize;
      if (stored_index >= 0 && other < kWarpSize) {
        __syncwarp();
        if constexpr (RANKS == 1) {
          if (other == 0) mbarrier_arrive(stored + stored_index);
        } else {
          if (other < RANKS) mbarrier_arrive_cluster(stored + stored_index, other);
        }
      }
    };

#pragma unroll 1
    for (int tile = first_tile; tile < tiles; tile += tile_step) {
      const auto row0 = [=] { return Traits::kRows * tile + 64 * warpgroup_idx(); };
      // Packed pairs of units, [factor, n, half]. If registers are scarce, the last two factors stay in shared memory,
      // where their gradients will replace them; dl does not overwrite them.
      constexpr int kInRegisters = CONSUMERS == 2 ? kFactors : kFactors - 2;
      uint32_t factors[kInRegisters * 2][4];
      const auto factor_at = [&] {
        return [&factors, pairs = FragmentPairs<32>(), to = store_smem()](int f, int n, int half) -> uint32_t& {
          if (f >= kInRegisters) return *pairs.at(to + f * 64 * kBlockUnits * 2, half, n);
          return factors[f * 2 % (kInRegisters * 2) + n / 2][n % 2 * 2 + half];
        };
      };
      {
        float u[kFactors * kBlockUnits / 8][4] = {};
        mma(u, Traits::kChannelBlocks, Width<64>{}, Width<64>{}, std::false_type{});
        begin_store();
        store_activations<T, 4>(u, store_smem(), 0, factor_at());
        warpgroup_fence_operand(factors);  // keeps the compiler from moving the rounding to each use
        issue_store(0, [&] {
          for (int r = 0; r < kOrders; ++r) {
            tma_store(maps.a_store, store_smem() + r * 64 * kBlockUnits * 2,
                      r * Traits::kUnits + kBlockUnits * rank(), row0(), 0);
          }
        });
      }

      uint32_t gate_dx[8][4];  // packed pairs of g A, the part of dx that does not pass through the logits
      {
        float gate_sum[PER_ORDER ? 16 : 1][4] = {};
#pragma unroll 1
        for (int r = 0; r < Traits::kNumGates; ++r) {
          [[maybe_unused]] const float inv_order = r < order ? 1.0f / static_cast<float>(order) : 0.0f;
          float logits[16][4] = {};
          constexpr int kSteps = (PER_ORDER ? 1 : kOrders) * Traits::kLogitSteps;
          mma(logits, kSteps, Width<Traits::kABoxWidth>{}, Width<Traits::kABoxWidth>{}, std::false_type{});
          begin_store();
#pragma unroll
          for (int p = 0; p < 2; ++p) {
            mbarrier_wait(full + pipe.stage(), pipe.phase());
            unsigned char* const x_box = smem + pipe.stage() * Traits::kStageBytes + warpgroup_idx() * kBoxBytes;
            unsigned char* const g_box = x_box + Traits::kABytes;
            const FragmentPairs<64> pairs;
            unsigned char* const dl_box = store_smem() + p * kBoxBytes;
            const auto gate_backward = [&](int n, int half, uint32_t x_pair, uint32_t g_pair) {
              float value[2], g[2], dl[2], gate[2];
              unpack_pair<T>(x_pair, value);
              unpack_pair<T>(g_pair, g);
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                float derivative;
                sigmoid_backward(logits[8 * p + n][2 * half + e], gate[e], derivative);
                dl[e] = g[e] * value[e] * derivative;
                if constexpr (PER_ORDER) {
                  dl[e] *= inv_order;
                  float& sum = gate_sum[8 * p + n][2 * half + e];
                  sum += gate[e] * inv_order;
                  if (r == kOrders - 1) sum *= g[e];
                }
              }
              *pairs.at(dl_box, half, n) = pack_rn<T>(dl[0], dl[1]);
              if constexpr (!PER_ORDER) {
                gate_dx[4 * p + n / 2][n % 2 * 2 + half] = pack_rn<T>(g[0] * gate[0], g[1] * gate[1]);
              }
            };
            for_each_pair<T, 8>(pairs, x_box, g_box, feature_mask, gate_backward);
            __syncwarp();
            consumer_release(pipe.stage());
            pipe.advance();
          }
          issue_store(r == Traits::kNumGates - 1 ? 1 : -1, [&] {
            for (int p = 0; p < 2; ++p) {
              tma_store(maps.dl_store, store_smem() + p * kBoxBytes,
                        r * Traits::kChannels + kBlockChannels * rank() + 64 * p, row0(), 0);
            }
          });
        }
        if constexpr (PER_ORDER) {
#pragma unroll
          for (int n = 0; n < 16; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              gate_dx[n / 2][n % 2 * 2 + half] = pack_rn<T>(gate_sum[n][2 * half], gate_sum[n][2 * half + 1]);
            }
          }
        }
        warpgroup_fence_operand(gate_dx);
      }
      if (!needs_grad_factors) continue;

      {
        float da[kOrders][kBlockUnits / 8][4] = {};
        auto& da_all = reinterpret_cast<float(&)[kOrders * kBlockUnits / 8][4]>(da);
        if constexpr (PER_ORDER) {
#pragma unroll
          for (int r = 0; r < kOrders; ++r) {
            mma(da[r], Traits::kChannelBlocks, Width<64>{}, Width<32>{}, std::true_type{});
          }
        } else {
          mma(da_all, Traits::kChannelBlocks, Width<64>{}, Width<32>{}, std::true_type{});
        }
        begin_store();
        store_factor_gradients<T, 4>(factor_at(), da_all, store_smem(), 0);
        issue_store(2, [&] {
          for (int f = 0; f < kFactors; ++f) {
            tma_store(maps.du_store, store_smem() + f * 64 * kBlockUnits * 2,
                      f * Traits::kUnits + kBlockUnits * rank(), row0(), 0);
          }
        });
      }
      if (!needs_grad_x) continue;

      float dx[16][4] = {};
      mma(dx, Traits::kDxSteps, Width<64>{}, Width<64>{}, std::true_type{});
      begin_store();
      const FragmentPairs<64> pairs;
      unsigned char* const dx_smem = store_smem();
#pragma unroll
      for (int n = 0; n < 16; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float direct[2];
          unpack_pair<T>(gate_dx[n / 2][n % 2 * 2 + half] & feature_mask, direct);
          *pairs.at(dx_smem + n / 8 * kBoxBytes, half, n % 8) =
              pack_rn<T>(direct[0] + dx[n][2 * half], direct[1] + dx[n][2 * half + 1]);
        }
      }
      issue_store(-1, [&] {
        for (int p = 0; p < 2; ++p) {
          tma_store(maps.dx_store, store_smem() + p * kBoxBytes, kBlockChannels * rank() + 64 * p, row0(), 0);
        }
      });
    }
    if (elected()) tma_store_wait<0>();
  }
  if constexpr (RANKS > 1) cluster_sync();
}

}  // namespace dfkd::high_order::bwd
