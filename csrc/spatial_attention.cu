// Spatial attention gate, forward, for sm_90a, in one launch: forms "spatial" and "spatial_mean1". For features
// f [N, P, C], hidden maps h [N, P, K] and a weight w [C, K], all channels-last:
//
//   l = w h      s = softmax of l over positions      out = f + scale s f
//
// Traffic: 4 N C P bytes of f and out and 2 N P K of h, which is read twice, the second time from L2. The 4 N C P K
// FLOPs and 2 N C P exponentials take half as long as the traffic at K = C / 8: memory is the limit if they overlap.
//
// A persistent kernel: each cluster processes one sample at a time, and its blocks split the tiles. Each consumer lane
// computes the online softmax statistics of its 16 channels; the cluster then combines them through DSMEM. The gate
// recomputes the logits, replaces f in the stage and issues one TMA store per warp. The four consumer warpgroups
// interleave the gate of one sample with the statistics of the next, tile by tile, so exponentials overlap memory
// traffic. Two producer warps issue TMA loads: f and h for the gate, in a pipeline that fills shared memory, and h for
// the statistics.
//
// make_params() selects the cluster size: larger clusters finish the first statistics sooner, smaller ones pad fewer
// positions. It is 2, 4, 4 and 8 for the paper's shapes with 64 samples. C up to 256 and K up to 64, multiples of 8.
// Not yet run on a GPU.
#include "spatial_attention.h"

#include <atomic>

namespace {

using namespace dfkd;
using namespace dfkd::spatial;

constexpr int kMaxClusterSize = 8, kMaxHiddenStages = 3, kMaxStages = 8;
constexpr float kHeadroom = 10.0f;
constexpr float kLowest = -3.402823466e38f;

#ifdef DFKD_HOST
constexpr int kMaxBlocks = 4;  // clusters then process several samples in small tests
#else
constexpr int kMaxBlocks = 128;  // blocks that run at the same time in clusters of eight
#endif

// Shared memory holds barriers, the statistics of the sample, those of each warp, and then boxes.
constexpr int kBarrierBytes = 1024, kStatsBytes = 4 * 2 * kMaxChannels;
constexpr int kFixedBytes = kBarrierBytes + kStatsBytes + 4 * 2 * kConsumerWarps * kBox;
static_assert(kFixedBytes % 1024 == 0);

struct Params {
  Tiling tiling;
  int cluster_size, num_clusters, stages, hidden_stages;
  int weight_dtype;
  float scale;

  __host__ __device__ int stage_bytes() const { return kTileBytes + tiling.hidden_tile_bytes(); }
  __host__ __device__ int cluster_stats_bytes() const { return 4 * 2 * cluster_size * 2 * tiling.padded_channels(); }
  __host__ __device__ int fixed_bytes() const {
    return kFixedBytes + hidden_stages * tiling.hidden_tile_bytes() + tiling.weight_bytes() + cluster_stats_bytes();
  }
  __host__ __device__ int smem_bytes() const { return stages * stage_bytes() + fixed_bytes(); }
};

// Selects the cluster size by estimated time, in hundredths of the time to load a tile of f. A sample takes 100 per
// tile and 50 to combine statistics. While the statistics of the first sample are computed, loads of f stop when the
// stages are full: each tile beyond `stages` adds 27.
Params make_params(const Tiling& tiling) {
  Params best{};
  int64_t best_time = 0;
  const int max_size = tiling.tiles < kMaxClusterSize ? tiling.tiles : kMaxClusterSize;
  for (int cluster_size = 1; cluster_size <= max_size && cluster_size <= kMaxBlocks; cluster_size *= 2) {
    Params params{};
    params.tiling = tiling;
    params.cluster_size = cluster_size;
    params.hidden_stages = tiling.hidden_tile_bytes() < kTileBytes ? kMaxHiddenStages : 2;
    params.stages = (kMaxSmemBytes - params.fixed_bytes()) / params.stage_bytes();
    if (params.stages < 2) break;
    params.stages = params.stages < kMaxStages ? params.stages : kMaxStages;
    const int64_t max_clusters = kMaxBlocks / cluster_size, tiles = (tiling.tiles + cluster_size - 1) / cluster_size;
    const int64_t samples = (tiling.samples + max_clusters - 1) / max_clusters;
    const int64_t late = tiles > params.stages ? tiles - params.stages : 0;
    const int64_t time = samples * (100 * tiles + 50) + 27 * late;
    params.num_clusters = static_cast<int>(tiling.samples < max_clusters ? tiling.samples : max_clusters);
    if (best.cluster_size == 0 || time < best_time) {
      best = params;
      best_time = time;
    }
  }
  return best;
}

struct Barriers {
  Barrier full[kMaxStages], empty[kMaxStages];  // tiles of the gate
  Barrier hidden_full[kMaxHiddenStages], hidden_empty[kMaxHiddenStages];
  Barrier stats_full;
};
static_assert(sizeof(Barriers) <= kBarrierBytes);

// Online softmax of a lane's 16 channels. row_sum is relative to `base`, which is at least row_max. Only when row_max
// exceeds it, base moves to kHeadroom above row_max, so that rescaling is rare.
struct OnlineSoftmax {
  float row_max[16], base[16], row_sum[16];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int c = 0; c < 16; ++c) {
      row_max[c] = -kInfinity;
      base[c] = kLowest;
      row_sum[c] = 0.0f;
    }
  }
  __device__ __forceinline__ void update(const float (&logits)[8][4]) {
    bool grew = false;
#pragma unroll
    for (int c = 0; c < 16; ++c) {
      row_max[c] = fmaxf(row_max[c], fmaxf(logits[c / 2][c % 2], logits[c / 2][2 + c % 2]));
      grew |= row_max[c] > base[c];
    }
    if (grew) {
#pragma unroll
      for (int c = 0; c < 16; ++c) {
        const float new_base = row_max[c] > base[c] ? row_max[c] + kHeadroom : base[c];
        row_sum[c] *= exp_nonpositive(base[c] - new_base);
        base[c] = new_base;
      }
    }
#pragma unroll
    for (int c = 0; c < 16; ++c) {
      row_sum[c] += exp_nonpositive(logits[c / 2][c % 2] - base[c]) +
                    exp_nonpositive(logits[c / 2][2 + c % 2] - base[c]);
    }
  }
};

struct SharedStorage {
  unsigned char *stages, *hidden, *weight;
  float *cluster_stats, *warp_stats, *row_stats;
  Barriers* barriers;

  __device__ __forceinline__ explicit SharedStorage(const Params& params) {
    barriers = reinterpret_cast<Barriers*>(shared_memory());
    row_stats = reinterpret_cast<float*>(shared_memory() + kBarrierBytes);
    warp_stats = row_stats + kStatsBytes / 4;
    stages = shared_memory() + kFixedBytes;
    hidden = stages + params.stages * params.stage_bytes();
    weight = hidden + params.hidden_stages * params.tiling.hidden_tile_bytes();
    cluster_stats = reinterpret_cast<float*>(weight + params.tiling.weight_bytes());
  }
};

// The tiles that a block processes, the same in each sample. Its cluster's samples have the indices cluster,
// cluster + num_clusters, ...
struct TileScheduler {
  int first_tile, tiles, cluster, rank;

  __device__ __forceinline__ explicit TileScheduler(const Params& params) {
    rank = static_cast<int>(blockIdx.x) % params.cluster_size;
    cluster = static_cast<int>(blockIdx.x) / params.cluster_size;
    const int64_t all = params.tiling.tiles;
    first_tile = static_cast<int>(all * rank / params.cluster_size);
    tiles = static_cast<int>(all * (rank + 1) / params.cluster_size) - first_tile;
  }
};

// Combines the statistics of all lanes, warps and blocks of a cluster into row_stats: row_max and scale / row_sum.
__device__ __forceinline__ void combine_stats(const Params& params, const SharedStorage& storage,
                                              const ConsumerCoords& coords, const TileScheduler& scheduler,
                                              const OnlineSoftmax& softmax, int sample, int round, float* saved) {
  const Tiling& tiling = params.tiling;
  const int width = tiling.padded_channels();
  Barriers& barriers = *storage.barriers;
#pragma unroll
  for (int c = 0; c < 16; ++c) {
    float row_max = softmax.row_max[c];
#pragma unroll
    for (int distance = 4; distance < kWarpSize; distance *= 2) {
      row_max = fmaxf(row_max, __shfl_xor_sync(kFullMask, row_max, distance));
    }
    const float rescale = exp_nonpositive(softmax.base[c] - finite_max(row_max));
    const float row_sum = sum_over_rows(softmax.row_sum[c] * rescale);
    if (coords.g == 0) {
      float* out = storage.warp_stats + 2 * (coords.thread / kWarpSize * kBox + 16 * coords.t + c);
      out[0] = row_max;
      out[1] = row_sum;
    }
  }
  named_barrier_sync(1, kConsumerThreads);
  const int c = coords.thread;
  float* const local = storage.cluster_stats + round % 2 * params.cluster_size * 2 * width;
  if (c < width) {
    float row_max, row_sum;
    const auto combine = [&](int count, auto source, int stride) {
      row_max = -kInfinity, row_sum = 0.0f;
      for (int i = 0; i < count; ++i) row_max = fmaxf(row_max, source(i)[0]);
      for (int i = 0; i < count; ++i) {
        row_sum += source(i)[stride] * exp_nonpositive(source(i)[0] - finite_max(row_max));
      }
    };
    // The warps that have this channel: those of every channel_blocks-th warpgroup.
    const auto warp_source = [&](int i) {
      return storage.warp_stats + 2 * (((i / 4 * tiling.channel_blocks + c / kBox) * 4 + i % 4) * kBox + c % kBox);
    };
    combine(4 * tiling.row_blocks, warp_source, 1);
#pragma unroll 1
    for (int rank = 0; rank < params.cluster_size; ++rank) {
      float* remote = map_shared_rank(local + scheduler.rank * 2 * width, rank);
      remote[c] = row_max;
      remote[width + c] = row_sum;
    }
    __syncwarp();
    if (coords.lane < params.cluster_size) mbarrier_arrive_cluster(&barriers.stats_full, coords.lane);
    mbarrier_wait_cluster(&barriers.stats_full, round % 2);
    combine(params.cluster_size, [&](int rank) { return local + rank * 2 * width + c; }, width);
    storage.row_stats[stats_index(c)] = row_max;
    storage.row_stats[width + stats_index(c)] = params.scale / row_sum;
    if (scheduler.rank == 0 && c < tiling.channels) {
      const int64_t index = static_cast<int64_t>(sample) * tiling.channels + c;
      saved[index] = row_max;
      saved[static_cast<int64_t>(tiling.samples) * tiling.channels + index] = row_sum;
    }
  }
  named_barrier_sync(1, kConsumerThreads);
}

template <typename T, int HIDDEN>
__global__ void __launch_bounds__(kBlockThreads, 1)
    gate_wgmma(Params params, const __grid_constant__ TensorMap features, const __grid_constant__ TensorMap hidden,
               const __grid_constant__ TensorMap out, const void* weight, float* saved) {
  const Tiling& tiling = params.tiling;
  const SharedStorage storage(params);
  const TileScheduler scheduler(params);
  Barriers& barriers = *storage.barriers;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == kConsumerThreads) {
    prefetch_tensormap(features);
    prefetch_tensormap(hidden);
    prefetch_tensormap(out);
#pragma unroll 1
    for (int i = 0; i < params.stages; ++i) {
      mbarrier_init(&barriers.full[i], 1);
      mbarrier_init(&barriers.empty[i], kConsumerWarps);
    }
#pragma unroll 1
    for (int i = 0; i < params.hidden_stages; ++i) {
      mbarrier_init(&barriers.hidden_full[i], 1);
      mbarrier_init(&barriers.hidden_empty[i], kConsumerWarps);
    }
    mbarrier_init(&barriers.stats_full, params.cluster_size * tiling.padded_channels() / kWarpSize);
    fence_barrier_init();
  }
  cluster_sync();

  if (thread >= kConsumerThreads) {
    warpgroup_reg_dealloc<kProducerRegisters>();
    const int warp = thread / kWarpSize - kConsumerWarps;
    const bool for_gate = warp == 0;  // warp 1 loads h for the statistics
    unsigned char* const stages = for_gate ? storage.stages : storage.hidden;
    const int stage_bytes = for_gate ? params.stage_bytes() : tiling.hidden_tile_bytes();
    if (warp < 2 && thread % kWarpSize == 0) {
      PipelineState state;
#pragma unroll 1
      for (int sample = scheduler.cluster; sample < tiling.samples; sample += params.num_clusters) {
#pragma unroll 1
        for (int tile = 0; tile < scheduler.tiles; ++tile) {
          const int row = (scheduler.first_tile + tile) * tiling.tile_rows();
          Barrier* full = (for_gate ? barriers.full : barriers.hidden_full) + state.index;
          mbarrier_wait((for_gate ? barriers.empty : barriers.hidden_empty) + state.index, state.phase ^ 1);
          mbarrier_arrive_expect_tx(full, stage_bytes);
          unsigned char* const stage = stages + state.index * stage_bytes;
          load_hidden(tiling, stage + (for_gate ? kTileBytes : 0), hidden, row, sample, full);
          if (for_gate) load_tile(tiling, stage, features, row, sample, full);
          state.advance(for_gate ? params.stages : params.hidden_stages);
        }
      }
    }
  } else {
    warpgroup_reg_alloc<kConsumerRegisters>();
    store_weight<T, HIDDEN>(tiling, weight, params.weight_dtype, reinterpret_cast<T*>(storage.weight));
    fence_proxy_async();
    named_barrier_sync(1, kConsumerThreads);
    const ConsumerCoords coords(tiling);
    const unsigned char* weight_block = storage.weight + coords.channel_block * tiling.hidden_box_bytes();
    const int width = tiling.padded_channels();
    const int hidden_offset = coords.row_block * tiling.hidden_box_bytes();
    PipelineState gate, stats;
    OnlineSoftmax softmax;
    int round = 0;
    for (int sample = scheduler.cluster; sample - params.num_clusters < tiling.samples; sample += params.num_clusters) {
      const int gate_sample = sample - params.num_clusters;  // the previous sample; negative in the first round
      softmax.reset();
      for (int tile = 0; tile < scheduler.tiles; ++tile) {
        const int tile_row = (scheduler.first_tile + tile) * tiling.tile_rows();
        const int row = tile_row + kBox * coords.row_block + 16 * coords.warp;
        float logits[8][4];
        if (sample < tiling.samples) {
          mbarrier_wait(&barriers.hidden_full[stats.index], stats.phase);
          compute_logits<T, HIDDEN>(logits, storage.hidden + stats.index * tiling.hidden_tile_bytes() + hidden_offset,
                                    weight_block, tiling.positions - row - coords.g);
          __syncwarp();
          if (coords.lane == 0) mbarrier_arrive(&barriers.hidden_empty[stats.index]);
          stats.advance(params.hidden_stages);
          softmax.update(logits);
        }
        if (gate_sample < 0) continue;
        unsigned char* stage = storage.stages + gate.index * params.stage_bytes();
        unsigned char* box = stage + coords.warpgroup * kBoxBytes;
        mbarrier_wait(&barriers.full[gate.index], gate.phase);
        compute_logits<T, HIDDEN>(logits, stage + kTileBytes + hidden_offset, weight_block, kBox);
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) {
          Uint4 f[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) f[half] = *smem_chunk(box, coords, half, chunk);
#pragma unroll
          for (int quad = 0; quad < 2; ++quad) {
            const Float4 row_max = load_stats(storage.row_stats, coords, 2 * chunk + quad);
            const Float4 factor = load_stats(storage.row_stats + width, coords, 2 * chunk + quad);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int half = i / 2, word = 2 * quad + i % 2;
              float y[2];
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const float logit = logits[4 * chunk + word][2 * half + e];
                y[e] = to_float(T{static_cast<uint16_t>(f[half].at[word] >> (16 * e))});
                const int c = 2 * (i % 2) + e;
                // Not f * (1 + gate): the sum would round off most digits of a gate of 1e-6.
                y[e] += y[e] * (exp_nonpositive(logit - row_max.at[c]) * factor.at[c]);
              }
              f[half].at[word] = pack_rn<T>(y[0], y[1]);
            }
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) *smem_chunk(box, coords, half, chunk) = f[half];
        }
        fence_proxy_async();
        __syncwarp();
        if (coords.lane == 0) {
          if (row < tiling.positions && kBox * coords.channel_block < tiling.channels) {
            tma_store(out, box + 2 * kBox * 16 * coords.warp, kBox * coords.channel_block, row, gate_sample);
          }
          tma_store_commit();
          // Release the previous stage: its store has had the time of one tile to complete.
          tma_store_wait_read<1>();
          if (tile > 0 || gate_sample >= params.num_clusters) {
            mbarrier_arrive(&barriers.empty[gate.index == 0 ? params.stages - 1 : gate.index - 1]);
          }
        }
        gate.advance(params.stages);
      }
      if (sample < tiling.samples) combine_stats(params, storage, coords, scheduler, softmax, sample, round++, saved);
    }
    if (coords.lane == 0) tma_store_wait<0>();
  }
  cluster_sync();
}

// Limits num_clusters to those that run at the same time: SMs of a GPC that do not fill a cluster stay idle, and a
// cluster that waits for another to finish could double the time. Affects only the schedule.
template <typename T, int HIDDEN>
int max_active_clusters(const Params& params) {
#ifdef DFKD_HOST
  return params.num_clusters;
#else
  static std::atomic<int> known[kMaxClusterSize + 1];  // by cluster size; every block fills an SM
  const auto kernel = gate_wgmma<T, HIDDEN>;
  int found = known[params.cluster_size].load(std::memory_order_relaxed);
  if (found == 0) {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(params.cluster_size), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(params.num_clusters * params.cluster_size));
    config.blockDim = kBlockThreads;
    config.dynamicSmemBytes = static_cast<size_t>(params.smem_bytes());
    config.attrs = &cluster;
    config.numAttrs = 1;
    if (cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             params.smem_bytes()) != cudaSuccess ||
        cudaOccupancyMaxActiveClusters(&found, kernel, &config) != cudaSuccess || found <= 0) {
      (void)cudaGetLastError();  // the launch reports the error
      return params.num_clusters;
    }
    known[params.cluster_size].store(found, std::memory_order_relaxed);
  }
  return found < params.num_clusters ? found : params.num_clusters;
#endif
}

template <typename T, int HIDDEN>
int launch_gate(Params params, const void* features, const void* hidden, const void* weight, void* out, void* saved,
                void* stream) {
  TensorMap features_map, hidden_map, out_map;
  int error = make_box_map<kBox>(&features_map, features, params.tiling, params.tiling.channels, kBox);
  if (error == 0) error = make_box_map<HIDDEN>(&hidden_map, hidden, params.tiling, params.tiling.hidden, kBox);
  if (error == 0) error = make_box_map<kBox>(&out_map, out, params.tiling, params.tiling.channels, 16);
  if (error != 0) return error;
  params.num_clusters = max_active_clusters<T, HIDDEN>(params);
  return launch_cluster(gate_wgmma<T, HIDDEN>, dim3(static_cast<unsigned>(params.num_clusters * params.cluster_size)),
                        kBlockThreads, static_cast<size_t>(params.smem_bytes()), params.cluster_size, false, stream,
                        params, features_map, hidden_map, out_map, weight, static_cast<float*>(saved));
}

}  // namespace

extern "C" {

int dfkd_spatial_attention(const void* features, const void* hidden, const void* weight, int64_t samples,
                           int64_t channels, int64_t maps, int64_t positions, int dtype, int weight_dtype, float scale,
                           int form, void* out, void* saved, void* stream) {
  if (const int status = require_supported(samples, channels, maps, positions, form)) return status;
  if (const int status = require_parameter_dtype("weight", weight_dtype)) return status;
  return dispatch_dtype(dtype, [=](auto type) {
    using T = decltype(type);
    if (samples == 0) return 0;
    Params params = make_params(make_tiling(samples, channels, maps, positions));
    params.weight_dtype = weight_dtype;
    params.scale = softmax_scale(scale, form, positions);
    return dispatch_hidden_width(params.tiling.hidden_width, [=](auto width) {
      return launch_gate<T, decltype(width)::value>(params, features, hidden, weight, out, saved, stream);
    });
  });
}
}
