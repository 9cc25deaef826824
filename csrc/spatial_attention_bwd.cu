// The gate of the spatial attention modules, backward, for sm_90a: the two softmaxes over positions. With logits l and
// softmax s as in spatial_attention.cu, made anew, and g the upstream gradient:
//
//   q = g f      D = sum of s q over positions      dl = scale s (q - D)
//   df = g + g scale s      dh = w^T dl      dw = sum over positions of dl h
//
// In a two-byte type 6 N C P bytes of f, g and df, 4 N C P more to read f and g again, which come from cache; 6 N K P
// of narrow maps; 8 N C P K operations and 2 N C P exponentials. Memory is the limit while the second reading stays in
// cache, and the way from cache to multiprocessors is next.
//
//   clear      counters
//   gradients  one cooperative launch. All tiles of all samples in a row are dealt to blocks in turn: in step i block b
//              makes D of tile i B + b, its own part of it, and then gradients of the tile `lag` steps before, of which
//              the sample's D is known by then. So all blocks are always at work on few neighbouring samples, however
//              large one is, and what waits in cache between the readings is lag B tiles: 17 MB of f and g, 26 where a
//              sample has more tiles than there are blocks. Parts of D are added up by the block that had the last tile
//              of a sample, as soon as a counter says that all are there; another counter tells that D is known.
//              dl replaces f in shared memory, in the order of columns that products have, and df replaces g: from
//              there products take dl twice, by positions and by channels, and a tile store takes df. dw stays in
//              accumulators over all tiles of a block.
//   add_parts  adds up the blocks' dw
//
// dl is rounded to the type of the maps, as the products that follow it in PyTorch take it. Four warpgroups do all
// this, with 112 registers a thread. Warps of a fifth bring tiles, two or three ahead, bring numbers of their channels,
// and add up and publish what the others' warps leave of D, for which these so need not wait for each other or for
// memory.
// Serves C up to 256 and K up to 64, multiples of 8. Not yet run on a GPU.
#include "spatial_attention.h"

namespace {

using namespace dfkd;
using namespace dfkd::spatial;

#ifdef DFKD_HOST
constexpr int kBlocks = 3;
#else
constexpr int kBlocks = 132;
#endif
constexpr int kMostStages = 3, kSlots = 2;
constexpr int kEverybody = 5;  // the barrier of all consumers; 1 to 4 are those of one strip of positions

// Shared memory for barriers and for numbers of channels: maxima, what to multiply exponentials by, D / scale.
constexpr int kBarrierBytes = 1024, kNumberBytes = kSlots * 4 * 3 * kMostChannels;
constexpr int kFixedBytes = kBarrierBytes + kNumberBytes;
static_assert(kFixedBytes % 1024 == 0);

struct Plan {
  Cut cut;
  int tiles, blocks;  // of all samples
  int steps, lag;     // steps in which there are tiles, and how many later their gradients are made
  int stages;
  unsigned summing_warps;  // which add up D of a sample: for each strip of a tile one of each 16 channels
  int weight_dtype;
  float scale;
  bool narrow, needs_grad_features, needs_grad_hidden, needs_grad_weight;  // narrow: more than df

  __host__ __device__ int stage_bytes() const { return 2 * kTileBytes + cut.hidden_bytes(); }
  __host__ __device__ int bytes() const { return kFixedBytes + cut.weight_bytes() + stages * stage_bytes(); }
};

// What blocks tell each other, in scratch.
struct Common {
  unsigned *parts_done, *slopes_done;  // counters of each sample: tiles, and warps that have added up
  float *parts, *slopes;               // D of tiles (tiles, channels), of samples (samples, strips, channels)
  float* weight_parts;                 // dw of blocks
};

struct Barriers {
  Barrier full[kMostStages], empty[kMostStages];
  Barrier summed[kMostStages];  // their consumers have left the sums of a first reading there
};

struct Memory {
  Barriers* barriers;
  float* numbers;
  unsigned char *weight, *stages;

  __device__ __forceinline__ explicit Memory(const Plan& x) {
    barriers = reinterpret_cast<Barriers*>(shared_memory());
    numbers = reinterpret_cast<float*>(shared_memory() + kBarrierBytes);
    weight = shared_memory() + kFixedBytes;
    stages = weight + x.cut.weight_bytes();
  }
  __device__ __forceinline__ float* slot(int item) const { return numbers + item % kSlots * 3 * kMostChannels; }
};

// What a block reads, one after the other: in each step a tile for D and one for gradients, where there are such.
struct Items {
  int number = -1, tile = 0, turn = -1;

  __device__ __forceinline__ bool second() const { return turn % 2 == 1; }
  __device__ __forceinline__ bool next(const Plan& x) {
    while (++turn < 2 * (x.steps + x.lag)) {
      tile = static_cast<int>(blockIdx.x) + (turn / 2 - (second() ? x.lag : 0)) * x.blocks;
      if ((second() || x.narrow) && tile >= 0 && tile < x.tiles) {
        ++number;
        return true;
      }
    }
    return false;
  }
};

// ---- bringing tiles -------------------------------------------------------------------------------------------------

__device__ __forceinline__ void bring_tile(const Plan& x, const Memory& memory, const Items& items,
                                           const TensorMap& features, const TensorMap& grad_output,
                                           const TensorMap& hidden) {
  const int which = items.number % x.stages, sample = items.tile / x.cut.tiles;
  const int row = items.tile % x.cut.tiles * x.cut.rows();
  unsigned char* stage = memory.stages + which * x.stage_bytes();
  Barrier* full = &memory.barriers->full[which];
  mbarrier_wait(&memory.barriers->empty[which], (items.number / x.stages & 1) ^ 1);
  mbarrier_arrive_expect_tx(full, x.stage_bytes());
#pragma unroll 1
  for (int strip = 0; strip < x.cut.strips; ++strip) {
    tma_load(stage + 2 * kTileBytes + strip * x.cut.narrow_bytes(), hidden, 0, row + kPanel * strip, sample, full);
  }
#pragma unroll 1
  for (int group = 0; group < kGroups; ++group) {
    const int channel = kPanel * (group % x.cut.panels), first = row + kPanel * (group / x.cut.panels);
    tma_load(stage + group * kPanelBytes, features, channel, first, sample, full);
    tma_load(stage + kTileBytes + group * kPanelBytes, grad_output, channel, first, sample, full);
  }
}

// By a warp: numbers of 128 channels, its own four from c on, of a tile's sample; for the second reading D too, when it
// is known.
__device__ __forceinline__ void bring_numbers(const Plan& x, const Memory& memory, const Items& items, int c,
                                              const float* saved, const Common& common) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, sample = items.tile / x.cut.tiles;
  const int before = items.number - kSlots;
  const bool with_slopes = items.second() && x.narrow;
  if (lane == 0) {
    if (before >= 0) mbarrier_wait(&memory.barriers->empty[before % x.stages], before / x.stages & 1);
    if (with_slopes) global_barrier_wait(common.slopes_done + sample, x.summing_warps);
  }
  __syncwarp();
  if (c < x.cut.width()) {
    Numbers top = {{0, 0, 0, 0}}, factor = top, slope = top;
    if (c < x.cut.channels) {
      const float* const from = saved + (static_cast<int64_t>(sample) * x.cut.channels + c);
      top = *reinterpret_cast<const Numbers*>(from);
      factor = *reinterpret_cast<const Numbers*>(from + static_cast<int64_t>(x.cut.samples) * x.cut.channels);
      if (with_slopes) {
        const float* part = common.slopes + (static_cast<int64_t>(sample) * x.cut.strips * x.cut.channels + c);
#pragma unroll 1
        for (int i = 0; i < x.cut.strips; ++i, part += x.cut.channels) {
          const Numbers more = *reinterpret_cast<const Numbers*>(part);
#pragma unroll
          for (int k = 0; k < 4; ++k) slope.at[k] += more.at[k];
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        slope.at[k] = fast_divide(slope.at[k], factor.at[k]);
        factor.at[k] = fast_divide(x.scale, factor.at[k]);
      }
    }
    float* const to = memory.slot(items.number) + place_of_number(c);
    *reinterpret_cast<Numbers*>(to) = top;
    *reinterpret_cast<Numbers*>(to + kMostChannels) = factor;
    *reinterpret_cast<Numbers*>(to + 2 * kMostChannels) = slope;
  }
  __syncwarp();
  if (lane == 0) mbarrier_arrive(&memory.barriers->full[items.number % x.stages]);
}

// ---- D --------------------------------------------------------------------------------------------------------------

// A tile's part of D but for the factors 1 / total.
template <typename T, int NARROW>
__device__ __forceinline__ void add_slopes(const Plan& x, const Seat& at, unsigned char* stage, const float* numbers,
                                           const unsigned char* weight, int left, Barrier* summed) {
  float logits[8][4], sums[16];
  expand<T, NARROW>(logits, stage + 2 * kTileBytes + at.strip * x.cut.narrow_bytes(),
                    weight + at.panel * x.cut.narrow_bytes());
  leave_out(logits, left);
  unsigned char* const features = stage + at.group * kPanelBytes;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const Numbers tops[2] = {numbers_of(numbers, at, 2 * which), numbers_of(numbers, at, 2 * which + 1)};
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[8 * which + i] = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float f[8], g[8];
      unpack<T>(f, *chunk_of(features, at, half, which));
      unpack<T>(g, *chunk_of(features + kTileBytes, at, half, which));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float e = exp_below(logits[4 * which + i / 2][2 * half + i % 2] - tops[i / 4].at[i % 4]);
        sums[8 * which + i] += e * (g[i] * f[i]);
      }
    }
  }
  fold<8>(sums, at.lane);
  fold<4>(sums, at.lane);
  fold<2>(sums, at.lane);
  __syncwarp();
  *reinterpret_cast<Pair*>(sums_of(stage, at.group, at.warp) + 16 * at.t + 2 * at.g) = {{sums[0], sums[1]}};
  fence_proxy_async();
  __syncwarp();
  if (at.lane == 0) mbarrier_arrive(summed);
}

// By a warp: a tile's part of D from sums of the consumers' warps. Its stage is free then.
__device__ __forceinline__ void publish_slopes(const Plan& x, const Memory& memory, int which, int tile,
                                               const Common& common) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float* const part = common.parts + static_cast<int64_t>(tile) * x.cut.channels;
#pragma unroll 2
  for (int c = lane; c < x.cut.width(); c += kWarpSize) {
    float sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < 4 * x.cut.strips; ++i) {
      const int group = i / 4 * x.cut.panels + c / kPanel;
      sum += sums_of(memory.stages + which * x.stage_bytes(), group, i % 4)[c % kPanel];
    }
    if (c < x.cut.channels) part[c] = sum;
  }
  __syncwarp();
  if (lane < kConsumerWarps) mbarrier_arrive(&memory.barriers->empty[which]);
  if (lane == 0) global_barrier_arrive(common.parts_done + tile / x.cut.tiles);
}

// D of a sample from its tiles' parts, but for the factors: each warp by itself for 16 channels and its share of tiles,
// four lanes side by side and eight of them along tiles.
__device__ __forceinline__ void merge_slopes(const Plan& x, const Seat& at, int sample, const Common& common) {
  const int warp = at.number / kWarpSize, share = warp / (4 * x.cut.panels);
  const int first = warp % (4 * x.cut.panels) * 16, channel = first + 4 * at.t;
  if (first >= x.cut.channels) return;
  if (at.lane == 0) global_barrier_wait(common.parts_done + sample, static_cast<unsigned>(x.cut.tiles));
  __syncwarp();
  float sums[4] = {0, 0, 0, 0};
  const bool valid = channel < x.cut.channels;
  if (valid) {
    const float* from = common.parts + static_cast<int64_t>(sample) * x.cut.tiles * x.cut.channels + channel;
#pragma unroll 8
    for (int tile = 8 * share + at.g; tile < x.cut.tiles; tile += 8 * x.cut.strips) {
      const Numbers part = *reinterpret_cast<const Numbers*>(from + static_cast<int64_t>(tile) * x.cut.channels);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] += part.at[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] = column_sum(sums[i]);
  if (valid && at.g == 0) {
    const int64_t place = (static_cast<int64_t>(sample) * x.cut.strips + share) * x.cut.channels + channel;
    *reinterpret_cast<Numbers*>(common.slopes + place) = {{sums[0], sums[1], sums[2], sums[3]}};
  }
  __syncwarp();
  if (at.lane == 0) global_barrier_arrive(common.slopes_done + sample);
}

// ---- gradients ------------------------------------------------------------------------------------------------------

// A tile of f to dl, its columns in the order of products, and of g to df.
template <typename T, int NARROW>
__device__ __forceinline__ void make_slopes(const Plan& x, const Seat& at, unsigned char* stage, const float* numbers,
                                            const unsigned char* weight, int left) {
  float logits[8][4];
  expand<T, NARROW>(logits, stage + 2 * kTileBytes + at.strip * x.cut.narrow_bytes(),
                    weight + at.panel * x.cut.narrow_bytes());
  leave_out(logits, left);
  unsigned char* const features = stage + at.group * kPanelBytes;
  Vector slopes[2][2];
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    Vector f[2], g[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      f[half] = *chunk_of(features, at, half, which);
      g[half] = *chunk_of(features + kTileBytes, at, half, which);
    }
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
      const Numbers top = numbers_of(numbers, at, 2 * which + quad);
      const Numbers factor = numbers_of(numbers + kMostChannels, at, 2 * which + quad);
      const Numbers slope = numbers_of(numbers + 2 * kMostChannels, at, 2 * which + quad);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2, word = 2 * quad + i % 2;
        float to_features[2], to_logits[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = 2 * (i % 2) + e;
          const float s = exp_below(logits[4 * which + word][2 * half + e] - top.at[c]) * factor.at[c];  // times scale
          const float u = to_float(T{static_cast<uint16_t>(g[half].words[word] >> (16 * e))});
          const float v = to_float(T{static_cast<uint16_t>(f[half].words[word] >> (16 * e))});
          to_features[e] = u + u * s;
          to_logits[e] = s * (u * v - slope.at[c]);
        }
        g[half].words[word] = pack_rn<T>(to_features[0], to_features[1]);
        slopes[half][which].words[word] = pack_rn<T>(to_logits[0], to_logits[1]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) *chunk_of(features + kTileBytes, at, half, which) = g[half];
  }
  if (!x.narrow) return;
  __syncwarp();  // all lanes of a row have read it
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      unsigned char* const to = features + 2 * swizzle_offset<kPanel>(at.row() + 8 * half, n) + 4 * at.t;
      *reinterpret_cast<uint32_t*>(to) = slopes[half][n / 4].words[n % 4];
    }
  }
}

template <typename T, int NARROW>
__global__ void __launch_bounds__(kBlockThreads, 1)
    gradients_wgmma(Plan x, const __grid_constant__ TensorMap features, const __grid_constant__ TensorMap grad_output,
                     const __grid_constant__ TensorMap hidden, const __grid_constant__ TensorMap d_features,
                     const void* weight, const float* saved, T* d_hidden, Common common) {
  const Memory memory(x);
  Barriers& barriers = *memory.barriers;
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  if (thread == kConsumers) {
    prefetch_tensormap(features);
    prefetch_tensormap(grad_output);
    prefetch_tensormap(hidden);
    prefetch_tensormap(d_features);
    for (int i = 0; i < x.stages; ++i) {
      mbarrier_init(&barriers.full[i], x.cut.panels == kGroups ? 3 : 2);  // tiles, and numbers of each 128 channels
      mbarrier_init(&barriers.empty[i], kConsumerWarps);
      mbarrier_init(&barriers.summed[i], kConsumerWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (thread >= kConsumers) {
    warpgroup_reg_dealloc<kCopyRegisters>();
    const int warp = (thread - kConsumers) / kWarpSize;
    Items items;
    if (thread == kConsumers) {
#pragma unroll 1
      while (items.next(x)) bring_tile(x, memory, items, features, grad_output, hidden);
    } else if (warp == 2 || (warp == 3 && x.cut.panels == kGroups)) {
      const int channel = 4 * (thread % kWarpSize) + (warp == 3 ? 4 * kWarpSize : 0);
#pragma unroll 1
      while (items.next(x)) bring_numbers(x, memory, items, channel, saved, common);
    } else if (warp == 1) {
      unsigned parities = 0;  // of each stage, as not all that it holds is for a first reading
#pragma unroll 1
      while (items.next(x)) {
        if (items.second()) continue;
        const int which = items.number % x.stages;
        mbarrier_wait(&barriers.summed[which], static_cast<int>(parities >> which & 1));
        parities ^= 1u << which;
        publish_slopes(x, memory, which, items.tile, common);
      }
    }
  } else {
    warpgroup_reg_alloc<kConsumerRegisters>();
    write_weight<T, NARROW>(x.cut, weight, x.weight_dtype, reinterpret_cast<T*>(memory.weight));
    fence_proxy_async();
    named_barrier_sync(kEverybody, kConsumers);
    const Seat at(x.cut);
    float dw[NARROW / 8][4];
#pragma unroll
    for (int i = 0; i < NARROW / 2; ++i) dw[i / 4][i % 4] = 0.0f;
    int item = 0;
#pragma unroll 1
    for (int step = 0; step < x.steps + x.lag; ++step) {
      const int tile = step * x.blocks + block;
      const bool first_reading = x.narrow && tile < x.tiles;
      if (first_reading) {
        const int row = tile % x.cut.tiles * x.cut.rows() + kPanel * at.strip + at.row();
        const int which = item % x.stages;
        mbarrier_wait(&barriers.full[which], item / x.stages & 1);
        add_slopes<T, NARROW>(x, at.anew(), memory.stages + which * x.stage_bytes(), memory.slot(item),
                              memory.weight, x.cut.positions - row, &barriers.summed[which]);
        ++item;
      }
      const int behind = tile - x.lag * x.blocks;
      if (behind >= 0 && behind < x.tiles) {
        const int sample = behind / x.cut.tiles;
        const int row = behind % x.cut.tiles * x.cut.rows() + kPanel * at.strip;
        const int which = item % x.stages;
        unsigned char* stage = memory.stages + which * x.stage_bytes();
        mbarrier_wait(&barriers.full[which], item / x.stages & 1);
        make_slopes<T, NARROW>(x, at.anew(), stage, memory.slot(item), memory.weight,
                               x.cut.positions - row - at.row());
        fence_proxy_async();
        __syncwarp();
        if (at.lane == 0 && x.needs_grad_features) {
          const int first = 16 * at.warp, channel = kPanel * at.panel;
          if (row + first < x.cut.positions && channel < x.cut.channels) {
            const unsigned char* from = stage + kTileBytes + at.group * kPanelBytes + 2 * kPanel * first;
            tma_store(d_features, from, channel, row + first, sample);
          }
          tma_store_commit();
        }
        if (x.narrow) named_barrier_sync(1 + at.strip, kWarpgroupSize * x.cut.panels);
        if (x.needs_grad_weight) add_weight<T, NARROW>(x.cut, at, stage, dw);
        if (x.needs_grad_hidden && (step & (x.cut.panels - 1)) == at.panel) {
          make_hidden<T, NARROW>(x.cut, at.anew(), stage, memory.weight, row,
                                 d_hidden + static_cast<int64_t>(sample) * x.cut.positions * x.cut.maps);
        }
        __syncwarp();
        if (at.lane == 0) {
          tma_store_wait_read<0>();
          mbarrier_arrive(&barriers.empty[which]);
        }
        ++item;
      }
      if (first_reading && tile % x.cut.tiles == x.cut.tiles - 1) {
        merge_slopes(x, at, tile / x.cut.tiles, common);
      }
    }
    if (at.lane == 0) tma_store_wait<0>();
    if (x.needs_grad_weight) {
      float* room = reinterpret_cast<float*>(memory.stages);
      named_barrier_sync(kEverybody, kConsumers);
#pragma unroll
      for (int n = 0; n < NARROW / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int line = thread / kWarpgroupSize * kPanel + at.row() + 8 * (i / 2);
          room[line * NARROW + 8 * n + 2 * at.t + i % 2] = dw[n][i];
        }
      }
      named_barrier_sync(kEverybody, kConsumers);
      float* part = common.weight_parts + static_cast<int64_t>(block) * x.cut.channels * x.cut.maps;
      for (int i = thread; i < x.cut.width() * NARROW; i += kConsumers) {
        const int column = i / NARROW, k = i % NARROW;
        const int channel = column / kPanel * kPanel + channel_of(column % kPanel);
        if (channel >= x.cut.channels || k >= x.cut.maps) continue;
        float sum = 0.0f;
        for (int strip = 0; strip < x.cut.strips; ++strip) sum += room[strip * x.cut.width() * NARROW + i];
        part[channel * x.cut.maps + k] = sum;
      }
    }
  }
}

// ---- before and after -----------------------------------------------------------------------------------------------

constexpr int kSumThreads = 512;

__global__ void __launch_bounds__(kSumThreads) clear(unsigned* counters, int64_t count) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kSumThreads + static_cast<int>(threadIdx.x);
  if (at < count) counters[at] = 0;
}

// Add up `count` rows of `width` numbers for the weight's gradient; zeros for the bias's.
__global__ void __launch_bounds__(kSumThreads) add_parts(const float* parts, int count, int width, int biases,
                                                         void* d_weight, void* d_bias, int weight_dtype,
                                                         int bias_dtype) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int at = static_cast<int>(blockIdx.x) * kWarpSize + lane;
  float sum = 0.0f;
  if (at < width) {
#pragma unroll 4
    for (int row = warp; row < count; row += kSumThreads / kWarpSize) sum += parts[static_cast<int64_t>(row) * width + at];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0) return;
  if (at < width) {
    float total = 0.0f;
    for (int i = 0; i < kSumThreads / kWarpSize; ++i) total += sums[i * kWarpSize + lane];
    write_as(d_weight, at, weight_dtype, total);
  } else if (at - width < biases) {
    write_as(d_bias, at - width, bias_dtype, 0.0f);
  }
}

// Bytes of scratch.
struct Scratch {
  int64_t counters, parts, slopes, weight_parts;

  explicit Scratch(const Cut& x) {
    const int64_t samples = x.samples, channels = x.channels;
    counters = aligned(2 * 4 * samples);
    parts = aligned(4 * samples * x.tiles * channels);
    slopes = aligned(4 * samples * channels * x.strips);
    weight_parts = aligned(4 * kBlocks * channels * x.maps);
  }
  int64_t all() const { return counters + parts + slopes + weight_parts; }
};

Plan plan(const Cut& cut, bool narrow) {
  Plan x{};
  x.cut = cut;
  x.tiles = cut.samples * cut.tiles;
  x.blocks = x.tiles < kBlocks ? x.tiles : kBlocks;
  x.narrow = narrow;
  x.summing_warps = static_cast<unsigned>(cut.strips * ((cut.channels + 15) / 16));
  if (x.tiles > 0) {
    x.steps = (x.tiles + x.blocks - 1) / x.blocks;
    // A tile's sample ends so many steps later at most; D is known after that.
    x.lag = narrow ? (cut.tiles - 1 + x.blocks - 1) / x.blocks + 1 : 0;
  }
  x.stages = (kSharedMemory - kFixedBytes - cut.weight_bytes()) / x.stage_bytes();
  x.stages = x.stages < kMostStages ? x.stages : kMostStages;
  return x;
}

template <typename T, int NARROW>
int run(const Plan& x, const void* grad_output, const void* features, const void* hidden, const void* weight,
        const void* saved, void* d_features, void* d_hidden, const Common& common, void* stream) {
  TensorMap of_features, of_grad_output, of_hidden, of_results;
  int error = map_of<kPanel>(&of_features, features, x.cut, x.cut.channels, kPanel);
  if (error == 0) error = map_of<kPanel>(&of_grad_output, grad_output, x.cut, x.cut.channels, kPanel);
  if (error == 0) error = map_of<NARROW>(&of_hidden, hidden, x.cut, x.cut.maps, kPanel);
  if (error == 0) {
    error = map_of<kPanel>(&of_results, x.needs_grad_features ? d_features : features, x.cut, x.cut.channels, 16);
  }
  if (error == 0 && x.narrow) {
    const int64_t counters = 2 * static_cast<int64_t>(x.cut.samples);
    error = launch(clear, dim3(static_cast<unsigned>((counters + kSumThreads - 1) / kSumThreads)), kSumThreads, 0,
                   stream, common.parts_done, counters);
  }
  if (error != 0) return error;
  return launch_cluster(gradients_wgmma<T, NARROW>, dim3(static_cast<unsigned>(x.blocks)), kBlockThreads,
                        static_cast<size_t>(x.bytes()), 1, true, stream, x, of_features, of_grad_output, of_hidden,
                        of_results, weight, static_cast<const float*>(saved), static_cast<T*>(d_hidden), common);
}

}  // namespace

extern "C" {

int64_t dfkd_spatial_attention_backward_scratch(int64_t samples, int64_t channels, int64_t maps, int64_t positions,
                                                int form) {
  if (require_served(samples, channels, maps, positions, form)) return 0;
  return Scratch(cut_tiles(samples, channels, maps, positions)).all();
}

int dfkd_spatial_attention_backward(const void* grad_output, const void* features, const void* hidden, const void* weight,
                                    const void* saved, int64_t samples, int64_t channels, int64_t maps,
                                    int64_t positions, int dtype, int weight_dtype, int bias_dtype, float scale,
                                    int form, void* d_features, void* d_hidden, void* d_weight, void* d_bias,
                                    void* scratch, void* stream) {
  if (const int status = require_served(samples, channels, maps, positions, form)) return status;
  if (const int status = require_parameter("weight", weight_dtype)) return status;
  if (const int status = require_parameter("bias", bias_dtype)) return status;
  return dispatch_dtype(dtype, [=](auto type) {
    using T = decltype(type);
    const bool narrow = d_hidden != nullptr || d_weight != nullptr;
    Plan x = plan(cut_tiles(samples, channels, maps, positions), narrow);
    x.weight_dtype = weight_dtype;
    x.scale = scale_of(scale, form, positions);
    x.needs_grad_features = d_features != nullptr;
    x.needs_grad_hidden = d_hidden != nullptr;
    x.needs_grad_weight = d_weight != nullptr;
    const Scratch room(x.cut);
    Common common{};
    common.parts_done = static_cast<unsigned*>(scratch);
    common.slopes_done = common.parts_done + samples;
    common.parts = static_cast<float*>(scratch) + room.counters / 4;
    common.slopes = common.parts + room.parts / 4;
    common.weight_parts = common.slopes + room.slopes / 4;
    if (x.tiles > 0 && (narrow || x.needs_grad_features)) {
      const int error = with_width(x.cut.narrow, [=](auto width) {
        return run<T, decltype(width)::value>(x, grad_output, features, hidden, weight, saved, d_features, d_hidden,
                                              common, stream);
      });
      if (error != 0) return error;
    }
    const int weights = d_weight == nullptr ? 0 : x.cut.channels * x.cut.maps;
    const int biases = d_bias == nullptr ? 0 : x.cut.channels;
    if (weights + biases == 0) return 0;
    return launch(add_parts, dim3(static_cast<unsigned>((weights + biases + kWarpSize - 1) / kWarpSize)), kSumThreads,
                  static_cast<size_t>(4 * kSumThreads), stream, common.weight_parts, x.blocks, weights, biases,
                  d_weight, d_bias, weight_dtype, bias_dtype);
  });
}
}
