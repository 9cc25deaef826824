// Mixed high-order attention, backward on sm_90a in one pass, for joint gates and few channels: weights lie in shared
// memory, their gradients in registers, and no hidden activation leaves the block. 6 P C bytes, and parts of the
// weights' gradients of each block.
#pragma once

#include "high_order_attention_bwd.h"

namespace dfkd::high_order::back {

// ---- up to 64 channels and 16 hidden units --------------------------------------------------------------------------

constexpr int kNarrowChannels = 64, kNarrowUnits = 16, kNarrowGroups = 2, kNarrowStages = 4;
constexpr int kNarrowThreads = kWarpgroupSize * (kNarrowGroups + 1);
constexpr int kProjBytes = kFactors * kNarrowUnits * 64 * 2, kOutBytes = kOrders * 64 * kNarrowUnits * 2;
constexpr int kUnitPanel = 64 * kNarrowUnits * 2, kFactorsPanel = 2 * kUnitPanel;  // of a, of two factors
// What a warpgroup has beside tiles of x and of the gradient: du, a and dx.
constexpr int kNarrowKept = kFactors * kUnitPanel + kOrders * kUnitPanel + kPanelBytes;
constexpr int kNarrowGroup = kNarrowKept + kNarrowStages * 2 * kPanelBytes;
constexpr int kNarrowBarriers = kProjBytes + kOutBytes + kNarrowGroups * kNarrowGroup;
constexpr size_t kNarrowShared = kNarrowBarriers + 8 * (1 + 2 * kNarrowGroups * kNarrowStages);
constexpr int64_t kNarrowParts = (kFactors + kOrders) * kNarrowChannels * kNarrowUnits;

struct OnceMaps {
  TensorMap x, grad_output, proj, out, dx;
};

// Two warpgroups walk over tiles of 64 positions, each with the sums over its positions in registers: parts (blocks,
// dproj (6, 16, 64) and dout (3, 64, 16)). dx, where wanted. features: all bits, or none where the result is the map.
template <typename T>
__global__ void __launch_bounds__(kNarrowThreads, 1)
    once_narrow_wgmma(const __grid_constant__ OnceMaps maps, float* parts, int tiles, uint32_t features, int needs_grad_x) {
  const int thread = static_cast<int>(threadIdx.x), group = thread / kWarpgroupSize, lane = thread % kWarpSize;
  const int warp = thread / kWarpSize % 4;
  unsigned char* const proj = shared_memory();   // (6, 16) rows of 64
  unsigned char* const out = proj + kProjBytes;  // 3 x 64 rows of 16
  unsigned char* const groups = out + kOutBytes;
  Barrier* const weights = reinterpret_cast<Barrier*>(proj + kNarrowBarriers);
  const int tile_step = static_cast<int>(gridDim.x) * kNarrowGroups;

  if (thread == 0) {
    mbarrier_init(weights, 1);
    for (int i = 0; i < kNarrowGroups * kNarrowStages; ++i) {
      mbarrier_init(weights + 1 + 2 * i, 1);
      mbarrier_init(weights + 2 + 2 * i, 4);
    }
    fence_barrier_init();
  }
  __syncthreads();

  PackedPipelineState<kNarrowStages> ring;
  if (group == kNarrowGroups) {
    warpgroup_reg_dealloc<40>();
    if (warp < kNarrowGroups && lane == 0) {
      if (warp == 0) {
        mbarrier_arrive_expect_tx(weights, kProjBytes + kOutBytes);
        tma_load(proj, maps.proj, 0, 0, 0, weights);
        tma_load(out, maps.out, 0, 0, 0, weights);
      }
      for (int tile = static_cast<int>(blockIdx.x) * kNarrowGroups + warp; tile < tiles; tile += tile_step) {
        Barrier* const full = weights + 1 + 2 * (warp * kNarrowStages + ring.stage());
        unsigned char* const to = groups + warp * kNarrowGroup + kNarrowKept + ring.stage() * 2 * kPanelBytes;
        mbarrier_wait(full + 1, ring.parity() ^ 1);
        mbarrier_arrive_expect_tx(full, 2 * kPanelBytes);
        tma_load(to, maps.x, 0, 64 * tile, 0, full);
        tma_load(to + kPanelBytes, maps.grad_output, 0, 64 * tile, 0, full);
        ring.next();
      }
    }
  } else {
    warpgroup_reg_alloc<232>();
    unsigned char* const du_panels = groups + group * kNarrowGroup;     // 3 of two factors
    unsigned char* const a_panels = du_panels + kFactors * kUnitPanel;  // one an order
    unsigned char* const dx_panel = a_panels + kOrders * kUnitPanel;
    unsigned char* const stages = groups + group * kNarrowGroup + kNarrowKept;
    Barrier* const barriers = weights + 1 + 2 * group * kNarrowStages;
    float dproj[kFactors * 2][4] = {}, dout[kOrders * 2][4] = {};  // (channels, units of each factor or order)
    mbarrier_wait(weights, 0);

#pragma unroll 1
    for (int tile = static_cast<int>(blockIdx.x) * kNarrowGroups + group; tile < tiles; tile += tile_step) {
      unsigned char* const x_panel = stages + ring.stage() * 2 * kPanelBytes;
      unsigned char* const g_panel = x_panel + kPanelBytes;  // dl replaces the gradient
      mbarrier_wait(barriers + 2 * ring.stage(), ring.parity());

      float u[kFactors * 2][4];
      warpgroup_fence_operand(u);
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma<T, kFactors * kNarrowUnits>(u, advance_desc(make_smem_desc<64>(x_panel), 32 * k),
                                          advance_desc(make_smem_desc<64>(proj), 32 * k), k > 0);
      }
      warpgroup_commit_batch();
      warpgroup_wait<0>();
      warpgroup_fence_operand(u);
      if (thread % kWarpgroupSize == 0) tma_store_wait_read<0>();
      named_barrier_sync(1 + group, kWarpgroupSize);  // the dx before is stored

      uint32_t a[kOrders][4];
      const Pairs<16> narrow;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        for_orders<kOrders>([&](auto order, auto first) {
          constexpr int kOrder = order, kFirst = first;
          float z[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float mine[kOrder];
#pragma unroll
            for (int j = 0; j < kOrder; ++j) mine[j] = u[2 * (kFirst + j) + i / 2][2 * (i % 2) + e];
            z[e] = product_of(mine);
          }
          a[kOrder - 1][i] = pack_rn<T>(positive(z[0], z[0]), positive(z[1], z[1]));
          *narrow.at(a_panels + (kOrder - 1) * kUnitPanel, i % 2, i / 2) = a[kOrder - 1][i];
        });
      }
      float logits[8][4];
      warpgroup_fence_operand(logits);
      warpgroup_fence_operand(a);
      warpgroup_arrive();
#pragma unroll
      for (int r = 0; r < kOrders; ++r) wgmma<T, 64>(logits, a[r], make_smem_desc<16>(out + r * kUnitPanel), r > 0);
      warpgroup_commit_batch();
      warpgroup_wait<0>();
      warpgroup_fence_operand(logits);
      warpgroup_fence_operand(a);

      uint32_t slopes[4][4];
      const Pairs<64> wide;
      each_pair<T, 8>(wide, x_panel, g_panel, features, [&](int n, int half, uint32_t x_pair, uint32_t g_pair) {
        float value[2], g[2], dl[2];
        unpack_pair<T>(x_pair, value);
        unpack_pair<T>(g_pair, g);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float gate, slope;
          open_gate(logits[n][2 * half + e], gate, slope);
          dl[e] = g[e] * value[e] * slope;
          g[e] *= gate;
        }
        *wide.at(dx_panel, half, n) = pack_rn<T>(g[0], g[1]) & features;
        slopes[n / 2][n % 2 * 2 + half] = pack_rn<T>(dl[0], dl[1]);
        *wide.at(g_panel, half, n) = slopes[n / 2][n % 2 * 2 + half];
      });

      float da[kOrders * 2][4];
      warpgroup_fence_operand(da);
      warpgroup_fence_operand(slopes);
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma<T, kOrders * kNarrowUnits, true>(da, slopes[k],
                                               advance_desc(make_smem_desc<16>(out, kUnitPanel), 512 * k), k > 0);
      }
      warpgroup_commit_batch();
      warpgroup_wait<0>();
      warpgroup_fence_operand(da);
      warpgroup_fence_operand(slopes);

      uint32_t du[kFactors][4];
      const Pairs<32> pairs;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        for_orders<kOrders>([&](auto order, auto first) {
          constexpr int kOrder = order, kFirst = first;
          float mine[2][kOrder];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int j = 0; j < kOrder; ++j) mine[e][j] = u[2 * (kFirst + j) + i / 2][2 * (i % 2) + e];
          }
          const float(&gradient)[4] = da[2 * (kOrder - 1) + i / 2];
          uint32_t result[kOrder];
          factor_gradients<T>(mine, {gradient[2 * (i % 2)], gradient[2 * (i % 2) + 1]}, result);
#pragma unroll
          for (int j = 0; j < kOrder; ++j) {
            constexpr int kBegin = kFirst;
            const int f = kBegin + j;
            du[f][i] = result[j];
            *pairs.at(du_panels + f / 2 * kFactorsPanel, i % 2, f % 2 * 2 + i / 2) = result[j];
          }
        });
      }
      fence_proxy_async();
      float dx[8][4];
      warpgroup_fence_operand(dx);
      warpgroup_fence_operand(du);
      warpgroup_arrive();
#pragma unroll
      for (int f = 0; f < kFactors; ++f) {
        wgmma<T, 64, true>(dx, du[f], advance_desc(make_smem_desc<64>(proj, kPanelBytes), f * kNarrowUnits * 128),
                           f > 0);
      }
      warpgroup_commit_batch();
      named_barrier_sync(1 + group, kWarpgroupSize);  // du, a and dl are there
      warpgroup_fence_operand(dproj);
      warpgroup_fence_operand(dout);
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint64_t x = make_smem_desc<64>(x_panel, kPanelBytes), g = make_smem_desc<64>(g_panel, kPanelBytes);
        const uint64_t du_operand = make_smem_desc<32>(du_panels, kFactorsPanel);
        const uint64_t a_operand = make_smem_desc<16>(a_panels, kUnitPanel);
        wgmma<T, kFactors * kNarrowUnits, true, true>(dproj, advance_desc(x, 2048 * k),
                                                      advance_desc(du_operand, 1024 * k), true);
        wgmma<T, kOrders * kNarrowUnits, true, true>(dout, advance_desc(g, 2048 * k), advance_desc(a_operand, 512 * k),
                                                     true);
      }
      warpgroup_commit_batch();
      warpgroup_wait<1>();
      warpgroup_fence_operand(dx);
      warpgroup_fence_operand(du);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t* const pair = wide.at(dx_panel, half, n);
          float before[2];
          unpack_pair<T>(*pair, before);
          *pair = pack_rn<T>(before[0] + dx[n][2 * half], before[1] + dx[n][2 * half + 1]);
        }
      }
      fence_proxy_async();
      warpgroup_wait<0>();
      warpgroup_fence_operand(dproj);
      warpgroup_fence_operand(dout);
      if (lane == 0) mbarrier_arrive(barriers + 2 * ring.stage() + 1);
      ring.next();
      named_barrier_sync(1 + group, kWarpgroupSize);  // dx is there, and no warp's products read a and du any more
      if (needs_grad_x && thread % kWarpgroupSize == 0) {
        tma_store(maps.dx, dx_panel, 0, 64 * tile, 0);
        tma_store_commit();
      }
    }
    if (thread % kWarpgroupSize == 0) tma_store_wait<0>();

    // One warpgroup's sums to the other's.
    float* const sums = reinterpret_cast<float*>(groups) + thread % kWarpgroupSize;
    const auto each_sum = [&](auto f) {
#pragma unroll
      for (int i = 0; i < kFactors * 8; ++i) f(dproj[i / 4][i % 4], i);
#pragma unroll
      for (int i = 0; i < kOrders * 8; ++i) f(dout[i / 4][i % 4], kFactors * 8 + i);
    };
    named_barrier_sync(3, kNarrowGroups * kWarpgroupSize);
    if (group == 1) each_sum([&](float sum, int i) { sums[i * kWarpgroupSize] = sum; });
    named_barrier_sync(3, kNarrowGroups * kWarpgroupSize);
    if (group == 0) {
      each_sum([&](float& sum, int i) { sum += sums[i * kWarpgroupSize]; });
      float* const to_proj = parts + blockIdx.x * kNarrowParts;
      float* const to_out = to_proj + kFactors * kNarrowUnits * kNarrowChannels;
      const int channel = 16 * warp + lane / 4, column = 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < kFactors * 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          to_proj[(8 * n + column + e % 2) * kNarrowChannels + channel + 8 * (e / 2)] = dproj[n][e];
        }
      }
#pragma unroll
      for (int n = 0; n < kOrders * 2; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = n / 2 * kNarrowChannels + channel + 8 * half;
          *reinterpret_cast<FloatPair*>(to_out + row * kNarrowUnits + n % 2 * 8 + column) = {dout[n][2 * half],
                                                                                              dout[n][2 * half + 1]};
        }
      }
    }
  }
}

// ---- up to 128 channels and 32 hidden units -------------------------------------------------------------------------

constexpr int kWideChannels = 128, kWideUnits = 32, kWideStages = 2, kWideThreads = 4 * kWarpgroupSize;
// proj: for each 64 channels, and in them for each half of the units, (6, 16) rows; out: for each half (3, 128) rows.
constexpr int kProjHalf = kFactors * 16 * 64 * 2, kProjPanel = 2 * kProjHalf;
constexpr int kOutPanel = 128 * 16 * 2, kOutHalf = kOrders * kOutPanel;
constexpr int kWideWeights = 2 * kProjPanel + 2 * kOutHalf;
constexpr int kUnitsPanel = 64 * 32 * 2;  // of one order of a, or one factor of du
constexpr int kWideStage = 4 * kPanelBytes + (kOrders + kFactors) * kUnitsPanel;
constexpr int kWideBarriers = kWideWeights + kWideStages * kWideStage + 2 * kPanelBytes;
constexpr size_t kWideShared = kWideBarriers + 8 * (1 + 3 * kWideStages);
constexpr int64_t kWideParts = (kFactors + kOrders) * kWideChannels * kWideUnits;

// Two warpgroups make a, dl and du of a tile of 64 positions, in shared memory, and dx, each for half of the units and
// channels; two others, which also fetch tiles, add up the products over positions of the tile before meanwhile, each
// for 64 channels: parts (blocks, dproj (6, 32, 128) and dout (3, 128, 32)).
template <typename T>
__global__ void __launch_bounds__(kWideThreads, 1)
    once_wide_wgmma(const __grid_constant__ OnceMaps maps, float* parts, int tiles, uint32_t features, int needs_grad_x) {
  const int thread = static_cast<int>(threadIdx.x);
  unsigned char* const proj = shared_memory();
  unsigned char* const out = proj + 2 * kProjPanel;
  unsigned char* const stages = proj + kWideWeights;  // x, dl in place of the gradient, a, du
  Barrier* const weights = reinterpret_cast<Barrier*>(proj + kWideBarriers);
  Barrier* const loaded = weights + 1;
  Barrier* const filled = loaded + kWideStages;
  Barrier* const empty = filled + kWideStages;
  const auto tile_of = [](int round) { return static_cast<int>(blockIdx.x + round * gridDim.x); };

  if (thread == 0) {
    mbarrier_init(weights, 1);
    for (int i = 0; i < kWideStages; ++i) {
      mbarrier_init(loaded + i, 1);
      mbarrier_init(filled + i, 8);
      mbarrier_init(empty + i, 8);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (thread < 2 * kWarpgroupSize) {
    warpgroup_reg_dealloc<80>();
    // Which half is this warpgroup's; read where it is used, as all else that registers need not hold.
    const auto part = [] { return thread_anew() / kWarpgroupSize % 2; };
    const auto elected = [](int threads) { return thread_anew() % threads == 0; };
    const auto dx_panel_of = [=] { return stages + kWideStages * kWideStage + part() * kPanelBytes; };
    mbarrier_wait(weights, 0);
#pragma unroll 1
    for (int round = 0; tile_of(round) < tiles; ++round) {
      const int stage = round % kWideStages, parity = round / kWideStages % 2;
      unsigned char* const x_panels = stages + stage * kWideStage;
      unsigned char* const g_panels = x_panels + 2 * kPanelBytes;
      unsigned char* const a_panels = g_panels + 2 * kPanelBytes;
      unsigned char* const du_panels = a_panels + kOrders * kUnitsPanel;
      mbarrier_wait(loaded + stage, parity);

      // Factors lie there until du takes their place.
      const auto in_du = [&] {
        return [du_panels, pairs = Pairs<32>(), first = 2 * part()](int f, int n, int half) -> uint32_t& {
          return *pairs.at(du_panels + f * kUnitsPanel, half, first + n);
        };
      };
      {
        float u[kFactors * 2][4];
        const uint64_t a = make_smem_desc<64>(x_panels), b = make_smem_desc<64>(proj + part() * kProjHalf);
        warpgroup_fence_operand(u);
        warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          wgmma<T, kFactors * 16>(u, advance_desc(a, k / 4 * kPanelBytes + k % 4 * 32),
                                  advance_desc(b, k / 4 * kProjPanel + k % 4 * 32), k > 0);
        }
        warpgroup_commit_batch();
        warpgroup_wait<0>();
        warpgroup_fence_operand(u);
        rectify_slice<T, 2>(u, a_panels, 2 * part(), in_du());
      }
      if (elected(kWarpgroupSize)) tma_store_wait_read<0>();
      fence_proxy_async();
      named_barrier_sync(1, 2 * kWarpgroupSize);  // a is there, and the dx before is stored
      {
        float logits[8][4];
        const uint64_t a = make_smem_desc<32>(a_panels), b = make_smem_desc<16>(out + part() * 64 * 16 * 2);
        warpgroup_fence_operand(logits);
        warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < kOrders * 2; ++k) {
          wgmma<T, 64>(logits, advance_desc(a, k / 2 * kUnitsPanel + k % 2 * 32),
                       advance_desc(b, k % 2 * kOutHalf + k / 2 * kOutPanel), k > 0);
        }
        warpgroup_commit_batch();
        warpgroup_wait<0>();
        warpgroup_fence_operand(logits);
        const Pairs<64> wide;
        unsigned char* const dx_panel = dx_panel_of();
        unsigned char* const x_panel = x_panels + part() * kPanelBytes;
        unsigned char* const g_panel = g_panels + part() * kPanelBytes;
        each_pair<T, 4>(wide, x_panel, g_panel, features, [&](int n, int half, uint32_t x_pair, uint32_t g_pair) {
          float value[2], g[2], dl[2];
          unpack_pair<T>(x_pair, value);
          unpack_pair<T>(g_pair, g);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float gate, slope;
            open_gate(logits[n][2 * half + e], gate, slope);
            dl[e] = g[e] * value[e] * slope;
            g[e] *= gate;
          }
          *wide.at(g_panel, half, n) = pack_rn<T>(dl[0], dl[1]);
          *wide.at(dx_panel, half, n) = pack_rn<T>(g[0], g[1]) & features;
        });
      }
      fence_proxy_async();
      named_barrier_sync(1, 2 * kWarpgroupSize);
      {
        float da[kOrders * 2][4];
        const uint64_t a = make_smem_desc<64>(g_panels), b = make_smem_desc<16>(out + part() * kOutHalf, kOutPanel);
        warpgroup_fence_operand(da);
        warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          wgmma<T, kOrders * 16, false, true>(da, advance_desc(a, k / 4 * kPanelBytes + k % 4 * 32),
                                              advance_desc(b, 512 * k), k > 0);
        }
        warpgroup_commit_batch();
        warpgroup_wait<0>();
        warpgroup_fence_operand(da);
        factor_gradients_slice<T, 2>(in_du(), da, du_panels, 2 * part());
      }
      fence_proxy_async();
      named_barrier_sync(1, 2 * kWarpgroupSize);
      float dx[8][4];
      const uint64_t a = make_smem_desc<32>(du_panels), b = make_smem_desc<64>(proj + part() * kProjPanel, kPanelBytes);
      warpgroup_fence_operand(dx);
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kFactors * 2; ++k) {
        wgmma<T, 64, false, true>(dx, advance_desc(a, k / 2 * kUnitsPanel + k % 2 * 32),
                                  advance_desc(b, k % 2 * kProjHalf + k / 2 * 2048), k > 0);
      }
      warpgroup_commit_batch();
      if (elected(kWarpSize)) mbarrier_arrive(filled + stage);  // the sums follow the chain's next products
      warpgroup_wait<0>();
      warpgroup_fence_operand(dx);
      const Pairs<64> wide;
      unsigned char* const dx_panel = dx_panel_of();
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t* const pair = wide.at(dx_panel, half, n);
          float before[2];
          unpack_pair<T>(*pair, before);
          *pair = pack_rn<T>(before[0] + dx[n][2 * half], before[1] + dx[n][2 * half + 1]);
        }
      }
      fence_proxy_async();
      named_barrier_sync(2 + part(), kWarpgroupSize);
      if (needs_grad_x && elected(kWarpgroupSize)) {
        tma_store(maps.dx, dx_panel, 64 * part(), 64 * tile_of(round), 0);
        tma_store_commit();
      }
    }
    if (elected(kWarpgroupSize)) tma_store_wait<0>();
  } else {
    warpgroup_reg_alloc<176>();
    const int part = thread / kWarpgroupSize % 2, warp = thread / kWarpSize % 4, lane = thread % kWarpSize;
    const bool fetches = thread == 2 * kWarpgroupSize;
    const auto fetch = [&](int stage, int tile) {
      unsigned char* const to = stages + stage * kWideStage;
      mbarrier_arrive_expect_tx(loaded + stage, 4 * kPanelBytes);
      for (int p = 0; p < 2; ++p) {
        tma_load(to + p * kPanelBytes, maps.x, 64 * p, 64 * tile, 0, loaded + stage);
        tma_load(to + (2 + p) * kPanelBytes, maps.grad_output, 64 * p, 64 * tile, 0, loaded + stage);
      }
    };
    if (fetches) {
      fetch(0, tile_of(0));  // there is one for each block
      mbarrier_arrive_expect_tx(weights, kWideWeights);
      for (int half = 0; half < 2; ++half) {
        for (int p = 0; p < 2; ++p) {
          tma_load(proj + p * kProjPanel + half * kProjHalf, maps.proj, 64 * p, 16 * half, 0, weights);
        }
        tma_load(out + half * kOutHalf, maps.out, 16 * half, 0, 0, weights);
      }
      if (tile_of(1) < tiles) fetch(1, tile_of(1));
    }
    __syncwarp();
    float dproj[kFactors * 4][4] = {}, dout[kOrders * 4][4] = {};
#pragma unroll 1
    for (int round = 0; tile_of(round) < tiles; ++round) {
      const int stage = round % kWideStages, parity = round / kWideStages % 2;
      unsigned char* const x_panel = stages + stage * kWideStage + part * kPanelBytes;
      unsigned char* const g_panel = x_panel + 2 * kPanelBytes;
      unsigned char* const a_panels = stages + stage * kWideStage + 4 * kPanelBytes;
      unsigned char* const du_panels = a_panels + kOrders * kUnitsPanel;
      mbarrier_wait(loaded + stage, parity);
      mbarrier_wait(filled + stage, parity);
      warpgroup_fence_operand(dproj);
      warpgroup_fence_operand(dout);
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma<T, kFactors * 32, true, true>(dproj, advance_desc(make_smem_desc<64>(x_panel, kPanelBytes), 2048 * k),
                                            advance_desc(make_smem_desc<32>(du_panels, kUnitsPanel), 1024 * k), true);
        wgmma<T, kOrders * 32, true, true>(dout, advance_desc(make_smem_desc<64>(g_panel, kPanelBytes), 2048 * k),
                                           advance_desc(make_smem_desc<32>(a_panels, kUnitsPanel), 1024 * k), true);
      }
      warpgroup_commit_batch();
      warpgroup_wait<0>();
      warpgroup_fence_operand(dproj);
      warpgroup_fence_operand(dout);
      if (lane == 0) mbarrier_arrive(empty + stage);
      if (fetches && tile_of(round + kWideStages) < tiles) {
        mbarrier_wait(empty + stage, parity);
        fetch(stage, tile_of(round + kWideStages));
      }
      __syncwarp();
    }
    float* to_proj = parts + blockIdx.x * kWideParts;
    float* to_out = to_proj + kFactors * kWideUnits * kWideChannels;
    const int channel = 64 * part + 16 * warp + lane / 4, column = 2 * (lane % 4);
    to_proj += column * kWideChannels + channel;
    to_out += channel * kWideUnits + column;
#pragma unroll
    for (int n = 0; n < kFactors * 4; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) to_proj[(8 * n + e % 2) * kWideChannels + 8 * (e / 2)] = dproj[n][e];
    }
#pragma unroll
    for (int n = 0; n < kOrders * 4; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<FloatPair*>(to_out + (n / 4 * kWideChannels + 8 * half) * kWideUnits + n % 4 * 8) = {
            dout[n][2 * half], dout[n][2 * half + 1]};
      }
    }
  }
}

}  // namespace dfkd::high_order::back
