// Mixed high-order attention, backward for sm_90a: gradients of x and of both weights from x and grad_output.
//
// With g = grad_output, u_r,i = proj_r,i x, z_r = prod_i u_r,i, A and a_r (high_order_attention.cu), for joint gates:
//
//   dl = g x A (1 - A)         da_r = out_r^T dl                     du_r,i = da_r [z_r > 0] prod_{j != i} u_r,j
//   dx = g A + sum proj^T du   dproj = sum over positions of du x^T  dout_r = sum over positions of dl a_r^T
//
// P positions, C channels, K = C / 4 hidden units and order 3 take 6 P C bytes of x, g and dx, plus weights, and 13.5
// P C^2 FLOPs, including the recomputed forward. Two forms, not yet run on a GPU, compute nothing twice.
//
// one pass (high_order_attention_once.h), joint gates, up to 128 channels and 32 hidden units: a persistent kernel with
//   the weights in shared memory and dproj and dout in registers. It moves the 6 P C bytes and, per block, one partial
//   sum of the weight gradients (36 KB with 64 channels, 144 KB with 128). 64 channels: two consumer warpgroups have
//   independent pipelines, so element-wise work of one overlaps wgmmas of the other. 128 channels: dproj and dout take
//   144 registers of two warpgroups; two others compute dl, du and dx, limited by the latency of their four GEMMs.
// chain (high_order_attention_bwd.h and _weights.h), all other sizes: clusters of 1, 2 or 4 blocks share 128 or 192
//   positions, each block with 128 channels and 32 hidden units. 3.25 P C elements of a_r, dl and du go to scratch.
//   TMA multicast reads them back from L2 for the whole cluster; a split-K kernel computes dproj and dout from them.
//   These round trips through L2 limit it, and then the 4.5 C^2 / RANKS elements of weights per tile and block.
//   For 64 samples, 7 x 7 maps of 512 channels use 100 blocks, and 14 x 14 maps of 256 channels use 132.
//
// a_r, dl and du are rounded to the weights' dtype before each GEMM, and g A before dx is added to it. With more than
// 64 channels, so are the factors from which du is computed. Partial sums of the weight gradients are float32 and
// reduced in a fixed order that depends only on sizes: results are bitwise deterministic.
#include "high_order_attention_once.h"
#include "high_order_attention_weights.h"

namespace {

using namespace dfkd;
using namespace dfkd::high_order;
using namespace dfkd::high_order::bwd;

// ---- launches -------------------------------------------------------------------------------------------------------

enum Form { kBySize = 0, kOnePass = 1, kChain = 2, kTallChain = 3 };

// Clusters that run at the same time. A GPC has 16 or 18 SMs, which fit four clusters of four blocks.
#ifdef DFKD_HOST
constexpr int max_clusters(int) { return 2; }
#else
constexpr int max_clusters(int ranks) { return ranks == 4 ? 32 : kNumSMs / ranks; }
#endif

// Cluster size of the chain.
int cluster_ranks(int64_t channels, int64_t hidden) {
  const auto fit = [=](int ranks) { return channels <= ranks * kBlockChannels && hidden <= ranks * kBlockUnits; };
  return fit(1) ? 1 : fit(2) ? 2 : 4;
}

bool fits_one_pass(int64_t channels, int64_t hidden, int mode) {
  return channels <= OnePass128::kChannels && hidden <= OnePass128::kUnits && mode == 0;
}

// Returns 0 if the kernels support the sizes and the form, else DFKD_INVALID with the reason.
int require_supported(int64_t positions, int64_t channels, int64_t hidden, int64_t order, int form, int mode) {
  static_assert(kMaxChannels == 4 * kBlockChannels && kMaxHidden == 4 * kBlockUnits);
  int status = require_sizes(positions, channels, hidden, order);
  if (!status) status = require_size("form of the backward", form, kBySize, kTallChain);
  if (status) return status;
  if (form == kOnePass && !fits_one_pass(channels, hidden, mode)) {
    return dfkd_unsupported("one pass supports joint gates of up to 128 channels and 32 hidden maps");
  }
  if (form == kTallChain && (mode != 0 || cluster_ranks(channels, hidden) == 1)) {
    return dfkd_unsupported("taller tiles support joint gates of more than 128 channels or 32 hidden maps");
  }
  return 0;
}

// Consumer warpgroups per block of the chain: 2 or 3, whichever needs less time in whole waves of blocks.
int consumer_warpgroups(const Problem& p, int form) {
  if (p.num_gates > 1 || form == kChain) return 2;
  if (form == kTallChain) return 3;
  const auto time = [&](int consumers) {
    return divide_up(divide_up(p.positions, 64 * consumers) * cluster_ranks(p.channels, p.hidden), kNumSMs) * consumers;
  };
  return time(3) <= time(2) ? 3 : 2;
}

// The buffers in scratch memory.
template <typename T>
struct Buffers {
  WeightGradTiles tiles;
  bool one_pass;
  int channels, units;  // padded
  int64_t splits;       // partial sums of the weight gradients; the blocks of one pass
  T *a = nullptr, *dl = nullptr, *du = nullptr;
  float* partials;
  int64_t bytes;

  Buffers(const Problem& p, int form, bool needs_grad_x, bool needs_grad_proj, bool needs_grad_out, void* scratch)
      : tiles(p.positions, cluster_ranks(p.channels, p.hidden), p.num_gates, needs_grad_proj, needs_grad_out),
        one_pass(form <= kOnePass && fits_one_pass(p.channels, p.hidden, p.num_gates - 1)),
        channels(tiles.channels),
        units(tiles.units),
        splits(tiles.splits) {
    ScratchAllocator allocator{static_cast<unsigned char*>(scratch)};
    if (one_pass) {
      const bool fits_64 = p.channels <= OnePass64::kChannels && p.hidden <= OnePass64::kUnits;
      channels = fits_64 ? OnePass64::kChannels : OnePass128::kChannels;
      units = fits_64 ? OnePass64::kUnits : OnePass128::kUnits;
      const int64_t needed = divide_up(p.positions, fits_64 ? 64 * OnePass64::kConsumers : 64);
      splits = needed < max_clusters(1) ? needed : max_clusters(1);
      partials = allocator.allocate<float>(splits * (fits_64 ? OnePass64::kPartials : OnePass128::kPartials));
    } else {
      a = allocator.allocate<T>(p.positions * kOrders * units);
      dl = allocator.allocate<T>(p.positions * p.num_gates * channels);
      du = allocator.allocate<T>(needs_grad_x || needs_grad_proj ? p.positions * kFactors * units : 0);
      partials = allocator.allocate<float>(splits * tiles.split_size);
    }
    bytes = allocator.used;
  }
};

uint32_t feature_mask(const Problem& p) { return p.return_gate ? 0u : ~0u; }

template <typename T>
struct Tensors {
  const T *grad_output, *x, *proj, *out;
  T *dx, *dproj, *dout;
};

template <typename T, int RANKS, int CONSUMERS, bool PER_ORDER>
int launch_chain(const Problem& p, const Buffers<T>& buffers, const Tensors<T>& tensors, void* stream) {
  using Traits = ChainTraits<RANKS, CONSUMERS, PER_ORDER>;
  const bool needs_grad_x = tensors.dx != nullptr, needs_grad_factors = needs_grad_x || tensors.dproj != nullptr;
  constexpr int kUnits = Traits::kUnits;
  ChainTensorMaps maps{};
  TensorMapBuilder build{p};
  build.matrix<64>(maps.x, tensors.x, p.channels, 64, Traits::kRowsPerRank);
  build.matrix<64>(maps.x_channels, tensors.x, p.channels, 64, Traits::kRows);
  build.matrix<64>(maps.grad_output, tensors.grad_output, p.channels, 64, Traits::kRows);
  build.proj_weight<64>(maps.proj_units, tensors.proj, {64, kBlockUnits, kFactors});
  build.proj_weight<64>(maps.proj_channels, tensors.proj, {64, RANKS == 1 ? 32 : 64, RANKS == 1 ? 2 : 1});
  build.out_weight<Traits::kABoxWidth>(maps.out_channels, tensors.out, {Traits::kABoxWidth, kBlockChannels, 1});
  build.out_weight<32>(maps.out_units, tensors.out, {kBlockUnits, 64, PER_ORDER ? 1 : kOrders});
  build.matrix<Traits::kABoxWidth>(maps.a, buffers.a, kOrders * kUnits, Traits::kABoxWidth, Traits::kRowsPerRank);
  build.matrix<32>(maps.a_store, buffers.a, kOrders * kUnits, kBlockUnits, 64);
  build.matrix<64>(maps.dl, buffers.dl, Traits::kNumGates * Traits::kChannels, 64, Traits::kRowsPerRank);
  build.matrix<64>(maps.dl_store, buffers.dl, Traits::kNumGates * Traits::kChannels, 64, 64);
  if (needs_grad_factors) {
    build.matrix<64>(maps.du, buffers.du, kFactors * kUnits, 64, Traits::kRowsPerRank);
    build.matrix<32>(maps.du_store, buffers.du, kFactors * kUnits, kBlockUnits, 64);
  }
  if (needs_grad_x) build.matrix<64>(maps.dx_store, tensors.dx, p.channels, 64, 64);
  if (build.error) return build.error;
  const int64_t tiles = divide_up(p.positions, Traits::kRows), limit = max_clusters(RANKS);
  const int64_t clusters = tiles < limit ? tiles : limit;
  return launch_cluster(chain_wgmma<T, RANKS, CONSUMERS, PER_ORDER>, dim3(static_cast<unsigned>(clusters * RANKS)),
                        dim3(Traits::kThreads), Traits::kSmemBytes, RANKS, false, stream, maps, tiles, p.order,
                        feature_mask(p), needs_grad_factors, needs_grad_x);
}

template <typename T, int RANKS>
int launch_chain_with(const Problem& p, int form, const Buffers<T>& buffers, const Tensors<T>& tensors, void* stream) {
  if (p.num_gates > 1) return launch_chain<T, RANKS, 2, true>(p, buffers, tensors, stream);
  if constexpr (RANKS > 1) {
    if (consumer_warpgroups(p, form) == 3) return launch_chain<T, RANKS, 3, false>(p, buffers, tensors, stream);
  }
  return launch_chain<T, RANKS, 2, false>(p, buffers, tensors, stream);
}

template <typename T>
int launch_weight_grads(const Problem& p, const Buffers<T>& buffers, const Tensors<T>& tensors, void* stream) {
  const WeightGradTiles& tiles = buffers.tiles;
  if (tiles.count == 0) return 0;
  WeightGradTensorMaps maps{};
  TensorMapBuilder build{p};
  build.matrix<64>(maps.x, tensors.x, p.channels, 64, 64);
  build.matrix<64>(maps.dl, buffers.dl, tiles.gates * tiles.channels, 64, 64);
  build.matrix<64>(maps.a, buffers.a, kOrders * tiles.units, 64, 64);
  if (tiles.proj_tiles > 0) build.matrix<64>(maps.du, buffers.du, kFactors * tiles.units, 64, 64);
  if (build.error) return build.error;
  const dim3 blocks(static_cast<unsigned>(tiles.count), static_cast<unsigned>(tiles.splits));
  return launch(weight_grad_wgmma<T>, blocks, dim3(kGradThreads), kGradSmemBytes, stream, maps, buffers.partials,
                p.positions, tiles);
}

template <typename T>
int launch_one_pass(const Problem& p, const Buffers<T>& buffers, const Tensors<T>& tensors, void* stream) {
  OnePassTensorMaps maps{};
  TensorMapBuilder build{p};
  build.matrix<64>(maps.x, tensors.x, p.channels, 64, 64);
  build.matrix<64>(maps.grad_output, tensors.grad_output, p.channels, 64, 64);
  build.proj_weight<64>(maps.proj, tensors.proj, {64, 16, kFactors});
  build.out_weight<16>(maps.out, tensors.out, {16, buffers.channels, kOrders});
  if (tensors.dx != nullptr) build.matrix<64>(maps.dx, tensors.dx, p.channels, 64, 64);
  if (build.error) return build.error;
  const bool is_64 = buffers.channels == OnePass64::kChannels;
  return launch(is_64 ? one_pass_64_wgmma<T> : one_pass_128_wgmma<T>, dim3(static_cast<unsigned>(buffers.splits)),
                dim3(is_64 ? OnePass64::kThreads : OnePass128::kThreads),
                is_64 ? OnePass64::kSmemBytes : OnePass128::kSmemBytes, stream, maps, buffers.partials,
                divide_up(p.positions, 64), feature_mask(p), tensors.dx != nullptr);
}

template <typename T>
int backward(const Problem& p, int form, const Tensors<T>& tensors, void* scratch, void* stream) {
  const Buffers<T> buffers(p, form, tensors.dx != nullptr, tensors.dproj != nullptr, tensors.dout != nullptr, scratch);
  if (buffers.bytes > 0 && scratch == nullptr) return dfkd_unsupported("scratch is null");
  int error = 0;
  if (p.positions > 0 && buffers.one_pass) {
    error = launch_one_pass(p, buffers, tensors, stream);
  } else if (p.positions > 0) {
    const int ranks = buffers.tiles.ranks;
    error = ranks == 1   ? launch_chain_with<T, 1>(p, form, buffers, tensors, stream)
            : ranks == 2 ? launch_chain_with<T, 2>(p, form, buffers, tensors, stream)
                         : launch_chain_with<T, 4>(p, form, buffers, tensors, stream);
    if (!error) error = launch_weight_grads(p, buffers, tensors, stream);
  }
  if (error) return error;
  return reduce_splits(buffers.partials, p, buffers.channels, buffers.units, tensors.dproj, tensors.dout,
                       buffers.splits, buffers.one_pass, stream);
}

}  // namespace

extern "C" {

int64_t dfkd_high_order_attention_backward_scratch(int64_t positions, int64_t channels, int64_t hidden, int64_t order,
                                                   int mode, int needs_grad_x, int needs_grad_proj, int needs_grad_out,
                                                   int form) {
  if (require_supported(positions, channels, hidden, order, form, mode)) return 0;
  const Problem p{positions,          static_cast<int>(channels), static_cast<int>(hidden), static_cast<int>(order),
                  mode ? kOrders : 1, 0};
  return Buffers<float16>(p, form, needs_grad_x != 0, needs_grad_proj != 0, needs_grad_out != 0, nullptr).bytes;
}

int dfkd_high_order_attention_backward(const void* grad_output, const void* x, const void* proj_weight,
                                       const void* out_weight, int64_t positions, int64_t channels, int64_t hidden,
                                       int64_t order, int dtype, int mode, int result, int form, void* dx, void* dproj,
                                       void* dout, void* scratch, void* stream) {
  if (const int status = require_supported(positions, channels, hidden, order, form, mode)) return status;
  const Problem p{positions,          static_cast<int>(channels), static_cast<int>(hidden), static_cast<int>(order),
                  mode ? kOrders : 1, result};
  return dispatch_dtype(dtype, [=](auto type) {
    using T = decltype(type);
    const Tensors<T> tensors{static_cast<const T*>(grad_output), static_cast<const T*>(x),
                             static_cast<const T*>(proj_weight), static_cast<const T*>(out_weight),
                             static_cast<T*>(dx),                static_cast<T*>(dproj),
                             static_cast<T*>(dout)};
    return backward(p, form, tensors, scratch, stream);
  });
}
}
