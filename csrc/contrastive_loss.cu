// Forward of NT-Xent over M = 2N vectors v, anchors then positives, without storing their similarity matrix.
//
// With the temperature tau, y_i = 2^k_i v_i (exact, since k_i is an integer) and r_i = 1 / |y_i| (0 for a zero vector):
//
//   s_ij = (y_i . y_j) r_i r_j log2(e) / tau      L_i = log2(sum over j != i of 2^s_ij)
//   loss_i = log(2) (L_i - s_{i, partner of i})
//
// wgmma multiplies the vectors in their own dtype; the factors r are applied in float32. A cosine is at most 1, so s is
// bounded and the softmax needs no running maximum. L is saved for backward. launchers.h lists the supported sizes.
//
// 1. preprocess() scales the vectors into scratch.
// 2. similarity_sums_wgmma is persistent. A work tile is 256 rows by one split of the columns. Two consumer warpgroups
//    hold 128 rows each in registers and read the columns from the pipeline, 128 at a time.
// 3. combine() adds each row's splits and its partner's term, which the sums of step 2 leave out, and reduces the
//    losses, in one cluster of eight blocks. With more than 8192 anchors it runs in several clusters, and
//    reduce_partials() adds their sums.
//
// For A anchors and D dimensions, wgmma computes 2 A M D FLOPs, and there are A M exponentials. At D = 128, the wgmmas
// of 64 x 128 similarities take 512 cycles of an SM, and the exponentials take as many, so the two must overlap:
//  - Named barriers alternate the warpgroups: each issues 1024 cycles of wgmma and then has 1024 cycles for its
//    exponentials. It starts them when the first of its two 64 x 128 accumulators is complete.
//  - One exponential in kPolynomialPeriod is computed on the FMA units, as a polynomial of degree 5. Its relative error
//    is below 2.2e-7, about that of ex2.approx.
//  - With the rows in registers, wgmma reads only the columns from shared memory. Two operands in shared memory would
//    take three quarters of its bandwidth.
// Traffic: preprocess() reads M D elements and writes as many. Work tiles read their columns from L2, A M D / 128 bytes
// in all: 8.6 GB for A = 65536, M = 2 A and D = 128, or 16 bytes per cycle and SM at the rate of the tensor cores.
// Blocks read the same split at about the same time. Each split writes 4 bytes per anchor.
//
// Not yet run on a GPU.
#include "contrastive_loss.h"

namespace {

using namespace dfkd;
using namespace dfkd::contrastive;

constexpr int kBlockM = 2 * kTile;
template <int DIM>
constexpr int kPolynomialPeriod = DIM == 128 ? 5 : 4;

// Returns sum + 2^x for |x| up to about kMaxLogit, by 2^x = 2^n 2^f with |f| <= 1/2. A NaN propagates through 2^f.
__device__ __forceinline__ float add_exp2_polynomial(float sum, float x) {
  constexpr float kShift = 12582912.0f + 127.0f;  // rounds x to an integer n and leaves n + 127 in the low bits
  const float shifted = x + kShift;
  const float f = x - (shifted - kShift);
  float p = 0.0013276472454890609f;
  p = p * f + 0.009675540961325169f;
  p = p * f + 0.05550713092088699f;
  p = p * f + 0.24022120237350464f;
  p = p * f + 0.6931469440460205f;
  p = p * f + 1.0000001192092896f;
  return p * std::bit_cast<float>(std::bit_cast<uint32_t>(shifted) << 23) + sum;
}

// Adds 2^s of the thread's 32 columns to the sums of its two rows.
template <int DIM>
__device__ __forceinline__ void accumulate_tile(float (&row_sum)[2], const float (&acc_s)[kTile / 8][4],
                                                const float* inverse_norms, const float (&scale)[2]) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  float sum[2] = {};  // per tile first, which is more accurate than one long sum
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n) {
    const Float2 r_j = *reinterpret_cast<const Float2*>(inverse_norms + 8 * n + 2 * t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i / 2;
      const float x = (acc_s[n][i] * (i % 2 ? r_j.y : r_j.x)) * scale[r];
      if ((4 * n + i) % kPolynomialPeriod<DIM> == kPolynomialPeriod<DIM> / 2) {
        sum[r] = add_exp2_polynomial(sum[r], x);
      } else {
        sum[r] += exp2_approx_ftz(x);
      }
    }
  }
  row_sum[0] += sum[0];
  row_sum[1] += sum[1];
}

// Does the same for a tile that contains the rows themselves, their partners or the end of the columns, and excludes
// these from the sums. `rows` counts the valid rows from the thread's first on; their partners' logits are written.
__device__ __forceinline__ void accumulate_masked_tile(float (&row_sum)[2], const float (&acc_s)[kTile / 8][4],
                                                       const float* inverse_norms, const float* row_inverse_norms,
                                                       float scale_log2, int column, int row, int partner, int limit,
                                                       float* partner_logits, int rows) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  inverse_norms += 2 * t;
  column += 2 * t;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int self_at = row + 8 * r - column, partner_at = partner + 8 * r - column, end = limit - column;
    const float r_i = row_inverse_norms[8 * r];
    float partner_logit = 0.0f, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kTile / 4; ++i) {
      const int at = i / 2 * 8 + i % 2;
      // Symmetric in i and j, so that backward computes bitwise equal logits.
      const float x = acc_s[i / 2][2 * r + i % 2] * ((r_i * inverse_norms[at]) * scale_log2);
      partner_logit = at == partner_at ? x : partner_logit;
      sum += at == self_at || at == partner_at || at >= end ? 0.0f : exp2_approx_ftz(x);
    }
    const bool has_partner = partner_at >= 0 && partner_at < kTile && partner_at % 8 < 2;
    if (has_partner && 8 * r < rows) partner_logits[8 * r] = partner_logit;
    row_sum[r] += sum;
  }
}

// 256 rows of a side (0: anchors, 1: positives) by the column tiles [begin, end) of one split. Row blocks vary fastest.
struct WorkTile {
  int split, side, row, begin, end;

  __device__ __forceinline__ WorkTile(int tile_idx, int count, int sides, int tiles_per_split) {
    const int row_blocks = (count + kBlockM - 1) / kBlockM, tiles = (2 * count + kTile - 1) / kTile;
    split = tile_idx / (row_blocks * sides);
    side = tile_idx / row_blocks % sides;
    row = tile_idx % row_blocks * kBlockM;
    begin = split * tiles_per_split;
    end = begin + tiles_per_split < tiles ? begin + tiles_per_split : tiles;
  }
};

// `count` is N; `anchors` is N, or 2N if the positives are anchors too (symmetric).
// Shapes: row_stats (1, padded_rows), partials (splits, anchors), partner_logits (anchors).
template <typename T, int DIM>
__global__ void __launch_bounds__(kNumThreads, 1)
    similarity_sums_wgmma(const __grid_constant__ TensorMap vectors, const float* row_stats, float* partials,
                          float* partner_logits, int count, int anchors, int tiles_per_split, int num_work_tiles,
                          float scale_log2) {
  Pipeline<DIM, 1> pipeline;
  pipeline.init();
  const int warpgroup = canonical_warp_group_idx(), sides = anchors / count;
  const int first_tile = static_cast<int>(blockIdx.x), num_blocks = static_cast<int>(gridDim.x);
  if (warpgroup == 0) {
    warpgroup_reg_dealloc<kProducerRegs>();
    if (threadIdx.x == 0) {
      prefetch_tensormap(vectors);
      const float* const stats[1] = {row_stats};
      for (int tile_idx = first_tile; tile_idx < num_work_tiles; tile_idx += num_blocks) {
        const WorkTile work(tile_idx, count, sides, tiles_per_split);
        pipeline.load(vectors, work.side * count + work.row);
        pipeline.load(vectors, work.side * count + work.row + kTile);
        for (int tile = work.begin; tile < work.end; ++tile) pipeline.load(vectors, tile * kTile, stats);
      }
    }
  } else {
    warpgroup_reg_alloc<kConsumerRegs>();
    mma_init(warpgroup);
    uint32_t rows[2][DIM / 16][4];
    float acc_s[2][kTile / 8][4];
    for (int tile_idx = first_tile; tile_idx < num_work_tiles; tile_idx += num_blocks) {
      const WorkTile work(tile_idx, count, sides, tiles_per_split);
      const int local_row = work.row + (warpgroup - 1) * kTile;  // within the side
      const int row = work.side * count + local_row, partner = (1 - work.side) * count + local_row;
      const int frag_row = fragment_row();
      float scale[2][2], row_sum[2][2] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scale[i / 2][i % 2] = row_stats[row + frag_row + i / 2 * 64 + i % 2 * 8] * scale_log2;
      }
#pragma unroll
      for (int owner = 1; owner <= 2; ++owner) {
        pipeline.consumer_wait();
        if (warpgroup == owner) {
          load_row_fragment<DIM>(rows[0], pipeline.offset(), frag_row / 16 * 16);
          load_row_fragment<DIM>(rows[1], pipeline.offset(), 64 + frag_row / 16 * 16);
        }
        pipeline.consumer_release();
        pipeline.advance();
      }
      const auto accumulate = [&](int half, int tile) {
        const int column = tile * kTile, first = row + 64 * half, first_partner = partner + 64 * half;
        if (column + kTile > 2 * count || overlaps(column, kTile, first, 64) ||
            overlaps(column, kTile, first_partner, 64)) {
          const int i = first + frag_row;
          accumulate_masked_tile(row_sum[half], acc_s[half], pipeline.stats(), row_stats + i, scale_log2, column, i,
                                 first_partner + frag_row, 2 * count, partner_logits + i,
                                 count - local_row - 64 * half - frag_row);
        } else {
          accumulate_tile<DIM>(row_sum[half], acc_s[half], pipeline.stats(), scale[half]);
        }
      };

      for (int tile = work.begin; tile < work.end; ++tile) {
        pipeline.consumer_wait();
        warp_scheduler_barrier_sync(warpgroup);
        warpgroup_fence_operand(rows[0]);
        warpgroup_fence_operand(rows[1]);
        warpgroup_fence_operand(acc_s[0]);
        warpgroup_fence_operand(acc_s[1]);
        warpgroup_arrive();
        issue_similarities<T, DIM>(acc_s[0], rows[0], pipeline.tile());
        warpgroup_commit_batch();
        issue_similarities<T, DIM>(acc_s[1], rows[1], pipeline.tile());
        warpgroup_commit_batch();
        warp_scheduler_barrier_arrive(warpgroup);
        warpgroup_wait<1>();
        warpgroup_fence_operand(acc_s[0]);
        accumulate(0, tile);
        warpgroup_wait<0>();
        warpgroup_fence_operand(acc_s[1]);
        accumulate(1, tile);
        pipeline.consumer_release();
        pipeline.advance();
      }

#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float sum = warp_sum<4>(row_sum[i / 2][i % 2]);
        const int at = local_row + frag_row + i / 2 * 64 + i % 2 * 8;
        if (threadIdx.x % 4 == 0 && at < count) {
          partials[static_cast<int64_t>(work.split) * anchors + (work.side * count + at)] = sum;
        }
      }
    }
    mma_finish(warpgroup);
  }
}

// ---- epilogue kernels -----------------------------------------------------------------------------------------------

constexpr int kCombineThreads = 512, kCombineCluster = 8;

// Adds the splits of `rows` anchors per block. Writes L, and either the losses or their scaled sum per cluster.
__global__ void __launch_bounds__(kCombineThreads) combine(const float* partials, const float* partner_logits,
                                                           float* out, float* saved_lse, int anchors, int splits,
                                                           int rows, float scale, int elementwise) {
  cluster_arrive();  // all blocks of the cluster must run before one accesses DSMEM
  float* block_sums = reinterpret_cast<float*>(shared_memory() + 128);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows;
  float sum = 0.0f;
  for (int64_t anchor = first + threadIdx.x; anchor < first + rows && anchor < anchors; anchor += kCombineThreads) {
    float row_sum = 0.0f;
#pragma unroll 8
    for (int split = 0; split < splits; ++split) row_sum += partials[static_cast<int64_t>(split) * anchors + anchor];
    // row_sum excludes the partner: if the partner dominates, L minus its logit would cancel.
    const float logit = partner_logits[anchor], loss = log1pf(row_sum * exp2_approx_ftz(-logit));
    saved_lse[anchor] = logit + loss * static_cast<float>(kLog2OfE);
    if (elementwise) out[anchor] = loss;
    sum += loss;
  }
  sum = block_sum(sum);
  cluster_wait();
  if (threadIdx.x == 0) *map_shared_rank(block_sums + cluster_rank(), 0) = sum;
  cluster_sync();
  if (elementwise || threadIdx.x != 0 || cluster_rank() != 0) return;
  sum = 0.0f;
  for (int rank = 0; rank < cluster_size(); ++rank) sum += block_sums[rank];
  out[static_cast<int>(blockIdx.x) / cluster_size()] = sum * scale;
}

// Reduces the clusters' sums in one block.
__global__ void __launch_bounds__(256) reduce_partials(const float* sums, float* out, int count, float scale) {
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 256) sum += sums[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = sum * scale;
}

// ---- launches -------------------------------------------------------------------------------------------------------

struct ForwardConfig : Config {
  int64_t row_blocks, tiles_per_split;
  int64_t combine_rows, combine_clusters;  // anchors per block of combine(), and its clusters
};

ForwardConfig forward_config(int64_t count, int64_t dim, int symmetric) {
  ForwardConfig config{base_config(count, dim, symmetric), 0, 0, 0, 0};
  config.row_blocks = divide_up(count, kBlockM) * (symmetric ? 2 : 1);
  const int64_t tiles = divide_up(2 * count, kTile);
  int64_t best_time = 0;
  for (int64_t splits = 1; splits <= 64 && splits <= tiles; ++splits) {
    const int64_t length = divide_up(tiles, splits), work_tiles = config.row_blocks * divide_up(tiles, length);
    // The prologue and epilogue of a work tile take about as long as one column tile.
    const int64_t time = divide_up(work_tiles, num_sms) * (length + 1);
    if (splits == 1 || time < best_time) config.tiles_per_split = length, best_time = time;
  }
  config.splits = divide_up(tiles, config.tiles_per_split);
  // One cluster: up to two rows per thread. Several: a row for every second thread, which gives more blocks.
  const bool one_cluster = config.anchors <= kCombineCluster * 2 * kCombineThreads;
  config.combine_rows = one_cluster ? divide_up(config.anchors, kCombineCluster) : kCombineThreads / 2;
  config.combine_clusters = divide_up(config.anchors, config.combine_rows * kCombineCluster);
  config.partials_offset = config.stats_offset + config.padded_rows * 4;
  config.extra_offset = config.partials_offset + round_up(config.splits * config.anchors * 4, 16);
  config.bytes = config.extra_offset + round_up((config.anchors + config.combine_clusters) * 4, 16);
  return config;
}

template <typename T, int DIM>
int launch_sums(const ForwardConfig& config, int64_t count, float scale_log2, void* scratch, void* stream) {
  unsigned char* memory = static_cast<unsigned char*>(scratch);
  TensorMap map;
  const int status = make_vectors_map(&map, config, memory);
  if (status) return status;
  const int64_t work_tiles = config.row_blocks * config.splits;
  const dim3 grid(static_cast<unsigned>(work_tiles < num_sms ? work_tiles : num_sms));
  return launch(similarity_sums_wgmma<T, DIM>, grid, kNumThreads, Pipeline<DIM, 1>::kBytes, stream, map,
                reinterpret_cast<const float*>(memory + config.stats_offset),
                reinterpret_cast<float*>(memory + config.partials_offset),
                reinterpret_cast<float*>(memory + config.extra_offset), count, config.anchors, config.tiles_per_split,
                work_tiles, scale_log2);
}

template <typename T>
int forward(const TensorPair<const T>& input, double temperature, int symmetric, int reduction, float* out,
            float* saved_lse, void* scratch, void* stream) {
  const bool elementwise = reduction == DFKD_NONE;
  const ForwardConfig config = forward_config(input.count, input.dim, symmetric);
  const float scale = reduction == DFKD_MEAN ? static_cast<float>(1.0 / static_cast<double>(config.anchors)) : 1.0f;
  unsigned char* memory = static_cast<unsigned char*>(scratch);
  int status = launch_preprocess<T>(config, input, scratch, nullptr, nullptr, 0, nullptr, false, stream);
  if (status) return status;
  const auto sums = config.padded_dim == 64 ? launch_sums<T, 64> : launch_sums<T, 128>;
  status = sums(config, input.count, static_cast<float>(kLog2OfE / temperature), scratch, stream);
  if (status) return status;
  const bool single = elementwise || config.combine_clusters == 1;
  const float* partner_logits = reinterpret_cast<const float*>(memory + config.extra_offset);
  float* cluster_sums = reinterpret_cast<float*>(memory + config.extra_offset) + config.anchors;
  status = launch_cluster(combine, static_cast<unsigned>(config.combine_clusters * kCombineCluster), kCombineThreads,
                          128 + kCombineCluster * 4, kCombineCluster, false, stream,
                          reinterpret_cast<const float*>(memory + config.partials_offset), partner_logits,
                          single ? out : cluster_sums, saved_lse, config.anchors, config.splits, config.combine_rows,
                          single ? scale : 1.0f, elementwise);
  if (status || single) return status;
  return launch(reduce_partials, 1, 256, 128, stream, cluster_sums, out, config.combine_clusters, scale);
}

}  // namespace

extern "C" {

int64_t dfkd_contrastive_loss_scratch(int64_t count, int64_t dim, int symmetric) {
  return require_sizes(count, dim) == 0 ? forward_config(count, dim, symmetric).bytes : 0;
}

int dfkd_contrastive_loss(const void* anchors, const void* positives, int64_t count, int64_t dim,
                          int64_t anchors_row, int64_t anchors_column, int64_t positives_row,
                          int64_t positives_column, int dtype, float temperature, int symmetric, int normalize,
                          int reduction, float* out, float* saved, void* scratch, void* stream) {
  if (const int status = require_sizes(count, dim)) return status;
  if (const int status = require_options(temperature, normalize)) return status;
  return dispatch_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const auto input = make_pair(static_cast<const T*>(anchors), static_cast<const T*>(positives), anchors_row,
                                 anchors_column, positives_row, positives_column, count, dim);
    return forward<T>(input, temperature, symmetric, reduction, out, saved, scratch, stream);
  });
}

#ifdef DFKD_HOST
int dfkd_host_contrastive_loss(int64_t num_sms, int64_t min_count, int64_t l2_bytes) {
  dfkd::contrastive::num_sms = static_cast<int>(num_sms);
  dfkd::contrastive::min_count = min_count;
  dfkd::contrastive::l2_bytes = l2_bytes;
  return 0;
}
#endif
}
