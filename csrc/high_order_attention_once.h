// Mixed high-order attention, backward for sm_90a in one pass, for joint gates and few channels: weights stay in shared
// memory, their gradients in registers, and hidden activations never leave the block. With P positions and C channels,
// it moves 6 P C bytes and, per block, one partial sum of the weight gradients (see high_order_attention_bwd.cu).
#pragma once

#include "high_order_attention_bwd.h"

namespace dfkd::high_order::bwd {

// Backward of the gates A of 64 channels: dl replaces grad_output g and is passed to store_dl(); dx_box receives g A.
template <typename T, int BATCH, typename StoreDl>
__device__ __forceinline__ void gate_backward(const FragmentPairs<64>& pairs, const float (&logits)[8][4],
                                              unsigned char* x_box, unsigned char* g_box, unsigned char* dx_box,
                                              uint32_t feature_mask, StoreDl store_dl) {
  const auto backward = [&](int n, int half, uint32_t x_pair, uint32_t g_pair) {
    float value[2], g[2], dl[2];
    unpack_pair<T>(x_pair, value);
    unpack_pair<T>(g_pair, g);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float gate, derivative;
      sigmoid_backward(logits[n][2 * half + e], gate, derivative);
      dl[e] = g[e] * value[e] * derivative;
      g[e] *= gate;
    }
    const uint32_t dl_pair = pack_rn<T>(dl[0], dl[1]);
    *pairs.at(dx_box, half, n) = pack_rn<T>(g[0], g[1]) & feature_mask;
    *pairs.at(g_box, half, n) = dl_pair;
    store_dl(n, half, dl_pair);
  };
  for_each_pair<T, BATCH>(pairs, x_box, g_box, feature_mask, backward);
}

// dx_box += dx
template <typename T>
__device__ __forceinline__ void add_to_dx(const FragmentPairs<64>& pairs, unsigned char* dx_box,
                                          const float (&dx)[8][4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t* const pair = pairs.at(dx_box, half, n);
      float before[2];
      unpack_pair<T>(*pair, before);
      *pair = pack_rn<T>(before[0] + dx[n][2 * half], before[1] + dx[n][2 * half + 1]);
    }
  }
}

// Stores a warpgroup's accumulators of 64 channels, from channel0 on, to the block's partial sums: dproj [6, UNITS,
// CHANNELS], then dout [3, CHANNELS, UNITS].
template <int CHANNELS, int UNITS>
__device__ __forceinline__ void store_partials(float* partials, int channel0,
                                               const float (&dproj)[kFactors * UNITS / 8][4],
                                               const float (&dout)[kOrders * UNITS / 8][4]) {
  const int warp = reload_thread_idx() / kWarpSize % 4, lane = reload_thread_idx() % kWarpSize;
  const int channel = channel0 + 16 * warp + lane / 4, column = 2 * (lane % 4);
  float* const to_proj = partials + column * CHANNELS + channel;
  float* const to_out = partials + kFactors * UNITS * CHANNELS + channel * UNITS + column;
#pragma unroll
  for (int n = 0; n < kFactors * UNITS / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) to_proj[(8 * n + e % 2) * CHANNELS + 8 * (e / 2)] = dproj[n][e];
  }
#pragma unroll
  for (int n = 0; n < kOrders * UNITS / 8; ++n) {
    const int order = n / (UNITS / 8), unit = n % (UNITS / 8) * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* const to = to_out + (order * CHANNELS + 8 * half) * UNITS + unit;
      *reinterpret_cast<AlignedArray<float, 2>*>(to) = {dout[n][2 * half], dout[n][2 * half + 1]};
    }
  }
}

// ---- up to 64 channels and 16 hidden units --------------------------------------------------------------------------

struct OnePass64 {
  static constexpr int kChannels = 64, kUnits = 16, kConsumers = 2, kStages = 4;
  static constexpr int kThreads = kWarpgroupSize * (kConsumers + 1);
  static constexpr int kProjBytes = kFactors * kUnits * 64 * 2, kOutBytes = kOrders * 64 * kUnits * 2;
  static constexpr int kUnitTile = 64 * kUnits * 2, kFactorPairTile = 2 * kUnitTile;  // bytes of a tile of a_r, of du
  static constexpr int kWorkBytes = (kFactors + kOrders) * kUnitTile + kBoxBytes;     // du, a_r and dx of a warpgroup
  static constexpr int kConsumerBytes = kWorkBytes + kStages * 2 * kBoxBytes;
  static constexpr int kBarrierOffset = kProjBytes + kOutBytes + kConsumers * kConsumerBytes;
  static constexpr size_t kSmemBytes = kBarrierOffset + 8 * (1 + 2 * kConsumers * kStages);
  static constexpr int64_t kPartials = (kFactors + kOrders) * kChannels * kUnits;
};

struct OnePassTensorMaps {
  TensorMap x, grad_output, proj, out, dx;
};

// Each of two consumer warpgroups has its own pipeline of 64-position tiles and accumulates dproj and dout in its
// registers. partials: [blocks, dproj [6, 16, 64], dout [3, 64, 16]].
template <typename T>
__global__ void __launch_bounds__(OnePass64::kThreads, 1)
    one_pass_64_wgmma(const __grid_constant__ OnePassTensorMaps maps, float* partials, int tiles,
                      uint32_t feature_mask, int needs_grad_x) {
  using Traits = OnePass64;
  const int thread = static_cast<int>(threadIdx.x), warpgroup = thread / kWarpgroupSize, lane = thread % kWarpSize;
  const int warp = thread / kWarpSize % 4;
  unsigned char* const proj = shared_memory();           // [6, 16, 64]
  unsigned char* const out = proj + Traits::kProjBytes;  // [3, 64, 16]
  unsigned char* const consumers = out + Traits::kOutBytes;
  Barrier* const weights_full = reinterpret_cast<Barrier*>(proj + Traits::kBarrierOffset);
  const int tile_step = static_cast<int>(gridDim.x) * Traits::kConsumers;

  if (thread == 0) {
    mbarrier_init(weights_full, 1);
    for (int i = 0; i < Traits::kConsumers * Traits::kStages; ++i) {
      mbarrier_init(weights_full + 1 + 2 * i, 1);
      mbarrier_init(weights_full + 2 + 2 * i, 4);
    }
    fence_barrier_init();
  }
  __syncthreads();

  PackedPipelineState<Traits::kStages> pipe;
  if (warpgroup == Traits::kConsumers) {
    warpgroup_reg_dealloc<40>();
    if (warp < Traits::kConsumers && lane == 0) {
      if (warp == 0) {
        mbarrier_arrive_expect_tx(weights_full, Traits::kProjBytes + Traits::kOutBytes);
        tma_load(proj, maps.proj, 0, 0, 0, weights_full);
        tma_load(out, maps.out, 0, 0, 0, weights_full);
      }
      for (int tile = static_cast<int>(blockIdx.x) * Traits::kConsumers + warp; tile < tiles; tile += tile_step) {
        Barrier* const full = weights_full + 1 + 2 * (warp * Traits::kStages + pipe.stage());
        unsigned char* const stages = consumers + warp * Traits::kConsumerBytes + Traits::kWorkBytes;
        unsigned char* const to = stages + pipe.stage() * 2 * kBoxBytes;
        mbarrier_wait(full + 1, pipe.phase() ^ 1);
        mbarrier_arrive_expect_tx(full, 2 * kBoxBytes);
        tma_load(to, maps.x, 0, 64 * tile, 0, full);
        tma_load(to + kBoxBytes, maps.grad_output, 0, 64 * tile, 0, full);
        pipe.advance();
      }
    }
  } else {
    warpgroup_reg_alloc<232>();
    unsigned char* const du_tiles = consumers + warpgroup * Traits::kConsumerBytes;  // 3 tiles of two factors each
    unsigned char* const a_tiles = du_tiles + kFactors * Traits::kUnitTile;          // 3 tiles of one order each
    unsigned char* const dx_box = a_tiles + kOrders * Traits::kUnitTile;
    unsigned char* const stages = consumers + warpgroup * Traits::kConsumerBytes + Traits::kWorkBytes;
    Barrier* const barriers = weights_full + 1 + 2 * warpgroup * Traits::kStages;
    float dproj[kFactors * 2][4] = {}, dout[kOrders * 2][4] = {};  // [channels, factors or orders, units]
    mbarrier_wait(weights_full, 0);

#pragma unroll 1
    for (int tile = static_cast<int>(blockIdx.x) * Traits::kConsumers + warpgroup; tile < tiles; tile += tile_step) {
      unsigned char* const x_box = stages + pipe.stage() * 2 * kBoxBytes;
      unsigned char* const g_box = x_box + kBoxBytes;  // dl replaces grad_output
      mbarrier_wait(barriers + 2 * pipe.stage(), pipe.phase());

      float u[kFactors * 2][4];
      gemm<4>([&](int k) {
        wgmma<T, kFactors * Traits::kUnits>(u, advance_desc(make_smem_desc<64>(x_box), 32 * k),
                                            advance_desc(make_smem_desc<64>(proj), 32 * k), k > 0);
      }, u);
      if (thread % kWarpgroupSize == 0) tma_store_wait_read<0>();
      named_barrier_sync(1 + warpgroup, kWarpgroupSize);  // the last TMA store has read dx_box

      uint32_t a[kOrders][4];
      const FragmentPairs<16> a_pairs;
      relu_product<T, 2>(u, [&](int r, int n, int half, uint32_t pair) {
        a[r][2 * n + half] = pair;
        *a_pairs.at(a_tiles + r * Traits::kUnitTile, half, n) = pair;
      });
      float logits[8][4];
      gemm<kOrders>([&](int r) { wgmma<T, 64>(logits, a[r], make_smem_desc<16>(out + r * Traits::kUnitTile), r > 0); },
                    logits, a);

      uint32_t dl[4][4];
      const FragmentPairs<64> channel_pairs;
      gate_backward<T, 8>(channel_pairs, logits, x_box, g_box, dx_box, feature_mask,
                          [&](int n, int half, uint32_t pair) { dl[n / 2][n % 2 * 2 + half] = pair; });

      float da[kOrders * 2][4];
      gemm<4>([&](int k) {
        const uint64_t b = make_smem_desc<16>(out, Traits::kUnitTile);
        wgmma<T, kOrders * Traits::kUnits, true>(da, dl[k], advance_desc(b, 512 * k), k > 0);
      }, da, dl);

      uint32_t du[kFactors][4];
      const FragmentPairs<32> du_pairs;
      factor_gradients<T, 2>(
          da,
          [&](int f, int n, int half, float(&pair)[2]) {
            pair[0] = u[2 * f + n][2 * half], pair[1] = u[2 * f + n][2 * half + 1];
          },
          [&](int f, int n, int half, uint32_t pair) {
            du[f][2 * n + half] = pair;
            *du_pairs.at(du_tiles + f / 2 * Traits::kFactorPairTile, half, f % 2 * 2 + n) = pair;
          });
      fence_proxy_async();
      float dx[8][4];
      warpgroup_fence_operand(dx);
      warpgroup_fence_operand(du);
      warpgroup_arrive();
#pragma unroll
      for (int f = 0; f < kFactors; ++f) {
        const uint64_t b = make_smem_desc<64>(proj, kBoxBytes);
        wgmma<T, 64, true>(dx, du[f], advance_desc(b, f * Traits::kUnits * 128), f > 0);
      }
      warpgroup_commit_batch();
      named_barrier_sync(1 + warpgroup, kWarpgroupSize);  // du, a_r and dl are in shared memory
      warpgroup_fence_operand(dproj);
      warpgroup_fence_operand(dout);
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint64_t x = make_smem_desc<64>(x_box, kBoxBytes), g = make_smem_desc<64>(g_box, kBoxBytes);
        const uint64_t du_operand = make_smem_desc<32>(du_tiles, Traits::kFactorPairTile);
        const uint64_t a_operand = make_smem_desc<16>(a_tiles, Traits::kUnitTile);
        wgmma<T, kFactors * Traits::kUnits, true, true>(dproj, advance_desc(x, 2048 * k),
                                                        advance_desc(du_operand, 1024 * k), true);
        wgmma<T, kOrders * Traits::kUnits, true, true>(dout, advance_desc(g, 2048 * k),
                                                       advance_desc(a_operand, 512 * k), true);
      }
      warpgroup_commit_batch();
      warpgroup_wait<1>();
      warpgroup_fence_operand(dx);
      warpgroup_fence_operand(du);
      add_to_dx<T>(channel_pairs, dx_box, dx);
      fence_proxy_async();
      warpgroup_wait<0>();
      warpgroup_fence_operand(dproj);
      warpgroup_fence_operand(dout);
      if (lane == 0) mbarrier_arrive(barriers + 2 * pipe.stage() + 1);
      pipe.advance();
      named_barrier_sync(1 + warpgroup, kWarpgroupSize);  // dx is in shared memory; a_r and du have been read
      if (needs_grad_x && thread % kWarpgroupSize == 0) {
        tma_store(maps.dx, dx_box, 0, 64 * tile, 0);
        tma_store_commit();
      }
    }
    if (thread % kWarpgroupSize == 0) tma_store_wait<0>();

    // Add the accumulators of both warpgroups.
    float* const sums = reinterpret_cast<float*>(consumers) + thread % kWarpgroupSize;
    const auto for_each_sum = [&](auto f) {
#pragma unroll
      for (int i = 0; i < kFactors * 8; ++i) f(dproj[i / 4][i % 4], i);
#pragma unroll
      for (int i = 0; i < kOrders * 8; ++i) f(dout[i / 4][i % 4], kFactors * 8 + i);
    };
    named_barrier_sync(3, Traits::kConsumers * kWarpgroupSize);
    if (warpgroup == 1) for_each_sum([&](float sum, int i) { sums[i * kWarpgroupSize] = sum; });
    named_barrier_sync(3, Traits::kConsumers * kWarpgroupSize);
    if (warpgroup == 0) {
      for_each_sum([&](float& sum, int i) { sum += sums[i * kWarpgroupSize]; });
      store_partials<Traits::kChannels, Traits::kUnits>(partials + blockIdx.x * Traits::kPartials, 0, dproj, dout);
    }
  }
}

// ---- up to 128 channels and 32 hidden units -------------------------------------------------------------------------

struct OnePass128 {
  static constexpr int kChannels = 128, kUnits = 32, kStages = 2, kThreads = 4 * kWarpgroupSize;
  // proj [2 channel blocks, 2 halves of the units, 6, 16, 64]; out [2 halves of the units, 3, 128, 16]. In bytes:
  static constexpr int kProjHalf = kFactors * 16 * 64 * 2, kProjBlock = 2 * kProjHalf;
  static constexpr int kOutOrder = 128 * 16 * 2, kOutHalf = kOrders * kOutOrder;
  static constexpr int kWeightBytes = 2 * kProjBlock + 2 * kOutHalf;
  static constexpr int kUnitTile = 64 * 32 * 2;  // of one order of a_r, or one factor of du
  static constexpr int kStageBytes = 4 * kBoxBytes + (kOrders + kFactors) * kUnitTile;
  static constexpr int kBarrierOffset = kWeightBytes + kStages * kStageBytes + 2 * kBoxBytes;
  static constexpr size_t kSmemBytes = kBarrierOffset + 8 * (1 + 3 * kStages);
  static constexpr int64_t kPartials = (kFactors + kOrders) * kChannels * kUnits;
};

// Warpgroups 0 and 1 compute a_r, dl and du of a 64-position tile, which they store in its stage, and dx, each for half
// of the units and channels. Warpgroups 2 and 3, which also issue the TMA loads, accumulate dproj and dout of the
// previous tile, each for 64 channels. partials: [blocks, dproj [6, 32, 128], dout [3, 128, 32]].
template <typename T>
__global__ void __launch_bounds__(OnePass128::kThreads, 1)
    one_pass_128_wgmma(const __grid_constant__ OnePassTensorMaps maps, float* partials, int tiles,
                       uint32_t feature_mask, int needs_grad_x) {
  using Traits = OnePass128;
  const int thread = static_cast<int>(threadIdx.x);
  unsigned char* const proj = shared_memory();
  unsigned char* const out = proj + 2 * Traits::kProjBlock;
  unsigned char* const stages = proj + Traits::kWeightBytes;  // x, grad_output (then dl), a_r, du
  Barrier* const weights_full = reinterpret_cast<Barrier*>(proj + Traits::kBarrierOffset);
  Barrier* const full = weights_full + 1;
  Barrier* const computed = full + Traits::kStages;
  Barrier* const empty = computed + Traits::kStages;
  const auto tile_of = [](int round) { return static_cast<int>(blockIdx.x + round * gridDim.x); };

  if (thread == 0) {
    mbarrier_init(weights_full, 1);
    for (int i = 0; i < Traits::kStages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(computed + i, 8);
      mbarrier_init(empty + i, 8);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (thread < 2 * kWarpgroupSize) {
    warpgroup_reg_dealloc<80>();
    // Recomputed at each use to save registers.
    const auto half_idx = [] { return reload_thread_idx() / kWarpgroupSize % 2; };
    const auto elected = [](int threads) { return reload_thread_idx() % threads == 0; };
    const auto dx_box = [=] { return stages + Traits::kStages * Traits::kStageBytes + half_idx() * kBoxBytes; };
    mbarrier_wait(weights_full, 0);
#pragma unroll 1
    for (int round = 0; tile_of(round) < tiles; ++round) {
      const int stage = round % Traits::kStages, phase = round / Traits::kStages % 2;
      unsigned char* const x_smem = stages + stage * Traits::kStageBytes;
      unsigned char* const g_smem = x_smem + 2 * kBoxBytes;
      unsigned char* const a_tiles = g_smem + 2 * kBoxBytes;
      unsigned char* const du_tiles = a_tiles + kOrders * Traits::kUnitTile;
      mbarrier_wait(full + stage, phase);

      // du replaces the factors.
      const auto factor_at = [&] {
        return [du_tiles, pairs = FragmentPairs<32>(), first = 2 * half_idx()](int f, int n, int half) -> uint32_t& {
          return *pairs.at(du_tiles + f * Traits::kUnitTile, half, first + n);
        };
      };
      {
        float u[kFactors * 2][4];
        const uint64_t a = make_smem_desc<64>(x_smem), b = make_smem_desc<64>(proj + half_idx() * Traits::kProjHalf);
        gemm<8>([&](int k) {
          wgmma<T, kFactors * 16>(u, advance_desc(a, k / 4 * kBoxBytes + k % 4 * 32),
                                  advance_desc(b, k / 4 * Traits::kProjBlock + k % 4 * 32), k > 0);
        }, u);
        store_activations<T, 2>(u, a_tiles, 2 * half_idx(), factor_at());
      }
      if (elected(kWarpgroupSize)) tma_store_wait_read<0>();
      fence_proxy_async();
      named_barrier_sync(1, 2 * kWarpgroupSize);  // a_r is in shared memory; the last TMA store has read dx
      {
        float logits[8][4];
        const uint64_t a = make_smem_desc<32>(a_tiles), b = make_smem_desc<16>(out + half_idx() * 64 * 16 * 2);
        gemm<kOrders * 2>([&](int k) {
          wgmma<T, 64>(logits, advance_desc(a, k / 2 * Traits::kUnitTile + k % 2 * 32),
                       advance_desc(b, k % 2 * Traits::kOutHalf + k / 2 * Traits::kOutOrder), k > 0);
        }, logits);
        gate_backward<T, 4>(FragmentPairs<64>(), logits, x_smem + half_idx() * kBoxBytes,
                            g_smem + half_idx() * kBoxBytes, dx_box(), feature_mask, [](int, int, uint32_t) {});
      }
      fence_proxy_async();
      named_barrier_sync(1, 2 * kWarpgroupSize);
      {
        float da[kOrders * 2][4];
        const uint64_t a = make_smem_desc<64>(g_smem);
        const uint64_t b = make_smem_desc<16>(out + half_idx() * Traits::kOutHalf, Traits::kOutOrder);
        gemm<8>([&](int k) {
          wgmma<T, kOrders * 16, false, true>(da, advance_desc(a, k / 4 * kBoxBytes + k % 4 * 32),
                                              advance_desc(b, 512 * k), k > 0);
        }, da);
        store_factor_gradients<T, 2>(factor_at(), da, du_tiles, 2 * half_idx());
      }
      fence_proxy_async();
      named_barrier_sync(1, 2 * kWarpgroupSize);
      float dx[8][4];
      const uint64_t a = make_smem_desc<32>(du_tiles);
      const uint64_t b = make_smem_desc<64>(proj + half_idx() * Traits::kProjBlock, kBoxBytes);
      warpgroup_fence_operand(dx);
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kFactors * 2; ++k) {
        wgmma<T, 64, false, true>(dx, advance_desc(a, k / 2 * Traits::kUnitTile + k % 2 * 32),
                                  advance_desc(b, k % 2 * Traits::kProjHalf + k / 2 * 2048), k > 0);
      }
      warpgroup_commit_batch();
      if (elected(kWarpSize)) mbarrier_arrive(computed + stage);  // the dproj and dout wgmmas run after these
      warpgroup_wait<0>();
      warpgroup_fence_operand(dx);
      unsigned char* const dx_smem = dx_box();
      add_to_dx<T>(FragmentPairs<64>(), dx_smem, dx);
      fence_proxy_async();
      named_barrier_sync(2 + half_idx(), kWarpgroupSize);
      if (needs_grad_x && elected(kWarpgroupSize)) {
        tma_store(maps.dx, dx_smem, 64 * half_idx(), 64 * tile_of(round), 0);
        tma_store_commit();
      }
    }
    if (elected(kWarpgroupSize)) tma_store_wait<0>();
  } else {
    warpgroup_reg_alloc<176>();
    const int half_idx = thread / kWarpgroupSize % 2, lane = thread % kWarpSize;
    const bool is_producer = thread == 2 * kWarpgroupSize;
    const auto load_stage = [&](int stage, int tile) {
      unsigned char* const to = stages + stage * Traits::kStageBytes;
      mbarrier_arrive_expect_tx(full + stage, 4 * kBoxBytes);
      for (int p = 0; p < 2; ++p) {
        tma_load(to + p * kBoxBytes, maps.x, 64 * p, 64 * tile, 0, full + stage);
        tma_load(to + (2 + p) * kBoxBytes, maps.grad_output, 64 * p, 64 * tile, 0, full + stage);
      }
    };
    if (is_producer) {
      load_stage(0, tile_of(0));
      mbarrier_arrive_expect_tx(weights_full, Traits::kWeightBytes);
      for (int half = 0; half < 2; ++half) {
        for (int p = 0; p < 2; ++p) {
          unsigned char* const to = proj + p * Traits::kProjBlock + half * Traits::kProjHalf;
          tma_load(to, maps.proj, 64 * p, 16 * half, 0, weights_full);
        }
        tma_load(out + half * Traits::kOutHalf, maps.out, 16 * half, 0, 0, weights_full);
      }
      if (tile_of(1) < tiles) load_stage(1, tile_of(1));
    }
    __syncwarp();
    float dproj[kFactors * 4][4] = {}, dout[kOrders * 4][4] = {};
#pragma unroll 1
    for (int round = 0; tile_of(round) < tiles; ++round) {
      const int stage = round % Traits::kStages, phase = round / Traits::kStages % 2;
      unsigned char* const x_box = stages + stage * Traits::kStageBytes + half_idx * kBoxBytes;
      unsigned char* const dl_box = x_box + 2 * kBoxBytes;
      unsigned char* const a_tiles = stages + stage * Traits::kStageBytes + 4 * kBoxBytes;
      unsigned char* const du_tiles = a_tiles + kOrders * Traits::kUnitTile;
      mbarrier_wait(full + stage, phase);
      mbarrier_wait(computed + stage, phase);
      const uint64_t x = make_smem_desc<64>(x_box, kBoxBytes), dl = make_smem_desc<64>(dl_box, kBoxBytes);
      const uint64_t du = make_smem_desc<32>(du_tiles, Traits::kUnitTile);
      const uint64_t a = make_smem_desc<32>(a_tiles, Traits::kUnitTile);
      gemm<4>([&](int k) {
        wgmma<T, kFactors * 32, true, true>(dproj, advance_desc(x, 2048 * k), advance_desc(du, 1024 * k), true);
        wgmma<T, kOrders * 32, true, true>(dout, advance_desc(dl, 2048 * k), advance_desc(a, 1024 * k), true);
      }, dproj, dout);
      if (lane == 0) mbarrier_arrive(empty + stage);
      if (is_producer && tile_of(round + Traits::kStages) < tiles) {
        mbarrier_wait(empty + stage, phase);
        load_stage(stage, tile_of(round + Traits::kStages));
      }
      __syncwarp();
    }
    store_partials<Traits::kChannels, Traits::kUnits>(partials + blockIdx.x * Traits::kPartials, 64 * half_idx, dproj,
                                                      dout);
  }
}

}  // namespace dfkd::high_order::bwd
