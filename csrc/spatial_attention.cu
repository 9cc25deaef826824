// The gate of the spatial attention modules, forward, for sm_90a: the two softmaxes over positions in one launch. With
// features f (N, C, P), narrow maps h (N, K, P) and a weight w (C, K), all maps channels-last:
//
//   l = w h, s = softmax of l over positions, out = f + scale s f
//
// In a two-byte type 4 N C P bytes of f and out and 2 N K P of h (the second time from cache); 4 N C P K operations and
// 2 N C P exponentials, plus those for sums whose maximum grew by more than kHeadroom. Memory is the limit, and at
// K = C / 8 exponentials, 16 a clock and multiprocessor, take half as long as it: they must not stand in its way.
//
//   A team, the blocks of a cluster, takes one sample at a time, its tiles shared out in ranges. First statistics: each
//   lane the maxima of its channels and the sums of exponentials, over all of its range; then the block's and through
//   shared memory of the others the team's. Then the gate, tile by tile: logits made anew, f replaced in place, and
//   out by tile stores of each warp for itself.
//   The gate of one sample and statistics of the team's next go in turn, tile by tile: while the memory brings f and
//   takes out, the exponentials of both are computed. Of four warpgroups with 112 registers a thread every one does
//   both. Of a fifth one warp brings tiles of f and h for the gate in a ring of all shared memory that is left, four or
//   five tiles of 32 KB of f, and so begins before statistics of the first sample are done; another those of h for
//   statistics.
//   How many blocks are a team follows from sizes: the more, the less statistics of the first sample delay; the fewer,
//   the fewer positions are beyond the end of tiles (plan()). 2, 4, 4 and 8 at the paper's shapes with 64 samples.
//
// Serves C up to 256 and K up to 64, multiples of 8. Not yet run on a GPU.
#include "spatial_attention.h"

#include <atomic>

namespace {

using namespace dfkd;
using namespace dfkd::spatial;

constexpr int kMostTeam = 8;
constexpr int kMostHiddenStages = 3;
constexpr int kMostStages = 8;
constexpr float kHeadroom = 10.0f;
constexpr float kLowest = -3.402823466e38f;

// Blocks at the same time, as far as clusters of eight fill the device. Few in tests, where teams go round.
#ifdef DFKD_HOST
constexpr int kBlocks = 4;
#else
constexpr int kBlocks = 128;
#endif

// Shared memory for barriers, for numbers of channels and for what warps tell each other. Panels follow.
constexpr int kBarrierBytes = 1024, kNumberBytes = 4 * 2 * kMostChannels;
constexpr int kFixedBytes = kBarrierBytes + kNumberBytes + 4 * 2 * kConsumerWarps * kPanel;
static_assert(kFixedBytes % 1024 == 0);

struct Plan {
  Cut cut;
  int team, teams, stages, hidden_stages;
  int weight_dtype;
  float scale;

  __host__ __device__ int stage_bytes() const { return kTileBytes + cut.hidden_bytes(); }
  __host__ __device__ int exchange_bytes() const { return 4 * 2 * team * 2 * cut.width(); }
  __host__ __device__ int bytes_beside() const {
    return kFixedBytes + hidden_stages * cut.hidden_bytes() + cut.weight_bytes() + exchange_bytes();
  }
  __host__ __device__ int bytes() const { return stages * stage_bytes() + bytes_beside(); }
};

// In hundredths of the time that a tile of f takes: statistics of the first sample take some 27 a tile beyond those for
// which f is under way meanwhile, what the team tells each other 50 a sample.
Plan plan(const Cut& cut) {
  Plan best{};
  int64_t least = 0;
  for (int team = 1; team <= kMostTeam && team <= kBlocks && team <= cut.tiles; team *= 2) {
    Plan x{};
    x.cut = cut;
    x.team = team;
    x.hidden_stages = cut.hidden_bytes() < kTileBytes ? kMostHiddenStages : 2;
    x.stages = (kSharedMemory - x.bytes_beside()) / x.stage_bytes();
    if (x.stages < 2) break;
    x.stages = x.stages < kMostStages ? x.stages : kMostStages;
    const int64_t most = kBlocks / team, tiles = (cut.tiles + team - 1) / team;
    const int64_t samples = (cut.samples + most - 1) / most;
    const int64_t late = tiles > x.stages ? tiles - x.stages : 0, time = samples * (100 * tiles + 50) + 27 * late;
    x.teams = static_cast<int>(cut.samples < most ? cut.samples : most);
    if (best.team == 0 || time < least) {
      best = x;
      least = time;
    }
  }
  return best;
}

struct Barriers {
  Barrier full[kMostStages], empty[kMostStages];  // of the gate's tiles
  Barrier hidden_full[kMostHiddenStages], hidden_empty[kMostHiddenStages];
  Barrier merged;
};
static_assert(sizeof(Barriers) <= kBarrierBytes);

// The running maxima of a lane's 16 channels and sums of exponentials, these below a base that stays at least the
// maximum, and is moved only where that would pass it.
struct Running {
  float top[16], base[16], sum[16];

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int c = 0; c < 16; ++c) {
      top[c] = -kInfinity;
      base[c] = kLowest;
      sum[c] = 0.0f;
    }
  }
  // Logits of two positions.
  __device__ __forceinline__ void add(const float (&logits)[8][4]) {
    bool grew = false;
#pragma unroll
    for (int c = 0; c < 16; ++c) {
      top[c] = larger(top[c], larger(logits[c / 2][c % 2], logits[c / 2][2 + c % 2]));
      grew |= top[c] > base[c];
    }
    if (grew) {
#pragma unroll
      for (int c = 0; c < 16; ++c) {
        const float now = top[c] > base[c] ? top[c] + kHeadroom : base[c];
        sum[c] *= exp_below(base[c] - now);
        base[c] = now;
      }
    }
#pragma unroll
    for (int c = 0; c < 16; ++c) {
      sum[c] += exp_below(logits[c / 2][c % 2] - base[c]) + exp_below(logits[c / 2][2 + c % 2] - base[c]);
    }
  }
};

// What a kernel's parts are in shared memory: first those of fixed size.
struct Memory {
  unsigned char *stages, *hidden, *weight;
  float *exchange, *shares, *numbers;
  Barriers* barriers;

  __device__ __forceinline__ explicit Memory(const Plan& x) {
    barriers = reinterpret_cast<Barriers*>(shared_memory());
    numbers = reinterpret_cast<float*>(shared_memory() + kBarrierBytes);
    shares = numbers + kNumberBytes / 4;
    stages = shared_memory() + kFixedBytes;
    hidden = stages + x.stages * x.stage_bytes();
    weight = hidden + x.hidden_stages * x.cut.hidden_bytes();
    exchange = reinterpret_cast<float*>(weight + x.cut.weight_bytes());
  }
};

// The team's range of tiles that a block has, and its samples: those from `first` on, `teams` apart.
struct Share {
  int first_tile, tiles, team, rank;

  __device__ __forceinline__ explicit Share(const Plan& x) {
    rank = static_cast<int>(blockIdx.x) % x.team;
    team = static_cast<int>(blockIdx.x) / x.team;
    first_tile = static_cast<int>(static_cast<int64_t>(x.cut.tiles) * rank / x.team);
    tiles = static_cast<int>(static_cast<int64_t>(x.cut.tiles) * (rank + 1) / x.team) - first_tile;
  }
};

// Statistics of a block's range to those of the sample: into `numbers`, maxima and what to multiply exponentials by.
__device__ __forceinline__ void merge(const Plan& x, const Memory& to, const Seat& at, const Share& share,
                                      const Running& mine, int sample, int round, float* saved) {
  const int width = x.cut.width();
  Barriers& barriers = *to.barriers;
#pragma unroll
  for (int c = 0; c < 16; ++c) {
    float top = mine.top[c];
#pragma unroll
    for (int distance = 4; distance < kWarpSize; distance *= 2) top = larger(top, __shfl_xor_sync(kFullMask, top, distance));
    const float sum = column_sum(mine.sum[c] * exp_below(mine.base[c] - base_of(top)));
    if (at.g == 0) {
      float* out = to.shares + 2 * (at.number / kWarpSize * kPanel + 16 * at.t + c);
      out[0] = top;
      out[1] = sum;
    }
  }
  named_barrier_sync(1, kConsumers);
  const int c = at.number;
  float* const here = to.exchange + round % 2 * x.team * 2 * width;
  if (c < width) {
    // Warps of this channel's panel: of every panels-th warpgroup.
    float top = -kInfinity, sum = 0.0f;
    for (int i = 0; i < 4 * x.cut.strips; ++i) {
      const int warp = (i / 4 * x.cut.panels + c / kPanel) * 4 + i % 4;
      top = larger(top, to.shares[2 * (warp * kPanel + c % kPanel)]);
    }
    for (int i = 0; i < 4 * x.cut.strips; ++i) {
      const int warp = (i / 4 * x.cut.panels + c / kPanel) * 4 + i % 4;
      const float* from = to.shares + 2 * (warp * kPanel + c % kPanel);
      sum += from[1] * exp_below(from[0] - base_of(top));
    }
#pragma unroll 1
    for (int rank = 0; rank < x.team; ++rank) {
      float* there = map_shared_rank(here + share.rank * 2 * width, rank);
      there[c] = top;
      there[width + c] = sum;
    }
    __syncwarp();
    if (at.lane < x.team) mbarrier_arrive_cluster(&barriers.merged, at.lane);
    mbarrier_wait_cluster(&barriers.merged, round % 2);
    top = -kInfinity;
    sum = 0.0f;
#pragma unroll 1
    for (int rank = 0; rank < x.team; ++rank) top = larger(top, here[rank * 2 * width + c]);
#pragma unroll 1
    for (int rank = 0; rank < x.team; ++rank) {
      const float* from = here + rank * 2 * width + c;
      sum += from[width] * exp_below(from[0] - base_of(top));
    }
    to.numbers[place_of_number(c)] = top;
    to.numbers[width + place_of_number(c)] = x.scale / sum;
    if (share.rank == 0 && c < x.cut.channels) {
      const int64_t place = static_cast<int64_t>(sample) * x.cut.channels + c;
      saved[place] = top;
      saved[static_cast<int64_t>(x.cut.samples) * x.cut.channels + place] = sum;
    }
  }
  named_barrier_sync(1, kConsumers);
}

template <typename T, int NARROW>
__global__ void __launch_bounds__(kBlockThreads, 1)
    gate_wgmma(Plan x, const __grid_constant__ TensorMap features, const __grid_constant__ TensorMap hidden,
                const __grid_constant__ TensorMap out, const void* weight, float* saved) {
  const Memory memory(x);
  const Share share(x);
  Barriers& barriers = *memory.barriers;
  const int thread = static_cast<int>(threadIdx.x), strips = x.cut.strips;
  if (thread == kConsumers) {
    prefetch_tensormap(features);
    prefetch_tensormap(hidden);
    prefetch_tensormap(out);
#pragma unroll 1
    for (int i = 0; i < x.stages; ++i) {
      mbarrier_init(&barriers.full[i], 1);
      mbarrier_init(&barriers.empty[i], kConsumerWarps);
    }
#pragma unroll 1
    for (int i = 0; i < x.hidden_stages; ++i) {
      mbarrier_init(&barriers.hidden_full[i], 1);
      mbarrier_init(&barriers.hidden_empty[i], kConsumerWarps);
    }
    mbarrier_init(&barriers.merged, x.team * x.cut.width() / kWarpSize);
    fence_barrier_init();
  }
  cluster_sync();

  if (thread >= kConsumers) {
    warpgroup_reg_dealloc<kCopyRegisters>();
    const int warp = thread / kWarpSize - kConsumerWarps;
    const bool for_gate = warp == 0;
    if (warp < 2 && thread % kWarpSize == 0) {
      PipelineState state;
#pragma unroll 1
      for (int sample = share.team; sample < x.cut.samples; sample += x.teams) {
#pragma unroll 1
        for (int tile = 0; tile < share.tiles; ++tile) {
          const int row = (share.first_tile + tile) * x.cut.rows();
          if (for_gate) {
            unsigned char* stage = memory.stages + state.index * x.stage_bytes();
            Barrier* full = &barriers.full[state.index];
            mbarrier_wait(&barriers.empty[state.index], state.phase ^ 1);
            mbarrier_arrive_expect_tx(full, x.stage_bytes());
#pragma unroll 1
            for (int strip = 0; strip < strips; ++strip) {
              tma_load(stage + kTileBytes + strip * x.cut.narrow_bytes(), hidden, 0, row + kPanel * strip, sample,
                       full);
            }
#pragma unroll 1
            for (int group = 0; group < kGroups; ++group) {
              tma_load(stage + group * kPanelBytes, features, kPanel * (group % x.cut.panels),
                       row + kPanel * (group / x.cut.panels), sample, full);
            }
            state.advance(x.stages);
          } else {
            unsigned char* stage = memory.hidden + state.index * x.cut.hidden_bytes();
            mbarrier_wait(&barriers.hidden_empty[state.index], state.phase ^ 1);
            mbarrier_arrive_expect_tx(&barriers.hidden_full[state.index], x.cut.hidden_bytes());
#pragma unroll 1
            for (int strip = 0; strip < strips; ++strip) {
              tma_load(stage + strip * x.cut.narrow_bytes(), hidden, 0, row + kPanel * strip, sample,
                       &barriers.hidden_full[state.index]);
            }
            state.advance(x.hidden_stages);
          }
        }
      }
    }
  } else {
    warpgroup_reg_alloc<kConsumerRegisters>();
    write_weight<T, NARROW>(x.cut, weight, x.weight_dtype, reinterpret_cast<T*>(memory.weight));
    fence_proxy_async();
    named_barrier_sync(1, kConsumers);
    const Seat at(x.cut);
    const unsigned char* mine = memory.weight + at.panel * x.cut.narrow_bytes();
    const int width = x.cut.width();
    const int to_strip = at.strip * x.cut.narrow_bytes();
    PipelineState gate, statistics;
    Running running;
    for (int round = 0, sample = share.team; sample - x.teams < x.cut.samples; ++round, sample += x.teams) {
      const int gated = sample - x.teams;  // the sample before, if there is one
      running.begin();
      for (int tile = 0; tile < share.tiles; ++tile) {
        const int row = (share.first_tile + tile) * x.cut.rows() + kPanel * at.strip + 16 * at.warp;
        float logits[8][4];
        if (sample < x.cut.samples) {
          mbarrier_wait(&barriers.hidden_full[statistics.index], statistics.phase);
          expand<T, NARROW>(logits, memory.hidden + statistics.index * x.cut.hidden_bytes() + to_strip, mine);
          __syncwarp();
          if (at.lane == 0) mbarrier_arrive(&barriers.hidden_empty[statistics.index]);
          statistics.advance(x.hidden_stages);
          leave_out(logits, x.cut.positions - row - at.g);
          running.add(logits);
        }
        if (gated < 0) continue;
        unsigned char* stage = memory.stages + gate.index * x.stage_bytes();
        unsigned char* panel = stage + at.group * kPanelBytes;
        mbarrier_wait(&barriers.full[gate.index], gate.phase);
        expand<T, NARROW>(logits, stage + kTileBytes + to_strip, mine);
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          Vector f[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) f[half] = *chunk_of(panel, at, half, which);
#pragma unroll
          for (int quad = 0; quad < 2; ++quad) {
            const Numbers top = numbers_of(memory.numbers, at, 2 * which + quad);
            const Numbers factor = numbers_of(memory.numbers + width, at, 2 * which + quad);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int half = i / 2, word = 2 * quad + i % 2;
              float y[2];
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const float logit = logits[4 * which + word][2 * half + e];
                y[e] = to_float(T{static_cast<uint16_t>(f[half].words[word] >> (16 * e))});
                // Not f * (1 + gate): next to 1 a gate of 1e-6 would lose most of its digits.
                y[e] += y[e] * (exp_below(logit - top.at[2 * (i % 2) + e]) * factor.at[2 * (i % 2) + e]);
              }
              f[half].words[word] = pack_rn<T>(y[0], y[1]);
            }
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) *chunk_of(panel, at, half, which) = f[half];
        }
        fence_proxy_async();
        __syncwarp();
        if (at.lane == 0) {
          if (row < x.cut.positions && kPanel * at.panel < x.cut.channels) {
            tma_store(out, panel + 2 * kPanel * 16 * at.warp, kPanel * at.panel, row, gated);
          }
          tma_store_commit();
          // The stage before this one: its stores have had a tile's time.
          tma_store_wait_read<1>();
          if (tile > 0 || gated >= x.teams) {
            mbarrier_arrive(&barriers.empty[gate.index == 0 ? x.stages - 1 : gate.index - 1]);
          }
        }
        gate.advance(x.stages);
      }
      if (sample < x.cut.samples) merge(x, memory, at, share, running, sample, round, saved);
    }
    if (at.lane == 0) tma_store_wait<0>();
  }
  cluster_sync();
}

// How many teams the device holds at the same time: multiprocessors are grouped, and what a group has left beside whole
// clusters stays idle. A team that had to wait for another to end could double the time. Changes nothing but who takes
// which sample.
template <typename T, int NARROW>
int most_teams(const Plan& x) {
#ifdef DFKD_HOST
  return x.teams;
#else
  static std::atomic<int> known[kMostTeam + 1];  // by the size of a team: one block fills a multiprocessor always
  const auto kernel = gate_wgmma<T, NARROW>;
  int found = known[x.team].load(std::memory_order_relaxed);
  if (found == 0) {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(x.team), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(x.teams * x.team));
    config.blockDim = kBlockThreads;
    config.dynamicSmemBytes = static_cast<size_t>(x.bytes());
    config.attrs = &cluster;
    config.numAttrs = 1;
    if (cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             x.bytes()) != cudaSuccess ||
        cudaOccupancyMaxActiveClusters(&found, kernel, &config) != cudaSuccess || found <= 0) {
      (void)cudaGetLastError();  // the launch will tell
      return x.teams;
    }
    known[x.team].store(found, std::memory_order_relaxed);
  }
  return found < x.teams ? found : x.teams;
#endif
}

template <typename T, int NARROW>
int run(Plan x, const void* features, const void* hidden, const void* weight, void* out, void* saved,
        void* stream) {
  TensorMap of_features, of_hidden, of_out;
  int error = map_of<kPanel>(&of_features, features, x.cut, x.cut.channels, kPanel);
  if (error == 0) error = map_of<NARROW>(&of_hidden, hidden, x.cut, x.cut.maps, kPanel);
  if (error == 0) error = map_of<kPanel>(&of_out, out, x.cut, x.cut.channels, 16);
  if (error != 0) return error;
  x.teams = most_teams<T, NARROW>(x);
  return launch_cluster(gate_wgmma<T, NARROW>, dim3(static_cast<unsigned>(x.teams * x.team)), kBlockThreads,
                        static_cast<size_t>(x.bytes()), x.team, false, stream, x, of_features, of_hidden, of_out,
                        weight, static_cast<float*>(saved));
}

}  // namespace

extern "C" {

int dfkd_spatial_attention(const void* features, const void* hidden, const void* weight, int64_t samples,
                           int64_t channels, int64_t maps, int64_t positions, int dtype, int weight_dtype, float scale,
                           int form, void* out, void* saved, void* stream) {
  if (const int status = require_served(samples, channels, maps, positions, form)) return status;
  if (const int status = require_parameter("weight", weight_dtype)) return status;
  return dispatch_dtype(dtype, [=](auto type) {
    using T = decltype(type);
    if (samples == 0) return 0;
    Plan x = plan(cut_tiles(samples, channels, maps, positions));
    x.weight_dtype = weight_dtype;
    x.scale = scale_of(scale, form, positions);
    return with_width(x.cut.narrow, [=](auto narrow) {
      return run<T, decltype(narrow)::value>(x, features, hidden, weight, out, saved, stream);
    });
  });
}
}
