// NT-Xent over 2N vectors v, anchors then positives, without their similarity matrix: forward.
//
// With y_i = 2^k_i v_i the rows scaled by a power of two, which rounds nothing, and r_i = 1 / |y_i| (0 for a zero row):
//
//   s_ij = (y_i . y_j) r_i r_j log2(e) / tau      L_i = log2(sum over j != i of 2^s_ij)
//   loss_i = log(2) (L_i - s_{i, partner of i})
//
// The tensor cores multiply the rows in the type they came in, in which they are exact; scaling follows in float32.
// Cosines bound s, so that sums need no running maximum. L is what backward needs. What is served: launchers.h.
//
// Three launches, four for more than 8192 anchors: rows are scaled into scratch (prepare(), shared); a
// block of similarity_sums_wgmma takes units of 256 rows by a span of columns, 128 at a time; their sums are merged.
//
// With A anchors, M = 2N vectors and up to 128 dimensions: 2 A M D operations by wgmma and A M exponentials. At D = 128
// a processor takes as long for either, 512 cycles for 64 x 128 similarities: what counts is that both go on at the
// same time. So
//  - two warpgroups of 128 rows ask for a tile's products in turn, 1024 cycles each, and have 1024 of the other's for
//    their exponentials. These begin earlier, with the first of two accumulators of 64 x 128.
//  - one exponential in kEvery is a polynomial of degree 5 (relative error below 2.2e-7, about that of the
//    instruction) on the multipliers, which four instructions an element leave half idle.
//  - rows are held in registers, as left operands: shared memory, of whose rate two operands would take three quarters,
//    is read for columns alone.
// Reads and writes 2 M D elements once. Every unit reads its columns from the second-level cache, A M D / 128 bytes in
// all (8.6 GB with A = 65536, M = 2 A, D = 128: 16 bytes a cycle and processor at the tensor cores' rate); blocks walk
// the same span at about the same time. Sums over a span go to scratch, 4 bytes an anchor.
//
// Not yet run on a GPU.
#include "contrastive_loss.h"

namespace {

using namespace dfkd;
using namespace dfkd::contrastive;

constexpr int kRows = 2 * kTile;  // of a unit
template <int SLAB>
constexpr int kEvery = SLAB == 128 ? 5 : 4;

// sum + 2^x for |x| up to about kBound: 2^x = p 2^n with p = 2^f of |f| <= 1/2, as two factors. A NaN stays: p is one.
__device__ __forceinline__ float add_power_of_two(float sum, float x) {
  constexpr float kShift = 12582912.0f + 127.0f;  // to where units are the last place, and n 127 more than it is
  const float shifted = x + kShift;
  const float f = x - (shifted - kShift);
  float p = 0.0013276472454890609f;
  p = p * f + 0.009675540961325169f;
  p = p * f + 0.05550713092088699f;
  p = p * f + 0.24022120237350464f;
  p = p * f + 0.6931469440460205f;
  p = p * f + 1.0000001192092896f;
  return p * float_of(bits_of(shifted) << 23) + sum;
}

// Adds 2^s of the thread's 32 columns in each of two rows, 8 apart.
template <int SLAB>
__device__ __forceinline__ void add_plain(float (&totals)[2], const float (&s)[kTile / 8][4], const float* inverses,
                                          const float (&scale)[2]) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  float sum[2] = {};  // of the tile first: a sum of tens of thousands, one by one, loses digits
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n) {
    const Two other = *reinterpret_cast<const Two*>(inverses + 8 * n + 2 * t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i / 2;
      const float x = (s[n][i] * (i % 2 ? other.y : other.x)) * scale[r];
      if ((4 * n + i) % kEvery<SLAB> == kEvery<SLAB> / 2) {
        sum[r] = add_power_of_two(sum[r], x);
      } else {
        sum[r] += exp2_approx_ftz(x);
      }
    }
  }
  totals[0] += sum[0];
  totals[1] += sum[1];
}

// The same for a tile with the rows themselves, their partners or the end, `limit`, among its columns: all of these are
// left out. What a partner has goes to `positives`, those of `rows` rows.
__device__ __forceinline__ void add_masked(float (&totals)[2], const float (&s)[kTile / 8][4], const float* inverses,
                                           const float* row_inverses, float scale_log2, int column, int row, int partner,
                                           int limit, float* positives, int rows) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  inverses += 2 * t;
  column += 2 * t;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int own = row + 8 * r - column, beside = partner + 8 * r - column, end = limit - column;
    const float inverse = row_inverses[8 * r];
    float positive = 0.0f, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kTile / 4; ++i) {
      const int at = i / 2 * 8 + i % 2;
      // Alike from either side, so that backward finds the same to the bit.
      const float x = s[i / 2][2 * r + i % 2] * ((inverse * inverses[at]) * scale_log2);
      positive = at == beside ? x : positive;
      sum += at == own || at == beside || at >= end ? 0.0f : exp2_approx_ftz(x);
    }
    if (beside >= 0 && beside < kTile && beside % 8 < 2 && 8 * r < rows) positives[8 * r] = positive;
    totals[r] += sum;
  }
}

// A unit: 256 rows of a side by `span` tiles of columns. All rows come first for some columns, then for the next.
struct Unit {
  int chunk, side, first, begin, end;  // of tiles of columns

  __device__ __forceinline__ Unit(int number, int count, int sides, int span) {
    const int blocks = (count + kRows - 1) / kRows, all = (2 * count + kTile - 1) / kTile;
    chunk = number / (blocks * sides);
    side = number / blocks % sides;
    first = number % blocks * kRows;
    begin = chunk * span;
    end = begin + span < all ? begin + span : all;
  }
};

template <typename T, int SLAB>
__global__ void __launch_bounds__(kRoles, 1)
    similarity_sums_wgmma(const __grid_constant__ TensorMap vectors, const float* numbers, float* parts,
                           float* positives, int count, int anchors, int span, int units, float scale_log2) {
  Ring<SLAB, 1> ring;
  ring.begin();
  const int warpgroup = my_warpgroup(), sides = anchors / count;
  if (warpgroup == 0) {
    warpgroup_reg_dealloc<kFetching>();
    if (threadIdx.x == 0) {
      prefetch_tensormap(vectors);
      const float* const arrays[1] = {numbers};
      for (int number = static_cast<int>(blockIdx.x); number < units; number += static_cast<int>(gridDim.x)) {
        const Unit unit(number, count, sides, span);
        ring.fetch(vectors, unit.side * count + unit.first);
        ring.fetch(vectors, unit.side * count + unit.first + kTile);
        for (int tile = unit.begin; tile < unit.end; ++tile) ring.fetch(vectors, tile * kTile, arrays);
      }
    }
  } else {
    warpgroup_reg_alloc<kMultiplying>();
    begin_turns(warpgroup);
    uint32_t own[2][SLAB / 16][4];
    float s[2][kTile / 8][4];
    for (int number = static_cast<int>(blockIdx.x); number < units; number += static_cast<int>(gridDim.x)) {
      const Unit unit(number, count, sides, span);
      const int local = unit.first + (warpgroup - 1) * kTile;
      const int row = unit.side * count + local, partner = (1 - unit.side) * count + local;
      const int place = my_row();
      float scale[2][2], totals[2][2] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scale[i / 2][i % 2] = numbers[row + place + i / 2 * 64 + i % 2 * 8] * scale_log2;
      }
#pragma unroll
      for (int of = 1; of <= 2; ++of) {
        ring.wait_full();
        if (warpgroup == of) {
          load_rows<SLAB>(own[0], ring.offset(), place / 16 * 16);
          load_rows<SLAB>(own[1], ring.offset(), 64 + place / 16 * 16);
        }
        ring.release();
        ring.advance();
      }
      const auto add = [&](int half, int tile) {
        const int column = tile * kTile, row_here = row + 64 * half, partner_here = partner + 64 * half;
        if (column + kTile > 2 * count || meet(column, kTile, row_here, 64) ||
            meet(column, kTile, partner_here, 64)) {
          const int mine = row_here + place;
          add_masked(totals[half], s[half], ring.numbers(), numbers + mine, scale_log2, column, mine, partner_here + place,
                     2 * count, positives + mine, count - local - 64 * half - place);
        } else {
          add_plain<SLAB>(totals[half], s[half], ring.numbers(), scale[half]);
        }
      };

      for (int tile = unit.begin; tile < unit.end; ++tile) {
        ring.wait_full();
        await_turn(warpgroup);
        warpgroup_fence_operand(own[0]);
        warpgroup_fence_operand(own[1]);
        warpgroup_fence_operand(s[0]);
        warpgroup_fence_operand(s[1]);
        warpgroup_arrive();
        multiply_rows<T, SLAB>(s[0], own[0], ring.tile());
        warpgroup_commit_batch();
        multiply_rows<T, SLAB>(s[1], own[1], ring.tile());
        warpgroup_commit_batch();
        pass_turn(warpgroup);
        warpgroup_wait<1>();
        warpgroup_fence_operand(s[0]);
        add(0, tile);
        warpgroup_wait<0>();
        warpgroup_fence_operand(s[1]);
        add(1, tile);
        ring.release();
        ring.advance();
      }

#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float total = warp_sum<4>(totals[i / 2][i % 2]);
        const int here = local + place + i / 2 * 64 + i % 2 * 8;
        if (threadIdx.x % 4 == 0 && here < count) {
          parts[static_cast<int64_t>(unit.chunk) * anchors + (unit.side * count + here)] = total;
        }
      }
    }
    end_turns(warpgroup);
  }
}

// ---- what the spans found -------------------------------------------------------------------------------------------

constexpr int kMergeThreads = 512, kMergeCluster = 8;

// The spans in order, `rows` anchors a block: losses, or their sum over the rows of each cluster.
__global__ void __launch_bounds__(kMergeThreads) merge(const float* parts, const float* positives, float* out,
                                                       float* saved, int anchors, int chunks, int rows, float scale,
                                                       int elementwise) {
  cluster_arrive();  // a block has shared memory only from when it runs
  float* sums = reinterpret_cast<float*>(shared_memory() + 128);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows;
  float sum = 0.0f;
  for (int64_t anchor = first + threadIdx.x; anchor < first + rows && anchor < anchors; anchor += kMergeThreads) {
    float total = 0.0f;
#pragma unroll 8
    for (int chunk = 0; chunk < chunks; ++chunk) total += parts[static_cast<int64_t>(chunk) * anchors + anchor];
    // The partner apart from all others: where it is nearly all there is, the loss is what they are beside it.
    const float positive = positives[anchor], loss = log1pf(total * exp2_approx_ftz(-positive));
    saved[anchor] = positive + loss * static_cast<float>(kLog2OfE);
    if (elementwise) out[anchor] = loss;
    sum += loss;
  }
  sum = block_sum(sum);
  cluster_wait();
  if (threadIdx.x == 0) *map_shared_rank(sums + cluster_rank(), 0) = sum;
  cluster_sync();
  if (elementwise || threadIdx.x != 0 || cluster_rank() != 0) return;
  sum = 0.0f;
  for (int rank = 0; rank < cluster_size(); ++rank) sum += sums[rank];
  out[static_cast<int>(blockIdx.x) / cluster_size()] = sum * scale;
}

// The sum of few numbers, in one block.
__global__ void __launch_bounds__(256) total(const float* sums, float* out, int count, float scale) {
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 256) sum += sums[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = sum * scale;
}

// ---- launches -------------------------------------------------------------------------------------------------------

struct Merging {
  int64_t rows, clusters;  // of a block; of blocks
};
// One cluster, as long as its blocks need few rounds.
Merging plan_merging(int64_t anchors) {
  const bool few = anchors <= kMergeCluster * 2 * kMergeThreads;
  const int64_t rows = few ? divide_up(anchors, kMergeCluster) : kMergeThreads / 2;
  return {rows, divide_up(anchors, rows * kMergeCluster)};
}

Plan plan_forward(int64_t count, int64_t dim, int symmetric) {
  Plan plan = plan_rows(count, dim, symmetric);
  plan.rows = kRows;
  plan.blocks = divide_up(count, kRows) * (symmetric ? 2 : 1);
  const int64_t tiles = divide_up(2 * count, kTile);
  int64_t best_time = 0;
  for (int64_t chunks = 1; chunks <= 64 && chunks <= tiles; ++chunks) {
    const int64_t span = divide_up(tiles, chunks);
    // A unit's beginning and end cost about a tile's time.
    const int64_t time = divide_up(plan.blocks * divide_up(tiles, span), num_sms) * (span + 1);
    if (chunks == 1 || time < best_time) plan.span = span, best_time = time;
  }
  plan.chunks = divide_up(tiles, plan.span);
  plan.parts = plan.numbers + plan.padded * 4;
  plan.extra = plan.parts + round_up(plan.chunks * plan.anchors * 4, 16);
  plan.bytes = plan.extra + round_up((plan.anchors + plan_merging(plan.anchors).clusters) * 4, 16);
  return plan;
}

template <typename T, int SLAB>
int launch_sums(const Plan& plan, int64_t count, float scale_log2, void* scratch, void* stream) {
  unsigned char* memory = static_cast<unsigned char*>(scratch);
  TensorMap map;
  const int status = map_vectors(&map, plan, memory);
  if (status) return status;
  const int64_t units = plan.blocks * plan.chunks;
  const dim3 grid(static_cast<unsigned>(units < num_sms ? units : num_sms));
  return launch(similarity_sums_wgmma<T, SLAB>, grid, kRoles, Ring<SLAB, 1>::kBytes, stream, map,
                reinterpret_cast<const float*>(memory + plan.numbers), reinterpret_cast<float*>(memory + plan.parts),
                reinterpret_cast<float*>(memory + plan.extra), count, plan.anchors, plan.span, units, scale_log2);
}

template <typename T>
int forward(const Sides<const T>& from, int64_t count, int64_t dim, double temperature, int symmetric, int reduction,
            float* out, float* saved, void* scratch, void* stream) {
  const bool elementwise = reduction == DFKD_NONE;
  const Plan plan = plan_forward(count, dim, symmetric);
  const float scale = reduction == DFKD_MEAN ? static_cast<float>(1.0 / static_cast<double>(plan.anchors)) : 1.0f;
  unsigned char* memory = static_cast<unsigned char*>(scratch);
  int status = launch_prepare<T>(plan, from, scratch, nullptr, nullptr, 0, nullptr, false, stream);
  if (status) return status;
  const auto sums = plan.slab == 64 ? launch_sums<T, 64> : launch_sums<T, 128>;
  status = sums(plan, count, static_cast<float>(kLog2OfE / temperature), scratch, stream);
  if (status) return status;
  const Merging merging = plan_merging(plan.anchors);
  const bool direct = elementwise || merging.clusters == 1;
  const float* positives = reinterpret_cast<const float*>(memory + plan.extra);
  float* partial = reinterpret_cast<float*>(memory + plan.extra) + plan.anchors;
  status = launch_cluster(merge, static_cast<unsigned>(merging.clusters * kMergeCluster), kMergeThreads,
                          128 + kMergeCluster * 4, kMergeCluster, false, stream,
                          reinterpret_cast<const float*>(memory + plan.parts), positives, direct ? out : partial,
                          saved, plan.anchors, plan.chunks, merging.rows, direct ? scale : 1.0f, elementwise);
  if (status || direct) return status;
  return launch(total, 1, 256, 128, stream, partial, out, merging.clusters, scale);
}

}  // namespace

extern "C" {

int64_t dfkd_contrastive_loss_scratch(int64_t count, int64_t dim, int symmetric) {
  return require_sizes(count, dim) == 0 ? plan_forward(count, dim, symmetric).bytes : 0;
}

int dfkd_contrastive_loss(const void* anchors, const void* positives, int64_t count, int64_t dim,
                          int64_t anchors_row, int64_t anchors_column, int64_t positives_row,
                          int64_t positives_column, int dtype, float temperature, int symmetric, int normalize,
                          int reduction, float* out, float* saved, void* scratch, void* stream) {
  if (const int status = require_sizes(count, dim)) return status;
  if (const int status = require_options(temperature, normalize)) return status;
  return dispatch_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const auto from = sides(static_cast<const T*>(anchors), static_cast<const T*>(positives), anchors_row,
                            anchors_column, positives_row, positives_column, count, dim);
    return forward<T>(from, count, dim, temperature, symmetric, reduction, out, saved, scratch, stream);
  });
}

#ifdef DFKD_HOST
int dfkd_host_contrastive_loss(int64_t num_sms, int64_t smallest, int64_t cached_bytes) {
  dfkd::contrastive::num_sms = static_cast<int>(num_sms);
  dfkd::contrastive::smallest = smallest;
  dfkd::contrastive::cached_bytes = cached_bytes;
  return 0;
}
#endif
}
