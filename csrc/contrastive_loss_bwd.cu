// NT-Xent over 2N vectors without their similarity matrix: gradients of both sides. Notation: contrastive_loss.cu.
//
// For every row a, with g the upstream gradient of an anchor (0 for what is none):
//
//   w_ab = g_a 2^(s_ab - L_a) + g_b 2^(s_ab - L_b) - [b is the partner of a] (g_a + g_b)        w_aa = 0
//   G_a = sum over b of w_ab y_b r_b / tau        d v_a = 2^k_a r_a (G_a - (G_a . u_a) u_a)     u_a = r_a y_a
//
// w is rounded to the type of y for the second product, but for the partner's, whose difference of nearly equal numbers
// is kept in float32. Cosines bound s, and then (BOUNDED) one exponential serves: 2^s_ab (g_a 2^-L_a + g_b 2^-L_b).
// Where the positives are no anchors their rows meet the anchors alone.
//
// Any number of vectors: a block holds 128 rows in shared memory, streams tiles of 64 vectors past them and multiplies
// each twice: for similarities, which become weights where the matrix instruction left them, and by those. Of rows
// wider than 128, every step brings 128 dimensions of both, and each 128 columns of the result are another block's.
// Weighted sums go to scratch in float32; a second kernel adds up those of a row's blocks in order and goes back
// through the normalisation. With M = 2N and up to 128 dimensions: 3 M^2 D operations and 0.75 M^2 exponentials, with
// all vectors as anchors 4 and 1; every block reads M D elements from the second-level cache. Limited by the matrix
// instructions (mma.sync does not reach the full rate of sm_90), next by shared memory's reads and the exponentials.
//
// Up to 256 vectors that fit into shared memory: one launch, 16 rows a block, each scaling all vectors for itself.
// Limited by latencies.
//
// Not yet run on a card.
#include "contrastive_loss.h"

namespace {

using namespace dfkd;
using namespace dfkd::contrastive;

// ---- any number of vectors ------------------------------------------------------------------------------------------

constexpr int kRows = 128;
template <bool WIDE>
constexpr int kStages = WIDE ? 2 : 3;
// Of wide rows the cache's rate is the limit, and eight warps of 16 rows each; otherwise warps of 32 rows read shared
// memory less often. Then there are registers for the similarities of 32 columns beside 128 dimensions of the result.
template <bool WIDE>
constexpr int kTiles = WIDE ? 1 : 2;  // of 16 rows, of a warp
template <bool WIDE>
constexpr int kThreads = kRows / (16 * kTiles<WIDE>)*kLanes;
template <int SLAB, bool WIDE>
constexpr int kAtOnce = SLAB == 128 && !WIDE ? 32 : kColumns;

template <typename T, int SLAB, bool WIDE>
constexpr int stage_bytes() {
  return ((WIDE ? kRows : 0) + kColumns) * pitch(SLAB) * static_cast<int>(sizeof(T)) + 3 * kColumns * 4;
}
template <typename T, int SLAB, bool WIDE>
constexpr int shared_bytes() {
  return 3 * kRows * 4 + (WIDE ? 0 : kRows * pitch(SLAB) * static_cast<int>(sizeof(T))) +
         kStages<WIDE> * stage_bytes<T, SLAB, WIDE>();
}

// The partners' weights of a warp's 16 M rows, which both sides share. By the same instructions over the same
// dimensions as in the forward kernel, so that similarities are equal to the bit: L has no digits to spare where they
// are large.
template <int M, typename T>
__device__ __forceinline__ void weigh_partners(const T* vectors, const float* numbers, float* pairs, int width,
                                               int padded, int row, int partner, int inside, float bend) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes, g = lane / 4, t = lane % 4;
  const T* a = vectors + static_cast<int64_t>(row + g) * width + 2 * t;
  const T* b = vectors + static_cast<int64_t>(partner + g) * width + 2 * t;
  float s[2 * M][4] = {};  // rows 16 (n / 2) to + 15 by partners 8 n to + 7
  for (int k = 0; k < width; k += 16, a += 16, b += 16) {
#pragma unroll
    for (int n = 0; n < 2 * M; ++n) {
      const auto pair_at = [width](const T* base, int further, int column) {
        return *reinterpret_cast<const uint32_t*>(base + (static_cast<int64_t>(further) * width + column));
      };
      const int m = n / 2 * 16;
      const uint32_t left[4] = {pair_at(a, m, 0), pair_at(a, m + 8, 0), pair_at(a, m, 8), pair_at(a, m + 8, 8)};
      const uint32_t right[2] = {pair_at(b, 8 * n, 0), pair_at(b, 8 * n, 8)};
      mma_16x8x16<T>(s[n], left, right);
    }
  }
  if (t != g / 2) return;  // the diagonal is with the others
  const float* gains = numbers + static_cast<int64_t>(kGain) * padded;
  const float* levels = numbers + static_cast<int64_t>(kLevel) * padded;
#pragma unroll
  for (int n = 0; n < 2 * M; ++n) {
    const int at = 8 * n + g, i = row + at, j = partner + at;
    if (at >= inside) continue;
    const float x = g % 2 ? s[n][n % 2 * 2 + 1] : s[n][n % 2 * 2];
    const float scaled = rounded_product(x, (numbers[i] * numbers[j]) * bend);  // as in forward
    pairs[at] = (exp2_flushed(scaled - levels[i]) - 1.0f) * gains[i] +
                (exp2_flushed(scaled - levels[j]) - 1.0f) * gains[j];
  }
}

// 16 columns of similarities, from 16 k on, become weights. `columns`: r and g 2^-L r of the tile's vectors where
// bounded, otherwise r, g and L; `rows`: r, g and L of the block's, where bounded g 2^-L for g.
template <bool BOUNDED, int M, int N>
__device__ __forceinline__ void weigh(float (&s)[M][N][4], int k, const float* rows, const float* columns, float bend) {
  float inverse[2 * M], share[2 * M], level[2 * M];
#pragma unroll
  for (int r = 0; r < 2 * M; ++r) {
    inverse[r] = rows[8 * r];
    share[r] = rows[kRows + 8 * r];
    if constexpr (!BOUNDED) level[r] = rows[2 * kRows + 8 * r];
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Two inverses = *reinterpret_cast<const Two*>(columns + 8 * half);
    const Two second = *reinterpret_cast<const Two*>(columns + kColumns + 8 * half);
    Two levels{};
    if constexpr (!BOUNDED) levels = *reinterpret_cast<const Two*>(columns + 2 * kColumns + 8 * half);
#pragma unroll
    for (int i = 0; i < 4 * M; ++i) {
      const int r = i / 2;
      const float inverse_b = i % 2 ? inverses.y : inverses.x, share_b = i % 2 ? second.y : second.x;
      float& x = s[r / 2][2 * k + half][i % 4];
      if constexpr (BOUNDED) {
        x = exp2_flushed((x * inverse_b) * (inverse[r] * bend)) * (share[r] * inverse_b + share_b);
      } else {
        const float scaled = x * ((inverse[r] * inverse_b) * bend);
        const float level_b = i % 2 ? levels.y : levels.x;
        const float w = exp2_flushed(scaled - level[r]) * share[r] + exp2_flushed(scaled - level_b) * share_b;
        x = w * (inverse_b * kLift);
      }
    }
  }
}

// No weights for the rows themselves, their partners and what is past the end; all from those of the thread's first
// element.
template <int M, int N>
__device__ __forceinline__ void mask(float (&s)[M][N][4], int k, int column, int row, int partner, int limit) {
#pragma unroll
  for (int e = 0; e < 8 * M; ++e) {
    const int r = e / 4, half = e % 4 / 2, j = column + 8 * half + e % 2;
    float& x = s[r / 2][2 * k + half][r % 2 * 2 + e % 2];
    x = j == row + 8 * r || j == partner + 8 * r || j >= limit ? 0.0f : x;
  }
}

// Block (x, y, z): rows 128 x.. of the sides that are wanted, tiles of columns from span y on, slab z of the result.
template <typename T, int SLAB, bool WIDE, bool BOUNDED>
__global__ void __launch_bounds__(kThreads<WIDE>, WIDE ? 1 : 2)
    weighted_sums(const T* vectors, const float* numbers, float* parts, float* pairs, int count, int width, int padded,
                  int span, int first_side, int rows, int symmetric, float bend) {
  constexpr int M = kTiles<WIDE>, kAtOnceHere = kAtOnce<SLAB, WIDE>;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, g = lane / 4, t = lane % 4;
  const int blocks = (count + kRows - 1) / kRows;
  const int side = first_side + static_cast<int>(blockIdx.x) / blocks;
  const int first = static_cast<int>(blockIdx.x) % blocks * kRows, mine = thread / kLanes * 16 * M;
  const int local = first + mine;
  const int row = side * count + local, partner = (1 - side) * count + local;
  const int limit = symmetric || side == 0 ? 2 * count : count;
  const int all = (limit + kColumns - 1) / kColumns;
  const int begin = static_cast<int>(blockIdx.y) * span, end = begin + span < all ? begin + span : all;
  if (begin >= end) return;
  const int slabs = WIDE ? width / SLAB : 1;
  const int result = WIDE ? static_cast<int>(blockIdx.z) * SLAB : 0;

  if (side == first_side && blockIdx.y == 0 && blockIdx.z == 0) {
    weigh_partners<M>(vectors, numbers, pairs + local, width, padded, row, partner, count - local, bend);
  }

  // The block's rows' numbers; the rows, of which a slab comes with each step where they are wide; stages.
  float* beside_rows = reinterpret_cast<float*>(shared_memory());
  if (thread < kRows) {
    const float* from = numbers + side * count + first + thread;
    beside_rows[thread] = from[0];
    beside_rows[kRows + thread] = from[static_cast<int64_t>(BOUNDED ? kShare : kGain) * padded];
    beside_rows[2 * kRows + thread] = from[static_cast<int64_t>(kLevel) * padded];
  }
  T* own = reinterpret_cast<T*>(beside_rows + 3 * kRows);
  const auto stage = [&](int slot) {
    return reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(own + (WIDE ? 0 : kRows * pitch(SLAB))) +
                                slot * stage_bytes<T, SLAB, WIDE>());
  };
  // A tile is one step. Of wide rows it is one step for every slab, and one for the columns of the result.
  const auto fetch = [&](int column, int part, int slot) {
    if (column < end * kColumns) {
      T* to = stage(slot);
      const bool last = !WIDE || part == slabs;
      const int offset = WIDE ? (last ? result : part * SLAB) : 0;
      copy_tile<kColumns, SLAB, kThreads<WIDE>>(to, vectors + (static_cast<int64_t>(column) * width + offset), width);
      if (WIDE && !last) {
        const T* rows_from = vectors + (static_cast<int64_t>(side * count + first) * width + offset);
        copy_tile<kRows, SLAB, kThreads<WIDE>>(to + kColumns * pitch(SLAB), rows_from, width);
      }
      if (last) {
        float* beside = reinterpret_cast<float*>(to + ((WIDE ? kRows : 0) + kColumns) * pitch(SLAB));
        if constexpr (BOUNDED) {
          const float* const arrays[2] = {numbers, numbers + static_cast<int64_t>(kScaledShare) * padded};
          copy_numbers<2>(beside, arrays, column);
        } else {
          const float* const arrays[3] = {numbers, numbers + static_cast<int64_t>(kGain) * padded,
                                          numbers + static_cast<int64_t>(kLevel) * padded};
          copy_numbers<3>(beside, arrays, column);
        }
      }
    }
    commit_copies();
  };
  if constexpr (!WIDE) {
    copy_tile<kRows, SLAB, kThreads<WIDE>>(own, vectors + static_cast<int64_t>(side * count + first) * width, width);
  }
#pragma unroll
  for (int slot = 0; slot < kStages<WIDE> - 1; ++slot) fetch((begin + slot) * kColumns, 0, slot);

  float s[M][kAtOnceHere / 8][4], sums[M][SLAB / 8][4];
  clear(s);
  clear(sums);
  for (int column = begin * kColumns, part = 0, slot = 0; column < end * kColumns;
       slot = slot + 1 == kStages<WIDE> ? 0 : slot + 1) {
    wait_copies<kStages<WIDE> - 2>();
    __syncthreads();  // this step's copies are there, and all are done with the stage that the next ones fill
    if constexpr (WIDE) {
      fetch(part < slabs ? column : column + kColumns, part < slabs ? part + 1 : 0, slot ^ 1);
    } else {
      fetch(column + (kStages<WIDE> - 1) * kColumns, 0, slot == 0 ? kStages<WIDE> - 1 : slot - 1);
    }
    T* b = stage(slot);
    const auto products = [&](int at) {
      T* a = WIDE ? b + kColumns * pitch(SLAB) : own;
#pragma unroll
      for (int k = 0; k < SLAB / 16; ++k) {
        uint32_t left[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) load_left(left[m], a, mine + 16 * m, k, SLAB);
        multiply<T>(s, left, b, at, k, SLAB);
      }
    };
    if (WIDE && part < slabs) {
      products(0);
      ++part;
      continue;
    }
    const float* columns = reinterpret_cast<const float*>(b + ((WIDE ? kRows : 0) + kColumns) * pitch(SLAB));
    const bool masked = column + kColumns > limit || meet(column, kColumns, row, 16 * M) ||
                        meet(column, kColumns, partner, 16 * M);
#pragma unroll 1
    for (int at = 0; at < kColumns; at += kAtOnceHere) {
      if constexpr (!WIDE) products(at);
#pragma unroll
      for (int k = 0; k < kAtOnceHere / 16; ++k) {
        weigh<BOUNDED>(s, k, beside_rows + mine + g, columns + at + 16 * k + 2 * t, bend);
        if (masked) mask(s, k, column + at + 16 * k + 2 * t, row + g, partner + g, limit);
        uint32_t left[M][4];
#pragma unroll
        for (int i = 0; i < 4 * M; ++i) {
          const float(&from)[4] = s[i / 4][2 * k + i % 4 / 2];
          left[i / 4][i % 4] = pack(from_float<T>(from[i % 2 * 2]), from_float<T>(from[i % 2 * 2 + 1]));
        }
#pragma unroll
        for (int n = 0; n < SLAB / 8; n += 2) {
          uint32_t r[4];
          load_right_as_is(r, b, at + 16 * k, n, SLAB);
          const uint32_t even[2] = {r[0], r[1]}, odd[2] = {r[2], r[3]};
#pragma unroll
          for (int m = 0; m < M; ++m) {
            mma_16x8x16<T>(sums[m][n], left[m], even);
            mma_16x8x16<T>(sums[m][n + 1], left[m], odd);
          }
        }
      }
      clear(s);
    }
    column += kColumns;
    part = 0;
  }
  wait_copies<0>();

#pragma unroll
  for (int r = 0; r < 2 * M; ++r) {
    const int here = local + 8 * r + g;
    if (here >= count) continue;
    const int64_t at = static_cast<int64_t>(blockIdx.y) * rows + ((side - first_side) * count + here);
    float* to = parts + (at * width + result + 2 * t);
#pragma unroll
    for (int n = 0; n < SLAB / 8; ++n) {
      *reinterpret_cast<Two*>(to + 8 * n) = {sums[r / 2][n][r % 2 * 2], sums[r / 2][n][r % 2 * 2 + 1]};
    }
  }
}

// Adds up what the blocks of a row found, in order; one warp a row.
template <typename T>
__global__ void __launch_bounds__(256)
    finish(const T* vectors, const float* numbers, const float* unit, Sides<T> to, const float* parts,
           const float* pairs, int width, int padded, int first_side, int rows, int chunks_first, int chunks_second,
           float scale, int normalize) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int at = static_cast<int>(blockIdx.x) * 8 + static_cast<int>(threadIdx.x) / kLanes;
  if (at >= rows) return;  // a whole warp
  const int row = first_side * to.count + at, partner = row < to.count ? row + to.count : row - to.count;
  const int chunks = row < to.count ? chunks_first : chunks_second;
  const float pair = pairs[row < to.count ? row : partner], inverse = numbers[row], inverse_partner = numbers[partner];
  const int k = static_cast<int>(numbers[static_cast<int64_t>(kPower) * padded + row]);
  const float factor = *unit * scale;

  Four<float> u, total;
  const auto load = [&](int column) {
    total = {};
#pragma unroll 2
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const auto part = *reinterpret_cast<const Four<float>*>(
          parts + ((static_cast<int64_t>(chunk) * rows + at) * width + column));
#pragma unroll
      for (int e = 0; e < 4; ++e) total.x[e] += part.x[e];
    }
    const auto y = *reinterpret_cast<const Four<T>*>(vectors + (static_cast<int64_t>(row) * width + column));
    const auto v = *reinterpret_cast<const Four<T>*>(vectors + (static_cast<int64_t>(partner) * width + column));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      u.x[e] = to_float(y.x[e]) * inverse;
      total.x[e] = total.x[e] * (1.0f / kLift) + pair * (to_float(v.x[e]) * inverse_partner);
    }
  };
  float along = 0.0f;
  if (normalize) {
    for (int column = 4 * lane; column < width; column += 4 * kLanes) {
      load(column);
#pragma unroll
      for (int e = 0; e < 4; ++e) along += total.x[e] * u.x[e];
    }
  }
  along = warp_sum(along);
  for (int column = 4 * lane; column < to.dim; column += 4 * kLanes) {
    load(column);  // of up to 128 dimensions the second time from the first-level cache
    Four<T> gradient;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float x = total.x[e];
      if (normalize) x = times_power((x - along * u.x[e]) * inverse, k);
      gradient.x[e] = from_float<T>(x * factor);
    }
    T* out = to.at(row, column);
    if (to.aligned) {
      *reinterpret_cast<Four<T>*>(out) = gradient;
    } else {
      const int64_t step = row < to.count ? to.first_column : to.second_column;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (column + e < to.dim) out[e * step] = gradient.x[e];
      }
    }
  }
}

// The unit of upstream gradients, in one block.
__global__ void __launch_bounds__(1024) largest(const float* upstream, int64_t stride, float* unit, int anchors) {
  const float found = block_largest(upstream, stride, anchors);
  if (threadIdx.x == 0) *unit = found;
}

// ---- few vectors, one launch ----------------------------------------------------------------------------------------

constexpr int kSmallThreads = 256, kSmallWarps = kSmallThreads / kLanes, kSmallRows = 16, kSmallColumns = 32;

// Shared memory: the reductions' numbers; y; w; r, k, g and L of each vector; the partners' weights.
int64_t small_shared(int64_t rows, int64_t width) {
  return 128 + kSmallWarps * kSmallRows * 4 + rows * pitch(static_cast<int>(width)) * 2 +
         kSmallRows * pitch(static_cast<int>(rows)) * 2 + rows * 16 + kSmallRows * 4;
}

template <typename T>
__global__ void __launch_bounds__(kSmallThreads)
    small_backward(const float* upstream, int64_t upstream_stride, Sides<const T> from, Sides<T> to, const float* saved,
                   int anchors, int rows, int width, int begin, int end, float bend, float scale, int normalize,
                   int elementwise) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const int g = lane / 4, t = lane % 4, count = from.count;
  const int first = begin + static_cast<int>(blockIdx.x) * kSmallRows;
  float* along = reinterpret_cast<float*>(shared_memory() + 128);
  T* y = reinterpret_cast<T*>(along + kSmallWarps * kSmallRows);
  T* weights = y + rows * pitch(width);
  float* inverses = reinterpret_cast<float*>(weights + kSmallRows * pitch(rows));
  int* powers = reinterpret_cast<int*>(inverses + rows);
  float* gains = reinterpret_cast<float*>(powers + rows);
  float* levels = gains + rows;
  float* pairs = levels + rows;

  fetch_all(y, from, rows, width);
  const float unit = elementwise ? block_largest(upstream, upstream_stride, anchors) : *upstream;
  for (int i = thread; i < rows; i += kSmallThreads) {
    gains[i] = gain_of(upstream, upstream_stride, i, anchors, elementwise, unit);
    levels[i] = i < anchors ? saved[i] : infinity();
  }
  wait_copies<0>();
  __syncthreads();
  scale_all(y, inverses, powers, rows, width, normalize);
  __syncthreads();

  for (int column = warp * kSmallColumns; column < rows; column += kSmallWarps * kSmallColumns) {
    float s[1][4][4];
    clear(s);
    for (int k = 0; k < width / 16; ++k) {
      uint32_t left[1][4];
      load_left(left[0], y, first, k, width);
      multiply<T>(s, left, y, column, k, width);
    }
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      const int local = e / 8 * 8 + g, i = first + local, partner = i < count ? i + count : i - count;
      const int j = column + e % 8 / 2 * 8 + 2 * t + e % 2;
      float& x = s[0][e % 8 / 2][e / 8 * 2 + e % 2];
      const float scaled = rounded_product(x, (inverses[i] * inverses[j]) * bend);
      const float to_a = exp2_flushed(scaled - levels[i]), to_b = exp2_flushed(scaled - levels[j]);
      if (j == partner) pairs[local] = (to_a - 1.0f) * gains[i] + (to_b - 1.0f) * gains[j];
      const float w = (to_a * gains[i] + to_b * gains[j]) * (inverses[j] * kLift);
      x = j == partner || j == i || j >= 2 * count ? 0.0f : w;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int n = e % 4, half = e / 4;
      *reinterpret_cast<uint32_t*>(weights + (8 * half + g) * pitch(rows) + column + 8 * n + 2 * t) =
          pack(from_float<T>(s[0][n][half * 2]), from_float<T>(s[0][n][half * 2 + 1]));
    }
  }
  __syncthreads();

  // 16 dimensions at a time, of which a warp has every eighth.
  constexpr int kMost = 512 / 16 / kSmallWarps;
  float sums[kMost][2][4];
  clear(sums);
  for (int k = 0; k < rows / 16; ++k) {
    uint32_t left[4];
    load_matrices(left, weights + lane % 16 * pitch(rows) + 16 * k + lane / 16 * 8);
#pragma unroll
    for (int u = 0; u < kMost; ++u) {
      const int dims = 16 * (warp + u * kSmallWarps);
      if (dims >= width) continue;
      uint32_t r[4];
      load_right_as_is(r, y, 16 * k, dims / 8, width);
      const uint32_t even[2] = {r[0], r[1]}, odd[2] = {r[2], r[3]};
      mma_16x8x16<T>(sums[u][0], left, even);
      mma_16x8x16<T>(sums[u][1], left, odd);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int local = 8 * half + g, i = first + local, partner = i < count ? i + count : i - count;
    const float pair = i < 2 * count ? pairs[local] : 0.0f;
    float mine = 0.0f;
#pragma unroll
    for (int e = 0; e < 4 * kMost; ++e) {
      const int u = e / 4, column = 16 * (warp + u * kSmallWarps) + e % 4 / 2 * 8 + 2 * t + e % 2;
      if (column >= width) continue;
      float& x = sums[u][e % 4 / 2][half * 2 + e % 2];
      const float v = to_float(piece_at(y, partner, column / 8, width)[column % 8]) * inverses[partner];
      x = x * (1.0f / kLift) + pair * v;
      mine += x * (to_float(piece_at(y, i, column / 8, width)[column % 8]) * inverses[i]);
    }
    mine = warp_sum<4>(mine);
    if (t == 0) along[warp * kSmallRows + local] = mine;
  }
  __syncthreads();
  const float factor = unit * scale;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int local = 8 * half + g, i = first + local;
    if (i >= end) continue;
    float dot = 0.0f;
    for (int w = 0; w < kSmallWarps; ++w) dot += along[w * kSmallRows + local];
    const float inverse = inverses[i];
    const int k = powers[i];
#pragma unroll
    for (int e = 0; e < 2 * kMost; ++e) {
      const int u = e / 2, column = 16 * (warp + u * kSmallWarps) + e % 2 * 8 + 2 * t;
      if (column >= to.dim) continue;
      T pair[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float x = sums[u][e % 2][half * 2 + c];
        if (normalize) {
          const float unit_row = to_float(piece_at(y, i, column / 8, width)[column % 8 + c]) * inverse;
          x = times_power((x - dot * unit_row) * inverse, k);
        }
        pair[c] = from_float<T>(x * factor);
      }
      T* out = to.at(i, column);
      if (to.aligned) {
        *reinterpret_cast<uint32_t*>(out) = pack(pair[0], pair[1]);
      } else {
        out[0] = pair[0];
        if (column + 1 < to.dim) out[i < count ? to.first_column : to.second_column] = pair[1];
      }
    }
  }
}

// ---- launches -------------------------------------------------------------------------------------------------------

bool is_small(int64_t count, int64_t dim) {
  return 2 * count <= 256 && dim <= 512 &&
         small_shared(round_up(2 * count, kSmallColumns), round_up(dim ? dim : 1, 64)) <= most_shared;
}

Plan plan_backward(int64_t count, int64_t dim, int symmetric, bool want_first, bool want_second) {
  Plan plan = plan_rows(count, dim, symmetric);
  plan.rows = kRows;
  plan.blocks = divide_up(count, kRows);
  const int64_t tiles[2] = {divide_up(2 * count, kColumns), divide_up((symmetric ? 2 : 1) * count, kColumns)};
  const int64_t wanted[2] = {want_first ? tiles[0] : tiles[1], tiles[1]};
  const int sides = want_first + want_second;
  plan.span = tiles_a_block(plan.blocks * (plan.width / plan.slab), sides, wanted, (plan.wide ? 1 : 2) * processors);
  plan.chunks = divide_up(wanted[0], plan.span);  // the first side has no fewer tiles than the second
  for (int side = 0; side < 2; ++side) plan.chunks_of[side] = divide_up(tiles[side], plan.span);
  plan.parts = plan.numbers + kNumbers * plan.padded * 4;
  plan.extra = plan.parts + plan.chunks * sides * count * plan.width * 4;
  plan.bytes = plan.extra + 16 + round_up(count * 4, 16);
  return plan;
}

template <typename T, int SLAB, bool WIDE, bool BOUNDED>
int launch_sums(const Plan& plan, int first_side, int sides, int64_t count, int symmetric, float bend, void* scratch,
                void* stream) {
  unsigned char* memory = static_cast<unsigned char*>(scratch);
  const dim3 grid(static_cast<unsigned>(plan.blocks * sides), static_cast<unsigned>(plan.chunks),
                  static_cast<unsigned>(plan.width / SLAB));
  return launch(weighted_sums<T, SLAB, WIDE, BOUNDED>, grid, kThreads<WIDE>, shared_bytes<T, SLAB, WIDE>(), stream,
                reinterpret_cast<const T*>(memory), reinterpret_cast<const float*>(memory + plan.numbers),
                reinterpret_cast<float*>(memory + plan.parts), reinterpret_cast<float*>(memory + plan.extra + 16),
                count, plan.width, plan.padded, plan.span, first_side, sides * count, symmetric, bend);
}

template <typename T>
int backward(const float* upstream, int64_t upstream_row, const Sides<const T>& from, const Sides<T>& to,
             const float* saved, double temperature, int symmetric, int normalize, int reduction, void* scratch,
             void* stream) {
  const int64_t count = from.count, dim = from.dim, anchors = symmetric ? 2 * count : count;
  const int first_side = to.first != nullptr ? 0 : 1, sides = (to.first != nullptr) + (to.second != nullptr);
  if (count == 0 || sides == 0) return 0;
  const bool elementwise = reduction == DFKD_NONE;
  const double exact_bend = kLog2OfE / temperature;
  const float bend = static_cast<float>(exact_bend);
  const double terms = reduction == DFKD_MEAN ? static_cast<double>(anchors) : 1.0;
  const float scale = static_cast<float>(1.0 / temperature / terms);
  if (is_small(count, dim)) {
    const int64_t rows = round_up(2 * count, kSmallColumns), width = round_up(dim ? dim : 1, 64);
    return launch(small_backward<T>, static_cast<unsigned>(divide_up(sides * count, kSmallRows)), kSmallThreads,
                  static_cast<size_t>(small_shared(rows, width)), stream, upstream, upstream_row, from, to, saved,
                  anchors, rows, width, first_side * count, (first_side + sides) * count, bend, scale, normalize,
                  elementwise);
  }
  const Plan plan = plan_backward(count, dim, symmetric, to.first != nullptr, to.second != nullptr);
  unsigned char* memory = static_cast<unsigned char*>(scratch);
  float* found = reinterpret_cast<float*>(memory + plan.extra);
  const float* unit = elementwise ? found : upstream;
  int status = 0;
  const auto threads = static_cast<unsigned>(anchors < 1024 ? round_up(anchors, kLanes) : 1024);
  if (elementwise) status = launch(largest, 1, threads, 128, stream, upstream, upstream_row, found, anchors);
  if (status) return status;
  status = launch_prepare<T>(plan, from, scratch, saved, upstream, upstream_row, unit, normalize, elementwise, stream);
  if (status) return status;
  const bool bounded = normalize && exact_bend <= kBound;
  const auto sums = [&](auto kernel_bounded) {
    constexpr bool kBounded = decltype(kernel_bounded)::value;
    auto* with = launch_sums<T, 128, false, kBounded>;
    if (plan.slab == 64) with = launch_sums<T, 64, false, kBounded>;
    if (plan.wide) with = launch_sums<T, 128, true, kBounded>;
    return with(plan, first_side, sides, count, symmetric, bend, scratch, stream);
  };
  status = bounded ? sums(Constant<true>{}) : sums(Constant<false>{});
  if (status) return status;
  return launch(finish<T>, static_cast<unsigned>(divide_up(sides * count, 8)), 256, 0, stream,
                reinterpret_cast<const T*>(memory), reinterpret_cast<const float*>(memory + plan.numbers), unit, to,
                reinterpret_cast<const float*>(memory + plan.parts), found + 4, plan.width, plan.padded, first_side,
                sides * count, plan.chunks_of[0], plan.chunks_of[1], scale, normalize);
}

}  // namespace

extern "C" {

int64_t dfkd_contrastive_loss_backward_scratch(int64_t count, int64_t dim, int symmetric, int want_anchors,
                                               int want_positives) {
  if (count <= 0 || !sizes_fit(count, dim) || is_small(count, dim) || (!want_anchors && !want_positives)) return 0;
  return plan_backward(count, dim, symmetric, want_anchors, want_positives).bytes;
}

int dfkd_contrastive_loss_backward(const float* upstream, int64_t upstream_row, const void* anchors,
                                   const void* positives, const float* saved, int64_t count, int64_t dim,
                                   int64_t anchors_row, int64_t anchors_column, int64_t positives_row,
                                   int64_t positives_column, int dtype, float temperature, int symmetric, int normalize,
                                   int reduction, void* d_anchors, void* d_positives, int64_t d_anchors_row,
                                   int64_t d_anchors_column, int64_t d_positives_row, int64_t d_positives_column,
                                   void* scratch, void* stream) {
  if (!sizes_fit(count, dim) || !(temperature > 0) || dtype == DFKD_FLOAT32) return DFKD_INVALID;
  return with_type(dtype, [&](auto type) -> int {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      const auto from = sides(static_cast<const T*>(anchors), static_cast<const T*>(positives), anchors_row,
                              anchors_column, positives_row, positives_column, count, dim);
      const auto to = sides(static_cast<T*>(d_anchors), static_cast<T*>(d_positives), d_anchors_row, d_anchors_column,
                            d_positives_row, d_positives_column, count, dim);
      return backward<T>(upstream, upstream_row, from, to, saved, temperature, symmetric, normalize, reduction, scratch,
                         stream);
    } else {
      return DFKD_INVALID;
    }
  });
}
}
