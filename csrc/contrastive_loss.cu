// NT-Xent over 2N vectors v, anchors then positives, without their similarity matrix: forward.
//
// With y_i = 2^k_i v_i the rows scaled by a power of two, which rounds nothing, and r_i = 1 / |y_i| (0 for a zero row):
//
//   s_ij = (y_i . y_j) r_i r_j log2(e) / tau      L_i = log2(sum over j != i of 2^s_ij)
//   loss_i = log(2) (L_i - s_{i, partner of i})
//
// The tensor cores multiply the rows in the type they came in, in which they are exact; scaling follows in float32.
// Without normalisation k = 0 and r = 1. L is what backward needs.
//
// Any number of vectors: rows are scaled once into scratch; a block then holds 256 anchors' rows in registers (of wide
// rows 128 anchors, through shared memory, 128 dimensions a step) and streams tiles of 64 vectors past them by
// asynchronous copies. Every thread keeps sums of its own columns, and nothing is exchanged before the end. Cosines
// bound s, and then (BOUNDED) no running maximum is needed, but in a tile with the anchor itself, its partner or the
// end of the vectors in it. Few row blocks have their columns split over blocks; partial sums are merged in order.
// With A anchors and M = 2N: 2 A M D operations and A M exponentials; reads and writes 2 M D elements once, and every
// block of anchors reads M D from the second-level cache. Limited by the matrix instructions (mma.sync does not reach
// the full rate of sm_90), next by the exponentials and by shared memory's reads.
//
// Up to 256 vectors that fit into shared memory: one block and one launch do all. Limited by latencies.
//
// Not yet run on a card.
#include "contrastive_loss.h"

namespace {

using namespace dfkd;
using namespace dfkd::contrastive;

// ---- any number of vectors ------------------------------------------------------------------------------------------

template <bool WIDE>
constexpr int kWarps = WIDE ? 4 : 8;  // of 32 anchors
template <bool WIDE>
constexpr int kStages = WIDE ? 2 : 4;

template <typename T, int SLAB, bool WIDE>
constexpr int stage_bytes() {
  return ((WIDE ? 32 * kWarps<WIDE> : 0) + kColumns) * pitch(SLAB) * static_cast<int>(sizeof(T)) + kColumns * 4;
}

// What a thread knows of its four rows.
struct Sums {
  float top[4], total[4], positive[4];
};

// The thread's 16 columns a row of a tile. `column` is its first vector.
template <bool BOUNDED>
__device__ __forceinline__ void add_plain(Sums& sums, const float (&s)[2][8][4], const float* inverses,
                                          const float (&inverse)[4], float bend) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  if constexpr (BOUNDED) {
    float sum[4] = {};  // of the tile first: a sum of tens of thousands, one by one, loses digits
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const Two other = *reinterpret_cast<const Two*>(inverses + 8 * n + 2 * t);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int r = i / 2;
        const float x = s[r / 2][n][i % 4] * (i % 2 ? other.y : other.x);
        sum[r] += exp2_flushed(x * (inverse[r] * bend) - sums.top[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) sums.total[r] += sum[r];
  } else {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float scaled[16];
      float higher = sums.top[r];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const Two other = *reinterpret_cast<const Two*>(inverses + 8 * n + 2 * t);
        // Alike from either side, so that backward finds the same to the bit: L has no digits to spare if large.
        scaled[2 * n] = s[r / 2][n][r % 2 * 2] * ((inverse[r] * other.x) * bend);
        scaled[2 * n + 1] = s[r / 2][n][r % 2 * 2 + 1] * ((inverse[r] * other.y) * bend);
        higher = larger(higher, larger(scaled[2 * n], scaled[2 * n + 1]));
      }
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < 16; ++n) sum += exp2_flushed(scaled[n] - higher);
      sums.total[r] = sums.total[r] * exp2_flushed(sums.top[r] - higher) + sum;
      sums.top[r] = higher;
    }
  }
}

// The same for a tile with the rows themselves, their partners or the end, `limit`, among its columns.
__device__ __forceinline__ void add_masked(Sums& sums, const float (&s)[2][8][4], const float* inverses,
                                           const float (&inverse)[4], float bend, int column, int row, int partner,
                                           int limit) {
  const int g = static_cast<int>(threadIdx.x) % kLanes / 4, t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    float scaled[16];
    float higher = sums.top[r];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int at = i / 2 * 8 + 2 * t + i % 2, j = column + at;
      float x = s[r / 2][i / 2][r % 2 * 2 + i % 2] * ((inverse[r] * inverses[at]) * bend);
      if (j == row + 8 * r + g || j >= limit) x = -infinity();
      if (j == partner + 8 * r + g) sums.positive[r] += x;
      higher = larger(higher, x);
      scaled[i] = x;
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) sum += exp2_flushed(scaled[i] - higher);
    sums.total[r] = sums.total[r] * exp2_flushed(sums.top[r] - higher) + sum;
    sums.top[r] = higher;
  }
}

// Block (x, y): rows 32 kWarps x.. of one side, tiles of columns from span y on.
template <typename T, int SLAB, bool WIDE, bool BOUNDED>
__global__ void __launch_bounds__(kLanes* kWarps<WIDE>, WIDE ? 2 : 1)
    similarity_sums(const T* vectors, const float* numbers, float* parts, int count, int anchors, int width, int span,
                    float bend) {
  constexpr int kThreads = kLanes * kWarps<WIDE>, kRows = 32 * kWarps<WIDE>;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const int blocks = (count + kRows - 1) / kRows;
  const int side = static_cast<int>(blockIdx.x) / blocks, first = static_cast<int>(blockIdx.x) % blocks * kRows;
  const int local = first + 32 * warp;
  const int row = side * count + local, partner = (1 - side) * count + local;
  const int all = (2 * count + kColumns - 1) / kColumns;
  const int begin = static_cast<int>(blockIdx.y) * span, end = begin + span < all ? begin + span : all;
  const int slabs = WIDE ? width / SLAB : 1, steps = (end - begin) * slabs;

  const auto stage = [&](int step) {
    return reinterpret_cast<T*>(shared_memory() + step % kStages<WIDE> * stage_bytes<T, SLAB, WIDE>());
  };
  const auto fetch = [&](int step) {
    if (step < steps) {
      const int column = (begin + step / slabs) * kColumns, slab = step % slabs;
      T* to = stage(step);
      copy_tile<kColumns, SLAB, kThreads>(to, vectors + (static_cast<int64_t>(column) * width + slab * SLAB), width);
      if constexpr (WIDE) {
        const T* rows = vectors + (static_cast<int64_t>(side * count + first) * width + slab * SLAB);
        copy_tile<kRows, SLAB, kThreads>(to + kColumns * pitch(SLAB), rows, width);
      }
      if (slab == slabs - 1) {
        const float* const arrays[1] = {numbers};
        copy_numbers<1>(reinterpret_cast<float*>(to + ((WIDE ? kRows : 0) + kColumns) * pitch(SLAB)), arrays, column);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int step = 0; step < kStages<WIDE> - 1; ++step) fetch(step);

  uint32_t own[WIDE ? 1 : SLAB / 16][2][4];
  if constexpr (!WIDE) {
    const T* from = vectors + static_cast<int64_t>(row + lane / 4) * SLAB + 2 * (lane % 4);
#pragma unroll
    for (int k = 0; k < SLAB / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        own[k][i / 4][i % 4] =
            *reinterpret_cast<const uint32_t*>(from + (i / 4 * 16 + i % 2 * 8) * SLAB + 16 * k + i % 4 / 2 * 8);
      }
    }
  }
  float inverse[4];
  Sums sums;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    inverse[r] = numbers[row + 8 * r + lane / 4];
    sums.top[r] = BOUNDED ? -bend : kLowest;
    sums.total[r] = 0.0f;
    sums.positive[r] = 0.0f;
  }

  float s[2][8][4];
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages<WIDE> - 2>();
    __syncthreads();  // this step's copies are there, and all are done with the stage that the next ones fill
    fetch(step + kStages<WIDE> - 1);
    T* b = stage(step);
    const int slab = step % slabs, column = (begin + step / slabs) * kColumns;
    if (slab == 0) clear(s);
#pragma unroll
    for (int k = 0; k < SLAB / 16; ++k) {
      if constexpr (WIDE) {
        uint32_t left[2][4];
        load_left(left[0], b + kColumns * pitch(SLAB), 32 * warp, k, SLAB);
        load_left(left[1], b + kColumns * pitch(SLAB), 32 * warp + 16, k, SLAB);
        multiply<T>(s, left, b, 0, k, SLAB);
      } else {
        multiply<T>(s, own[k], b, 0, k, SLAB);
      }
    }
    if (slab != slabs - 1) continue;
    const float* inverses = reinterpret_cast<const float*>(b + ((WIDE ? kRows : 0) + kColumns) * pitch(SLAB));
    if (column + kColumns > 2 * count || meet(column, kColumns, row, 32) || meet(column, kColumns, partner, 32)) {
      add_masked(sums, s, inverses, inverse, bend, column, row, partner, 2 * count);
    } else {
      add_plain<BOUNDED>(sums, s, inverses, inverse, bend);
    }
  }
  wait_copies<0>();

#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const float top = warp_max<4>(sums.top[r]);
    const float total = warp_sum<4>(sums.total[r] * exp2_flushed(sums.top[r] - top));
    const float positive = warp_sum<4>(sums.positive[r]);
    const int here = local + 8 * r + lane / 4;
    if (lane % 4 == 0 && here < count) {
      float* to = parts + static_cast<int64_t>(blockIdx.y) * 3 * anchors + (side * count + here);
      to[0] = top;
      to[anchors] = total;
      to[2 * static_cast<int64_t>(anchors)] = positive;
    }
  }
}

constexpr int kMergeThreads = 1024, kMergeRows = 4096;  // at most, of a block

// The loss of an anchor, and L. The difference first: where the partner is all there is to the sum, exactly nothing is
// left of it.
__device__ __forceinline__ float finish(float top, float total, float positive, float* saved) {
  const float above = logarithm(total);
  *saved = top + above;
  return ((top - positive) + above) * kLog2;
}

// What the chunks of columns found, in order; then losses, or their sum over each block's rows.
__global__ void __launch_bounds__(kMergeThreads) merge(const float* parts, float* out, float* saved, int anchors,
                                                       int chunks, float scale, int elementwise) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kMergeRows;
  float sum = 0.0f;
  for (int64_t anchor = first + threadIdx.x; anchor < first + kMergeRows && anchor < anchors; anchor += blockDim.x) {
    float top = kLowest, total = 0.0f, positive = 0.0f;
    const float* from = parts + anchor;
    for (int chunk = 0; chunk < chunks; ++chunk, from += 3 * static_cast<int64_t>(anchors)) {
      const float higher = larger(top, from[0]);
      total = total * exp2_flushed(top - higher) + from[anchors] * exp2_flushed(from[0] - higher);
      positive += from[2 * static_cast<int64_t>(anchors)];
      top = higher;
    }
    const float loss = finish(top, total, positive, saved + anchor);
    if (elementwise) out[anchor] = loss;
    sum += loss;
  }
  sum = block_sum(sum);
  if (!elementwise && threadIdx.x == 0) out[blockIdx.x] = sum * scale;
}

// The sum of few numbers, in one block.
__global__ void __launch_bounds__(256) total(const float* sums, float* out, int count, float scale) {
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 256) sum += sums[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = sum * scale;
}

__global__ void fill(float* out, float value) { *out = value; }

// ---- few vectors, one launch ----------------------------------------------------------------------------------------

constexpr int kSmallThreads = 512, kSmallColumns = 32;

// Shared memory: y; r; of each group of columns (top, total, positive) of each anchor; the block's sums.
int64_t small_shared(int64_t rows, int64_t width) {
  return rows * pitch(static_cast<int>(width)) * 2 + rows * 4 + rows / kSmallColumns * rows * 12 + 128;
}

template <typename T>
__global__ void __launch_bounds__(kSmallThreads)
    small_forward(Sides<const T> from, float* out, float* saved, int anchors, int rows, int width, float bend,
                  float scale, int normalize, int elementwise) {
  T* y = reinterpret_cast<T*>(shared_memory() + 128);
  float* inverses = reinterpret_cast<float*>(y + rows * pitch(width));
  float* found = inverses + rows;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const int g = lane / 4, t = lane % 4, count = from.count;
  fetch_all(y, from, rows, width);
  wait_copies<0>();
  __syncthreads();
  scale_all(y, inverses, nullptr, rows, width, normalize);
  __syncthreads();

  const int groups = rows / kSmallColumns;
  for (int unit = warp; unit < (anchors + 15) / 16 * groups; unit += kSmallThreads / kLanes) {
    const int row = unit / groups * 16, column = unit % groups * kSmallColumns;
    float s[1][4][4];
    clear(s);
    for (int k = 0; k < width / 16; ++k) {
      uint32_t left[1][4];
      load_left(left[0], y, row, k, width);
      multiply<T>(s, left, y, column, k, width);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = row + 8 * half + g, partner = i < count ? i + count : i - count;
      float top = kLowest, total = 0.0f, positive = 0.0f;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int j = column + e / 2 * 8 + 2 * t + e % 2;
        float& x = s[0][e / 2][half * 2 + e % 2];
        x *= (inverses[i] * inverses[j]) * bend;
        if (j == i || j >= 2 * count) x = -infinity();
        if (j == partner) positive += x;
        top = larger(top, x);
      }
      top = warp_max<4>(top);
#pragma unroll
      for (int e = 0; e < 8; ++e) total += exp2_flushed(s[0][e / 2][half * 2 + e % 2] - top);
      total = warp_sum<4>(total);
      positive = warp_sum<4>(positive);
      if (t == 0) {
        float* to = found + (unit % groups * rows + i) * 3;
        to[0] = top;
        to[1] = total;
        to[2] = positive;
      }
    }
  }
  __syncthreads();

  float loss = 0.0f;
  if (thread < anchors) {
    float top = kLowest, total = 0.0f, positive = 0.0f;
    for (int group = 0; group < groups; ++group) top = larger(top, found[(group * rows + thread) * 3]);
    for (int group = 0; group < groups; ++group) {
      const float* here = found + (group * rows + thread) * 3;
      total += here[1] * exp2_flushed(here[0] - top);
      positive += here[2];
    }
    loss = finish(top, total, positive, saved + thread);
    if (elementwise) out[thread] = loss;
  }
  loss = block_sum(loss);
  if (!elementwise && thread == 0) *out = loss * scale;
}

// ---- launches -------------------------------------------------------------------------------------------------------

bool is_small(int64_t count, int64_t dim) {
  return 2 * count <= 256 && dim <= 512 &&
         small_shared(round_up(2 * count, kSmallColumns), round_up(dim ? dim : 1, 64)) <= most_shared;
}

Plan plan_forward(int64_t count, int64_t dim, int symmetric) {
  Plan plan = plan_rows(count, dim, symmetric);
  plan.rows = 32 * (plan.wide ? kWarps<true> : kWarps<false>);
  plan.blocks = divide_up(count, plan.rows);
  const int64_t tiles[2] = {divide_up(2 * count, kColumns), divide_up(2 * count, kColumns)};
  plan.span = tiles_a_block(plan.blocks, symmetric ? 2 : 1, tiles, processors * (plan.wide ? 2 : 1));
  plan.chunks = divide_up(tiles[0], plan.span);
  plan.parts = plan.numbers + plan.padded * 4;
  plan.extra = plan.parts + round_up(plan.chunks * 3 * plan.anchors * 4, 16);
  plan.bytes = plan.extra + round_up(divide_up(plan.anchors, kMergeRows) * 4, 16);
  return plan;
}

template <typename T, int SLAB, bool WIDE, bool BOUNDED>
int launch_sums(const Plan& plan, int sides, int64_t count, float bend, void* scratch, void* stream) {
  unsigned char* memory = static_cast<unsigned char*>(scratch);
  const dim3 grid(static_cast<unsigned>(plan.blocks * sides), static_cast<unsigned>(plan.chunks));
  return launch(similarity_sums<T, SLAB, WIDE, BOUNDED>, grid, kLanes * kWarps<WIDE>,
                kStages<WIDE> * stage_bytes<T, SLAB, WIDE>(), stream, reinterpret_cast<const T*>(memory),
                reinterpret_cast<const float*>(memory + plan.numbers), reinterpret_cast<float*>(memory + plan.parts),
                count, plan.anchors, plan.width, plan.span, bend);
}

template <typename T>
int forward(const Sides<const T>& from, int64_t count, int64_t dim, double temperature, int symmetric, int normalize,
            int reduction, float* out, float* saved, void* scratch, void* stream) {
  const int64_t anchors = symmetric ? 2 * count : count;
  const bool elementwise = reduction == DFKD_NONE;
  const float scale = reduction == DFKD_MEAN ? static_cast<float>(1.0 / static_cast<double>(anchors)) : 1.0f;
  const double exact_bend = kLog2OfE / temperature;
  const float bend = static_cast<float>(exact_bend);
  if (is_small(count, dim)) {
    const int64_t rows = round_up(2 * count, kSmallColumns), width = round_up(dim ? dim : 1, 64);
    return launch(small_forward<T>, 1, kSmallThreads, static_cast<size_t>(small_shared(rows, width)), stream, from, out,
                  saved, anchors, rows, width, bend, scale, normalize, elementwise);
  }
  const Plan plan = plan_forward(count, dim, symmetric);
  unsigned char* memory = static_cast<unsigned char*>(scratch);
  int status = launch_prepare<T>(plan, from, scratch, nullptr, nullptr, 0, nullptr, normalize, false, stream);
  if (status) return status;
  const bool bounded = normalize && exact_bend <= kBound;
  const auto sums = [&](auto kernel_bounded) {
    constexpr bool kBounded = decltype(kernel_bounded)::value;
    auto* with = launch_sums<T, 128, false, kBounded>;
    if (plan.slab == 64) with = launch_sums<T, 64, false, kBounded>;
    if (plan.wide) with = launch_sums<T, 128, true, kBounded>;
    return with(plan, symmetric ? 2 : 1, count, bend, scratch, stream);
  };
  status = bounded ? sums(Constant<true>{}) : sums(Constant<false>{});
  if (status) return status;
  const int64_t merging = divide_up(anchors, kMergeRows);
  const bool direct = elementwise || merging == 1;
  float* partial = reinterpret_cast<float*>(memory + plan.extra);
  const int64_t threads = anchors < kMergeThreads ? round_up(anchors, kLanes) : kMergeThreads;
  status = launch(merge, static_cast<unsigned>(merging), static_cast<unsigned>(threads), 128, stream,
                  reinterpret_cast<const float*>(memory + plan.parts), direct ? out : partial, saved, anchors,
                  plan.chunks, direct ? scale : 1.0f, elementwise);
  if (status || direct) return status;
  return launch(total, 1, 256, 128, stream, partial, out, merging, scale);
}

}  // namespace

extern "C" {

int64_t dfkd_contrastive_loss_scratch(int64_t count, int64_t dim, int symmetric) {
  if (count <= 0 || !sizes_fit(count, dim) || is_small(count, dim)) return 0;
  return plan_forward(count, dim, symmetric).bytes;
}

int dfkd_contrastive_loss(const void* anchors, const void* positives, int64_t count, int64_t dim, int64_t anchors_row,
                          int64_t anchors_column, int64_t positives_row, int64_t positives_column, int dtype,
                          float temperature, int symmetric, int normalize, int reduction, float* out, float* saved,
                          void* scratch, void* stream) {
  if (!sizes_fit(count, dim) || !(temperature > 0) || dtype == DFKD_FLOAT32) return DFKD_INVALID;
  if (count == 0 && reduction == DFKD_NONE) return 0;
  // As torch's mean of nothing.
  if (count == 0) return launch(fill, 1, 1, 0, stream, out, reduction == DFKD_MEAN ? NAN : 0.0f);
  return with_type(dtype, [&](auto type) -> int {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      const auto from = sides(static_cast<const T*>(anchors), static_cast<const T*>(positives), anchors_row,
                              anchors_column, positives_row, positives_column, count, dim);
      return forward<T>(from, count, dim, temperature, symmetric, normalize, reduction, out, saved, scratch, stream);
    } else {
      return DFKD_INVALID;
    }
  });
}

#ifdef DFKD_HOST
int dfkd_host_contrastive_loss(int64_t processors, int64_t most_shared) {
  dfkd::contrastive::processors = static_cast<int>(processors);
  dfkd::contrastive::most_shared = most_shared;
  return 0;
}
#endif
}
