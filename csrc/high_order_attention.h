// Mixed high-order attention: code shared by the forward and backward kernels.
//
// A warpgroup computes 64 positions. One GEMM computes all six factors of a set of hidden units, with the units of each
// factor contiguous along N. The products of its accumulator fragments, after ReLU, are the A operand of the second
// GEMM, in registers.
//
// A "box" is the 64 x 64 shared-memory tile that one TMA instruction copies with the 128-byte swizzle.
#pragma once

#include "sm90.h"

namespace dfkd::high_order {

#ifdef DFKD_HOST
constexpr int kNumSMs = 1;  // small tests then reach every loop
#else
constexpr int kNumSMs = 132;  // of an H100; fixed, so that results are bitwise equal on every device
#endif

__host__ __device__ constexpr int num_factors(int order) { return order * (order + 1) / 2; }

constexpr int kOrders = 3, kFactors = num_factors(kOrders);  // lower orders are padded with zeros
constexpr int kWarpgroupRows = 64;                           // positions per warpgroup
constexpr int kBoxElements = kWarpgroupRows * 64;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

template <typename T, int N>
struct alignas(sizeof(T) * N) AlignedArray {
  T at[N];
};

// ---- element-wise functions ----------------------------------------------------------------------------------------

// Returns x if z > 0, else 0. If z is NaN, it returns x, as in torch.relu.
__device__ __forceinline__ float where_positive(float z, float x) { return z <= 0.0f ? 0.0f : x; }

// Returns the product of the factors u of one order, without the factor `excluded` if that is not negative.
template <int R>
__device__ __forceinline__ float product_of(const float (&u)[R], int excluded = -1) {
  float z = 1.0f;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    if (i != excluded) z *= u[i];
  }
  return z;
}

// Calls f(order, index of its first factor) for orders 1 to R, both as integral constants.
template <int R, typename F>
__device__ __forceinline__ void for_each_order(F f) {
  if constexpr (R > 1) for_each_order<R - 1>(f);
  f(std::integral_constant<int, R>{}, std::integral_constant<int, num_factors(R - 1)>{});
}

constexpr int kMaxChannels = 512, kMaxHidden = 128;

// Returns 0 if the kernels support the sizes, else DFKD_INVALID with the reason.
inline int require_sizes(int64_t positions, int64_t channels, int64_t hidden, int64_t order) {
  int status = require_size("R of out_weight (R, C, K)", order, 1, kOrders);
  if (!status) status = require_size("C of out_weight (R, C, K)", channels, 8, kMaxChannels, 8);
  if (!status) status = require_size("K of out_weight (R, C, K)", hidden, 8, kMaxHidden, 8);
  if (!status) status = require_size("N H W of x (N, C, H, W)", positions, 0, int64_t{1} << 30);
  return status;
}

struct Problem {
  int64_t positions;
  int channels, hidden, order;
  int num_gates;    // 1 for mode "joint", one per order for "per_order"
  int return_gate;  // the result is A instead of A x
};

// Creates a launch's TMA descriptors; `error` keeps the first failure.
struct TensorMapBuilder {
  const Problem& p;
  int error = 0;

  // Describes a contiguous tensor [z, y, x].
  template <int WIDTH>
  void tensor(TensorMap& to, const void* base, Shape shape, Shape box) {
    if (!error) error = make_tensor_map<WIDTH>(&to, base, shape, shape.x, shape.x * shape.y, box);
  }
  // Describes a contiguous tensor [positions, columns].
  template <int WIDTH>
  void matrix(TensorMap& to, const void* base, int64_t columns, int64_t box_columns, int64_t box_rows) {
    tensor<WIDTH>(to, base, {columns, p.positions, 1}, {box_columns, box_rows, 1});
  }
  template <int WIDTH>
  void proj_weight(TensorMap& to, const void* base, Shape box) {
    tensor<WIDTH>(to, base, {p.channels, p.hidden, num_factors(p.order)}, box);
  }
  template <int WIDTH>
  void out_weight(TensorMap& to, const void* base, Shape box) {
    tensor<WIDTH>(to, base, {p.hidden, p.channels, p.order}, box);
  }
};

// Allocates consecutive buffers of the scratch memory. With a null base it only counts bytes.
struct ScratchAllocator {
  unsigned char* base;
  int64_t used = 0;

  template <typename T>
  T* allocate(int64_t elements) {
    T* const buffer = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += round_up(elements * static_cast<int64_t>(sizeof(T)), 16);
    return buffer;
  }
};

// ---- conversions ---------------------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ void unpack_pair(uint32_t pair, float (&values)[2]) {
#ifndef DFKD_HOST
  if constexpr (std::is_same_v<T, bfloat16>) {
    values[0] = __uint_as_float(pair << 16);
    values[1] = __uint_as_float(pair & 0xffff0000u);
    return;
  }
#endif
  values[0] = to_float(T{static_cast<uint16_t>(pair)});
  values[1] = to_float(T{static_cast<uint16_t>(pair >> 16)});
}

#ifdef DFKD_HOST
inline float rcp_approx(float x) { return 1.0f / x; }
#else
__device__ __forceinline__ float rcp_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
#endif

constexpr float kLog2E = 1.44269504f;

// Takes two MUFU instructions, ex2 and rcp, and two others.
__device__ __forceinline__ float sigmoid(float logit) { return rcp_approx(1.0f + exp2_approx_ftz(-kLog2E * logit)); }

template <typename... Maps>
__device__ __forceinline__ void prefetch_tensormaps(const Maps&... maps) {
  (prefetch_tensormap(maps), ...);
}

// ---- GEMMs ---------------------------------------------------------------------------------------------------------

// Issues the wgmmas of STEPS k-steps by step(k) and waits for them. registers: accumulators and A fragments.
template <int STEPS, typename Step, typename... Registers>
__device__ __forceinline__ void gemm(Step step, Registers&... registers) {
  (warpgroup_fence_operand(registers), ...);
  warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < STEPS; ++k) step(k);
  warpgroup_commit_batch();
  warpgroup_wait<0>();
  (warpgroup_fence_operand(registers), ...);
}

// Computes a_r = relu(prod_i u_r,i) for 8 CHUNKS hidden units. u[CHUNKS * factor + n] holds the n-th eight units of a
// factor. Calls store(r - 1, n, half, pair) for each pair of units; half 1 is 8 rows below half 0.
template <typename T, int CHUNKS, typename Store>
__device__ __forceinline__ void relu_product(const float (&u)[kFactors * CHUNKS][4], Store store) {
#pragma unroll
  for (int n = 0; n < CHUNKS; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for_each_order<kOrders>([&](auto order, auto first) {
        constexpr int kOrder = order, kFirst = first;
        float z[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float factors[kOrder];
#pragma unroll
          for (int i = 0; i < kOrder; ++i) factors[i] = u[CHUNKS * (kFirst + i) + n][2 * half + e];
          z[e] = product_of(factors);
        }
        store(kOrder - 1, n, half, pack_rn<T>(where_positive(z[0], z[0]), where_positive(z[1], z[1])));
      });
    }
  }
}
// Does the same, and stores a_r as A fragments of the second GEMM: k-steps of 16 units, order by order.
template <typename T, int UNITS>
__device__ __forceinline__ void relu_product_fragments(const float (&u)[kFactors * UNITS / 8][4],
                                                       uint32_t (&a)[kOrders * UNITS / 16][4]) {
  relu_product<T, UNITS / 8>(u, [&](int r, int n, int half, uint32_t pair) {
    a[r * (UNITS / 16) + n / 2][n % 2 * 2 + half] = pair;
  });
}

template <int N>
__device__ __forceinline__ void warpgroup_fence_operands(float (&logits)[N][8][4]) {
#pragma unroll
  for (int r = 0; r < N; ++r) warpgroup_fence_operand(logits[r]);
}

// Issues logits = sum_r a_r out_r^T, or += if `accumulate`, for 64 channels and UNITS hidden units. PER_ORDER keeps the
// logits of the orders separate. out_smem: (orders, 64, UNITS), swizzled.
template <typename T, int UNITS, bool PER_ORDER>
__device__ __forceinline__ void mma_logits(float (&logits)[PER_ORDER ? kOrders : 1][8][4],
                                           const uint32_t (&a)[kOrders * UNITS / 16][4], const T* out_smem,
                                           bool accumulate) {
  constexpr int kSteps = UNITS / 16;
#pragma unroll
  for (int r = 0; r < kOrders; ++r) {
    const uint64_t b = make_smem_desc<UNITS>(out_smem + r * 64 * UNITS);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      wgmma<T, 64>(logits[PER_ORDER ? r : 0], a[r * kSteps + k], advance_desc(b, 32 * k),
                   accumulate || (PER_ORDER ? k : r + k) > 0);
    }
  }
}

// Replaces x by A x, or by A, in a warpgroup's box. Each thread updates the elements of its accumulator fragment.
template <typename T, bool PER_ORDER>
__device__ __forceinline__ void apply_gate(const float (&logits)[PER_ORDER ? kOrders : 1][8][4], T* box, int order,
                                           int return_gate, float inv_order) {
  const int warp = static_cast<int>(threadIdx.x) % kWarpgroupSize / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  // The swizzle XORs the chunk index with the row, so one more XOR reaches another chunk of the row.
  const int row = 16 * warp + lane / 4, pair = 2 * (lane % 4);
  const int store_offset = swizzle_offset<64>(row, 0);
  const int ldmatrix_offset = swizzle_offset<64>(16 * warp + lane % 16, lane / 16);
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    uint32_t pairs[4] = {};
    if (!return_gate) ldmatrix(pairs, box + (ldmatrix_offset ^ (16 * c)));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = 2 * c + i / 2, half = i % 2;
      float gate[2], value[2] = {1.0f, 1.0f};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        gate[e] = sigmoid(logits[0][n][2 * half + e]);
        if constexpr (PER_ORDER) {
#pragma unroll
          for (int r = 1; r < kOrders; ++r) {
            if (r < order) gate[e] += sigmoid(logits[r][n][2 * half + e]);
          }
          gate[e] *= inv_order;
        }
      }
      if (!return_gate) unpack_pair<T>(pairs[i], value);
      *reinterpret_cast<uint32_t*>(box + (store_offset ^ (8 * n)) + 512 * half + pair) =
          pack_rn<T>(value[0] * gate[0], value[1] * gate[1]);
    }
  }
}

}  // namespace dfkd::high_order
