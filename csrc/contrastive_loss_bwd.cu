// NT-Xent over 2N vectors without their similarity matrix: gradients of both sides. Notation: contrastive_loss.cu.
//
// For every row a, with g the upstream gradient of an anchor (0 for other vectors):
//
//   w_ab = g_a 2^(s_ab - L_a) + g_b 2^(s_ab - L_b) - [b is the partner of a] (g_a + g_b)        w_aa = 0
//   G_a = sum over b of w_ab y_b r_b / tau        d v_a = 2^k_a r_a (G_a - (G_a . u_a) u_a)     u_a = r_a y_a
//
// w is rounded to the type of y for the second product, but for the partner's, whose difference of nearly equal numbers
// is kept in float32. One exponential serves both terms: 2^s_ab (g_a 2^-L_a + g_b 2^-L_b). Where the positives are no
// anchors their rows meet only the anchors.
//
// Three launches, four with an upstream gradient for every anchor: rows are scaled into scratch (prepare(), shared); a
// block of weighted_sums_wgmma takes pieces of 128 rows by neighbouring tiles of 128 columns; a row's pieces are added
// up in order and go back through the normalisation.
//
// With M = 2N and up to 128 dimensions: 3 M^2 D operations by wgmma and 0.75 M^2 exponentials, with all vectors as
// anchors 4 and 1. At D = 128 a tile is 2048 cycles of the tensor cores and 1024 of exponentials: the former are the
// limit, if they never wait. So
//  - a warpgroup (64 rows) asks for the next tile's similarities before it multiplies this one's weights by the same
//    tile, whose rows are now the other dimension; weights are made while that goes on, and never leave registers.
//  - the two warpgroups ask for products in turn, so that one's end meets the other's beginning.
//  - rows are held in registers: shared memory is read for columns alone.
// Tiles are dealt out evenly over blocks, one after the other's, whatever rows they belong to: at 2N = 8192, 132
// processors then have 24 tiles each, where rows' halves or wholes would leave 32 to some. Vectors too many for the
// cache are walked in step instead: then a block has as many tiles as the longer rows.
// Reads M D elements, writes and reads 4 M D bytes for each piece of a row; all blocks together read 0.75 M^2 D / 64
// bytes from the second-level cache, 16 bytes a cycle and processor at the tensor cores' rate.
//
// Not yet run on a GPU.
#include "contrastive_loss.h"

namespace {

using namespace dfkd;
using namespace dfkd::contrastive;

// ---- who does what --------------------------------------------------------------------------------------------------

// Tiles of columns, those of one row block after another's, first all of one side. Each block has `each` of them, but
// the last one.
struct Work {
  int64_t each, all;
  int blocks, first_side, sides, count;  // row blocks of a side
  int tiles[2];                          // of a row block, of the first and the second side wanted

  __device__ __forceinline__ int64_t before(int which) const {
    return which == 0 ? 0 : static_cast<int64_t>(blocks) * tiles[0];
  }
  // How many this block has.
  __device__ __forceinline__ int mine() const {
    const int64_t left = all - blockIdx.x * each;
    return static_cast<int>(left < each ? left : each);
  }
};

// What a block does of one row block: its tiles from number `done` on.
struct Piece {
  int which, first, begin, end, part;  // the side, and the first row in it; tiles; how many blocks have others before

  __device__ __forceinline__ Piece(const Work& work, int done) {
    const int64_t at = blockIdx.x * work.each + done;
    which = at >= work.before(1);
    const int64_t inside = at - work.before(which);
    const int tiles = work.tiles[which];
    const int64_t block = inside / tiles;
    begin = static_cast<int>(inside - block * tiles);
    end = work.mine() - done < tiles - begin ? begin + work.mine() - done : tiles;
    first = static_cast<int>(block) * kTile;
    part = static_cast<int>(blockIdx.x - (at - begin) / work.each);
  }
};

// ---- weights --------------------------------------------------------------------------------------------------------

// Similarities of the thread's two rows become weights. `columns`: r and g 2^-L r of the tile's vectors.
__device__ __forceinline__ void weigh(float (&s)[kTile / 8][4], const float* columns, const float (&scale)[2],
                                      const float (&share)[2]) {
  columns += 2 * (static_cast<int>(threadIdx.x) % 4);
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n) {
    const Two inverses = *reinterpret_cast<const Two*>(columns + 8 * n);
    const Two shares = *reinterpret_cast<const Two*>(columns + kTile + 8 * n);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float inverse_b = i % 2 ? inverses.y : inverses.x, share_b = i % 2 ? shares.y : shares.x;
      s[n][i] = exp2_approx_ftz((s[n][i] * inverse_b) * scale[i / 2]) * (share[i / 2] * inverse_b + share_b);
    }
  }
}

// No weights for the rows themselves, their partners and what is past the end. All three are told by how far they are
// from the thread's first column, the first two of its first row.
__device__ __forceinline__ void mask(float (&s)[kTile / 8][4], int own, int beside, int end) {
#pragma unroll
  for (int i = 0; i < kTile / 2; ++i) {
    const int r = i % 4 / 2, at = i / 4 * 8 + i % 2;
    s[i / 4][i % 4] = at == own + 8 * r || at == beside + 8 * r || at >= end ? 0.0f : s[i / 4][i % 4];
  }
}

// The weights of the thread's rows and their partners, where it has any, from similarities equal to those of forward to
// the bit. Of float32: differences of nearly equal numbers.
__device__ __forceinline__ void weigh_partners(const float (&s)[kTile / 8][4], int beside, int row, int partner,
                                               const float* numbers, int64_t padded, float* pairs, int rows,
                                               float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float x = 0.0f;
#pragma unroll
    for (int i = 0; i < kTile / 4; ++i) x = i / 2 * 8 + i % 2 == beside + 8 * r ? s[i / 2][2 * r + i % 2] : x;
    if (beside + 8 * r < 0 || beside + 8 * r >= kTile || (beside & 7) >= 2 || 8 * r >= rows) continue;
    const int i = row + 8 * r, j = partner + 8 * r;
    const float* gains = numbers + kGain * padded;
    const float* levels = numbers + kLevel * padded;
    const float scaled = mul_rn(x, (numbers[i] * numbers[j]) * scale_log2);
    pairs[8 * r] = (exp2_approx_ftz(scaled - levels[i]) - 1.0f) * gains[i] +
                   (exp2_approx_ftz(scaled - levels[j]) - 1.0f) * gains[j];
  }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <typename T, int SLAB>
__global__ void __launch_bounds__(kRoles, 1)
    weighted_sums_wgmma(const __grid_constant__ TensorMap vectors, const float* numbers, float* parts, float* pairs,
                         const __grid_constant__ Work work, int padded, int symmetric, float scale_log2) {
  using Stages = Ring<SLAB, 2>;
  Stages ring;
  ring.begin();
  const int warpgroup = my_warpgroup(), count = work.count;
  const int tiles = work.mine();
  if (warpgroup == 0) {
    warpgroup_reg_dealloc<kFetching>();
    if (threadIdx.x == 0) {
      prefetch_tensormap(vectors);
      const float* const arrays[2] = {numbers, numbers + static_cast<int64_t>(kScaledShare) * padded};
      for (int done = 0; done < tiles;) {
        const Piece piece(work, done);
        ring.fetch(vectors, (work.first_side + piece.which) * count + piece.first);
        for (int tile = piece.begin; tile < piece.end; ++tile) ring.fetch(vectors, tile * kTile, arrays);
        done += piece.end - piece.begin;
      }
    }
  } else {
    warpgroup_reg_alloc<kMultiplying>();
    begin_turns(warpgroup);
    uint32_t own[SLAB / 16][4], weights[kTile / 16][4];
    float s[kTile / 8][4], sums[SLAB / 8][4];
    for (int done = 0; done < tiles;) {
      const Piece piece(work, done);
      const int side = work.first_side + piece.which, limit = symmetric || side == 0 ? 2 * count : count;
      const int local = piece.first + (warpgroup - 1) * 64;  // the warpgroup's first row, in its side and in all
      const int row = side * count + local, partner = (1 - side) * count + local;
      float scale[2], share[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scale[r] = numbers[row + my_row() + 8 * r] * scale_log2;
        share[r] = numbers[static_cast<int64_t>(kShare) * padded + row + my_row() + 8 * r];
      }
      ring.wait_full();
      load_rows<SLAB>(own, ring.offset(), (warpgroup - 1) * 64 + my_row() / 16 * 16);
      ring.release();
      ring.advance();

      const auto ask_similarities = [&](const Stages& stage) {
        warpgroup_fence_operand(own);
        warpgroup_fence_operand(s);
        warpgroup_arrive();
        multiply_rows<T, SLAB>(s, own, stage.tile());
        warpgroup_commit_batch();
      };
      const auto ask_sums = [&](const Stages& stage) {
        const uint64_t columns = make_smem_desc<64>(stage.tile(), kPanelBytes);
#pragma unroll
        for (int k = 0; k < kTile / 16; ++k) {
          wgmma<T, SLAB, true>(sums, weights[k], advance_desc(columns, k * 16 * 128), true);
        }
        warpgroup_commit_batch();
      };
      const auto weigh_all = [&](const Stages& stage, int tile) {
        const int column = tile * kTile;
        if (column + kTile > limit || meet(column, kTile, row, 64) || meet(column, kTile, partner, 64)) {
          const int mine = my_row(), from = mine - column - static_cast<int>(threadIdx.x) % 4 * 2;
          if (piece.which == 0) {
            weigh_partners(s, partner + from, row + mine, partner + mine, numbers, padded, pairs + local + mine,
                           count - local - mine, scale_log2);
          }
          weigh(s, stage.numbers(), scale, share);
          mask(s, row + from, partner + from, limit + from - mine);
        } else {
          weigh(s, stage.numbers(), scale, share);
        }
      };
      const auto pack_all = [&] {
#pragma unroll
        for (int i = 0; i < kTile / 4; ++i) {
          const float(&from)[4] = s[i / 4 * 2 + i % 4 / 2];
          weights[i / 4][i % 4] = pack_rn<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
        }
      };

      ring.wait_full();
      await_turn(warpgroup);
      ask_similarities(ring);
      pass_turn(warpgroup);
      warpgroup_wait<0>();
      warpgroup_fence_operand(s);
      weigh_all(ring, piece.begin);
      pack_all();
      Stages last = ring;  // with the tile that weights are of
      ring.advance();
#pragma unroll
      for (int i = 0; i < SLAB / 2; ++i) sums[i / 4][i % 4] = 0.0f;
      for (int tile = piece.begin + 1; tile < piece.end; ++tile) {
        ring.wait_full();
        await_turn(warpgroup);
        warpgroup_fence_operand(weights);
        warpgroup_fence_operand(sums);
        ask_similarities(ring);
        ask_sums(last);
        pass_turn(warpgroup);
        warpgroup_wait<1>();
        warpgroup_fence_operand(s);
        weigh_all(ring, tile);
        warpgroup_wait<0>();
        warpgroup_fence_operand(sums);
        warpgroup_fence_operand(weights);
        last.release();
        last.index = ring.index;
        ring.advance();
        pack_all();
      }
      await_turn(warpgroup);
      warpgroup_fence_operand(weights);
      warpgroup_fence_operand(sums);
      warpgroup_arrive();
      ask_sums(last);
      pass_turn(warpgroup);
      warpgroup_wait<0>();
      warpgroup_fence_operand(sums);
      last.release();

#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int here = local + my_row() + 8 * r;
        if (here >= count) continue;
        const int64_t line = (static_cast<int64_t>(piece.part) * work.sides + piece.which) * count + here;
        float* to = parts + line * SLAB + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
        for (int n = 0; n < SLAB / 8; ++n) {
          *reinterpret_cast<Two*>(to + 8 * n) = {sums[n][r * 2], sums[n][r * 2 + 1]};
        }
      }
      done += piece.end - piece.begin;
    }
    end_turns(warpgroup);
  }
}

// ---- what the pieces found ------------------------------------------------------------------------------------------

// Adds up a row's pieces in order and goes back through the normalisation; one warp a row.
template <typename T>
__global__ void __launch_bounds__(256)
    finish(const T* vectors, const float* numbers, const float* unit, Sides<T> to, const float* parts,
           const float* pairs, const __grid_constant__ Work work, int width, int padded, float scale) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, column = 4 * lane;
  const int at = static_cast<int>(blockIdx.x) * 8 + static_cast<int>(threadIdx.x) / kWarpSize;
  const int rows = work.sides * work.count;
  if (at >= rows) return;  // a whole warp
  const int which = at >= work.count, side = work.first_side + which, local = at - which * work.count;
  const int row = side * work.count + local, partner = (1 - side) * work.count + local;
  const int64_t begin = work.before(which) + static_cast<int64_t>(local / kTile) * work.tiles[which];
  const auto pieces = static_cast<int>((begin + work.tiles[which] - 1) / work.each - begin / work.each) + 1;
  const float pair = pairs[local], inverse = numbers[row], inverse_partner = numbers[partner];
  const int k = static_cast<int>(numbers[static_cast<int64_t>(kPower) * padded + row]);
  const float factor = *unit * scale;

  Four<float> u{}, total{};
  if (column < width) {
    const auto y = *reinterpret_cast<const Four<T>*>(vectors + (static_cast<int64_t>(row) * width + column));
    const auto v = *reinterpret_cast<const Four<T>*>(vectors + (static_cast<int64_t>(partner) * width + column));
#pragma unroll 4
    for (int piece = 0; piece < pieces; ++piece) {
      const auto part =
          *reinterpret_cast<const Four<float>*>(parts + (static_cast<int64_t>(piece) * rows + at) * width + column);
#pragma unroll
      for (int e = 0; e < 4; ++e) total.x[e] += part.x[e];
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      u.x[e] = to_float(y.x[e]) * inverse;
      total.x[e] = total.x[e] * (1.0f / kLift) + pair * (to_float(v.x[e]) * inverse_partner);
    }
  }
  float along = 0.0f;
#pragma unroll
  for (int e = 0; e < 4; ++e) along += total.x[e] * u.x[e];
  along = warp_sum(along);
  if (column >= to.dim) return;
  Four<T> gradient;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    gradient.x[e] = from_float<T>(times_power((total.x[e] - along * u.x[e]) * inverse, k) * factor);
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

// The unit of upstream gradients, in one block.
__global__ void __launch_bounds__(1024) largest(const float* grad_output, int64_t stride, float* unit, int anchors) {
  const float found = block_largest(grad_output, stride, anchors);
  if (threadIdx.x == 0) *unit = found;
}

// ---- launches -------------------------------------------------------------------------------------------------------

struct BackwardPlan : Plan {
  Work work;
  int64_t grid;
};

BackwardPlan plan_backward(int64_t count, int64_t dim, int symmetric, bool needs_grad_first, bool needs_grad_second) {
  BackwardPlan plan{plan_rows(count, dim, symmetric), {}, 0};
  plan.rows = kTile;
  plan.blocks = divide_up(count, kTile);
  const int64_t tiles[2] = {divide_up(2 * count, kTile), divide_up((symmetric ? 2 : 1) * count, kTile)};
  Work& work = plan.work;
  work.blocks = static_cast<int>(plan.blocks);
  work.first_side = needs_grad_first ? 0 : 1;
  work.sides = needs_grad_first + needs_grad_second;
  work.count = static_cast<int>(count);
  for (int which = 0; which < 2; ++which) work.tiles[which] = static_cast<int>(tiles[which ? 1 : work.first_side]);
  work.all = plan.blocks * (work.tiles[0] + (work.sides == 2 ? work.tiles[1] : 0));
  const int64_t even = divide_up(work.all, num_sms);
  const bool cached = plan.padded * plan.width * 2 <= cached_bytes;
  work.each = cached || even < work.tiles[0] ? even : work.tiles[0];  // the first side has no fewer than the second
  plan.grid = divide_up(work.all, work.each);
  // A row block that begins at the end of a block's tiles has one part more than it would need.
  const bool whole = work.each % work.tiles[0] == 0 && work.tiles[0] % work.tiles[1] == 0;
  plan.chunks = whole ? 1 : divide_up(work.tiles[0] - 1, work.each) + 1;
  plan.parts = plan.numbers + kNumbers * plan.padded * 4;
  plan.extra = plan.parts + plan.chunks * work.sides * count * plan.width * 4;
  plan.bytes = plan.extra + 16 + round_up(count * 4, 16);
  return plan;
}

template <typename T, int SLAB>
int launch_sums(const BackwardPlan& plan, int symmetric, float scale_log2, void* scratch, void* stream) {
  unsigned char* memory = static_cast<unsigned char*>(scratch);
  TensorMap map;
  const int status = map_vectors(&map, plan, memory);
  if (status) return status;
  return launch(weighted_sums_wgmma<T, SLAB>, static_cast<unsigned>(plan.grid), kRoles, Ring<SLAB, 2>::kBytes, stream,
                map, reinterpret_cast<const float*>(memory + plan.numbers),
                reinterpret_cast<float*>(memory + plan.parts), reinterpret_cast<float*>(memory + plan.extra + 16),
                plan.work, plan.padded, symmetric, scale_log2);
}

template <typename T>
int backward(const float* grad_output, int64_t grad_output_row, const Sides<const T>& from, const Sides<T>& to,
             const float* saved, double temperature, int symmetric, int reduction, void* scratch, void* stream) {
  if (to.first == nullptr && to.second == nullptr) return 0;
  const BackwardPlan plan =
      plan_backward(from.count, from.dim, symmetric, to.first != nullptr, to.second != nullptr);
  const bool elementwise = reduction == DFKD_NONE;
  const double terms = reduction == DFKD_MEAN ? static_cast<double>(plan.anchors) : 1.0;
  const auto scale = static_cast<float>(1.0 / temperature / terms);
  unsigned char* memory = static_cast<unsigned char*>(scratch);
  float* found = reinterpret_cast<float*>(memory + plan.extra);
  const float* unit = elementwise ? found : grad_output;
  int status = 0;
  if (elementwise) status = launch(largest, 1, 1024, 128, stream, grad_output, grad_output_row, found, plan.anchors);
  if (status) return status;
  status = launch_prepare<T>(plan, from, scratch, saved, grad_output, grad_output_row, unit, elementwise, stream);
  if (status) return status;
  const auto sums = plan.slab == 64 ? launch_sums<T, 64> : launch_sums<T, 128>;
  status = sums(plan, symmetric, static_cast<float>(kLog2OfE / temperature), scratch, stream);
  if (status) return status;
  return launch(finish<T>, static_cast<unsigned>(divide_up(int64_t{plan.work.sides} * from.count, 8)), 256, 0, stream,
                reinterpret_cast<const T*>(memory), reinterpret_cast<const float*>(memory + plan.numbers), unit, to,
                reinterpret_cast<const float*>(memory + plan.parts), found + 4, plan.work, plan.width, plan.padded,
                scale);
}

}  // namespace

extern "C" {

int64_t dfkd_contrastive_loss_backward_scratch(int64_t count, int64_t dim, int symmetric, int needs_grad_anchors,
                                               int needs_grad_positives) {
  if (require_sizes(count, dim) || (!needs_grad_anchors && !needs_grad_positives)) return 0;
  return plan_backward(count, dim, symmetric, needs_grad_anchors, needs_grad_positives).bytes;
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
    const auto from = sides(static_cast<const T*>(anchors), static_cast<const T*>(positives), anchors_row,
                            anchors_column, positives_row, positives_column, count, dim);
    const auto to = sides(static_cast<T*>(d_anchors), static_cast<T*>(d_positives), d_anchors_row, d_anchors_column,
                          d_positives_row, d_positives_column, count, dim);
    return backward<T>(grad_output, grad_output_row, from, to, saved, temperature, symmetric, reduction, scratch, stream);
  });
}
}
