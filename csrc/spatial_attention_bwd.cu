// Spatial attention gate, backward, for sm_90a. With g = grad_output, with f, h and w of spatial_attention.cu, and with
// its logits l and softmax s, which are recomputed:
//
//   delta = sum over positions of s g f      dl = scale s (g f - delta)
//   df = g + g scale s                       dh = w^T dl      dw = sum over positions of dl h
//
// Traffic: 6 N C P bytes of f, g and df, 4 N C P to read f and g a second time, from L2, and 6 N K P of h and dh.
// There are 8 N C P K FLOPs and 2 N C P exponentials. HBM bandwidth is the limit while the second pass hits in
// L2; L2 bandwidth is the next one.
//
// A cooperative, persistent kernel assigns the tiles of all samples to B blocks round-robin. In step i, block b adds
// tile i B + b to delta, and then computes the gradients of its tile of `lag` steps before, whose delta is complete by
// then. So all blocks work on few neighboring samples, and f and g of only lag B tiles must stay in L2: 17 MB, or 26 MB
// if a sample has more tiles than there are blocks. The block with the last tile of a sample reduces delta, in a fixed
// order, once a counter in memory shows that all partial sums are stored; a second counter shows that delta is
// complete. dl replaces f in the stage, with permuted columns, and is an operand of two GEMMs, K-major for dh and
// MN-major for dw; df replaces g and is written by TMA stores; dw accumulates in registers over all tiles of a block.
//
// Four consumer warpgroups do this. The warps of a producer warpgroup issue TMA loads, load softmax statistics, and
// reduce and store partial sums of delta, so that consumer warps need not wait for each other. Before and after this
// kernel, two small ones clear the counters and reduce dw over blocks. dl is rounded to the maps' dtype before the
// GEMMs, as in PyTorch. C up to 256 and K up to 64, multiples of 8. Not yet run on a GPU.
#include "spatial_attention.h"

namespace {

using namespace dfkd;
using namespace dfkd::spatial;

#ifdef DFKD_HOST
constexpr int kNumSMs = 3;
#else
constexpr int kNumSMs = 132;
#endif
constexpr int kMaxStages = 3, kStatsStages = 2;
constexpr int kConsumerBarrier = 5;  // named barrier of all consumers; 1 to 4: of the warpgroups of one row block

// Shared memory holds barriers, then stages of row_max, scale / row_sum and delta, and then boxes.
constexpr int kBarrierBytes = 1024, kStatsBytes = kStatsStages * 4 * 3 * kMaxChannels;
constexpr int kFixedBytes = kBarrierBytes + kStatsBytes;
static_assert(kFixedBytes % 1024 == 0);

struct Params {
  Tiling tiling;
  int tiles, blocks;     // tiles of all samples
  int steps, lag;        // steps of the delta pass; the gradient pass of a tile runs `lag` steps later
  int stages;
  unsigned delta_warps;  // warps that reduce delta of a sample: one per row block and 16 channels
  int weight_dtype;
  float scale;
  bool needs_dl;  // dh or dw
  bool needs_grad_features, needs_grad_hidden, needs_grad_weight;

  __host__ __device__ int stage_bytes() const { return 2 * kTileBytes + tiling.hidden_tile_bytes(); }
  __host__ __device__ int smem_bytes() const { return kFixedBytes + tiling.weight_bytes() + stages * stage_bytes(); }
};

// Scratch memory.
struct Workspace {
  unsigned *tiles_done, *delta_done;  // per sample: counters of tiles, and of warps that have reduced delta
  float *tile_delta, *delta;          // [tiles, channels], [samples, row_blocks, channels]; without factor 1 / row_sum
  float* dw_partials;                 // [blocks, channels, hidden]
};

struct Barriers {
  Barrier full[kMaxStages], empty[kMaxStages];
  Barrier delta_full[kMaxStages];  // consumers have stored their partial sums of delta in the stage
};

struct SharedStorage {
  Barriers* barriers;
  float* row_stats;
  unsigned char *weight, *stages;

  __device__ __forceinline__ explicit SharedStorage(const Params& params) {
    barriers = reinterpret_cast<Barriers*>(shared_memory());
    row_stats = reinterpret_cast<float*>(shared_memory() + kBarrierBytes);
    weight = shared_memory() + kFixedBytes;
    stages = weight + params.tiling.weight_bytes();
  }
  __device__ __forceinline__ float* stats_stage(int item) const {
    return row_stats + item % kStatsStages * 3 * kMaxChannels;
  }
};

// The work items of a block: per step, the delta pass of one tile and the gradient pass of another, if they exist.
struct TileScheduler {
  int item = -1, tile = 0, half_step = -1;

  __device__ __forceinline__ bool is_gradient_pass() const { return half_step % 2 == 1; }
  __device__ __forceinline__ bool next(const Params& params) {
    while (++half_step < 2 * (params.steps + params.lag)) {
      tile = static_cast<int>(blockIdx.x) + (half_step / 2 - (is_gradient_pass() ? params.lag : 0)) * params.blocks;
      if ((is_gradient_pass() || params.needs_dl) && tile >= 0 && tile < params.tiles) {
        ++item;
        return true;
      }
    }
    return false;
  }
};

// ---- producers ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void load_stage(const Params& params, const SharedStorage& storage,
                                           const TileScheduler& scheduler, const TensorMap& features,
                                           const TensorMap& grad_output, const TensorMap& hidden) {
  const int index = scheduler.item % params.stages, sample = scheduler.tile / params.tiling.tiles;
  const int row = scheduler.tile % params.tiling.tiles * params.tiling.tile_rows();
  unsigned char* stage = storage.stages + index * params.stage_bytes();
  Barrier* full = &storage.barriers->full[index];
  mbarrier_wait(&storage.barriers->empty[index], (scheduler.item / params.stages & 1) ^ 1);
  mbarrier_arrive_expect_tx(full, params.stage_bytes());
  load_hidden(params.tiling, stage + 2 * kTileBytes, hidden, row, sample, full);
  load_tile(params.tiling, stage, features, row, sample, full);
  load_tile(params.tiling, stage + kTileBytes, grad_output, row, sample, full);
}

// A warp loads the statistics of 128 channels, four per lane from c on, and for the gradient pass waits for delta.
__device__ __forceinline__ void load_row_stats(const Params& params, const SharedStorage& storage,
                                               const TileScheduler& scheduler, int c, const float* saved,
                                               const Workspace& workspace) {
  const Tiling& tiling = params.tiling;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, sample = scheduler.tile / tiling.tiles;
  const int previous = scheduler.item - kStatsStages;
  const bool with_delta = scheduler.is_gradient_pass() && params.needs_dl;
  if (lane == 0) {
    if (previous >= 0) mbarrier_wait(&storage.barriers->empty[previous % params.stages], previous / params.stages & 1);
    if (with_delta) global_barrier_wait(workspace.delta_done + sample, params.delta_warps);
  }
  __syncwarp();
  if (c < tiling.padded_channels()) {
    Float4 row_max = {{0, 0, 0, 0}}, factor = row_max, delta = row_max;
    if (c < tiling.channels) {
      const float* const from = saved + (static_cast<int64_t>(sample) * tiling.channels + c);
      row_max = *reinterpret_cast<const Float4*>(from);
      factor = *reinterpret_cast<const Float4*>(from + static_cast<int64_t>(tiling.samples) * tiling.channels);
      if (with_delta) {
        const int64_t first = static_cast<int64_t>(sample) * tiling.row_blocks * tiling.channels;
        const float* partial = workspace.delta + first + c;
#pragma unroll 1
        for (int i = 0; i < tiling.row_blocks; ++i, partial += tiling.channels) {
          const Float4 more = *reinterpret_cast<const Float4*>(partial);
#pragma unroll
          for (int k = 0; k < 4; ++k) delta.at[k] += more.at[k];
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        delta.at[k] = fast_divide(delta.at[k], factor.at[k]);
        factor.at[k] = fast_divide(params.scale, factor.at[k]);
      }
    }
    float* const to = storage.stats_stage(scheduler.item) + stats_index(c);
    *reinterpret_cast<Float4*>(to) = row_max;
    *reinterpret_cast<Float4*>(to + kMaxChannels) = factor;
    *reinterpret_cast<Float4*>(to + 2 * kMaxChannels) = delta;
  }
  __syncwarp();
  if (lane == 0) mbarrier_arrive(&storage.barriers->full[scheduler.item % params.stages]);
}

// ---- delta ----------------------------------------------------------------------------------------------------------

// A tile's partial sums of delta, without the factor 1 / row_sum.
template <typename T, int HIDDEN>
__device__ __forceinline__ void accumulate_delta(const Params& params, const ConsumerCoords& coords,
                                                 unsigned char* stage, const float* row_stats,
                                                 const unsigned char* weight, int valid_rows, Barrier* delta_full) {
  const Tiling& tiling = params.tiling;
  float logits[8][4], sums[16];
  compute_logits<T, HIDDEN>(logits, stage + 2 * kTileBytes + coords.row_block * tiling.hidden_box_bytes(),
                            weight + coords.channel_block * tiling.hidden_box_bytes(), valid_rows);
  unsigned char* const features = stage + coords.warpgroup * kBoxBytes;
#pragma unroll
  for (int chunk = 0; chunk < 2; ++chunk) {
    const Float4 row_max[2] = {load_stats(row_stats, coords, 2 * chunk), load_stats(row_stats, coords, 2 * chunk + 1)};
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[8 * chunk + i] = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float f[8], g[8];
      unpack8<T>(f, *smem_chunk(features, coords, half, chunk));
      unpack8<T>(g, *smem_chunk(features + kTileBytes, coords, half, chunk));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float e = exp_nonpositive(logits[4 * chunk + i / 2][2 * half + i % 2] - row_max[i / 4].at[i % 4]);
        sums[8 * chunk + i] += e * (g[i] * f[i]);
      }
    }
  }
  reduce_scatter<8>(sums, coords.lane);
  reduce_scatter<4>(sums, coords.lane);
  reduce_scatter<2>(sums, coords.lane);
  __syncwarp();
  float* const to = warp_partials(stage, coords.warpgroup, coords.warp) + 16 * coords.t + 2 * coords.g;
  *reinterpret_cast<AlignedArray<float, 2>*>(to) = {{sums[0], sums[1]}};
  fence_proxy_async();
  __syncwarp();
  if (coords.lane == 0) mbarrier_arrive(delta_full);
}

// A warp reduces a tile's delta over consumer warps, stores it to memory and releases the stage.
__device__ __forceinline__ void store_tile_delta(const Params& params, const SharedStorage& storage, int index,
                                                 int tile, const Workspace& workspace) {
  const Tiling& tiling = params.tiling;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float* const to = workspace.tile_delta + static_cast<int64_t>(tile) * tiling.channels;
#pragma unroll 2
  for (int c = lane; c < tiling.padded_channels(); c += kWarpSize) {
    float sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < 4 * tiling.row_blocks; ++i) {
      const int warpgroup = i / 4 * tiling.channel_blocks + c / kBox;
      sum += warp_partials(storage.stages + index * params.stage_bytes(), warpgroup, i % 4)[c % kBox];
    }
    if (c < tiling.channels) to[c] = sum;
  }
  __syncwarp();
  if (lane < kConsumerWarps) mbarrier_arrive(&storage.barriers->empty[index]);
  if (lane == 0) global_barrier_arrive(workspace.tiles_done + tile / tiling.tiles);
}

// Reduces delta of a sample over its tiles. Each warp takes 16 channels, four per lane, and a `part` of the tiles, of
// which it reads eight at a time.
__device__ __forceinline__ void reduce_delta(const Params& params, const ConsumerCoords& coords, int sample,
                                             const Workspace& workspace) {
  const Tiling& tiling = params.tiling;
  const int warp = coords.thread / kWarpSize, part = warp / (4 * tiling.channel_blocks);
  const int first = warp % (4 * tiling.channel_blocks) * 16, channel = first + 4 * coords.t;
  if (first >= tiling.channels) return;
  if (coords.lane == 0) global_barrier_wait(workspace.tiles_done + sample, static_cast<unsigned>(tiling.tiles));
  __syncwarp();
  float sums[4] = {0, 0, 0, 0};
  const bool valid = channel < tiling.channels;
  if (valid) {
    const int64_t first_tile = static_cast<int64_t>(sample) * tiling.tiles;
    const float* from = workspace.tile_delta + first_tile * tiling.channels + channel;
#pragma unroll 8
    for (int tile = 8 * part + coords.g; tile < tiling.tiles; tile += 8 * tiling.row_blocks) {
      const Float4 partial = *reinterpret_cast<const Float4*>(from + static_cast<int64_t>(tile) * tiling.channels);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] += partial.at[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] = sum_over_rows(sums[i]);
  if (valid && coords.g == 0) {
    const int64_t index = (static_cast<int64_t>(sample) * tiling.row_blocks + part) * tiling.channels + channel;
    *reinterpret_cast<Float4*>(workspace.delta + index) = {{sums[0], sums[1], sums[2], sums[3]}};
  }
  __syncwarp();
  if (coords.lane == 0) global_barrier_arrive(workspace.delta_done + sample);
}

// ---- gradients ------------------------------------------------------------------------------------------------------

// Replaces f by dl, in the column order of the logits GEMM, and g by df.
template <typename T, int HIDDEN>
__device__ __forceinline__ void compute_dl(const Params& params, const ConsumerCoords& coords, unsigned char* stage,
                                           const float* row_stats, const unsigned char* weight, int valid_rows) {
  const Tiling& tiling = params.tiling;
  float logits[8][4];
  compute_logits<T, HIDDEN>(logits, stage + 2 * kTileBytes + coords.row_block * tiling.hidden_box_bytes(),
                            weight + coords.channel_block * tiling.hidden_box_bytes(), valid_rows);
  unsigned char* const features = stage + coords.warpgroup * kBoxBytes;
  Uint4 dl[2][2];
#pragma unroll
  for (int chunk = 0; chunk < 2; ++chunk) {
    Uint4 f[2], g[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      f[half] = *smem_chunk(features, coords, half, chunk);
      g[half] = *smem_chunk(features + kTileBytes, coords, half, chunk);
    }
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
      const Float4 row_max = load_stats(row_stats, coords, 2 * chunk + quad);
      const Float4 factor = load_stats(row_stats + kMaxChannels, coords, 2 * chunk + quad);
      const Float4 delta = load_stats(row_stats + 2 * kMaxChannels, coords, 2 * chunk + quad);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2, word = 2 * quad + i % 2;
        float df[2], dl_pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = 2 * (i % 2) + e;
          const float logit = logits[4 * chunk + word][2 * half + e];
          const float s = exp_nonpositive(logit - row_max.at[c]) * factor.at[c];  // scale times the softmax
          const float grad = to_float(T{static_cast<uint16_t>(g[half].at[word] >> (16 * e))});
          const float feature = to_float(T{static_cast<uint16_t>(f[half].at[word] >> (16 * e))});
          df[e] = grad + grad * s;
          dl_pair[e] = s * (grad * feature - delta.at[c]);
        }
        g[half].at[word] = pack_rn<T>(df[0], df[1]);
        dl[half][chunk].at[word] = pack_rn<T>(dl_pair[0], dl_pair[1]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) *smem_chunk(features + kTileBytes, coords, half, chunk) = g[half];
  }
  if (!params.needs_dl) return;
  __syncwarp();  // all lanes have read their chunks of f
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      unsigned char* const to = features + 2 * swizzle_offset<kBox>(coords.row() + 8 * half, n) + 4 * coords.t;
      *reinterpret_cast<uint32_t*>(to) = dl[half][n / 4].at[n % 4];
    }
  }
}

template <typename T, int HIDDEN>
__global__ void __launch_bounds__(kBlockThreads, 1)
    gate_bwd_wgmma(Params params, const __grid_constant__ TensorMap features,
                   const __grid_constant__ TensorMap grad_output, const __grid_constant__ TensorMap hidden,
                   const __grid_constant__ TensorMap d_features, const void* weight, const float* saved, T* d_hidden,
                   Workspace workspace) {
  const Tiling& tiling = params.tiling;
  const SharedStorage storage(params);
  Barriers& barriers = *storage.barriers;
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  if (thread == kConsumerThreads) {
    prefetch_tensormap(features);
    prefetch_tensormap(grad_output);
    prefetch_tensormap(hidden);
    prefetch_tensormap(d_features);
    for (int i = 0; i < params.stages; ++i) {
      // The TMA producer, and one warp per 128 channels of statistics.
      mbarrier_init(&barriers.full[i], tiling.channel_blocks == kConsumerWarpgroups ? 3 : 2);
      mbarrier_init(&barriers.empty[i], kConsumerWarps);
      mbarrier_init(&barriers.delta_full[i], kConsumerWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (thread >= kConsumerThreads) {
    warpgroup_reg_dealloc<kProducerRegisters>();
    const int warp = (thread - kConsumerThreads) / kWarpSize;
    TileScheduler scheduler;
    if (thread == kConsumerThreads) {
#pragma unroll 1
      while (scheduler.next(params)) load_stage(params, storage, scheduler, features, grad_output, hidden);
    } else if (warp == 2 || (warp == 3 && tiling.channel_blocks == kConsumerWarpgroups)) {
      const int channel = 4 * (thread % kWarpSize) + (warp == 3 ? 4 * kWarpSize : 0);
#pragma unroll 1
      while (scheduler.next(params)) load_row_stats(params, storage, scheduler, channel, saved, workspace);
    } else if (warp == 1) {
      unsigned phases = 0;  // one bit per stage: the gradient pass does not use delta_full
#pragma unroll 1
      while (scheduler.next(params)) {
        if (scheduler.is_gradient_pass()) continue;
        const int index = scheduler.item % params.stages;
        mbarrier_wait(&barriers.delta_full[index], static_cast<int>(phases >> index & 1));
        phases ^= 1u << index;
        store_tile_delta(params, storage, index, scheduler.tile, workspace);
      }
    }
  } else {
    warpgroup_reg_alloc<kConsumerRegisters>();
    store_weight<T, HIDDEN>(tiling, weight, params.weight_dtype, reinterpret_cast<T*>(storage.weight));
    fence_proxy_async();
    named_barrier_sync(kConsumerBarrier, kConsumerThreads);
    const ConsumerCoords coords(tiling);
    float dw[HIDDEN / 8][4] = {};
    int item = 0;
#pragma unroll 1
    for (int step = 0; step < params.steps + params.lag; ++step) {
      const int tile = step * params.blocks + block;
      const bool delta_pass = params.needs_dl && tile < params.tiles;
      if (delta_pass) {
        const int row = tile % tiling.tiles * tiling.tile_rows() + kBox * coords.row_block + coords.row();
        const int index = item % params.stages;
        mbarrier_wait(&barriers.full[index], item / params.stages & 1);
        accumulate_delta<T, HIDDEN>(params, coords.reload(), storage.stages + index * params.stage_bytes(),
                                    storage.stats_stage(item), storage.weight, tiling.positions - row,
                                    &barriers.delta_full[index]);
        ++item;
      }
      const int gradient_tile = tile - params.lag * params.blocks;
      if (gradient_tile >= 0 && gradient_tile < params.tiles) {
        const int sample = gradient_tile / tiling.tiles;
        const int row = gradient_tile % tiling.tiles * tiling.tile_rows() + kBox * coords.row_block;
        const int index = item % params.stages;
        unsigned char* stage = storage.stages + index * params.stage_bytes();
        mbarrier_wait(&barriers.full[index], item / params.stages & 1);
        compute_dl<T, HIDDEN>(params, coords.reload(), stage, storage.stats_stage(item), storage.weight,
                              tiling.positions - row - coords.row());
        fence_proxy_async();
        __syncwarp();
        if (coords.lane == 0 && params.needs_grad_features) {
          const int first = 16 * coords.warp, channel = kBox * coords.channel_block;
          if (row + first < tiling.positions && channel < tiling.channels) {
            const unsigned char* from = stage + kTileBytes + coords.warpgroup * kBoxBytes + 2 * kBox * first;
            tma_store(d_features, from, channel, row + first, sample);
          }
          tma_store_commit();
        }
        if (params.needs_dl) named_barrier_sync(1 + coords.row_block, kWarpgroupSize * tiling.channel_blocks);
        if (params.needs_grad_weight) accumulate_dw<T, HIDDEN>(tiling, coords, stage, dw);
        if (params.needs_grad_hidden && (step & (tiling.channel_blocks - 1)) == coords.channel_block) {
          compute_dh<T, HIDDEN>(tiling, coords.reload(), stage, storage.weight, row,
                                d_hidden + static_cast<int64_t>(sample) * tiling.positions * tiling.hidden);
        }
        __syncwarp();
        if (coords.lane == 0) {
          tma_store_wait_read<0>();
          mbarrier_arrive(&barriers.empty[index]);
        }
        ++item;
      }
      if (delta_pass && tile % tiling.tiles == tiling.tiles - 1) {
        reduce_delta(params, coords, tile / tiling.tiles, workspace);
      }
    }
    if (coords.lane == 0) tma_store_wait<0>();
    if (params.needs_grad_weight) {
      float* dw_smem = reinterpret_cast<float*>(storage.stages);
      named_barrier_sync(kConsumerBarrier, kConsumerThreads);
#pragma unroll
      for (int n = 0; n < HIDDEN / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int line = thread / kWarpgroupSize * kBox + coords.row() + 8 * (i / 2);
          dw_smem[line * HIDDEN + 8 * n + 2 * coords.t + i % 2] = dw[n][i];
        }
      }
      named_barrier_sync(kConsumerBarrier, kConsumerThreads);
      float* to = workspace.dw_partials + static_cast<int64_t>(block) * tiling.channels * tiling.hidden;
      for (int i = thread; i < tiling.padded_channels() * HIDDEN; i += kConsumerThreads) {
        const int column = i / HIDDEN, k = i % HIDDEN;
        const int channel = column / kBox * kBox + channel_of_column(column % kBox);
        if (channel >= tiling.channels || k >= tiling.hidden) continue;
        float sum = 0.0f;
        for (int r = 0; r < tiling.row_blocks; ++r) sum += dw_smem[r * tiling.padded_channels() * HIDDEN + i];
        to[channel * tiling.hidden + k] = sum;
      }
    }
  }
}

// ---- small kernels and launches -------------------------------------------------------------------------------------

constexpr int kReduceThreads = 512;

__global__ void __launch_bounds__(kReduceThreads) clear_counters(unsigned* counters, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceThreads + static_cast<int>(threadIdx.x);
  if (i < count) counters[i] = 0;
}

// d_weight = the sum of partials [count, width]; d_bias = 0, since the softmax cancels a bias.
__global__ void __launch_bounds__(kReduceThreads) reduce_dw(const float* partials, int count, int width, int biases,
                                                            void* d_weight, void* d_bias, int weight_dtype,
                                                            int bias_dtype) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int i = static_cast<int>(blockIdx.x) * kWarpSize + lane;
  float sum = 0.0f;
  if (i < width) {
#pragma unroll 4
    for (int row = warp; row < count; row += kReduceThreads / kWarpSize) {
      sum += partials[static_cast<int64_t>(row) * width + i];
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0) return;
  if (i < width) {
    float total = 0.0f;
    for (int w = 0; w < kReduceThreads / kWarpSize; ++w) total += sums[w * kWarpSize + lane];
    store_as(d_weight, i, weight_dtype, total);
  } else if (i - width < biases) {
    store_as(d_bias, i - width, bias_dtype, 0.0f);
  }
}

// Lays out the scratch memory, which may be null, and returns its size in bytes.
int64_t make_workspace(const Tiling& tiling, void* scratch, Workspace* workspace) {
  const int64_t samples = tiling.samples, channels = tiling.channels;
  int64_t used = 0;
  const auto allocate = [&](int64_t elements) {
    float* const buffer = scratch == nullptr ? nullptr : static_cast<float*>(scratch) + used;
    used += (elements + 3) / 4 * 4;
    return buffer;
  };
  workspace->tiles_done = reinterpret_cast<unsigned*>(allocate(2 * samples));
  workspace->delta_done = workspace->tiles_done + (scratch == nullptr ? 0 : samples);
  workspace->tile_delta = allocate(samples * tiling.tiles * channels);
  workspace->delta = allocate(samples * channels * tiling.row_blocks);
  workspace->dw_partials = allocate(kNumSMs * channels * tiling.hidden);
  return 4 * used;
}

Params make_params(const Tiling& tiling, bool needs_dl) {
  Params params{};
  params.tiling = tiling;
  params.tiles = tiling.samples * tiling.tiles;
  params.blocks = params.tiles < kNumSMs ? params.tiles : kNumSMs;
  params.needs_dl = needs_dl;
  params.delta_warps = static_cast<unsigned>(tiling.row_blocks * ((tiling.channels + 15) / 16));
  if (params.tiles > 0) {
    params.steps = (params.tiles + params.blocks - 1) / params.blocks;
    // The last tile of a sample comes at most lag - 1 steps after any other; then delta is complete.
    params.lag = needs_dl ? (tiling.tiles - 1 + params.blocks - 1) / params.blocks + 1 : 0;
  }
  params.stages = (kMaxSmemBytes - kFixedBytes - tiling.weight_bytes()) / params.stage_bytes();
  params.stages = params.stages < kMaxStages ? params.stages : kMaxStages;
  return params;
}

template <typename T, int HIDDEN>
int launch_gate_bwd(const Params& params, const void* grad_output, const void* features, const void* hidden,
                    const void* weight, const void* saved, void* d_features, void* d_hidden,
                    const Workspace& workspace, void* stream) {
  const Tiling& tiling = params.tiling;
  TensorMap features_map, grad_output_map, hidden_map, d_features_map;
  int error = make_box_map<kBox>(&features_map, features, tiling, tiling.channels, kBox);
  if (error == 0) error = make_box_map<kBox>(&grad_output_map, grad_output, tiling, tiling.channels, kBox);
  if (error == 0) error = make_box_map<HIDDEN>(&hidden_map, hidden, tiling, tiling.hidden, kBox);
  if (error == 0) {
    const void* const base = params.needs_grad_features ? d_features : features;
    error = make_box_map<kBox>(&d_features_map, base, tiling, tiling.channels, 16);
  }
  if (error == 0 && params.needs_dl) {
    const int64_t counters = 2 * static_cast<int64_t>(tiling.samples);
    const dim3 blocks(static_cast<unsigned>((counters + kReduceThreads - 1) / kReduceThreads));
    error = launch(clear_counters, blocks, kReduceThreads, 0, stream, workspace.tiles_done, counters);
  }
  if (error != 0) return error;
  return launch_cluster(gate_bwd_wgmma<T, HIDDEN>, dim3(static_cast<unsigned>(params.blocks)), kBlockThreads,
                        static_cast<size_t>(params.smem_bytes()), 1, true, stream, params, features_map,
                        grad_output_map, hidden_map, d_features_map, weight, static_cast<const float*>(saved),
                        static_cast<T*>(d_hidden), workspace);
}

}  // namespace

extern "C" {

int64_t dfkd_spatial_attention_backward_scratch(int64_t samples, int64_t channels, int64_t maps, int64_t positions,
                                                int form) {
  if (require_supported(samples, channels, maps, positions, form)) return 0;
  Workspace workspace{};
  return make_workspace(make_tiling(samples, channels, maps, positions), nullptr, &workspace);
}

int dfkd_spatial_attention_backward(const void* grad_output, const void* features, const void* hidden,
                                    const void* weight, const void* saved, int64_t samples, int64_t channels,
                                    int64_t maps, int64_t positions, int dtype, int weight_dtype, int bias_dtype,
                                    float scale, int form, void* d_features, void* d_hidden, void* d_weight,
                                    void* d_bias, void* scratch, void* stream) {
  if (const int status = require_supported(samples, channels, maps, positions, form)) return status;
  if (const int status = require_parameter_dtype("weight", weight_dtype)) return status;
  if (const int status = require_parameter_dtype("bias", bias_dtype)) return status;
  return dispatch_dtype(dtype, [=](auto type) {
    using T = decltype(type);
    const bool needs_dl = d_hidden != nullptr || d_weight != nullptr;
    Params params = make_params(make_tiling(samples, channels, maps, positions), needs_dl);
    params.weight_dtype = weight_dtype;
    params.scale = softmax_scale(scale, form, positions);
    params.needs_grad_features = d_features != nullptr;
    params.needs_grad_hidden = d_hidden != nullptr;
    params.needs_grad_weight = d_weight != nullptr;
    Workspace workspace{};
    make_workspace(params.tiling, scratch, &workspace);
    if (params.tiles > 0 && (needs_dl || params.needs_grad_features)) {
      const int error = dispatch_hidden_width(params.tiling.hidden_width, [=](auto width) {
        return launch_gate_bwd<T, decltype(width)::value>(params, grad_output, features, hidden, weight, saved,
                                                          d_features, d_hidden, workspace, stream);
      });
      if (error != 0) return error;
    }
    const int weights = d_weight == nullptr ? 0 : params.tiling.channels * params.tiling.hidden;
    const int biases = d_bias == nullptr ? 0 : params.tiling.channels;
    if (weights + biases == 0) return 0;
    const dim3 blocks(static_cast<unsigned>((weights + biases + kWarpSize - 1) / kWarpSize));
    return launch(reduce_dw, blocks, kReduceThreads, static_cast<size_t>(4 * kReduceThreads), stream,
                  workspace.dw_partials, params.blocks, weights, biases, d_weight, d_bias, weight_dtype, bias_dtype);
  });
}
}
