// Mixed high-order attention, backward on sm_90a: gradients of the weights from activations in memory.
//
// dproj = sum over positions of du x^T and dout_r = sum over positions of dl_r a_r^T: both operands have positions as
// rows, and are taken by columns. Sizes inside are padded as in high_order_attention_bwd.h.
#pragma once

#include "high_order_attention_bwd.h"

namespace dfkd::high_order::back {

constexpr int kJobRows = 128, kJobColumns = 192;  // channels, and columns of du or a
constexpr int kWeightStages = 5, kWeightStage = (kJobRows + kJobColumns) / 64 * kPanelBytes;
#ifdef DFKD_HOST
constexpr int kWeightBlocks = 12;
#else
constexpr int kWeightBlocks = kProcessors;
#endif
constexpr int kWeightThreads = 2 * kWarpgroupSize + kWarpSize;
constexpr size_t kWeightShared = kWeightStages * (kWeightStage + 16);

// Tiles of dproj, then those of dout, and in how many sums each is split: what every size is of follows from sizes
// alone, so that a gradient has the same bits whatever else is wanted.
struct Jobs {
  int channels, units, ranks, gates;  // padded
  int across, projections, out_across, outs, total;
  int64_t steps, splits, projection_size, size;

  Jobs(int64_t count, int ranks_, int gates_, bool needs_grad_proj, bool needs_grad_out)
      : channels(kSliceChannels * ranks_), units(kSliceUnits * ranks_), ranks(ranks_), gates(gates_) {
    across = ranks;
    projections = ranks * across;
    const int gate_columns = kOrders / gates * units;  // whose left operand is the same
    out_across = gates * static_cast<int>(divide_up(gate_columns, kJobColumns));
    outs = ranks * out_across;
    const int64_t panels = divide_up(count, 64), most = kWeightBlocks / (projections + outs);
    steps = divide_up(panels, most > 2 ? most : 2);
    splits = steps > 0 ? divide_up(panels, steps) : 0;
    projections = needs_grad_proj ? projections : 0;
    outs = needs_grad_out ? outs : 0;
    total = projections + outs;
    projection_size = needs_grad_proj ? static_cast<int64_t>(kFactors) * units * channels : 0;
    size = projection_size + (needs_grad_out ? static_cast<int64_t>(kOrders) * channels * units : 0);
  }
};

struct WeightMaps {
  TensorMap x, factors, slopes, a;  // tiles of 64 x 64
};

// parts (splits, dproj (6, K, C) and dout (3, C, K)), of what is wanted. Two warpgroups with 64 channels each.
template <typename T>
__global__ void __launch_bounds__(kWeightThreads, 1)
    weights_wgmma(const __grid_constant__ WeightMaps maps, float* parts, int64_t count, Jobs jobs) {
  const int thread = static_cast<int>(threadIdx.x), group = thread / kWarpgroupSize, lane = thread % kWarpSize;
  unsigned char* const memory = shared_memory();
  Barrier* const full = reinterpret_cast<Barrier*>(memory + kWeightStages * kWeightStage);
  Barrier* const empty = full + kWeightStages;
  const int first_job = static_cast<int>(blockIdx.x);
  const bool projection = first_job < jobs.projections;
  const int job = projection ? first_job : first_job - jobs.projections;
  const int across = projection ? jobs.across : jobs.out_across;
  const int channel0 = job / across * kJobRows;
  // Of du, or of the columns of a whose left operand is the same: the tiles of one gate, then those of the next.
  const int gate_tiles = projection ? across : across / jobs.gates, gate = job % across / gate_tiles;
  const int first_column = job % across % gate_tiles * kJobColumns;
  const int columns = projection ? kFactors * jobs.units : kOrders / jobs.gates * jobs.units;
  const int64_t step0 = static_cast<int64_t>(blockIdx.y) * jobs.steps, panels = (count + 63) / 64;
  const int steps = static_cast<int>(step0 + jobs.steps < panels ? jobs.steps : panels - step0);

  if (thread == 0) {
    for (int i = 0; i < kWeightStages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 8);
    }
    fence_barrier_init();
  }
  __syncthreads();

  PackedPipelineState<kWeightStages> ring;
  if (group == 2) {
    if (lane == 0) {
      const TensorMap& left = projection ? maps.x : maps.slopes;
      const TensorMap& right = projection ? maps.factors : maps.a;
      const int x = gate * jobs.channels + channel0, y = gate * columns + first_column;
      for (int step = 0; step < steps; ++step) {
        mbarrier_wait(empty + ring.stage(), ring.parity() ^ 1);
        mbarrier_arrive_expect_tx(full + ring.stage(), kWeightStage);
        unsigned char* const to = memory + ring.stage() * kWeightStage;
        const int position = static_cast<int>(step0 + step) * 64;
        for (int p = 0; p < kJobRows / 64; ++p) {
          tma_load(to + p * kPanelBytes, left, x + 64 * p, position, 0, full + ring.stage());
        }
        for (int p = 0; p < kJobColumns / 64; ++p) {
          tma_load(to + (kJobRows / 64 + p) * kPanelBytes, right, y + 64 * p, position, 0, full + ring.stage());
        }
        ring.next();
      }
    }
    return;
  }

  float sum[kJobColumns / 8][4];
  int before = 0;
  for (int step = 0; step < steps; ++step) {
    mbarrier_wait(full + ring.stage(), ring.parity());
    unsigned char* const panel = memory + ring.stage() * kWeightStage;
    const uint64_t a = make_smem_desc<64>(panel + group * kPanelBytes, kPanelBytes);
    const uint64_t b = make_smem_desc<64>(panel + kJobRows / 64 * kPanelBytes, kPanelBytes);
    warpgroup_fence_operand(sum);
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      wgmma<T, kJobColumns, true, true>(sum, advance_desc(a, 2048 * k), advance_desc(b, 2048 * k), step > 0 || k > 0);
    }
    warpgroup_commit_batch();
    if (step > 0) {
      warpgroup_wait<1>();
      if (lane == 0) mbarrier_arrive(empty + before);
    }
    before = ring.stage();
    ring.next();
  }
  warpgroup_wait<0>();
  warpgroup_fence_operand(sum);

  float* const to = parts + blockIdx.y * jobs.size + (projection ? 0 : jobs.projection_size);
  const int channel = channel0 + 64 * group + 16 * (thread / kWarpSize % 4) + lane / 4;
#pragma unroll
  for (int n = 0; n < kJobColumns / 8; ++n) {
    const int column = first_column + 8 * n + 2 * (lane % 4);
    if (column >= columns) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t c = channel + 8 * half;
      if (projection) {  // eight lanes write neighbours
        to[static_cast<int64_t>(column) * jobs.channels + c] = sum[n][2 * half];
        to[static_cast<int64_t>(column + 1) * jobs.channels + c] = sum[n][2 * half + 1];
      } else {
        const int order = gate * (kOrders / jobs.gates) + column / jobs.units;
        *reinterpret_cast<FloatPair*>(to + (order * jobs.channels + c) * jobs.units + column % jobs.units) = {
            sum[n][2 * half], sum[n][2 * half + 1]};
      }
    }
  }
}

// ---- parts ----------------------------------------------------------------------------------------------------------

struct alignas(16) Four {
  float values[4];
};

// Where the parts of a gradient (outer, rows, columns) lie: (outer, rows_from, columns_from) numbers from begin on.
template <typename T>
struct Gradient {
  T* to;
  int64_t rows, columns, rows_from, columns_from, begin, fours;
};

constexpr int kFours = kWarpSize;  // of a block: each of its warps adds some of their parts

// One thread's four numbers of a gradient, all of whose parts but those of other adders it adds up.
template <typename T>
__device__ __forceinline__ Four add_some(const float* parts, const Gradient<T>& of, int64_t i, int adder, int adders,
                                         int64_t splits, int64_t stride) {
  const int64_t column = i % of.columns, row = i / of.columns % of.rows, outer = i / of.columns / of.rows;
  const float* const from = parts + of.begin + (outer * of.rows_from + row) * of.columns_from + column;
  Four sum{};
#pragma unroll 8
  for (int64_t split = adder; split < splits; split += adders) {
    const Four part = *reinterpret_cast<const Four*>(from + split * stride);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.values[e] += part.values[e];
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kWarpSize * 16)
    add_parts_kernel(const float* parts, Gradient<T> first, Gradient<T> second, int64_t splits, int64_t stride) {
  Four* const sums = reinterpret_cast<Four*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, adder = static_cast<int>(threadIdx.x) / kWarpSize;
  const int adders = static_cast<int>(blockDim.x) / kWarpSize;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFours + lane, j = i - first.fours;
  Four sum{};
  if (j < 0) {
    sum = add_some(parts, first, 4 * i, adder, adders, splits, stride);
  } else if (j < second.fours) {
    sum = add_some(parts, second, 4 * j, adder, adders, splits, stride);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (adder != 0 || j >= second.fours) return;
  for (int other = 1; other < adders; ++other) {
    const Four part = sums[other * kWarpSize + lane];
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.values[e] += part.values[e];
  }
  uint32_t* const to = reinterpret_cast<uint32_t*>(j < 0 ? first.to + 4 * i : second.to + 4 * j);
  to[0] = pack_rn<T>(sum.values[0], sum.values[1]);
  to[1] = pack_rn<T>(sum.values[2], sum.values[3]);
}

// From parts of dproj (6, K, C), then dout (3, C, K), padded to other sizes; both in each part, or what is wanted.
template <typename T>
int add_parts(const float* parts, const Problem& p, int padded_channels, int padded_units, T* dproj, T* dout,
              int64_t splits, bool both, void* stream) {
  const int64_t padded = static_cast<int64_t>(padded_channels) * padded_units;
  const int64_t weight = static_cast<int64_t>(p.channels) * p.hidden;
  const Gradient<T> proj{dproj,        p.hidden,        p.channels, padded_units,
                         padded_channels, 0, dproj == nullptr ? 0 : factors_of(p.order) * weight / 4};
  const int64_t begin = dproj == nullptr && !both ? 0 : kFactors * padded;
  const Gradient<T> out{dout,         p.channels, p.hidden, padded_channels,
                        padded_units, begin,      dout == nullptr ? 0 : p.order * weight / 4};
  const int64_t stride = begin + (dout == nullptr && !both ? 0 : kOrders * padded), fours = proj.fours + out.fours;
  if (fours == 0) return 0;
  const unsigned adders = splits > 64 ? 16 : splits > 8 ? 8 : 2;
  return launch(add_parts_kernel<T>, dim3(static_cast<unsigned>(divide_up(fours, kFours))), dim3(kWarpSize * adders),
                sizeof(Four) * kWarpSize * adders, stream, parts, proj, out, splits, stride);
}

}  // namespace dfkd::high_order::back
