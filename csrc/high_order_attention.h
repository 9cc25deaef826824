// Mixed high-order attention: what its kernels share.
//
// A warpgroup has 64 positions. One product gives all six factors of some hidden units, units of a factor side by side,
// so that their accumulators, multiplied and rectified, are the left operand of the second product as they lie.
#pragma once

#include "sm90.h"

namespace dfkd::high_order {

#ifdef DFKD_HOST
constexpr int kProcessors = 1;  // so that small tests reach every loop
#else
// Of the card that this is written for: the same bits wherever they run.
constexpr int kProcessors = 132;
#endif

__host__ __device__ constexpr int factors_of(int order) { return order * (order + 1) / 2; }

constexpr int kOrders = 3, kFactors = factors_of(kOrders);  // of fewer orders the rest is zeros
constexpr int kGroupRows = 64;                              // positions of a warpgroup
constexpr int kSquare = kGroupRows * 64;                    // elements of a panel of 64 rows and 64 columns

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

struct alignas(16) Chunk {
  uint32_t words[4];
};
struct alignas(8) FloatPair {
  float first, second;
};

// ---- the formulas --------------------------------------------------------------------------------------------------

// x where z is not at or below zero: a NaN in z passes, as torch's relu lets it.
__device__ __forceinline__ float positive(float z, float x) { return z <= 0.0f ? 0.0f : x; }

// The product of the factors of one order, all or all but one.
template <int R>
__device__ __forceinline__ float product_of(const float (&u)[R]) {
  float z = u[0];
#pragma unroll
  for (int i = 1; i < R; ++i) z *= u[i];
  return z;
}
template <int R>
__device__ __forceinline__ float others(const float (&u)[R], int but) {
  float z = 1.0f;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    if (i != but) z *= u[i];
  }
  return z;
}

// Call f with every order from 1 to R as a constant, and where its first factor is.
template <int R, typename F>
__device__ __forceinline__ void for_orders(F f) {
  if constexpr (R > 1) for_orders<R - 1>(f);
  f(std::integral_constant<int, R>{}, std::integral_constant<int, factors_of(R - 1)>{});
}

constexpr int kMostChannels = 512, kMostHidden = 128;

// 0 where sizes are served, otherwise DFKD_INVALID with the reason.
inline int require_sizes(int64_t positions, int64_t channels, int64_t hidden, int64_t order) {
  int status = require_size("R of out_weight (R, C, K)", order, 1, kOrders);
  if (!status) status = require_size("C of out_weight (R, C, K)", channels, 8, kMostChannels, 8);
  if (!status) status = require_size("K of out_weight (R, C, K)", hidden, 8, kMostHidden, 8);
  if (!status) status = require_size("N H W of x (N, C, H, W)", positions, 0, int64_t{1} << 30);
  return status;
}

struct Problem {
  int64_t count;
  int channels, hidden, order, gates, map;
};

// Parts of the scratch one after the other; without a base only their size.
struct Parts {
  unsigned char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t elements) {
    T* const part = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += round_up(elements * static_cast<int64_t>(sizeof(T)), 16);
    return part;
  }
};

// ---- numbers -------------------------------------------------------------------------------------------------------

// Two numbers out of one register.
#ifdef DFKD_HOST
template <typename T>
void unpack_pair(uint32_t pair, float (&values)[2]) {
  values[0] = to_float(T{static_cast<uint16_t>(pair & 0xffffu)});
  values[1] = to_float(T{static_cast<uint16_t>(pair >> 16)});
}
inline float reciprocal_fast(float x) { return 1.0f / x; }
#else
template <typename T>
__device__ __forceinline__ void unpack_pair(uint32_t pair, float (&values)[2]) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    values[0] = __uint_as_float(pair << 16);
    values[1] = __uint_as_float(pair & 0xffff0000u);
  } else {
    values[0] = to_float(T{static_cast<uint16_t>(pair & 0xffffu)});
    values[1] = to_float(T{static_cast<uint16_t>(pair >> 16)});
  }
}
// Without the steps that keep denormal numbers.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
#endif

constexpr float kLog2E = 1.44269504f;

// The sigmoid: two of the slow instructions and two others.
__device__ __forceinline__ float opened(float logit) { return reciprocal_fast(1.0f + exp2_approx_ftz(-kLog2E * logit)); }

// ---- the two products of a warpgroup's positions -------------------------------------------------------------------

// UNITS hidden units: u[factor UNITS / 8 + ...] of the first product to a, the left operands of the second one's steps
// of 16 units, those of order 1 first.
template <typename T, int UNITS>
__device__ __forceinline__ void rectify(const float (&u)[kFactors * UNITS / 8][4],
                                        uint32_t (&a)[kOrders * UNITS / 16][4]) {
  for_orders<kOrders>([&](auto order, auto first) {
    constexpr int kOrder = order, kFirst = first;
#pragma unroll
    for (int n = 0; n < UNITS / 8; ++n) {
      float z[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float each[kOrder];
#pragma unroll
        for (int i = 0; i < kOrder; ++i) each[i] = u[(kFirst + i) * (UNITS / 8) + n][e];
        const float product = product_of(each);
        z[e] = positive(product, product);
      }
      uint32_t(&operand)[4] = a[(kOrder - 1) * (UNITS / 16) + n / 2];
      operand[n % 2 * 2] = pack_rn<T>(z[0], z[1]);
      operand[n % 2 * 2 + 1] = pack_rn<T>(z[2], z[3]);
    }
  });
}

template <int MANY>
__device__ __forceinline__ void hold_all(float (&logits)[MANY][8][4]) {
#pragma unroll
  for (int r = 0; r < MANY; ++r) warpgroup_fence_operand(logits[r]);
}

// Begin to add to the logits of 64 channels what UNITS units give: panels (orders, 64, UNITS). EACH: logits of each
// order apart. `add` where something is in the logits already.
template <typename T, int UNITS, bool EACH>
__device__ __forceinline__ void add_logits(float (&logits)[EACH ? kOrders : 1][8][4],
                                           const uint32_t (&a)[kOrders * UNITS / 16][4], const T* panels, bool add) {
  constexpr int kSteps = UNITS / 16;
#pragma unroll
  for (int r = 0; r < kOrders; ++r) {
    const uint64_t columns = make_smem_desc<UNITS>(panels + r * 64 * UNITS);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      wgmma<T, 64>(logits[EACH ? r : 0], a[r * kSteps + k], advance_desc(columns, 32 * k),
                   add || (EACH ? k : r + k) > 0);
    }
  }
}

// Replace x in a warpgroup's 64 x 64 panel by A x, or by A alone. Each thread has the pairs that its logits are of.
// share: 1 / order.
template <typename T, bool EACH>
__device__ __forceinline__ void open_gate(const float (&logits)[EACH ? kOrders : 1][8][4], T* panel, int order,
                                          int map, float share) {
  const int warp = static_cast<int>(threadIdx.x) % kWarpgroupSize / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  // Chunks of a row are exchanged by its number alone: another chunk is a change of the same bits.
  const int row = 16 * warp + lane / 4, pair = 2 * (lane % 4);
  const int mine = swizzle_offset<64>(row, 0), of_matrix = swizzle_offset<64>(16 * warp + lane % 16, lane / 16);
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    uint32_t pairs[4] = {};
    if (!map) ldmatrix(pairs, panel + (of_matrix ^ (16 * c)));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = 2 * c + i / 2, half = i % 2;
      float gate[2], value[2] = {1.0f, 1.0f};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        gate[e] = opened(logits[0][n][2 * half + e]);
        if constexpr (EACH) {
#pragma unroll
          for (int r = 1; r < kOrders; ++r) {
            if (r < order) gate[e] += opened(logits[r][n][2 * half + e]);
          }
          gate[e] *= share;
        }
      }
      if (!map) unpack_pair<T>(pairs[i], value);
      *reinterpret_cast<uint32_t*>(panel + (mine ^ (8 * n)) + 512 * half + pair) =
          pack_rn<T>(value[0] * gate[0], value[1] * gate[1]);
    }
  }
}

}  // namespace dfkd::high_order
