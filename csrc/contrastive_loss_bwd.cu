// Backward of NT-Xent over M = 2N vectors without storing their similarity matrix. Notation: contrastive_loss.cu.
//
// With g_i the upstream gradient of vector i (0 if it is not an anchor), for every row i:
//
//   w_ij = g_i 2^(s_ij - L_i) + g_j 2^(s_ij - L_j) - [j is the partner of i] (g_i + g_j)        w_ii = 0
//   G_i = sum over j of w_ij y_j r_j / tau        dv_i = 2^k_i r_i (G_i - (G_i . u_i) u_i)      u_i = r_i y_i
//
// One exponential serves both terms: 2^s_ij (g_i 2^-L_i + g_j 2^-L_j). w is rounded to the dtype of y for the second
// GEMM, except the partner's weight, a difference of nearly equal values, which stays in float32. If the positives are
// not anchors, their rows need only the anchors as columns.
//
// 1. With one upstream gradient per anchor, reduce_grad_amax() computes their amax. preprocess() divides g by it, so
//    that w stays within the range of the dtype, and postprocess() multiplies the result by it.
// 2. preprocess() scales the vectors into scratch and computes the row statistics.
// 3. weighted_sums_wgmma: as in FlashAttention's backward, wgmma computes the similarities, the consumers turn them
//    into weights in registers, and wgmma multiplies the weights by the same tile of vectors. Each block has a
//    contiguous range of the 128 x 128 tiles, which may begin and end within a row block (stream-K).
// 4. postprocess() adds a row's partial sums in a fixed order and applies the gradient of the normalization.
//
// For D dimensions, wgmma computes 3 M^2 D FLOPs, and there are 0.75 M^2 exponentials; if all vectors are anchors, the
// factors are 4 and 1. At D = 128, the wgmmas of a tile take 2048 cycles and its exponentials 1024, so the tensor cores
// must not wait:
//  - Each consumer warpgroup (64 rows) issues the next tile's similarities before this tile's weighted sums, and
//    computes the weights while the weighted sums run.
//  - Named barriers alternate the warpgroups, so that one's exponentials overlap the other's wgmma.
//  - The rows and the weights are register operands: wgmma reads only the columns from shared memory.
// At M = 8192, each of 132 SMs gets at most 24 tiles; if blocks took whole or half row blocks, some would get 32. If
// the vectors do not fit in the L2 cache, each block takes as many tiles as the longest row block has, so that all
// blocks read the same columns at about the same time. Traffic: M D elements are read. Each partial sum per row writes
// 4 M D bytes, which are read again. L2 provides 0.75 M^2 D / 64 bytes, 16 per cycle and SM at the tensor cores' rate.
//
// Not yet run on a GPU.
#include "contrastive_loss.h"

namespace {

using namespace dfkd;
using namespace dfkd::contrastive;

// ---- tile scheduler -------------------------------------------------------------------------------------------------

// A side is the anchors (0) or the positives (1) as rows. The tiles of the sides with a gradient are ordered by side
// and row block. Each thread block processes `tiles_per_block` consecutive tiles.
struct TileScheduler {
  int64_t tiles_per_block, num_tiles;
  int row_blocks, first_side, sides, count;  // row blocks per side; sides with a gradient
  int columns[2];                            // column tiles of a row block, for each of `sides`

  __device__ __forceinline__ int64_t first_tile(int side_index) const {
    return side_index == 0 ? 0 : static_cast<int64_t>(row_blocks) * columns[0];
  }
  __device__ __forceinline__ int tiles_of_block() const {
    const int64_t left = num_tiles - blockIdx.x * tiles_per_block;
    return static_cast<int>(left < tiles_per_block ? left : tiles_per_block);
  }
};

// The column tiles [begin, end) of one row block that this block processes, after `processed` tiles of its range.
struct WorkTile {
  int side_index;  // index of the side among those with a gradient
  int row;         // first row within the side
  int begin, end;  // column tiles
  int split;       // index of this partial sum of the row block: the number of blocks that process earlier columns

  __device__ __forceinline__ WorkTile(const TileScheduler& scheduler, int processed) {
    const int64_t tile = blockIdx.x * scheduler.tiles_per_block + processed;
    side_index = tile >= scheduler.first_tile(1);
    const int64_t in_side = tile - scheduler.first_tile(side_index);
    const int columns = scheduler.columns[side_index];
    const int64_t row_block = in_side / columns;
    begin = static_cast<int>(in_side - row_block * columns);
    const int left = scheduler.tiles_of_block() - processed;
    end = left < columns - begin ? begin + left : columns;
    row = static_cast<int>(row_block) * kTile;
    split = static_cast<int>(blockIdx.x - (tile - begin) / scheduler.tiles_per_block);
  }
};

// ---- weights --------------------------------------------------------------------------------------------------------

// Turns the similarities of the thread's two rows into weights. stats: r and g 2^-L r of the tile's vectors.
__device__ __forceinline__ void compute_weights(float (&acc_s)[kTile / 8][4], const float* stats,
                                                const float (&scale)[2], const float (&grad_exp)[2]) {
  stats += 2 * (static_cast<int>(threadIdx.x) % 4);
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n) {
    const Float2 r_j = *reinterpret_cast<const Float2*>(stats + 8 * n);
    const Float2 grad_exp_j = *reinterpret_cast<const Float2*>(stats + kTile + 8 * n);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float r = i % 2 ? r_j.y : r_j.x, scaled_grad_exp = i % 2 ? grad_exp_j.y : grad_exp_j.x;
      acc_s[n][i] = exp2_approx_ftz((acc_s[n][i] * r) * scale[i / 2]) * (grad_exp[i / 2] * r + scaled_grad_exp);
    }
  }
}

// Sets the diagonal w_ii, the partners' weights and the columns from the end on to zero. self_at and partner_at are the
// columns of the thread's first row and of that row's partner; for its second row, both are 8 further. All three
// arguments are relative to the thread's first column.
__device__ __forceinline__ void mask_weights(float (&acc_s)[kTile / 8][4], int self_at, int partner_at, int end) {
#pragma unroll
  for (int i = 0; i < kTile / 2; ++i) {
    const int r = i % 4 / 2, at = i / 4 * 8 + i % 2;
    const bool masked = at == self_at + 8 * r || at == partner_at + 8 * r || at >= end;
    acc_s[i / 4][i % 4] = masked ? 0.0f : acc_s[i / 4][i % 4];
  }
}

// Computes the weight between each of the thread's rows and its partner in float32, if this thread holds that
// similarity. The similarity is bitwise equal to that of forward.
__device__ __forceinline__ void compute_partner_weights(const float (&acc_s)[kTile / 8][4], int partner_at, int row,
                                                        int partner, const float* row_stats, int64_t padded_rows,
                                                        float* partner_weights, int rows, float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int target = partner_at + 8 * r;
    float x = 0.0f;
#pragma unroll
    for (int i = 0; i < kTile / 4; ++i) x = i / 2 * 8 + i % 2 == target ? acc_s[i / 2][2 * r + i % 2] : x;
    if (target < 0 || target >= kTile || (target & 7) >= 2 || 8 * r >= rows) continue;
    const int i = row + 8 * r, j = partner + 8 * r;
    const float *grad = row_stats + kGrad * padded_rows, *lse = row_stats + kLse * padded_rows;
    const float s = mul_rn(x, (row_stats[i] * row_stats[j]) * scale_log2);
    partner_weights[8 * r] =
        (exp2_approx_ftz(s - lse[i]) - 1.0f) * grad[i] + (exp2_approx_ftz(s - lse[j]) - 1.0f) * grad[j];
  }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

// Shapes: row_stats (kNumRowStats, padded_rows), partials (splits, sides, count, DIM), partner_weights (count).
// padded_rows is an int, because an int64_t spills registers.
template <typename T, int DIM>
__global__ void __launch_bounds__(kNumThreads, 1)
    weighted_sums_wgmma(const __grid_constant__ TensorMap vectors, const float* row_stats, float* partials,
                        float* partner_weights, const __grid_constant__ TileScheduler scheduler, int padded_rows,
                        int symmetric, float scale_log2) {
  using MainloopPipeline = Pipeline<DIM, 2>;
  MainloopPipeline pipeline;
  pipeline.init();
  const int warpgroup = canonical_warp_group_idx(), count = scheduler.count;
  const int num_tiles = scheduler.tiles_of_block();
  if (warpgroup == 0) {
    warpgroup_reg_dealloc<kProducerRegs>();
    if (threadIdx.x == 0) {
      prefetch_tensormap(vectors);
      const float* const stats[2] = {row_stats, row_stats + static_cast<int64_t>(kScaledGradExp) * padded_rows};
      for (int processed = 0; processed < num_tiles;) {
        const WorkTile work(scheduler, processed);
        pipeline.load(vectors, (scheduler.first_side + work.side_index) * count + work.row);
        for (int tile = work.begin; tile < work.end; ++tile) pipeline.load(vectors, tile * kTile, stats);
        processed += work.end - work.begin;
      }
    }
  } else {
    warpgroup_reg_alloc<kConsumerRegs>();
    mma_init(warpgroup);
    uint32_t rows[DIM / 16][4], weights[kTile / 16][4];
    float acc_s[kTile / 8][4], acc_o[DIM / 8][4];
    for (int processed = 0; processed < num_tiles;) {
      const WorkTile work(scheduler, processed);
      const int side = scheduler.first_side + work.side_index, limit = symmetric || side == 0 ? 2 * count : count;
      const int local_row = work.row + (warpgroup - 1) * 64;  // the warpgroup's first row in the side
      const int row = side * count + local_row, partner = (1 - side) * count + local_row;
      float scale[2], grad_exp[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scale[r] = row_stats[row + fragment_row() + 8 * r] * scale_log2;
        grad_exp[r] = row_stats[static_cast<int64_t>(kGradExp) * padded_rows + row + fragment_row() + 8 * r];
      }
      pipeline.consumer_wait();
      load_row_fragment<DIM>(rows, pipeline.offset(), (warpgroup - 1) * 64 + fragment_row() / 16 * 16);
      pipeline.consumer_release();
      pipeline.advance();

      const auto issue_s = [&](const MainloopPipeline& stage) {
        warpgroup_fence_operand(rows);
        warpgroup_fence_operand(acc_s);
        warpgroup_arrive();
        issue_similarities<T, DIM>(acc_s, rows, stage.tile());
        warpgroup_commit_batch();
      };
      const auto issue_o = [&](const MainloopPipeline& stage) {
        const uint64_t columns = make_smem_desc<64>(stage.tile(), kBoxBytes);
#pragma unroll
        for (int k = 0; k < kTile / 16; ++k) {
          wgmma<T, DIM, true>(acc_o, weights[k], advance_desc(columns, k * 16 * 128), true);
        }
        warpgroup_commit_batch();
      };
      const auto compute_tile_weights = [&](const MainloopPipeline& stage, int tile) {
        const int column = tile * kTile;
        if (column + kTile > limit || overlaps(column, kTile, row, 64) || overlaps(column, kTile, partner, 64)) {
          const int frag_row = fragment_row(), first = frag_row - column - static_cast<int>(threadIdx.x) % 4 * 2;
          if (work.side_index == 0) {
            compute_partner_weights(acc_s, partner + first, row + frag_row, partner + frag_row, row_stats, padded_rows,
                                    partner_weights + local_row + frag_row, count - local_row - frag_row, scale_log2);
          }
          compute_weights(acc_s, stage.stats(), scale, grad_exp);
          mask_weights(acc_s, row + first, partner + first, limit + first - frag_row);
        } else {
          compute_weights(acc_s, stage.stats(), scale, grad_exp);
        }
      };
      // The accumulator fragment of S has the layout of the register operand.
      const auto pack_weights = [&] {
#pragma unroll
        for (int i = 0; i < kTile / 4; ++i) {
          const float(&acc)[4] = acc_s[i / 4 * 2 + i % 4 / 2];
          weights[i / 4][i % 4] = pack_rn<T>(acc[i % 2 * 2], acc[i % 2 * 2 + 1]);
        }
      };

      pipeline.consumer_wait();
      warp_scheduler_barrier_sync(warpgroup);
      issue_s(pipeline);
      warp_scheduler_barrier_arrive(warpgroup);
      warpgroup_wait<0>();
      warpgroup_fence_operand(acc_s);
      compute_tile_weights(pipeline, work.begin);
      pack_weights();
      MainloopPipeline previous = pipeline;  // the stage of the packed weights
      pipeline.advance();
#pragma unroll
      for (int i = 0; i < DIM / 2; ++i) acc_o[i / 4][i % 4] = 0.0f;
      for (int tile = work.begin + 1; tile < work.end; ++tile) {
        pipeline.consumer_wait();
        warp_scheduler_barrier_sync(warpgroup);
        warpgroup_fence_operand(weights);
        warpgroup_fence_operand(acc_o);
        issue_s(pipeline);
        issue_o(previous);
        warp_scheduler_barrier_arrive(warpgroup);
        warpgroup_wait<1>();
        warpgroup_fence_operand(acc_s);
        compute_tile_weights(pipeline, tile);
        warpgroup_wait<0>();
        warpgroup_fence_operand(acc_o);
        warpgroup_fence_operand(weights);
        previous.consumer_release();
        previous.index = pipeline.index;
        pipeline.advance();
        pack_weights();
      }
      warp_scheduler_barrier_sync(warpgroup);
      warpgroup_fence_operand(weights);
      warpgroup_fence_operand(acc_o);
      warpgroup_arrive();
      issue_o(previous);
      warp_scheduler_barrier_arrive(warpgroup);
      warpgroup_wait<0>();
      warpgroup_fence_operand(acc_o);
      previous.consumer_release();

#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = local_row + fragment_row() + 8 * r;
        if (at >= count) continue;
        const int64_t partial_row = (static_cast<int64_t>(work.split) * scheduler.sides + work.side_index) * count + at;
        float* out = partials + partial_row * DIM + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
        for (int n = 0; n < DIM / 8; ++n) {
          *reinterpret_cast<Float2*>(out + 8 * n) = {acc_o[n][r * 2], acc_o[n][r * 2 + 1]};
        }
      }
      processed += work.end - work.begin;
    }
    mma_finish(warpgroup);
  }
}

// ---- pre- and postprocessing ----------------------------------------------------------------------------------------

// Adds a row's partial sums and applies the gradient of the normalization. One warp computes one row.
template <typename T>
__global__ void __launch_bounds__(256)
    postprocess(const T* vectors, const float* row_stats, const float* grad_amax, TensorPair<T> gradients,
                const float* partials, const float* partner_weights, const __grid_constant__ TileScheduler scheduler,
                int padded_dim, int64_t padded_rows, float scale) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, column = 4 * lane;
  const int at = static_cast<int>(blockIdx.x) * 8 + static_cast<int>(threadIdx.x) / kWarpSize;
  const int rows = scheduler.sides * scheduler.count;
  if (at >= rows) return;  // `at` is the same for all lanes of a warp, so warp_sum() below sees full warps
  const int side_index = at >= scheduler.count, local_row = at - side_index * scheduler.count;
  const int side = scheduler.first_side + side_index;
  const int row = side * scheduler.count + local_row, partner = (1 - side) * scheduler.count + local_row;
  const int64_t first_tile =
      scheduler.first_tile(side_index) + static_cast<int64_t>(local_row / kTile) * scheduler.columns[side_index];
  const int64_t last_tile = first_tile + scheduler.columns[side_index] - 1;
  const auto splits =
      static_cast<int>(last_tile / scheduler.tiles_per_block - first_tile / scheduler.tiles_per_block) + 1;
  const float partner_weight = partner_weights[local_row], r = row_stats[row], r_partner = row_stats[partner];
  const int k = static_cast<int>(row_stats[kExponent * padded_rows + row]);
  const float factor = *grad_amax * scale;

  Vec4<float> u{}, grad{};
  if (column < padded_dim) {
    const auto y = *reinterpret_cast<const Vec4<T>*>(vectors + (static_cast<int64_t>(row) * padded_dim + column));
    const auto y_partner =
        *reinterpret_cast<const Vec4<T>*>(vectors + (static_cast<int64_t>(partner) * padded_dim + column));
#pragma unroll 4
    for (int split = 0; split < splits; ++split) {
      const auto partial = *reinterpret_cast<const Vec4<float>*>(
          partials + (static_cast<int64_t>(split) * rows + at) * padded_dim + column);
#pragma unroll
      for (int e = 0; e < 4; ++e) grad.x[e] += partial.x[e];
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      u.x[e] = to_float(y.x[e]) * r;
      grad.x[e] = grad.x[e] * (1.0f / kWeightScale) + partner_weight * (to_float(y_partner.x[e]) * r_partner);
    }
  }
  float dot = 0.0f;
#pragma unroll
  for (int e = 0; e < 4; ++e) dot += grad.x[e] * u.x[e];
  dot = warp_sum(dot);
  if (column >= gradients.dim) return;
  Vec4<T> result;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    result.x[e] = from_float<T>(scale_by_power_of_two((grad.x[e] - dot * u.x[e]) * r * factor, k));
  }
  T* out = gradients.at(row, column);
  if (gradients.vectorized) {
    *reinterpret_cast<Vec4<T>*>(out) = result;
  } else {
    const int64_t step = gradients.step(row);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (column + e < gradients.dim) out[e * step] = result.x[e];
    }
  }
}

// The amax of the upstream gradients, in one block.
__global__ void __launch_bounds__(1024)
    reduce_grad_amax(const float* grad_output, int64_t stride, float* grad_amax, int anchors) {
  const float amax = block_amax(grad_output, stride, anchors);
  if (threadIdx.x == 0) *grad_amax = amax;
}

// ---- launches -------------------------------------------------------------------------------------------------------

struct BackwardConfig : Config {
  TileScheduler scheduler;
  int64_t grid;
};

BackwardConfig backward_config(int64_t count, int64_t dim, int symmetric, bool needs_grad_anchors,
                               bool needs_grad_positives) {
  BackwardConfig config{base_config(count, dim, symmetric), {}, 0};
  const int64_t columns[2] = {divide_up(2 * count, kTile), divide_up((symmetric ? 2 : 1) * count, kTile)};
  TileScheduler& scheduler = config.scheduler;
  scheduler.row_blocks = static_cast<int>(divide_up(count, kTile));
  scheduler.first_side = needs_grad_anchors ? 0 : 1;
  scheduler.sides = needs_grad_anchors + needs_grad_positives;
  scheduler.count = static_cast<int>(count);
  scheduler.columns[0] = static_cast<int>(columns[scheduler.first_side]);
  scheduler.columns[1] = static_cast<int>(columns[1]);
  scheduler.num_tiles =
      int64_t{scheduler.row_blocks} * (scheduler.columns[0] + (scheduler.sides == 2 ? scheduler.columns[1] : 0));
  const int64_t even = divide_up(scheduler.num_tiles, num_sms), longest = scheduler.columns[0];
  const bool in_l2 = config.padded_rows * config.padded_dim * 2 <= l2_bytes;
  scheduler.tiles_per_block = in_l2 || even < longest ? even : longest;
  config.grid = divide_up(scheduler.num_tiles, scheduler.tiles_per_block);
  // A row block that starts near the end of a thread block's range has one split more than its length requires.
  const bool whole_rows =
      scheduler.tiles_per_block % longest == 0 && scheduler.columns[0] % scheduler.columns[1] == 0;
  config.splits = whole_rows ? 1 : divide_up(longest - 1, scheduler.tiles_per_block) + 1;
  config.partials_offset = config.stats_offset + kNumRowStats * config.padded_rows * 4;
  config.extra_offset = config.partials_offset + config.splits * scheduler.sides * count * config.padded_dim * 4;
  config.bytes = config.extra_offset + 16 + round_up(count * 4, 16);  // grad_amax, partner_weights
  return config;
}

template <typename T, int DIM>
int launch_sums(const BackwardConfig& config, int symmetric, float scale_log2, void* scratch, void* stream) {
  unsigned char* memory = static_cast<unsigned char*>(scratch);
  TensorMap map;
  const int status = make_vectors_map(&map, config, memory);
  if (status) return status;
  return launch(weighted_sums_wgmma<T, DIM>, static_cast<unsigned>(config.grid), kNumThreads, Pipeline<DIM, 2>::kBytes,
                stream, map, reinterpret_cast<const float*>(memory + config.stats_offset),
                reinterpret_cast<float*>(memory + config.partials_offset),
                reinterpret_cast<float*>(memory + config.extra_offset + 16), config.scheduler, config.padded_rows,
                symmetric, scale_log2);
}

template <typename T>
int backward(const float* grad_output, int64_t grad_output_stride, const TensorPair<const T>& input,
             const TensorPair<T>& gradients, const float* saved_lse, double temperature, int symmetric, int reduction,
             void* scratch, void* stream) {
  const bool needs_grad[2] = {gradients.data[0] != nullptr, gradients.data[1] != nullptr};
  if (!needs_grad[0] && !needs_grad[1]) return 0;
  const BackwardConfig config = backward_config(input.count, input.dim, symmetric, needs_grad[0], needs_grad[1]);
  const bool elementwise = reduction == DFKD_NONE;
  const double terms = reduction == DFKD_MEAN ? static_cast<double>(config.anchors) : 1.0;
  const auto scale = static_cast<float>(1.0 / temperature / terms);
  unsigned char* memory = static_cast<unsigned char*>(scratch);
  float* amax = reinterpret_cast<float*>(memory + config.extra_offset);
  const float* grad_amax = elementwise ? amax : grad_output;
  int status = 0;
  if (elementwise) {
    status = launch(reduce_grad_amax, 1, 1024, 128, stream, grad_output, grad_output_stride, amax, config.anchors);
  }
  if (status) return status;
  status = launch_preprocess<T>(config, input, scratch, saved_lse, grad_output, grad_output_stride, grad_amax,
                                elementwise, stream);
  if (status) return status;
  const auto sums = config.padded_dim == 64 ? launch_sums<T, 64> : launch_sums<T, 128>;
  status = sums(config, symmetric, static_cast<float>(kLog2OfE / temperature), scratch, stream);
  if (status) return status;
  const int64_t rows = int64_t{config.scheduler.sides} * input.count;
  return launch(postprocess<T>, static_cast<unsigned>(divide_up(rows, 8)), 256, 0, stream,
                reinterpret_cast<const T*>(memory), reinterpret_cast<const float*>(memory + config.stats_offset),
                grad_amax, gradients, reinterpret_cast<const float*>(memory + config.partials_offset), amax + 4,
                config.scheduler, config.padded_dim, config.padded_rows, scale);
}

}  // namespace

extern "C" {

int64_t dfkd_contrastive_loss_backward_scratch(int64_t count, int64_t dim, int symmetric, int needs_grad_anchors,
                                               int needs_grad_positives) {
  if (require_sizes(count, dim) || (!needs_grad_anchors && !needs_grad_positives)) return 0;
  return backward_config(count, dim, symmetric, needs_grad_anchors, needs_grad_positives).bytes;
}

int dfkd_contrastive_loss_backward(const float* grad_output, int64_t grad_output_row, const void* anchors,
                                   const void* positives, const float* saved, int64_t count, int64_t dim,
                                   int64_t anchors_row, int64_t anchors_column, int64_t positives_row,
                                   int64_t positives_column, int dtype, float temperature, int symmetric,
                                   int normalize, int reduction, void* d_anchors, void* d_positives,
                                   int64_t d_anchors_row, int64_t d_anchors_column, int64_t d_positives_row,
                                   int64_t d_positives_column, void* scratch, void* stream) {
  if (const int status = require_sizes(count, dim)) return status;
  if (const int status = require_options(temperature, normalize)) return status;
  return dispatch_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const auto input = make_pair(static_cast<const T*>(anchors), static_cast<const T*>(positives), anchors_row,
                                 anchors_column, positives_row, positives_column, count, dim);
    const auto gradients = make_pair(static_cast<T*>(d_anchors), static_cast<T*>(d_positives), d_anchors_row,
                                     d_anchors_column, d_positives_row, d_positives_column, count, dim);
    return backward<T>(grad_output, grad_output_row, input, gradients, saved, temperature, symmetric, reduction,
                       scratch, stream);
  });
}
}
