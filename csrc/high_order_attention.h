// Mixed high-order attention on sm_90a: what its Hopper kernels share. Formulas and fragments of panels are those of
// ../high_order_attention.h.
//
// A warpgroup has 64 positions. One product gives all six factors of some hidden units, units of a factor side by side,
// so that their accumulators, multiplied and rectified, are the left operand of the second product as they lie.
#pragma once

#ifdef DFKD_HOST
#endif

#include "../high_order_attention.h"
#include "../hopper.h"

namespace dfkd::high_order {

using namespace dfkd::hopper;

constexpr int kOrders = 3, kFactors = factors_of(kOrders);  // of fewer orders the rest is zeros
constexpr int kGroupRows = 64;                              // positions of a warpgroup
constexpr int kSquare = kGroupRows * 64;                    // elements of a panel of 64 rows and 64 columns

// ---- numbers -------------------------------------------------------------------------------------------------------

// Two numbers out of one register.
#ifdef DFKD_HOST
template <typename T>
void unpack_pair(uint32_t pair, float (&values)[2]) {
  unpack<T>(pair, values);
}
inline float reciprocal_fast(float x) { return 1.0f / x; }
#else
template <typename T>
__device__ __forceinline__ void unpack_pair(uint32_t pair, float (&values)[2]) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    values[0] = __uint_as_float(pair << 16);
    values[1] = __uint_as_float(pair & 0xffff0000u);
  } else {
    unpack<T>(pair, values);
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

// sigmoid(): two of the slow instructions and two others.
__device__ __forceinline__ float opened(float logit) { return reciprocal_fast(1.0f + exp2_flushed(-kLog2E * logit)); }

// ---- rings of buffers ----------------------------------------------------------------------------------------------

// The use of a ring's buffers in turn: `slot` is filled when its barrier `full` has ended the phase of this parity, and
// free for it when `empty` has ended the one of the other parity: at once in the first round.
template <int SLOTS>
struct Turn {
  int slot = 0, parity = 0;

  __device__ __forceinline__ void advance(int by = 1) {
    slot += by;
    if (slot >= SLOTS) {
      slot -= SLOTS;
      parity ^= 1;
    }
  }
};

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
      operand[n % 2 * 2] = pack_rounded<T>(z[0], z[1]);
      operand[n % 2 * 2 + 1] = pack_rounded<T>(z[2], z[3]);
    }
  });
}

template <int MANY>
__device__ __forceinline__ void hold_all(float (&logits)[MANY][8][4]) {
#pragma unroll
  for (int r = 0; r < MANY; ++r) hold(logits[r]);
}

// Begin to add to the logits of 64 channels what UNITS units give: panels (orders, 64, UNITS). EACH: logits of each
// order apart. `add` where something is in the logits already.
template <typename T, int UNITS, bool EACH>
__device__ __forceinline__ void add_logits(float (&logits)[EACH ? kOrders : 1][8][4],
                                           const uint32_t (&a)[kOrders * UNITS / 16][4], const T* panels, bool add) {
  constexpr int kSteps = UNITS / 16;
#pragma unroll
  for (int r = 0; r < kOrders; ++r) {
    const uint64_t columns = rows_of<UNITS>(panels + r * 64 * UNITS);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      multiply<T, 64>(logits[EACH ? r : 0], a[r * kSteps + k], further(columns, 32 * k),
                      add || (EACH ? k : r + k) > 0);
    }
  }
}

// Replace x in a warpgroup's 64 x 64 panel by A x, or by A alone. Each thread has the pairs that its logits are of.
// share: 1 / order.
template <typename T, bool EACH>
__device__ __forceinline__ void open_gate(const float (&logits)[EACH ? kOrders : 1][8][4], T* panel, int order,
                                          int map, float share) {
  const int warp = static_cast<int>(threadIdx.x) % kWarpgroup / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
  // Chunks of a row are exchanged by its number alone: another chunk is a change of the same bits.
  const int row = 16 * warp + lane / 4, pair = 2 * (lane % 4);
  const int mine = at<64>(row, 0), of_matrix = at<64>(16 * warp + lane % 16, lane / 16);
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    uint32_t pairs[4] = {};
    if (!map) load_matrices(pairs, panel + (of_matrix ^ (16 * c)));
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
          pack_rounded<T>(value[0] * gate[0], value[1] * gate[1]);
    }
  }
}

}  // namespace dfkd::high_order
