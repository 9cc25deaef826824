// Mixed high-order attention, backward on sm_90a: gradients of x and of both weights from x and the gradient of the
// result alone.
//
// Not yet run on a GPU. With g that gradient, for P positions of C channels, K = C / 4 and order 3: 6 P C bytes in a
// two-byte type, weights apart, and 13.5 P C^2 operations, the maps of forward among them:
//
//   dl = g x A (1 - A)       da_r = out_r^T dl       du_i = da_r [z_r > 0] prod over j != i of u_j
//   dx = g A + sum proj^T du       dproj = sum over P of du x^T       dout_r = sum over P of dl a_r^T
//
// Two forms, of which neither computes anything twice:
//
// one pass, high_order_attention_once.h: joint gates, up to 128 channels and 32 hidden units. Each processor has
//   the weights in shared memory and their gradients in registers while it walks over positions, so that it moves those
//   6 P C bytes and, at its end, a part of the weights' gradients: 36 KB with 64 channels, 144 KB with 128. 64
//   channels: what is done with each logit limits it beside memory; two warpgroups go through their own tiles without
//   waiting for each other, so that one computes while the other one's products are under way. 128 channels: the sums
//   over positions take 144 registers of two warpgroups. Two others, which have the registers that are left, halve
//   units and channels of a tile between them; how long the chain of their four products is, is the limit.
//
// the chain, high_order_attention_bwd.h, for all else: blocks of 128 channels and 32 hidden units each, 1, 2 or
//   4 of which are a cluster that has 128 or 192 positions: with 7 x 7 maps of 512 channels 100 blocks, with 14 x 14 of
//   256 channels 132. a, dl and du, which all blocks of the cluster need, go to memory, where the sums over positions
//   find them, and come back from the cache for the whole cluster at once, each block fetching its share. Of those 3.25
//   P C numbers nothing else leaves registers. Its phases wait for each other: what limits it is the time that a, dl
//   and du take there and back, and then the weights that each block reads from cache, 4.5 C^2 / RANKS numbers a tile.
//   The sums, high_order_attention_weights.h, are 128 x 192 tiles of both gradients, split over positions into
//   as many blocks as there are processors.
//
// a, dl and du are rounded to the type of the weights before they are multiplied, and so are g A before dx is added to
// it and, but with 64 channels, the factors that du is computed from.
//
// The parts of the weights' gradients are float32 and added in a fixed order: two runs give the same bits. How many
// there are follows from the sizes alone.
#include "high_order_attention_once.h"
#include "high_order_attention_weights.h"

namespace {

using namespace dfkd;
using namespace dfkd::high_order;
using namespace dfkd::high_order::back;

// ---- launches -------------------------------------------------------------------------------------------------------

enum Way { kBySize = 0, kOnce = 1, kChain = 2, kTallChain = 3 };

// Blocks or clusters at the same time: of four blocks, four find room in each group of 16 or 18 processors.
#ifdef DFKD_HOST
constexpr int clusters_of(int) { return 2; }
#else
constexpr int clusters_of(int ranks) { return ranks == 4 ? 32 : kProcessors / ranks; }
#endif

// Blocks of a cluster of the chain.
int ranks_of(int64_t channels, int64_t hidden) {
  const auto fit = [=](int ranks) { return channels <= ranks * kSliceChannels && hidden <= ranks * kSliceUnits; };
  return fit(1) ? 1 : fit(2) ? 2 : 4;
}

bool once_here(int64_t channels, int64_t hidden, int mode) {
  return channels <= kWideChannels && hidden <= kWideUnits && mode == 0;
}

// 0 where sizes and way are served, otherwise DFKD_INVALID with the reason.
int require_served(int64_t positions, int64_t channels, int64_t hidden, int64_t order, int way, int mode) {
  static_assert(kMostChannels == 4 * kSliceChannels && kMostHidden == 4 * kSliceUnits);
  int status = require_sizes(positions, channels, hidden, order);
  if (!status) status = require_size("form of the backward", way, kBySize, kTallChain);
  if (status) return status;
  const bool once = once_here(channels, hidden, mode);
  if (way == kOnce && !once) return dfkd_unsupported("one pass supports joint gates of up to 128 channels and 32 hidden maps");
  if (way == kTallChain && (mode != 0 || ranks_of(channels, hidden) == 1)) {
    return dfkd_unsupported("taller tiles support joint gates of more than 128 channels or 32 hidden maps");
  }
  return 0;
}

// Warpgroups of a block of the chain: as the rounds of all blocks are shorter.
int groups_of(const Problem& p, int way) {
  if (p.gates > 1 || way == kChain) return 2;
  if (way == kTallChain) return 3;
  const auto time = [&](int groups) {
    return divide_up(divide_up(p.count, 64 * groups) * ranks_of(p.channels, p.hidden), kProcessors) * groups;
  };
  return time(3) <= time(2) ? 3 : 2;
}

struct Maps {
  int error = 0;

  // (outer, rows, columns), contiguous.
  template <int WIDTH, typename T>
  void weights(TensorMap& to, const T* base, int64_t outer, int64_t rows, int64_t columns, Shape tile) {
    if (!error) error = make_tensor_map<WIDTH>(&to, base, {columns, rows, outer}, columns, rows * columns, tile);
  }
  // A matrix (rows, columns) in tiles.
  template <int WIDTH, typename T>
  void rows(TensorMap& to, const T* base, int64_t count, int64_t columns, int64_t tile_columns, int64_t tile_rows) {
    weights<WIDTH>(to, base, 1, count, columns, {tile_columns, tile_rows, 1});
  }
};

// What lies in the scratch.
template <typename T>
struct Buffers {
  Jobs jobs;
  int64_t blocks = 0;  // of one pass, 0 where it is not taken
  bool narrow = false;
  T *a = nullptr, *slopes = nullptr, *factors = nullptr;
  float* parts;
  int64_t bytes;

  Buffers(const Problem& p, int way, bool needs_grad_x, bool needs_grad_proj, bool needs_grad_out, void* scratch)
      : jobs(p.count, ranks_of(p.channels, p.hidden), p.gates, needs_grad_proj, needs_grad_out) {
    Parts place{static_cast<unsigned char*>(scratch)};
    if (way <= kOnce && once_here(p.channels, p.hidden, p.gates - 1)) {
      narrow = p.channels <= kNarrowChannels && p.hidden <= kNarrowUnits;
      const int64_t needed = divide_up(p.count, narrow ? 64 * kNarrowGroups : 64);
      blocks = needed < clusters_of(1) ? needed : clusters_of(1);
      parts = place.template take<float>(blocks * (narrow ? kNarrowParts : kWideParts));
      bytes = place.used;
      return;
    }
    a = place.template take<T>(p.count * kOrders * jobs.units);
    slopes = place.template take<T>(p.count * p.gates * jobs.channels);
    factors = place.template take<T>(needs_grad_x || needs_grad_proj ? p.count * kFactors * jobs.units : 0);
    parts = place.template take<float>(jobs.splits * jobs.size);
    bytes = place.used;
  }
};

uint32_t features_of(const Problem& p) { return p.map ? 0u : ~0u; }

template <typename T>
struct Arguments {
  const T *grad_output, *x, *proj, *out;
  T *dx, *dproj, *dout;
};

template <typename T, int RANKS, int GROUPS, bool EACH>
int launch_chain(const Problem& p, const Buffers<T>& at, const Arguments<T>& given, void* stream) {
  using Sizes = Chain<RANKS, GROUPS, EACH>;
  const bool needs_grad_x = given.dx != nullptr, needs_grad_factors = needs_grad_x || given.dproj != nullptr;
  constexpr int kUnits = Sizes::kUnits;
  ChainMaps maps{};
  Maps make;
  make.rows<64>(maps.x, given.x, p.count, p.channels, 64, Sizes::kRowsOfRank);
  make.rows<64>(maps.x_slice, given.x, p.count, p.channels, 64, Sizes::kRows);
  make.rows<64>(maps.grad_output, given.grad_output, p.count, p.channels, 64, Sizes::kRows);
  make.weights<64>(maps.proj_units, given.proj, factors_of(p.order), p.hidden, p.channels, {64, kSliceUnits, kFactors});
  make.weights<64>(maps.proj_channels, given.proj, factors_of(p.order), p.hidden, p.channels,
                   {64, RANKS == 1 ? 32 : 64, RANKS == 1 ? 2 : 1});
  make.weights<Sizes::kUnitWidth>(maps.out_channels, given.out, p.order, p.channels, p.hidden,
                                  {Sizes::kUnitWidth, kSliceChannels, 1});
  make.weights<32>(maps.out_units, given.out, p.order, p.channels, p.hidden, {kSliceUnits, 64, EACH ? 1 : kOrders});
  make.rows<Sizes::kUnitWidth>(maps.a, at.a, p.count, kOrders * kUnits, Sizes::kUnitWidth, Sizes::kRowsOfRank);
  make.rows<32>(maps.a_to, at.a, p.count, kOrders * kUnits, kSliceUnits, 64);
  make.rows<64>(maps.slopes, at.slopes, p.count, Sizes::kGates * Sizes::kChannels, 64, Sizes::kRowsOfRank);
  make.rows<64>(maps.slopes_to, at.slopes, p.count, Sizes::kGates * Sizes::kChannels, 64, 64);
  if (needs_grad_factors) {
    make.rows<64>(maps.factors, at.factors, p.count, kFactors * kUnits, 64, Sizes::kRowsOfRank);
    make.rows<32>(maps.factors_to, at.factors, p.count, kFactors * kUnits, kSliceUnits, 64);
  }
  if (needs_grad_x) make.rows<64>(maps.dx_to, given.dx, p.count, p.channels, 64, 64);
  if (make.error) return make.error;
  const int64_t tiles = divide_up(p.count, Sizes::kRows), most = clusters_of(RANKS);
  const int64_t clusters = tiles < most ? tiles : most;
  return launch_cluster(chain_wgmma<T, RANKS, GROUPS, EACH>, dim3(static_cast<unsigned>(clusters * RANKS)),
                        dim3(Sizes::kThreads), Sizes::kShared, RANKS, false, stream, maps, tiles, p.order,
                        features_of(p), needs_grad_factors, needs_grad_x);
}

template <typename T, int RANKS>
int launch_chain_of(const Problem& p, int way, const Buffers<T>& at, const Arguments<T>& given, void* stream) {
  if (p.gates > 1) return launch_chain<T, RANKS, 2, true>(p, at, given, stream);
  if constexpr (RANKS > 1) {
    if (groups_of(p, way) == 3) return launch_chain<T, RANKS, 3, false>(p, at, given, stream);
  }
  return launch_chain<T, RANKS, 2, false>(p, at, given, stream);
}

template <typename T>
int launch_weights(const Problem& p, const Buffers<T>& at, const Arguments<T>& given, void* stream) {
  const Jobs& jobs = at.jobs;
  if (jobs.total == 0) return 0;
  WeightMaps maps{};
  Maps make;
  make.rows<64>(maps.x, given.x, p.count, p.channels, 64, 64);
  make.rows<64>(maps.slopes, at.slopes, p.count, jobs.gates * jobs.channels, 64, 64);
  make.rows<64>(maps.a, at.a, p.count, kOrders * jobs.units, 64, 64);
  if (jobs.projections > 0) make.rows<64>(maps.factors, at.factors, p.count, kFactors * jobs.units, 64, 64);
  if (make.error) return make.error;
  return launch_cluster(weights_wgmma<T>,
                        dim3(static_cast<unsigned>(jobs.total), static_cast<unsigned>(jobs.splits)),
                        dim3(kWeightThreads), kWeightShared, 1, false, stream, maps, at.parts, p.count, jobs);
}

template <typename T>
int launch_once(const Problem& p, const Buffers<T>& at, const Arguments<T>& given, void* stream) {
  OnceMaps maps{};
  Maps make;
  make.rows<64>(maps.x, given.x, p.count, p.channels, 64, 64);
  make.rows<64>(maps.grad_output, given.grad_output, p.count, p.channels, 64, 64);
  make.weights<64>(maps.proj, given.proj, factors_of(p.order), p.hidden, p.channels, {64, 16, kFactors});
  make.weights<16>(maps.out, given.out, p.order, p.channels, p.hidden,
                   {16, at.narrow ? kNarrowChannels : kWideChannels, kOrders});
  if (given.dx != nullptr) make.rows<64>(maps.dx, given.dx, p.count, p.channels, 64, 64);
  if (make.error) return make.error;
  const dim3 blocks(static_cast<unsigned>(at.blocks));
  const int64_t tiles = divide_up(p.count, 64);
  const int needs_grad_x = given.dx != nullptr;
  if (at.narrow) {
    return launch_cluster(once_narrow_wgmma<T>, blocks, dim3(kNarrowThreads), kNarrowShared, 1, false, stream, maps,
                          at.parts, tiles, features_of(p), needs_grad_x);
  }
  return launch_cluster(once_wide_wgmma<T>, blocks, dim3(kWideThreads), kWideShared, 1, false, stream, maps, at.parts,
                        tiles, features_of(p), needs_grad_x);
}

template <typename T>
int backward(const Problem& p, int way, const Arguments<T>& given, void* scratch, void* stream) {
  const Buffers<T> at(p, way, given.dx != nullptr, given.dproj != nullptr, given.dout != nullptr, scratch);
  if (at.bytes > 0 && scratch == nullptr) return dfkd_unsupported("scratch is null");
  int error = 0;
  if (p.count > 0 && at.blocks > 0) {
    error = launch_once(p, at, given, stream);
  } else if (p.count > 0) {
    switch (at.jobs.ranks) {
      case 1:
        error = launch_chain_of<T, 1>(p, way, at, given, stream);
        break;
      case 2:
        error = launch_chain_of<T, 2>(p, way, at, given, stream);
        break;
      default:
        error = launch_chain_of<T, 4>(p, way, at, given, stream);
    }
    if (!error) error = launch_weights(p, at, given, stream);
  }
  if (error) return error;
  if (at.blocks > 0) {
    return add_parts(at.parts, p, at.narrow ? kNarrowChannels : kWideChannels, at.narrow ? kNarrowUnits : kWideUnits,
                     given.dproj, given.dout, at.blocks, true, stream);
  }
  return add_parts(at.parts, p, at.jobs.channels, at.jobs.units, given.dproj, given.dout, at.jobs.splits, false,
                   stream);
}

}  // namespace

extern "C" {

int64_t dfkd_high_order_attention_backward_scratch(int64_t positions, int64_t channels, int64_t hidden, int64_t order,
                                                   int mode, int needs_grad_x, int needs_grad_proj, int needs_grad_out, int form) {
  if (require_served(positions, channels, hidden, order, form, mode)) return 0;
  const Problem p{positions,          static_cast<int>(channels), static_cast<int>(hidden), static_cast<int>(order),
                  mode ? kOrders : 1, 0};
  return Buffers<float16>(p, form, needs_grad_x != 0, needs_grad_proj != 0, needs_grad_out != 0, nullptr).bytes;
}

int dfkd_high_order_attention_backward(const void* grad_output, const void* x, const void* proj_weight,
                                       const void* out_weight, int64_t positions, int64_t channels, int64_t hidden,
                                       int64_t order, int dtype, int mode, int result, int form, void* dx, void* dproj,
                                       void* dout, void* scratch, void* stream) {
  if (const int status = require_served(positions, channels, hidden, order, form, mode)) return status;
  const Problem p{positions,          static_cast<int>(channels), static_cast<int>(hidden), static_cast<int>(order),
                  mode ? kOrders : 1, result};
  return dispatch_dtype(dtype, [=](auto type) {
    using T = decltype(type);
    const Arguments<T> given{static_cast<const T*>(grad_output),    static_cast<const T*>(x),
                             static_cast<const T*>(proj_weight), static_cast<const T*>(out_weight),
                             static_cast<T*>(dx),                static_cast<T*>(dproj),
                             static_cast<T*>(dout)};
    return backward(p, form, given, scratch, stream);
  });
}
}
