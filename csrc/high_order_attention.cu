// Mixed high-order attention, forward, for sm_90a: y = A x, or A alone; A = sigmoid(sum over r of out_r a_r),
// a_r = relu(prod_i proj_r,i x).
//
// Not yet run on a GPU. For P positions of C channels, K = C / 4 and order 3: 4 P C bytes in a two-byte type, 4.5 C^2
// bytes of weights, and 4.5 P C^2 operations: the six first products are one of 1.5 C columns, the three second ones
// one that sums over 0.75 C units. A gate costs two instructions of the unit that does 16 a clock, so that P C gates
// take a processor as long as the products do at C = 128: they must run beside products or copies. Two forms, both with
// a warp that copies and warpgroups that have 64 positions each (see high_order_attention.h); a is rounded to
// the type of the weights, as the reference rounds it, and nothing else is. Fewer units, channels or orders than a form
// is made for are filled up with zeros by the copies.
//
// resident, up to 128 channels: memory is the limit. A block a processor keeps all weights in shared memory (18 KB for
//   64 channels, 72 KB for 128), and its positions pass through a ring of tiles: 18 of 8 KB, or 9 of 16 KB, which is
//   more than what a processor's share of the bandwidth needs in flight, and at (64, 128, 28, 28) all that a block has
//   to read at once. Three warpgroups take tiles in turn, so that one's gates run beside another's products. The result
//   replaces x in its tile and is copied from there.
// spread, up to 512 channels: the products are the limit, and there is one wave of blocks. PARTS blocks of a cluster
//   have the same positions, and each has 32 units of every factor and 128 channels of the result. They read x once, a
//   PARTS-th each, for all of them. Weights come through a ring in pieces of 24 KB: a PARTS-th of them for each block,
//   and where TILES is 2 for two tiles of positions at once, since 25 tiles that each read all weights would ask the
//   second-level cache for 29 MB. The blocks exchange their a as it lies in registers: a thread stores what it has in
//   the shared memory of the others, where x was that nobody needs any more, and the thread there that has the same
//   positions reads it into registers; meanwhile products over the units that a block has itself go on. Gates of the
//   first 64 channels run beside products for the next 64, and one warpgroup's beside another's.
//   256 channels: 192 positions a block, two blocks a cluster, so that 12,544 positions are 132 blocks.
//   512 channels: 128 positions a block, four blocks to a tile and two tiles a cluster: 3,136 positions are 104 blocks.
#include "high_order_attention.h"

namespace {

using namespace dfkd;
using namespace dfkd::high_order;

// ---- all weights in shared memory ----------------------------------------------------------------------------------

// Warpgroups with positions: fewer where more registers are needed.
constexpr int resident_groups(int panels, bool each) { return panels == 2 && each ? 2 : 3; }
#ifdef DFKD_HOST  // so that small tests reach every loop
constexpr int kResidentBlocks = 2;
constexpr int resident_slots(int) { return 4; }
#else
constexpr int kResidentBlocks = kProcessors;
constexpr int resident_slots(int panels) { return panels == 1 ? 18 : 9; }
#endif

// Elements of the parts of shared memory.
constexpr int resident_proj(int panels) { return panels * kFactors * 16 * panels * 64; }
constexpr int resident_out(int panels) { return panels * kOrders * 64 * 16 * panels; }
constexpr size_t resident_shared(int panels) {
  const int elements = resident_proj(panels) + resident_out(panels) + resident_slots(panels) * panels * kSquare;
  return 2 * static_cast<size_t>(elements) + sizeof(Barrier) * static_cast<size_t>(2 * resident_slots(panels) + 1);
}

// PANELS of 64 channels, 16 PANELS hidden units; EACH: a gate an order.
template <typename T, int PANELS, bool EACH>
__global__ void __launch_bounds__((resident_groups(PANELS, EACH) + 1) * kWarpgroupSize, 1)
    resident_wgmma(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map,
                    const __grid_constant__ TensorMap proj_map, const __grid_constant__ TensorMap out_map, int tiles,
                    int order, int map) {
  constexpr int kUnits = 16 * PANELS, kColumns = kFactors * kUnits, kSlots = resident_slots(PANELS);
  constexpr int kGroups = resident_groups(PANELS, EACH);
  const int thread = static_cast<int>(threadIdx.x), group = thread / kWarpgroupSize;
  const int first = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
  T* const proj_tile = reinterpret_cast<T*>(shared_memory());  // PANELS x (factors, units, 64)
  T* const out_tile = proj_tile + resident_proj(PANELS);       // PANELS x (orders, 64, units)
  T* const x_tiles = out_tile + resident_out(PANELS);          // slots x PANELS x (64, 64)
  Barrier* const full = reinterpret_cast<Barrier*>(x_tiles + kSlots * PANELS * kSquare);
  Barrier* const empty = full + kSlots;
  Barrier* const weights = empty + kSlots;

  if (thread == 0) {
    for (int i = 0; i < kSlots; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 1);
    }
    mbarrier_init(weights, 1);
    fence_barrier_init();
  }
  __syncthreads();

  if (group == kGroups) {
    warpgroup_reg_dealloc<24>();
    if (thread % kWarpgroupSize == 0) {
      prefetch_tensormap(x_map);
      prefetch_tensormap(y_map);
      mbarrier_arrive_expect_tx(weights, 2 * (resident_proj(PANELS) + resident_out(PANELS)));
#pragma unroll
      for (int p = 0; p < PANELS; ++p) {
        tma_load(proj_tile + p * kColumns * 64, proj_map, 64 * p, 0, 0, weights);
        tma_load(out_tile + p * kOrders * 64 * kUnits, out_map, 0, 64 * p, 0, weights);
      }
      PipelineState state;
      bool again = false;
      for (int tile = first; tile < tiles; tile += step) {
        if (again) mbarrier_wait(empty + state.index, state.phase ^ 1);
        mbarrier_arrive_expect_tx(full + state.index, 2 * PANELS * kSquare);
#pragma unroll
        for (int p = 0; p < PANELS; ++p) {
          tma_load(x_tiles + (state.index * PANELS + p) * kSquare, x_map, 64 * p, tile * kGroupRows, 0,
                   full + state.index);
        }
        state.advance(kSlots);
        again = again || state.index == 0;
      }
    }
  } else {
    warpgroup_reg_alloc<kGroups == 3 ? 160 : 240>();
    const bool speaker = thread % kWarpgroupSize == 0;
    const float share = 1.0f / static_cast<float>(order);
    int before = -1;  // the slot that this warpgroup had before
    PipelineState state;
    state.advance(kSlots, group);
    mbarrier_wait(weights, 0);
    for (int tile = first + group * step; tile < tiles; tile += kGroups * step) {
      T* const x_tile = x_tiles + state.index * PANELS * kSquare;
      uint32_t a[kOrders * PANELS][4];
      {
        float u[kColumns / 8][4];
        mbarrier_wait(full + state.index, state.phase);
        warpgroup_fence_operand(u);
        warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < 4 * PANELS; ++k) {
          wgmma<T, kColumns>(u, advance_desc(make_smem_desc<64>(x_tile + k / 4 * kSquare), 32 * (k % 4)),
                             advance_desc(make_smem_desc<64>(proj_tile + k / 4 * kColumns * 64), 32 * (k % 4)), k > 0);
        }
        warpgroup_commit_batch();
        if (speaker && before >= 0) {
          tma_store_wait_read<0>();
          mbarrier_arrive(empty + before);
        }
        __syncwarp();
        warpgroup_wait<0>();
        warpgroup_fence_operand(u);
        rectify<T, kUnits>(u, a);
      }
      if constexpr (EACH) {
#pragma unroll
        for (int p = 0; p < PANELS; ++p) {
          float logits[kOrders][8][4];
          hold_all(logits);
          warpgroup_fence_operand(a);
          warpgroup_arrive();
          add_logits<T, kUnits, true>(logits, a, out_tile + p * kOrders * 64 * kUnits, false);
          warpgroup_commit_batch();
          warpgroup_wait<0>();
          hold_all(logits);
          open_gate<T, true>(logits, x_tile + p * kSquare, order, map, share);
        }
      } else {
        float logits[PANELS][1][8][4];
        warpgroup_fence_operand(a);
#pragma unroll
        for (int p = 0; p < PANELS; ++p) {
          hold_all(logits[p]);
          warpgroup_arrive();
          add_logits<T, kUnits, false>(logits[p], a, out_tile + p * kOrders * 64 * kUnits, false);
          warpgroup_commit_batch();
        }
        warpgroup_wait<PANELS - 1>();
        hold_all(logits[0]);
        open_gate<T, false>(logits[0], x_tile, order, map, share);
        if constexpr (PANELS == 2) {
          warpgroup_wait<0>();
          hold_all(logits[1]);
          open_gate<T, false>(logits[1], x_tile + kSquare, order, map, share);
        }
      }
      fence_proxy_async();
      named_barrier_sync(1 + group, kWarpgroupSize);
      if (speaker) {
#pragma unroll
        for (int p = 0; p < PANELS; ++p) tma_store(y_map, x_tile + p * kSquare, 64 * p, tile * kGroupRows, 0);
        tma_store_commit();
      }
      before = state.index;
      state.advance(kSlots, kGroups);
    }
    if (speaker) tma_store_wait<0>();
  }
}

// ---- the work of a tile spread over the blocks of a cluster --------------------------------------------------------

constexpr int kPartUnits = 32, kPartColumns = kFactors * kPartUnits;  // of a block
constexpr int kPiece = kPartColumns * 64;                             // elements of a piece of weights: two halves
static_assert(kPiece == 2 * kOrders * 64 * kPartUnits);

constexpr int spread_slots(int parts, int groups) { return parts == 4 ? 4 : groups == 3 ? 5 : 6; }
constexpr size_t spread_shared(int parts, int groups) {
  const int panels = 2 * parts, slots = spread_slots(parts, groups);
  return 2 * static_cast<size_t>(panels * groups * kSquare + slots * kPiece) +
         sizeof(Barrier) * static_cast<size_t>(panels + 2 * slots + 2 * groups);
}

// 128 PARTS channels, 32 PARTS hidden units; GROUPS warpgroups.
template <typename T, int PARTS, int TILES, int GROUPS, bool EACH>
__global__ void __launch_bounds__((GROUPS + 1) * kWarpgroupSize, 1)
    spread_wgmma(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map,
                  const __grid_constant__ TensorMap proj_map, const __grid_constant__ TensorMap out_map, int order,
                  int map) {
  constexpr int kPanels = 2 * PARTS, kPanel = GROUPS * kSquare, kSlots = spread_slots(PARTS, GROUPS);
  constexpr int kPieces = kPanels + PARTS, kSteps = kOrders * kPartUnits / 16;
  static_assert(PARTS <= kSlots && (PARTS & (PARTS - 1)) == 0);
  const int thread = static_cast<int>(threadIdx.x), group = thread / kWarpgroupSize, lane = thread % kWarpSize;
  const int rank = cluster_rank(), part = rank & (PARTS - 1), team = rank - part, twin = rank / PARTS;
  const int tile = static_cast<int>(blockIdx.x) / (PARTS * TILES) * TILES + twin;
  T* const x_tile = reinterpret_cast<T*>(shared_memory());  // PANELS x (64 GROUPS, 64)
  T* const pieces = x_tile + kPanels * kPanel;  // slots x (factors, units, 64), or x 2 x (orders, 64, units)
  Barrier* const x_full = reinterpret_cast<Barrier*>(pieces + kSlots * kPiece);
  Barrier* const full = x_full + kPanels;
  Barrier* const empty = full + kSlots;
  Barrier* const spent = empty + kSlots;  // a warpgroup's rows of x, in all other blocks
  Barrier* const given = spent + GROUPS;  // to a warpgroup, the others' a
  const auto other = [=](int i) { return (part + i) & (PARTS - 1); };

  if (thread == 0) {
    for (int i = 0; i < kPanels; ++i) mbarrier_init(x_full + i, 1);
    for (int i = 0; i < kSlots; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 4 * GROUPS * TILES);
    }
    for (int i = 0; i < GROUPS; ++i) {
      mbarrier_init(spent + i, 4 * (PARTS - 1));
      mbarrier_init(given + i, 1);
    }
    fence_barrier_init();
    for (int i = 0; i < GROUPS; ++i) mbarrier_arrive_expect_tx(given + i, (PARTS - 1) * 16 * kSteps * kWarpgroupSize);
    prefetch_tensormap(x_map);
    prefetch_tensormap(y_map);
    prefetch_tensormap(proj_map);
    prefetch_tensormap(out_map);
  }
  cluster_sync();

  if (group == GROUPS) {
    warpgroup_reg_dealloc<24>();
    if (thread % kWarpgroupSize == 0) {
      // Every block begins with the panels of x that it copies itself.
      const unsigned team_ranks = ((1u << PARTS) - 1) << team, twins = (1u << part) | (1u << (part + PARTS));
      for (int i = 0; i < kPanels; ++i) mbarrier_arrive_expect_tx(x_full + i, 2 * kPanel);
#pragma unroll 1
      for (int i = 0; i < kPieces; ++i) {
        if (i < 2) {
          const int panel = 2 * part + i;
          tma_load_multicast(team_ranks, x_tile + panel * kPanel, x_map, 64 * panel, tile * GROUPS * kGroupRows, 0,
                             x_full + panel);
        }
        const int slot = i % kSlots;
        if (i >= kSlots) mbarrier_wait(empty + slot, (i / kSlots - 1) % 2);
        mbarrier_arrive_expect_tx(full + slot, 2 * kPiece);
        const bool down = i < kPanels;
        const int channel = 64 * ((i + 2 * part) & (kPanels - 1)), unit = kPartUnits * other(i - kPanels);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          T* const to = pieces + slot * kPiece + half * (kPiece / 2);
          const TensorMap& from = down ? proj_map : out_map;
          const int x = down ? channel : unit, y = down ? kPartUnits * part : 128 * part + 64 * half;
          const int z = down ? kFactors / 2 * half : 0;
          if constexpr (TILES == 1) {
            tma_load(to, from, x, y, z, full + slot);
          } else {
            if (half == twin) tma_load_multicast(twins, to, from, x, y, z, full + slot);
          }
        }
      }
    }
  } else {
    warpgroup_reg_alloc<GROUPS == 3 ? 160 : 240>();
    const auto piece_at = [=](int i) { return pieces + i % kSlots * kPiece; };
    const auto group_panel = [=](int panel) { return x_tile + panel * kPanel + group * kSquare; };
    // This warp has done with a piece whose slot will be filled again.
    const auto release = [&](int i) {
      if (i + kSlots < kPieces && lane < TILES) {
        mbarrier_arrive_cluster_relaxed(empty + i % kSlots, part + lane * PARTS);
      }
      __syncwarp();
    };
    const float share = 1.0f / static_cast<float>(order);
    uint32_t a[PARTS][kSteps][4], mine[kSteps][4];
    {
      float u[kPartColumns / 8][4];
      warpgroup_fence_operand(u);
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        const int panel = (i + 2 * part) & (kPanels - 1);
        mbarrier_wait(x_full + panel, 0);
        mbarrier_wait(full + i % kSlots, i / kSlots % 2);
        warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          wgmma<T, kPartColumns>(u, advance_desc(make_smem_desc<64>(group_panel(panel)), 32 * k),
                                 advance_desc(make_smem_desc<64>(piece_at(i)), 32 * k), i + k > 0);
        }
        warpgroup_commit_batch();
        if (i > 0) {
          warpgroup_wait<1>();
          release(i - 1);
        }
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(u);
      release(kPanels - 1);
      if (lane < PARTS - 1) mbarrier_arrive_cluster_relaxed(spent + group, team + other(1 + lane));
      __syncwarp();
      rectify<T, kPartUnits>(u, a[0]);
    }
    // Products read a[0] from here on: what is sent is another copy.
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) mine[i][e] = a[0][i][e];
    }
    warpgroup_fence_operand(mine);

    float logits[EACH ? 1 : 2][EACH ? kOrders : 1][8][4];
    using Logits = float (&)[EACH ? kOrders : 1][8][4];
    const auto add_parts_of = [&](Logits to, int half, int begin, int end) {
      if (begin == 0) hold_all(to);
#pragma unroll
      for (int i = begin; i < end; ++i) {
        mbarrier_wait(full + (kPanels + i) % kSlots, (kPanels + i) / kSlots % 2);
        warpgroup_arrive();
        add_logits<T, kPartUnits, EACH>(to, a[i], piece_at(kPanels + i) + half * (kPiece / 2), i > 0);
      }
      warpgroup_commit_batch();
    };
    const auto finish = [&](Logits from, int half) {
      T* const panel = group_panel(2 * part + half);
      open_gate<T, EACH>(from, panel, order, map, share);
      fence_proxy_async();
      named_barrier_sync(1 + group, kWarpgroupSize);
      if (thread % kWarpgroupSize == 0) {
        tma_store(y_map, panel, 128 * part + 64 * half, (tile * GROUPS + group) * kGroupRows, 0);
        tma_store_commit();
      }
      __syncwarp();
    };

    warpgroup_fence_operand(a[0]);
    add_parts_of(logits[0], 0, 0, 1);
    if constexpr (!EACH) add_parts_of(logits[1], 1, 0, 1);

    // Where a block's channels of x were, it puts its a: 16 bytes a thread and step.
    const int place = thread % kWarpgroupSize * 8;
    const auto exchange_at = [=](int of, int i) {
      return group_panel(2 * of + i / 4) + i % 4 * kWarpgroupSize * 8 + place;
    };
    mbarrier_wait(spent + group, 0);
#pragma unroll
    for (int j = 1; j < PARTS; ++j) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        st_async(exchange_at(part, i), mine[i], given + group, team + other(j));
      }
    }
    mbarrier_wait_cluster(given + group, 0);
#pragma unroll
    for (int j = 1; j < PARTS; ++j) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const Chunk chunk = *reinterpret_cast<const Chunk*>(exchange_at(other(j), i));
#pragma unroll
        for (int e = 0; e < 4; ++e) a[j][i][e] = chunk.words[e];
      }
      warpgroup_fence_operand(a[j]);
    }
    // One warpgroup after the other, so that the gates of the first begin early: they take longer than the products.
    if (group > 0) named_barrier_sync(GROUPS + group, 2 * kWarpgroupSize);
    add_parts_of(logits[0], 0, 1, PARTS);
    if constexpr (!EACH) add_parts_of(logits[1], 1, 1, PARTS);
    if (group < GROUPS - 1) named_barrier_arrive(GROUPS + group + 1, 2 * kWarpgroupSize);
    if constexpr (EACH) {
      warpgroup_wait<0>();
      hold_all(logits[0]);
      finish(logits[0], 0);
      add_parts_of(logits[0], 1, 0, PARTS);
      warpgroup_wait<0>();
      hold_all(logits[0]);
      finish(logits[0], 1);
    } else {
      warpgroup_wait<1>();
      hold_all(logits[0]);
      finish(logits[0], 0);
      warpgroup_wait<0>();
      hold_all(logits[1]);
      finish(logits[1], 1);
    }
    if (thread % kWarpgroupSize == 0) tma_store_wait<0>();
    __syncwarp();
  }
  cluster_sync();
}

// ---- launches ------------------------------------------------------------------------------------------------------

// The channels that a kernel is made for: the next of 64, 128, 256, 512.
int width_of(int64_t channels, int64_t hidden) {
  for (const int width : {64, 128, 256}) {
    if (channels <= width && hidden <= width / 4) return width;
  }
  return kMostChannels;
}

struct Maps {
  TensorMap x, y, proj, out;
};

// rows of a tile of x; units of a piece of the first weights, and factors; units of one of the second.
template <int UNITS>
int make_maps(Maps& to, const Problem& p, const void* x, const void* proj, const void* out, void* y, int rows,
              int factors) {
  const int64_t channels = p.channels, hidden = p.hidden;
  const int64_t all = channels * p.count;  // what the map's third dimension of one would step by
  int error = make_tensor_map<64>(&to.x, x, {channels, p.count, 1}, channels, all, {64, rows, 1});
  if (!error) error = make_tensor_map<64>(&to.y, y, {channels, p.count, 1}, channels, all, {64, kGroupRows, 1});
  if (!error) {
    error = make_tensor_map<64>(&to.proj, proj, {channels, hidden, factors_of(p.order)}, channels, channels * hidden,
                                {64, UNITS, factors});
  }
  if (!error) {
    error = make_tensor_map<UNITS>(&to.out, out, {hidden, channels, p.order}, hidden, channels * hidden,
                                   {UNITS, 64, kOrders});
  }
  return error;
}

template <typename T, int PANELS, bool EACH>
int launch_resident(const Problem& p, const void* x, const void* proj, const void* out, void* y, void* stream) {
  Maps maps;
  if (const int error = make_maps<16 * PANELS>(maps, p, x, proj, out, y, kGroupRows, kFactors)) return error;
  const int64_t tiles = divide_up(p.count, kGroupRows);
  const dim3 blocks(static_cast<unsigned>(tiles < kResidentBlocks ? tiles : kResidentBlocks));
  return launch(resident_wgmma<T, PANELS, EACH>, blocks, dim3((resident_groups(PANELS, EACH) + 1) * kWarpgroupSize),
                resident_shared(PANELS), stream, maps.x, maps.y, maps.proj, maps.out, tiles, p.order, p.map);
}

template <typename T, int PARTS, int TILES, int GROUPS, bool EACH>
int launch_spread(const Problem& p, const void* x, const void* proj, const void* out, void* y, void* stream) {
  Maps maps;
  if (const int error = make_maps<kPartUnits>(maps, p, x, proj, out, y, GROUPS * kGroupRows, kFactors / 2)) {
    return error;
  }
  const int64_t clusters = divide_up(p.count, TILES * GROUPS * kGroupRows);
  return launch_cluster(spread_wgmma<T, PARTS, TILES, GROUPS, EACH>,
                        dim3(static_cast<unsigned>(clusters * PARTS * TILES)), dim3((GROUPS + 1) * kWarpgroupSize),
                        spread_shared(PARTS, GROUPS), PARTS * TILES, false, stream, maps.x, maps.y, maps.proj,
                        maps.out, p.order, p.map);
}

// A gate an order takes more registers: two warpgroups.
template <typename T, bool EACH>
int forward(const Problem& p, const void* x, const void* proj, const void* out, void* y, void* stream) {
  switch (width_of(p.channels, p.hidden)) {
    case 64:
      return launch_resident<T, 1, EACH>(p, x, proj, out, y, stream);
    case 128:
      return launch_resident<T, 2, EACH>(p, x, proj, out, y, stream);
    case 256:
      return launch_spread<T, 2, 1, EACH ? 2 : 3, EACH>(p, x, proj, out, y, stream);
    default:
      return launch_spread<T, 4, 2, 2, EACH>(p, x, proj, out, y, stream);
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
