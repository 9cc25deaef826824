// Mixed high-order attention, backward for sm_90a: split-K GEMMs of the weight gradients.
//
// dproj = sum over positions of du x^T and dout_r = sum over positions of dl_r a_r^T, with du, dl_r (dl for joint
// gates) and a_r from the scratch memory. Positions are the K dimension, so all operands are MN-major. Sizes are padded
// as in high_order_attention_bwd.h.
#pragma once

#include "high_order_attention_bwd.h"

namespace dfkd::high_order::bwd {

constexpr int kTileM = 128, kTileN = 192;  // channels, columns of du or a_r
constexpr int kGradStages = 5, kGradStageBytes = (kTileM + kTileN) / 64 * kBoxBytes;
#ifdef DFKD_HOST
constexpr int kGradBlocks = 12;
#else
constexpr int kGradBlocks = kNumSMs;
#endif
constexpr int kGradThreads = 2 * kWarpgroupSize + kWarpSize;
constexpr size_t kGradSmemBytes = kGradStages * (kGradStageBytes + 16);

// Tile scheduler: tiles of dproj, then of dout, each split along positions. The split depends only on sizes, so that a
// gradient has the same bits whichever other gradients are computed.
struct WeightGradTiles {
  int channels, units, ranks, gates;  // padded
  int proj_tiles, out_tiles_n, out_tiles, count;
  int64_t steps_per_split, splits, proj_size, split_size;  // sizes: elements of the partial sums

  WeightGradTiles(int64_t positions, int ranks_, int gates_, bool needs_grad_proj, bool needs_grad_out)
      : channels(kBlockChannels * ranks_), units(kBlockUnits * ranks_), ranks(ranks_), gates(gates_) {
    proj_tiles = ranks * ranks;
    const int gate_columns = kOrders / gates * units;  // columns of a_r that share an A operand
    out_tiles_n = gates * static_cast<int>(divide_up(gate_columns, kTileN));
    out_tiles = ranks * out_tiles_n;
    const int64_t k_blocks = divide_up(positions, 64), max_splits = kGradBlocks / (proj_tiles + out_tiles);
    steps_per_split = divide_up(k_blocks, max_splits > 2 ? max_splits : 2);
    splits = steps_per_split > 0 ? divide_up(k_blocks, steps_per_split) : 0;
    proj_tiles = needs_grad_proj ? proj_tiles : 0;
    out_tiles = needs_grad_out ? out_tiles : 0;
    count = proj_tiles + out_tiles;
    proj_size = needs_grad_proj ? static_cast<int64_t>(kFactors) * units * channels : 0;
    split_size = proj_size + (needs_grad_out ? static_cast<int64_t>(kOrders) * channels * units : 0);
  }
};

struct WeightGradTensorMaps {
  TensorMap x, du, dl, a;  // boxes of 64 x 64
};

// Two consumer warpgroups of 64 channels each. partials: [splits, dproj [6, K, C], dout [3, C, K]], without
// a gradient that is not needed.
template <typename T>
__global__ void __launch_bounds__(kGradThreads, 1)
    weight_grad_wgmma(const __grid_constant__ WeightGradTensorMaps maps, float* partials, int64_t positions,
                      WeightGradTiles tiles) {
  const int thread = static_cast<int>(threadIdx.x), warpgroup = thread / kWarpgroupSize, lane = thread % kWarpSize;
  unsigned char* const smem = shared_memory();
  Barrier* const full = reinterpret_cast<Barrier*>(smem + kGradStages * kGradStageBytes);
  Barrier* const empty = full + kGradStages;
  const int block = static_cast<int>(blockIdx.x);
  const bool is_proj = block < tiles.proj_tiles;
  const int tile = is_proj ? block : block - tiles.proj_tiles;
  const int tiles_n = is_proj ? tiles.ranks : tiles.out_tiles_n;
  const int channel0 = tile / tiles_n * kTileM;
  // The tiles of dout are ordered by gate, since each gate has its own dl.
  const int gate_tiles = is_proj ? tiles_n : tiles_n / tiles.gates, gate = tile % tiles_n / gate_tiles;
  const int first_column = tile % tiles_n % gate_tiles * kTileN;
  const int columns = is_proj ? kFactors * tiles.units : kOrders / tiles.gates * tiles.units;
  const int64_t step0 = static_cast<int64_t>(blockIdx.y) * tiles.steps_per_split, k_blocks = (positions + 63) / 64;
  const int64_t steps_left = k_blocks - step0;
  const int steps = static_cast<int>(tiles.steps_per_split < steps_left ? tiles.steps_per_split : steps_left);

  if (thread == 0) {
    for (int i = 0; i < kGradStages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 8);
    }
    fence_barrier_init();
  }
  __syncthreads();

  PackedPipelineState<kGradStages> pipe;
  if (warpgroup == 2) {
    if (lane == 0) {
      const TensorMap& a_map = is_proj ? maps.x : maps.dl;
      const TensorMap& b_map = is_proj ? maps.du : maps.a;
      const int x = gate * tiles.channels + channel0, y = gate * columns + first_column;
      for (int step = 0; step < steps; ++step) {
        mbarrier_wait(empty + pipe.stage(), pipe.phase() ^ 1);
        mbarrier_arrive_expect_tx(full + pipe.stage(), kGradStageBytes);
        unsigned char* const to = smem + pipe.stage() * kGradStageBytes;
        const int position = static_cast<int>(step0 + step) * 64;
        for (int p = 0; p < kTileM / 64; ++p) {
          tma_load(to + p * kBoxBytes, a_map, x + 64 * p, position, 0, full + pipe.stage());
        }
        for (int p = 0; p < kTileN / 64; ++p) {
          tma_load(to + (kTileM / 64 + p) * kBoxBytes, b_map, y + 64 * p, position, 0, full + pipe.stage());
        }
        pipe.advance();
      }
    }
    return;
  }

  float accumulator[kTileN / 8][4];
  int prev_stage = 0;
  for (int step = 0; step < steps; ++step) {
    mbarrier_wait(full + pipe.stage(), pipe.phase());
    unsigned char* const stage = smem + pipe.stage() * kGradStageBytes;
    const uint64_t a = make_smem_desc<64>(stage + warpgroup * kBoxBytes, kBoxBytes);
    const uint64_t b = make_smem_desc<64>(stage + kTileM / 64 * kBoxBytes, kBoxBytes);
    warpgroup_fence_operand(accumulator);
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      wgmma<T, kTileN, true, true>(accumulator, advance_desc(a, 2048 * k), advance_desc(b, 2048 * k), step + k > 0);
    }
    warpgroup_commit_batch();
    if (step > 0) {
      warpgroup_wait<1>();
      if (lane == 0) mbarrier_arrive(empty + prev_stage);
    }
    prev_stage = pipe.stage();
    pipe.advance();
  }
  warpgroup_wait<0>();
  warpgroup_fence_operand(accumulator);

  float* const to = partials + blockIdx.y * tiles.split_size + (is_proj ? 0 : tiles.proj_size);
  const int channel = channel0 + 64 * warpgroup + 16 * (thread / kWarpSize % 4) + lane / 4;
#pragma unroll
  for (int n = 0; n < kTileN / 8; ++n) {
    const int column = first_column + 8 * n + 2 * (lane % 4);
    if (column >= columns) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t c = channel + 8 * half;
      if (is_proj) {  // eight lanes write consecutive channels
        to[static_cast<int64_t>(column) * tiles.channels + c] = accumulator[n][2 * half];
        to[static_cast<int64_t>(column + 1) * tiles.channels + c] = accumulator[n][2 * half + 1];
      } else {
        const int order = gate * (kOrders / tiles.gates) + column / tiles.units;
        float* const pair = to + (order * tiles.channels + c) * tiles.units + column % tiles.units;
        *reinterpret_cast<AlignedArray<float, 2>*>(pair) = {accumulator[n][2 * half], accumulator[n][2 * half + 1]};
      }
    }
  }
}

// ---- reduction over splits ------------------------------------------------------------------------------------------

using Float4 = AlignedArray<float, 4>;

// A gradient [outer, rows, columns]. From `offset` on, its partial sums are [outer, padded_rows, padded_columns].
template <typename T>
struct PaddedGradient {
  T* to;
  int rows, columns, padded_rows, padded_columns, offset, vectors;
};

constexpr int kVectors = kWarpSize;  // vectors of 4 elements per block; each warp adds some of the splits

template <typename T>
__global__ void __launch_bounds__(kWarpSize * 16)
    reduce_splits_kernel(const float* partials, PaddedGradient<T> first, PaddedGradient<T> second, int64_t splits,
                         int64_t stride) {
  Float4* const sums = reinterpret_cast<Float4*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int vector = static_cast<int>(blockIdx.x) * kVectors + lane;
  const bool in_first = vector < first.vectors;
  const PaddedGradient<T> gradient = in_first ? first : second;
  const int i = 4 * (in_first ? vector : vector - first.vectors);
  const bool valid = i < 4 * gradient.vectors;
  Float4 sum{};
  if (valid) {
    const int column = i % gradient.columns, row = i / gradient.columns;
    const int padded_row = row / gradient.rows * gradient.padded_rows + row % gradient.rows;
    const float* const from = partials + gradient.offset + padded_row * gradient.padded_columns + column;
#pragma unroll 8
    for (int64_t split = warp; split < splits; split += warps) {
      const Float4 partial = *reinterpret_cast<const Float4*>(from + split * stride);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.at[e] += partial.at[e];
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || !valid) return;
  for (int other = 1; other < warps; ++other) {
    const Float4 partial = sums[other * kWarpSize + lane];
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.at[e] += partial.at[e];
  }
  uint32_t* const to = reinterpret_cast<uint32_t*>(gradient.to + i);
  to[0] = pack_rn<T>(sum.at[0], sum.at[1]);
  to[1] = pack_rn<T>(sum.at[2], sum.at[3]);
}

// The partial sums of a split are dproj [6, K, C], then dout [3, C, K], padded; unless `both`, only the needed ones.
template <typename T>
int reduce_splits(const float* partials, const Problem& p, int padded_channels, int padded_units, T* dproj, T* dout,
              int64_t splits, bool both, void* stream) {
  const int padded = padded_channels * padded_units, weight = p.channels * p.hidden;
  const int proj_vectors = dproj == nullptr ? 0 : num_factors(p.order) * weight / 4;
  const int out_vectors = dout == nullptr ? 0 : p.order * weight / 4, vectors = proj_vectors + out_vectors;
  const int out_offset = dproj == nullptr && !both ? 0 : kFactors * padded;
  const int stride = out_offset + (dout == nullptr && !both ? 0 : kOrders * padded);
  const PaddedGradient<T> proj{dproj, p.hidden, p.channels, padded_units, padded_channels, 0, proj_vectors};
  const PaddedGradient<T> out{dout, p.channels, p.hidden, padded_channels, padded_units, out_offset, out_vectors};
  if (vectors == 0) return 0;
  const unsigned warps = splits > 64 ? 16 : splits > 8 ? 8 : 2;
  const dim3 blocks(static_cast<unsigned>(divide_up(vectors, kVectors)));
  return launch(reduce_splits_kernel<T>, blocks, dim3(kWarpSize * warps), sizeof(Float4) * kWarpSize * warps, stream,
                partials, proj, out, splits, stride);
}

}  // namespace dfkd::high_order::bwd
