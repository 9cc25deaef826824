// Mixed high-order attention, forward, for sm_90a: y = A x, or A only. Order r has the factors i = 1 to r.
//
//   A = sigmoid(sum_r out_r a_r), or per_order mean_r sigmoid(out_r a_r)      a_r = relu(prod_i proj_r,i x)
//
// P positions, C channels, K = C / 4 hidden units and order 3 take 4 P C bytes of x and y, 4.5 C^2 bytes of weights,
// 4.5 P C^2 FLOPs, and P C sigmoids of two MUFU instructions each. a_r is rounded to the weights' dtype, as in the
// reference. TMA pads channels, hidden units and orders with zeros. There are two kernels, not yet run on a GPU:
//
// resident, up to 128 channels, memory-bound: a persistent kernel with one block per SM and all weights in shared
//   memory (18 KB for 64 channels, 72 KB for 128). A producer warp issues TMA loads of 64-position tiles into 18 or 9
//   pipeline stages. Two or three consumer warpgroups take tiles round-robin, so the sigmoids of one overlap the wgmmas
//   of another. The epilogue writes y over x in the stage and issues a TMA store.
// split, up to 512 channels, compute-bound: SPLIT blocks of a cluster share the positions; each computes 32 hidden
//   units of every factor and 128 channels of y. TMA multicast loads x once per cluster. Weights stream through a
//   pipeline of 24 KB stages, and multicast shares them between the TILES tiles of a cluster. The blocks exchange their
//   fragments of a_r through DSMEM with st.async, into the buffer that held x, while wgmmas on local units continue.
//   The sigmoids of the first 64 channels overlap the wgmmas of the next 64.
//   256 channels: 192 positions per block, clusters of 2; 12,544 positions fill 132 blocks.
//   512 channels: 128 positions per block, clusters of 2 tiles x 4 blocks; 3,136 positions fill 104 blocks.
#include "high_order_attention.h"

namespace {

using namespace dfkd;
using namespace dfkd::high_order;

struct TensorMaps {
  TensorMap x, y, proj, out;
};

// ---- weights resident in shared memory -----------------------------------------------------------------------------

#ifdef DFKD_HOST
constexpr int kResidentGrid = 2;  // small tests then reach every loop
#else
constexpr int kResidentGrid = kNumSMs;
#endif

template <int CBLOCKS, bool PER_ORDER>
struct ResidentTraits {
  // There are two consumer warpgroups if three would not have enough registers.
  static constexpr int kConsumers = CBLOCKS == 2 && PER_ORDER ? 2 : 3, kThreads = (kConsumers + 1) * kWarpgroupSize;
#ifdef DFKD_HOST
  static constexpr int kStages = 4;
#else
  static constexpr int kStages = CBLOCKS == 1 ? 18 : 9;
#endif
  static constexpr int kUnits = 16 * CBLOCKS, kColumns = kFactors * kUnits;
  static constexpr int kProj = CBLOCKS * kColumns * 64, kOut = CBLOCKS * kOrders * 64 * kUnits;  // elements
  static constexpr size_t kSmemBytes = 2 * (kProj + kOut + kStages * CBLOCKS * kBoxElements) + 8 * (2 * kStages + 1);
};

// For CBLOCKS blocks of 64 channels and 16 CBLOCKS hidden units. PER_ORDER: one gate per order.
template <typename T, int CBLOCKS, bool PER_ORDER>
__global__ void __launch_bounds__(ResidentTraits<CBLOCKS, PER_ORDER>::kThreads, 1)
    resident_wgmma(const __grid_constant__ TensorMaps maps, int tiles, int order, int return_gate) {
  using Traits = ResidentTraits<CBLOCKS, PER_ORDER>;
  constexpr int kUnits = Traits::kUnits, kColumns = Traits::kColumns, kStages = Traits::kStages;
  constexpr int kConsumers = Traits::kConsumers;
  const int thread = static_cast<int>(threadIdx.x), warpgroup = thread / kWarpgroupSize;
  const int first_tile = static_cast<int>(blockIdx.x), tile_step = static_cast<int>(gridDim.x);
  T* const proj_smem = reinterpret_cast<T*>(shared_memory());  // [CBLOCKS, factors, units, 64]
  T* const out_smem = proj_smem + Traits::kProj;               // [CBLOCKS, orders, 64, units]
  T* const x_smem = out_smem + Traits::kOut;                   // [stages, CBLOCKS, 64, 64]
  Barrier* const full = reinterpret_cast<Barrier*>(x_smem + kStages * CBLOCKS * kBoxElements);
  Barrier* const empty = full + kStages;
  Barrier* const weights_full = empty + kStages;

  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 1);
    }
    mbarrier_init(weights_full, 1);
    fence_barrier_init();
  }
  __syncthreads();

  if (warpgroup == kConsumers) {
    warpgroup_reg_dealloc<24>();
    if (thread % kWarpgroupSize == 0) {
      prefetch_tensormaps(maps.x, maps.y);
      mbarrier_arrive_expect_tx(weights_full, 2 * (Traits::kProj + Traits::kOut));
#pragma unroll
      for (int p = 0; p < CBLOCKS; ++p) {
        tma_load(proj_smem + p * kColumns * 64, maps.proj, 64 * p, 0, 0, weights_full);
        tma_load(out_smem + p * kOrders * 64 * kUnits, maps.out, 0, 64 * p, 0, weights_full);
      }
      PipelineState state;
      for (int tile = first_tile; tile < tiles; tile += tile_step) {
        mbarrier_wait(empty + state.index, state.phase ^ 1);
        mbarrier_arrive_expect_tx(full + state.index, 2 * CBLOCKS * kBoxElements);
#pragma unroll
        for (int p = 0; p < CBLOCKS; ++p) {
          tma_load(x_smem + (state.index * CBLOCKS + p) * kBoxElements, maps.x, 64 * p, tile * kWarpgroupRows, 0,
                   full + state.index);
        }
        state.advance(kStages);
      }
    }
  } else {
    warpgroup_reg_alloc<kConsumers == 3 ? 160 : 240>();
    const bool elected = thread % kWarpgroupSize == 0;
    const float inv_order = 1.0f / static_cast<float>(order);
    int prev_stage = -1;
    PipelineState state;
    state.advance(kStages, warpgroup);
    mbarrier_wait(weights_full, 0);
    for (int tile = first_tile + warpgroup * tile_step; tile < tiles; tile += kConsumers * tile_step) {
      T* const x_tile = x_smem + state.index * CBLOCKS * kBoxElements;
      uint32_t a[kOrders * CBLOCKS][4];
      {
        float u[kColumns / 8][4];
        mbarrier_wait(full + state.index, state.phase);
        warpgroup_fence_operand(u);
        warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < 4 * CBLOCKS; ++k) {
          wgmma<T, kColumns>(u, advance_desc(make_smem_desc<64>(x_tile + k / 4 * kBoxElements), 32 * (k % 4)),
                             advance_desc(make_smem_desc<64>(proj_smem + k / 4 * kColumns * 64), 32 * (k % 4)), k > 0);
        }
        warpgroup_commit_batch();
        if (elected && prev_stage >= 0) {
          tma_store_wait_read<0>();
          mbarrier_arrive(empty + prev_stage);
        }
        __syncwarp();
        warpgroup_wait<0>();
        warpgroup_fence_operand(u);
        relu_product_fragments<T, kUnits>(u, a);
      }
      if constexpr (PER_ORDER) {
#pragma unroll
        for (int p = 0; p < CBLOCKS; ++p) {
          float logits[kOrders][8][4];
          warpgroup_fence_operands(logits);
          warpgroup_fence_operand(a);
          warpgroup_arrive();
          mma_logits<T, kUnits, true>(logits, a, out_smem + p * kOrders * 64 * kUnits, false);
          warpgroup_commit_batch();
          warpgroup_wait<0>();
          warpgroup_fence_operands(logits);
          apply_gate<T, true>(logits, x_tile + p * kBoxElements, order, return_gate, inv_order);
        }
      } else {
        float logits[CBLOCKS][1][8][4];
        warpgroup_fence_operand(a);
#pragma unroll
        for (int p = 0; p < CBLOCKS; ++p) {
          warpgroup_fence_operands(logits[p]);
          warpgroup_arrive();
          mma_logits<T, kUnits, false>(logits[p], a, out_smem + p * kOrders * 64 * kUnits, false);
          warpgroup_commit_batch();
        }
        warpgroup_wait<CBLOCKS - 1>();
        warpgroup_fence_operands(logits[0]);
        apply_gate<T, false>(logits[0], x_tile, order, return_gate, inv_order);
        if constexpr (CBLOCKS == 2) {
          warpgroup_wait<0>();
          warpgroup_fence_operands(logits[1]);
          apply_gate<T, false>(logits[1], x_tile + kBoxElements, order, return_gate, inv_order);
        }
      }
      fence_proxy_async();
      named_barrier_sync(1 + warpgroup, kWarpgroupSize);
      if (elected) {
#pragma unroll
        for (int p = 0; p < CBLOCKS; ++p) {
          tma_store(maps.y, x_tile + p * kBoxElements, 64 * p, tile * kWarpgroupRows, 0);
        }
        tma_store_commit();
      }
      prev_stage = state.index;
      state.advance(kStages, kConsumers);
    }
    if (elected) tma_store_wait<0>();
  }
}

// ---- channels split over the blocks of a cluster --------------------------------------------------------------------

constexpr int kSplitUnits = 32, kSplitProjN = kFactors * kSplitUnits;  // per block
constexpr int kWeightStage = kSplitProjN * 64;                         // elements, loaded in two halves
static_assert(kWeightStage == 2 * kOrders * 64 * kSplitUnits);

template <int SPLIT, int CONSUMERS>
struct SplitTraits {
  static constexpr int kStages = SPLIT == 4 ? 4 : CONSUMERS == 3 ? 5 : 6, kThreads = (CONSUMERS + 1) * kWarpgroupSize;
  static constexpr int kChannelBlocks = 2 * SPLIT, kXBlock = CONSUMERS * kBoxElements;
  static constexpr size_t kSmemBytes =
      2 * (kChannelBlocks * kXBlock + kStages * kWeightStage) + 8 * (kChannelBlocks + 2 * kStages + 2 * CONSUMERS);
};

// For 128 SPLIT channels, 32 SPLIT hidden units, CONSUMERS consumer warpgroups and TILES position tiles per cluster.
template <typename T, int SPLIT, int TILES, int CONSUMERS, bool PER_ORDER>
__global__ void __launch_bounds__(SplitTraits<SPLIT, CONSUMERS>::kThreads, 1)
    split_wgmma(const __grid_constant__ TensorMaps maps, int order, int return_gate) {
  using Traits = SplitTraits<SPLIT, CONSUMERS>;
  constexpr int kChannelBlocks = Traits::kChannelBlocks, kXBlock = Traits::kXBlock, kStages = Traits::kStages;
  constexpr int kWeightLoads = kChannelBlocks + SPLIT, kSteps = kOrders * kSplitUnits / 16;
  static_assert(SPLIT <= kStages && (SPLIT & (SPLIT - 1)) == 0);
  const int thread = static_cast<int>(threadIdx.x), warpgroup = thread / kWarpgroupSize, lane = thread % kWarpSize;
  const int rank = cluster_rank(), split_rank = rank & (SPLIT - 1), first_rank = rank - split_rank;
  const int cluster_tile = rank / SPLIT;
  const int tile = static_cast<int>(blockIdx.x) / (SPLIT * TILES) * TILES + cluster_tile;
  T* const x_tile = reinterpret_cast<T*>(shared_memory());  // [kChannelBlocks, 64 CONSUMERS, 64]
  // [stages, factors, units, 64] for proj, [stages, 2, orders, 64, units] for out.
  T* const weights = x_tile + kChannelBlocks * kXBlock;
  Barrier* const x_full = reinterpret_cast<Barrier*>(weights + kStages * kWeightStage);
  Barrier* const full = x_full + kChannelBlocks;
  Barrier* const empty = full + kStages;
  Barrier* const x_empty = empty + kStages;     // per warpgroup: all peers have read its rows of x
  Barrier* const a_full = x_empty + CONSUMERS;  // per warpgroup: all peers' fragments of a_r have arrived
  const auto peer = [=](int i) { return (split_rank + i) & (SPLIT - 1); };

  if (thread == 0) {
    for (int i = 0; i < kChannelBlocks; ++i) mbarrier_init(x_full + i, 1);
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 4 * CONSUMERS * TILES);
    }
    for (int i = 0; i < CONSUMERS; ++i) {
      mbarrier_init(x_empty + i, 4 * (SPLIT - 1));
      mbarrier_init(a_full + i, 1);
    }
    fence_barrier_init();
    for (int i = 0; i < CONSUMERS; ++i) {
      mbarrier_arrive_expect_tx(a_full + i, (SPLIT - 1) * 16 * kSteps * kWarpgroupSize);
    }
    prefetch_tensormaps(maps.x, maps.y, maps.proj, maps.out);
  }
  cluster_sync();

  if (warpgroup == CONSUMERS) {
    warpgroup_reg_dealloc<24>();
    if (thread % kWarpgroupSize == 0) {
      // Every thread block starts with the channel blocks of x that it loads itself.
      const unsigned tile_mask = ((1u << SPLIT) - 1) << first_rank;
      const unsigned pair_mask = (1u << split_rank) | (1u << (split_rank + SPLIT));
      for (int i = 0; i < kChannelBlocks; ++i) mbarrier_arrive_expect_tx(x_full + i, 2 * kXBlock);
#pragma unroll 1
      for (int i = 0; i < kWeightLoads; ++i) {
        if (i < 2) {
          const int block = 2 * split_rank + i;
          tma_load_multicast(tile_mask, x_tile + block * kXBlock, maps.x, 64 * block,
                             tile * CONSUMERS * kWarpgroupRows, 0, x_full + block);
        }
        const int stage = i % kStages;
        if (i >= kStages) mbarrier_wait(empty + stage, (i / kStages - 1) % 2);
        mbarrier_arrive_expect_tx(full + stage, 2 * kWeightStage);
        const bool is_proj = i < kChannelBlocks;
        const int channel = 64 * ((i + 2 * split_rank) & (kChannelBlocks - 1));
        const int unit = kSplitUnits * peer(i - kChannelBlocks);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          T* const to = weights + stage * kWeightStage + half * (kWeightStage / 2);
          const TensorMap& from = is_proj ? maps.proj : maps.out;
          const int x = is_proj ? channel : unit;
          const int y = is_proj ? kSplitUnits * split_rank : 128 * split_rank + 64 * half;
          const int z = is_proj ? kFactors / 2 * half : 0;
          if constexpr (TILES == 1) {
            tma_load(to, from, x, y, z, full + stage);
          } else {
            if (half == cluster_tile) tma_load_multicast(pair_mask, to, from, x, y, z, full + stage);
          }
        }
      }
    }
  } else {
    warpgroup_reg_alloc<CONSUMERS == 3 ? 160 : 240>();
    const auto weight_stage = [=](int i) { return weights + i % kStages * kWeightStage; };
    const auto x_box = [=](int block) { return x_tile + block * kXBlock + warpgroup * kBoxElements; };
    // Releases only stages that will be refilled: no producer waits for the others.
    const auto consumer_release = [&](int i) {
      if (i + kStages < kWeightLoads && lane < TILES) {
        mbarrier_arrive_cluster_cta_release(empty + i % kStages, split_rank + lane * SPLIT);
      }
      __syncwarp();
    };
    const float inv_order = 1.0f / static_cast<float>(order);
    uint32_t a[SPLIT][kSteps][4], a_local[kSteps][4];
    {
      float u[kSplitProjN / 8][4];
      warpgroup_fence_operand(u);
#pragma unroll
      for (int i = 0; i < kChannelBlocks; ++i) {
        const int block = (i + 2 * split_rank) & (kChannelBlocks - 1);
        mbarrier_wait(x_full + block, 0);
        mbarrier_wait(full + i % kStages, i / kStages % 2);
        warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          wgmma<T, kSplitProjN>(u, advance_desc(make_smem_desc<64>(x_box(block)), 32 * k),
                                advance_desc(make_smem_desc<64>(weight_stage(i)), 32 * k), i + k > 0);
        }
        warpgroup_commit_batch();
        if (i > 0) {
          warpgroup_wait<1>();
          consumer_release(i - 1);
        }
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(u);
      consumer_release(kChannelBlocks - 1);
      if (lane < SPLIT - 1) mbarrier_arrive_cluster_cta_release(x_empty + warpgroup, first_rank + peer(1 + lane));
      __syncwarp();
      relu_product_fragments<T, kSplitUnits>(u, a[0]);
    }
    // From here on, wgmmas read the registers of a[0], so st_async() sends a copy.
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) a_local[i][e] = a[0][i][e];
    }
    warpgroup_fence_operand(a_local);

    float logits[PER_ORDER ? 1 : 2][PER_ORDER ? kOrders : 1][8][4];
    using Logits = float (&)[PER_ORDER ? kOrders : 1][8][4];
    const auto issue_logits = [&](Logits to, int half, int begin, int end) {
      if (begin == 0) warpgroup_fence_operands(to);
#pragma unroll
      for (int i = begin; i < end; ++i) {
        mbarrier_wait(full + (kChannelBlocks + i) % kStages, (kChannelBlocks + i) / kStages % 2);
        warpgroup_arrive();
        const T* const out_smem = weight_stage(kChannelBlocks + i) + half * (kWeightStage / 2);
        mma_logits<T, kSplitUnits, PER_ORDER>(to, a[i], out_smem, i > 0);
      }
      warpgroup_commit_batch();
    };
    const auto epilogue = [&](Logits from, int half) {
      T* const box = x_box(2 * split_rank + half);
      apply_gate<T, PER_ORDER>(from, box, order, return_gate, inv_order);
      fence_proxy_async();
      named_barrier_sync(1 + warpgroup, kWarpgroupSize);
      if (thread % kWarpgroupSize == 0) {
        tma_store(maps.y, box, 128 * split_rank + 64 * half, (tile * CONSUMERS + warpgroup) * kWarpgroupRows, 0);
        tma_store_commit();
      }
      __syncwarp();
    };

    warpgroup_fence_operand(a[0]);
    issue_logits(logits[0], 0, 0, 1);
    if constexpr (!PER_ORDER) issue_logits(logits[1], 1, 0, 1);

    // A block's fragments of a_r replace its channels of x: 16 bytes per thread and k-step.
    const int offset = thread % kWarpgroupSize * 8;
    const auto a_slot = [=](int owner, int i) {
      return x_box(2 * owner + i / 4) + i % 4 * kWarpgroupSize * 8 + offset;
    };
    mbarrier_wait(x_empty + warpgroup, 0);
#pragma unroll
    for (int j = 1; j < SPLIT; ++j) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        st_async(a_slot(split_rank, i), a_local[i], a_full + warpgroup, first_rank + peer(j));
      }
    }
    mbarrier_wait_cluster(a_full + warpgroup, 0);
#pragma unroll
    for (int j = 1; j < SPLIT; ++j) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const auto chunk = *reinterpret_cast<const AlignedArray<uint32_t, 4>*>(a_slot(peer(j), i));
#pragma unroll
        for (int e = 0; e < 4; ++e) a[j][i][e] = chunk.at[e];
      }
      warpgroup_fence_operand(a[j]);
    }
    // Warpgroups issue their wgmmas in order, so that the first warpgroup starts its sigmoids early. Sigmoids take
    // longer than wgmmas.
    if (warpgroup > 0) named_barrier_sync(CONSUMERS + warpgroup, 2 * kWarpgroupSize);
    issue_logits(logits[0], 0, 1, SPLIT);
    if constexpr (!PER_ORDER) issue_logits(logits[1], 1, 1, SPLIT);
    if (warpgroup < CONSUMERS - 1) named_barrier_arrive(CONSUMERS + warpgroup + 1, 2 * kWarpgroupSize);
    if constexpr (PER_ORDER) {
      warpgroup_wait<0>();
      warpgroup_fence_operands(logits[0]);
      epilogue(logits[0], 0);
      issue_logits(logits[0], 1, 0, SPLIT);
      warpgroup_wait<0>();
      warpgroup_fence_operands(logits[0]);
      epilogue(logits[0], 1);
    } else {
      warpgroup_wait<1>();
      warpgroup_fence_operands(logits[0]);
      epilogue(logits[0], 0);
      warpgroup_wait<0>();
      warpgroup_fence_operands(logits[1]);
      epilogue(logits[1], 1);
    }
    if (thread % kWarpgroupSize == 0) tma_store_wait<0>();
    __syncwarp();
  }
  cluster_sync();
}

// ---- launches ------------------------------------------------------------------------------------------------------

// Returns the smallest kernel size, in channels, that fits: 64, 128, 256 or 512.
int padded_channels(int64_t channels, int64_t hidden) {
  for (const int width : {64, 128, 256}) {
    if (channels <= width && hidden <= width / 4) return width;
  }
  return kMaxChannels;
}

// A tile of x has `rows` rows, a box of proj has UNITS units of `factors` factors, and a box of out has UNITS units.
template <int UNITS>
int make_tensor_maps(TensorMaps& to, const Problem& p, const void* x, const void* proj, const void* out, void* y,
                     int rows, int factors) {
  TensorMapBuilder build{p};
  build.matrix<64>(to.x, x, p.channels, 64, rows);
  build.matrix<64>(to.y, y, p.channels, 64, kWarpgroupRows);
  build.proj_weight<64>(to.proj, proj, {64, UNITS, factors});
  build.out_weight<UNITS>(to.out, out, {UNITS, 64, kOrders});
  return build.error;
}

template <typename T, int CBLOCKS, bool PER_ORDER>
int launch_resident(const Problem& p, const void* x, const void* proj, const void* out, void* y, void* stream) {
  TensorMaps maps;
  if (const int error = make_tensor_maps<16 * CBLOCKS>(maps, p, x, proj, out, y, kWarpgroupRows, kFactors)) {
    return error;
  }
  using Traits = ResidentTraits<CBLOCKS, PER_ORDER>;
  const int64_t tiles = divide_up(p.positions, kWarpgroupRows);
  const dim3 blocks(static_cast<unsigned>(tiles < kResidentGrid ? tiles : kResidentGrid));
  return launch(resident_wgmma<T, CBLOCKS, PER_ORDER>, blocks, dim3(Traits::kThreads), Traits::kSmemBytes, stream,
                maps, tiles, p.order, p.return_gate);
}

template <typename T, int SPLIT, int TILES, int CONSUMERS, bool PER_ORDER>
int launch_split(const Problem& p, const void* x, const void* proj, const void* out, void* y, void* stream) {
  TensorMaps maps;
  const int rows = CONSUMERS * kWarpgroupRows;
  if (const int error = make_tensor_maps<kSplitUnits>(maps, p, x, proj, out, y, rows, kFactors / 2)) return error;
  using Traits = SplitTraits<SPLIT, CONSUMERS>;
  const dim3 blocks(static_cast<unsigned>(divide_up(p.positions, TILES * rows) * SPLIT * TILES));
  return launch_cluster(split_wgmma<T, SPLIT, TILES, CONSUMERS, PER_ORDER>, blocks, dim3(Traits::kThreads),
                        Traits::kSmemBytes, SPLIT * TILES, false, stream, maps, p.order, p.return_gate);
}

// PER_ORDER needs more registers, so the kernel of 256 channels then has two consumer warpgroups instead of three.
template <typename T, bool PER_ORDER>
int forward(const Problem& p, const void* x, const void* proj, const void* out, void* y, void* stream) {
  switch (padded_channels(p.channels, p.hidden)) {
    case 64:
      return launch_resident<T, 1, PER_ORDER>(p, x, proj, out, y, stream);
    case 128:
      return launch_resident<T, 2, PER_ORDER>(p, x, proj, out, y, stream);
    case 256:
      return launch_split<T, 2, 1, PER_ORDER ? 2 : 3, PER_ORDER>(p, x, proj, out, y, stream);
    default:
      return launch_split<T, 4, 2, 2, PER_ORDER>(p, x, proj, out, y, stream);
  }
}

}  // namespace

extern "C" {

int dfkd_high_order_attention(const void* x, const void* proj_weight, const void* out_weight, int64_t positions,
                              int64_t channels, int64_t hidden, int64_t order, int dtype, int mode, int result,
                              void* y, void* stream) {
  if (const int status = require_sizes(positions, channels, hidden, order)) return status;
  const int orders = static_cast<int>(order);
  const Problem p{positions, static_cast<int>(channels), static_cast<int>(hidden), orders, mode ? orders : 1, result};
  return dispatch_dtype(dtype, [=](auto type) {
    using T = decltype(type);
    if (positions == 0) return 0;
    return mode ? forward<T, true>(p, x, proj_weight, out_weight, y, stream)
                : forward<T, false>(p, x, proj_weight, out_weight, y, stream);
  });
}
}
