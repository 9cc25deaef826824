// Mixed high-order attention, backward: gradients of x and of both weights from x and the gradient of the result alone.
//
// Not yet run on a card. With g that gradient, for P positions of C channels, K = C / 4 and order 3: 6 P C bytes in a
// two-byte type, weights apart, and 13.5 P C^2 operations, the maps of forward among them (16.5 here: the
// factors are computed twice):
//
//   dl = g x A (1 - A)       da_r = out_r^T dl       du_i = da_r [z_r > 0] prod over j != i of u_j
//   dx = g A + sum proj^T du       dproj = sum over P of du x^T       dout_r = sum over P of dl a_r^T
//
// Two forms. whole, for joint gates of order 3 with up to 64 channels and 16 hidden units, where memory is the limit:
// one pass, in high_order_attention_bwd.h. split, for all others, where the products are (7 x 7 with 512 channels).
//
// split: hidden activations go through memory: a, then dl and the part g A of dx, then du, then dx, then the products
// over positions, each a matrix product with one end of the formula before or behind it. What they write and read, 3.25
// P C numbers and more than once, lies in cache where maps are small.
// a, dl and du are rounded to the type of the weights before they are multiplied, and g A before dx is added to it.
//
// The sums over positions are split over blocks, whose float32 parts are added in a fixed order: two runs give the same
// bits. How many there are follows from the sizes alone.
#include "high_order_attention_bwd.h"

namespace {

using namespace dfkd;
using namespace dfkd::high_order;

// ---- dx ------------------------------------------------------------------------------------------------------------

constexpr int kInputStage = (kBlockRows + kBlockColumns) * kDepth;
constexpr size_t kInputShared = 2 * static_cast<size_t>(kStages * kInputStage + kBlockRows * kBlockColumns);

// dx (count, C) from du (count, width) and proj (width, C), ADDed to what it holds or not. Four warps of 32 x 64.
template <typename T, bool ADD>
__global__ void __launch_bounds__(128, 2)
    input_kernel(const T* factors, const T* proj, T* dx, int64_t count, int channels, int width) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kLanes, lane = thread % kLanes;
  const int warp_row = warp / 2 * 32, panel = warp % 2;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kBlockRows;
  const int column0 = static_cast<int>(blockIdx.y) * kBlockColumns;
  T* memory = reinterpret_cast<T*>(shared_memory());
  T* tile = memory + kStages * kInputStage;
  float sum[2][8][4] = {};

  if constexpr (ADD) {  // arrives with the first step
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      load_rows<64>(tile + p * kBlockRows * 64, kBlockRows, dx + row0 * channels + column0 + 64 * p, channels,
                    count - row0, channels - column0 - 64 * p, thread, 128, dx);
    }
  }
  const auto load = [&](int stage, int step) {
    T* a_panel = memory + stage * kInputStage;
    const int unit = step * kDepth;
    load_rows<kDepth>(a_panel, kBlockRows, factors + row0 * width + unit, width, count - row0, width - unit, thread,
                      128, factors);
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      load_rows<64>(a_panel + kBlockRows * kDepth + p * kDepth * 64, kDepth,
                    proj + static_cast<int64_t>(unit) * channels + column0 + 64 * p, channels, width - unit,
                    channels - column0 - 64 * p, thread, 128, proj);
    }
  };
  const auto use = [&](int stage, int) {
    const T* a_panel = memory + stage * kInputStage;
    const T* b_panel = a_panel + kBlockRows * kDepth + panel * kDepth * 64;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[2][4], b[2][2];
      load_a<kDepth>(a[0], a_panel, warp_row, 2 * k);
      load_a<kDepth>(a[1], a_panel, warp_row + 16, 2 * k);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        load_b_transposed<64>(b, b_panel, 16 * k, 2 * n);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_16x8x16<T>(sum[m][2 * n], a[m], b[0]);
          mma_16x8x16<T>(sum[m][2 * n + 1], a[m], b[1]);
        }
      }
    }
  };
  pipeline((width + kDepth - 1) / kDepth, load, use);

  T* const my_tile = tile + panel * kBlockRows * 64;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t* const pair = pair_at(my_tile, warp_row + 16 * m + 8 * half + lane / 4, 8 * n + 2 * (lane % 4));
        float before[2] = {0.0f, 0.0f};
        if constexpr (ADD) unpack<T>(*pair, before);
        *pair = pack_rounded<T>(before[0] + sum[m][n][2 * half], before[1] + sum[m][n][2 * half + 1]);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    store_rows(tile + p * kBlockRows * 64, kBlockRows, dx + row0 * channels + column0 + 64 * p, channels, count - row0,
               channels - column0 - 64 * p, thread, 128);
  }
}

// ---- gradients of the weights: products over positions -------------------------------------------------------------

constexpr int kWeightRows = 128, kWeightColumns = 64;
constexpr int kWeightStage = (kWeightRows + kWeightColumns) * kDepth;

// The tiles of dproj (width, C), then those of each dout_r (C, K), and into how many sums each is split.
struct Jobs {
  int projection_columns, projections, out_columns, out_tiles, total;
  int64_t steps, splits, projection_size, size;

  Jobs(const Problem& p, bool want_proj, bool want_out) {
    const int width = factors_of(p.order) * p.hidden;
    projection_columns = static_cast<int>(divide_up(p.channels, kWeightColumns));
    projections = static_cast<int>(divide_up(width, kWeightRows)) * projection_columns;
    out_columns = static_cast<int>(divide_up(p.hidden, kWeightColumns));
    out_tiles = static_cast<int>(divide_up(p.channels, kWeightRows)) * out_columns;
    // The same whatever is wanted, so that each gradient is too.
    const int64_t rows = divide_up(p.count, kDepth);
    steps = divide_up(rows, divide_up(kSums, projections + p.order * out_tiles));
    splits = steps > 0 ? divide_up(rows, steps) : 0;
    projections = want_proj ? projections : 0;
    total = projections + (want_out ? p.order * out_tiles : 0);
    projection_size = want_proj ? static_cast<int64_t>(width) * p.channels : 0;
    size = projection_size + (want_out ? static_cast<int64_t>(p.order) * p.channels * p.hidden : 0);
  }
};

// Sums over steps x kDepth positions of du x^T, then of dl_r a_r^T. Four warps of 64 x 32.
template <typename T>
__global__ void __launch_bounds__(128, 2)
    weights_kernel(const T* x, const T* slopes, const T* rectified, const T* factors, float* parts, int64_t count,
                   int channels, int hidden, int order, int gates, Jobs jobs) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kLanes, lane = thread % kLanes;
  T* memory = reinterpret_cast<T*>(shared_memory());
  const bool projection = static_cast<int>(blockIdx.x) < jobs.projections;
  const int job = static_cast<int>(blockIdx.x) - (projection ? 0 : jobs.projections);
  const int across = projection ? jobs.projection_columns : jobs.out_columns;
  const int r = projection ? 0 : job / jobs.out_tiles, tile = projection ? job : job % jobs.out_tiles;
  const int first_row = tile / across * kWeightRows, first_column = tile % across * kWeightColumns;
  const int result_rows = projection ? factors_of(order) * hidden : channels;
  const int result_columns = projection ? channels : hidden;
  // Both operands have positions as rows.
  const T* const left = projection ? factors + first_row : slopes + (gates > 1 ? r : 0) * channels + first_row;
  const T* const right = projection ? x + first_column : rectified + r * hidden + first_column;
  const int64_t left_stride = projection ? result_rows : static_cast<int64_t>(gates) * channels;
  const int64_t right_stride = projection ? channels : static_cast<int64_t>(order) * hidden;
  const int64_t position0 = static_cast<int64_t>(blockIdx.y) * jobs.steps * kDepth;
  const int64_t position_end = position0 + jobs.steps * kDepth < count ? position0 + jobs.steps * kDepth : count;
  float sum[4][4][4] = {};

  const auto load = [&](int stage, int step) {
    T* panel = memory + stage * kWeightStage;
    const int64_t position = position0 + static_cast<int64_t>(step) * kDepth, inside = position_end - position;
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      load_rows<64>(panel + p * kDepth * 64, kDepth, left + position * left_stride + 64 * p, left_stride, inside,
                    result_rows - first_row - 64 * p, thread, 128, x);
    }
    load_rows<64>(panel + 2 * kDepth * 64, kDepth, right + position * right_stride, right_stride, inside,
                  result_columns - first_column, thread, 128, x);
  };
  const auto use = [&](int stage, int) {
    const T* panel = memory + stage * kWeightStage;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[4][4], b[2][2];
#pragma unroll
      for (int m = 0; m < 4; ++m) load_a_transposed<64>(a[m], panel + warp / 2 * kDepth * 64, 16 * k, 2 * m);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        load_b_transposed<64>(b, panel + 2 * kDepth * 64, 16 * k, warp % 2 * 4 + 2 * n);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          mma_16x8x16<T>(sum[m][2 * n], a[m], b[0]);
          mma_16x8x16<T>(sum[m][2 * n + 1], a[m], b[1]);
        }
      }
    }
  };
  pipeline(static_cast<int>((position_end - position0 + kDepth - 1) / kDepth), load, use);

  float* const to = parts + blockIdx.y * jobs.size +
                    (projection ? 0 : jobs.projection_size + static_cast<int64_t>(r) * channels * hidden);
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + warp / 2 * 64 + 16 * m + 8 * half + lane / 4;
        const int column = first_column + warp % 2 * 32 + 8 * n + 2 * (lane % 4);
        if (row < result_rows && column < result_columns) {
          *reinterpret_cast<FloatPair*>(to + static_cast<int64_t>(row) * result_columns + column) = {
              sum[m][n][2 * half], sum[m][n][2 * half + 1]};
        }
      }
    }
  }
}

constexpr int kAdded = 32, kAdders = 8;  // elements of a block, and threads that share the parts of one

// A gradient (outer, rows, columns) from the parts of one that is padded to (outer, rows_from, columns_from).
template <typename T>
__global__ void __launch_bounds__(kAdded * kAdders)
    add_parts_kernel(const float* parts, T* to, int64_t size, int64_t rows, int64_t columns, int64_t rows_from,
                     int64_t columns_from, int64_t splits, int64_t stride) {
  float* const sums = reinterpret_cast<float*>(shared_memory());
  const int element = static_cast<int>(threadIdx.x) % kAdded, adder = static_cast<int>(threadIdx.x) / kAdded;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAdded + element;
  float sum = 0.0f;
  if (i < size) {
    const int64_t column = i % columns, row = i / columns % rows, outer = i / columns / rows;
    const float* const from = parts + (outer * rows_from + row) * columns_from + column;
#pragma unroll 8
    for (int64_t split = adder; split < splits; split += kAdders) sum += from[split * stride];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (adder != 0 || i >= size) return;
#pragma unroll
  for (int other = 1; other < kAdders; ++other) sum += sums[other * kAdded + element];
  to[i] = from_float<T>(sum);
}

template <typename T>
int add_parts(const float* parts, T* to, int64_t outer, int64_t rows, int64_t columns, int64_t rows_from,
              int64_t columns_from, int64_t splits, int64_t stride, void* stream) {
  const int64_t size = outer * rows * columns;
  return launch(add_parts_kernel<T>, dim3(static_cast<unsigned>(divide_up(size, kAdded))), dim3(kAdded * kAdders),
                sizeof(float) * kAdded * kAdders, stream, parts, to, size, rows, columns, rows_from, columns_from,
                splits, stride);
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// What lies in the scratch; sizes inside are padded.
template <typename T>
struct Buffers {
  Problem padded;
  bool channels_off, weights_off;
  T *x, *upstream, *dx, *proj, *out, *rectified, *slopes, *factors;
  float* parts;
  int64_t once, bytes;  // blocks of the whole form, 0 where it does not serve

  Buffers(const Problem& p, int form, bool want_x, bool want_proj, bool want_out, void* scratch) : padded(p) {
    padded.channels = static_cast<int>(round_up(p.channels, 8));
    padded.hidden = static_cast<int>(round_up(p.hidden, 8));
    channels_off = padded.channels != p.channels;
    weights_off = channels_off || padded.hidden != p.hidden;
    const int64_t features = p.count * padded.channels, weight = static_cast<int64_t>(padded.hidden) * padded.channels;
    Parts place{static_cast<unsigned char*>(scratch)};
    x = place.template take<T>(channels_off ? features : 0);
    upstream = place.template take<T>(channels_off ? features : 0);
    dx = place.template take<T>(channels_off && want_x ? features : 0);
    proj = place.template take<T>(weights_off ? factors_of(p.order) * weight : 0);
    out = place.template take<T>(weights_off ? p.order * weight : 0);
    once = once_blocks(padded, form);
    const bool through = once == 0;
    rectified = place.template take<T>(through ? p.count * p.order * padded.hidden : 0);
    slopes = place.template take<T>(through ? features * p.gates : 0);
    const bool through_factors = through && (want_x || want_proj);
    factors = place.template take<T>(through_factors ? p.count * factors_of(p.order) * padded.hidden : 0);
    const Jobs jobs(padded, want_proj, want_out);
    parts = place.template take<float>((through ? jobs.splits : once) * jobs.size);
    bytes = place.used;
  }
};

// The split form, from padded arguments to dx and the parts of the weights' gradients.
template <typename T>
int through(const Buffers<T>& at, const Jobs& jobs, int form, const T* upstream, const T* x, const T* proj,
            const T* out, T* dx, void* stream) {
  const Problem& p = at.padded;
  const bool want_x = dx != nullptr, want_factors = want_x || jobs.projections > 0;
  T* const none = nullptr;
  int error = rectified(p, form, x, proj, out, at.rectified, stream);
  if (!error) error = launch_gate<T, true>(p, upstream, x, at.rectified, out, p.map ? none : dx, at.slopes, stream);
  if (!error && want_factors) error = launch_hidden<T, true>(p, form, x, at.slopes, proj, out, at.factors, stream);
  if (!error && want_x) {
    const dim3 blocks(static_cast<unsigned>(divide_up(p.count, kBlockRows)),
                      static_cast<unsigned>(divide_up(p.channels, kBlockColumns)));
    error = launch(p.map ? input_kernel<T, false> : input_kernel<T, true>, blocks, dim3(128), kInputShared, stream,
                   at.factors, proj, dx, p.count, p.channels, factors_of(p.order) * p.hidden);
  }
  if (!error && jobs.total > 0) {
    error = launch(weights_kernel<T>, dim3(static_cast<unsigned>(jobs.total), static_cast<unsigned>(jobs.splits)),
                   dim3(128), 2 * static_cast<size_t>(kStages * kWeightStage), stream, x, at.slopes, at.rectified,
                   at.factors, at.parts, p.count, p.channels, p.hidden, p.order, p.gates, jobs);
  }
  return error;
}

template <typename T>
int backward(const Problem& p, int form, const T* upstream, const T* x, const T* proj, const T* out, T* dx, T* dproj,
             T* dout, void* scratch, void* stream) {
  const bool want_x = dx != nullptr, want_proj = dproj != nullptr, want_out = dout != nullptr;
  const Buffers<T> at(p, form, want_x, want_proj, want_out, scratch);
  if ((at.bytes > 0 && scratch == nullptr) || (form == kWhole && p.count > 0 && at.once == 0)) return DFKD_INVALID;
  const Problem& padded = at.padded;
  const Jobs jobs(padded, want_proj, want_out);
  const int64_t splits = at.once > 0 ? at.once : jobs.splits;
  T* dx_to = dx;
  int error = 0;
  if (p.count > 0) {
    if (at.channels_off) {
      error = resize(x, at.x, 1, p.count, p.channels, p.count, padded.channels, stream);
      if (!error) error = resize(upstream, at.upstream, 1, p.count, p.channels, p.count, padded.channels, stream);
      x = at.x;
      upstream = at.upstream;
      dx_to = want_x ? at.dx : nullptr;
    }
    if (at.weights_off) {
      if (!error) {
        error = resize(proj, at.proj, factors_of(p.order), p.hidden, p.channels, padded.hidden, padded.channels,
                       stream);
      }
      if (!error) error = resize(out, at.out, p.order, p.channels, p.hidden, padded.channels, padded.hidden, stream);
      proj = at.proj;
      out = at.out;
    }
    if (!error && at.once > 0) {
      error = launch(once_kernel<T>, dim3(static_cast<unsigned>(at.once)), dim3(128), kOnceShared, stream, upstream, x,
                     proj, out, dx_to, at.parts, p.count, padded.channels, padded.hidden, p.map, want_proj, want_out,
                     jobs.projection_size, jobs.size);
    } else if (!error) {
      error = through(at, jobs, form, upstream, x, proj, out, dx_to, stream);
    }
    if (!error && at.channels_off && want_x) {
      error = resize(at.dx, dx, 1, p.count, padded.channels, p.count, p.channels, stream);
    }
  }
  if (!error && want_proj) {
    error = add_parts(at.parts, dproj, factors_of(p.order), p.hidden, p.channels, padded.hidden, padded.channels,
                      splits, jobs.size, stream);
  }
  if (!error && want_out) {
    error = add_parts(at.parts + jobs.projection_size, dout, p.order, p.channels, p.hidden, padded.channels,
                      padded.hidden, splits, jobs.size, stream);
  }
  return error;
}

}  // namespace

extern "C" {

int64_t dfkd_high_order_attention_backward_scratch(int64_t positions, int64_t channels, int64_t hidden, int64_t order,
                                                   int mode, int want_x, int want_proj, int want_out, int form) {
  if (!served(positions, channels, hidden, order)) return 0;
  const int orders = static_cast<int>(order);
  const Problem p{positions, static_cast<int>(channels), static_cast<int>(hidden), orders, mode ? orders : 1, 0};
  return Buffers<float16>(p, form, want_x != 0, want_proj != 0, want_out != 0, nullptr).bytes;
}

int dfkd_high_order_attention_backward(const void* upstream, const void* x, const void* proj_weight,
                                       const void* out_weight, int64_t positions, int64_t channels, int64_t hidden,
                                       int64_t order, int dtype, int mode, int result, int form, void* dx, void* dproj,
                                       void* dout, void* scratch, void* stream) {
  if (!served(positions, channels, hidden, order)) return DFKD_INVALID;
  const int orders = static_cast<int>(order);
  const Problem p{positions, static_cast<int>(channels), static_cast<int>(hidden), orders, mode ? orders : 1, result};
  return with_type(dtype, [=](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      return backward(p, form, static_cast<const T*>(upstream), static_cast<const T*>(x),
                      static_cast<const T*>(proj_weight), static_cast<const T*>(out_weight), static_cast<T*>(dx),
                      static_cast<T*>(dproj), static_cast<T*>(dout), scratch, stream);
    } else {
      return DFKD_INVALID;
    }
  });
}
}
