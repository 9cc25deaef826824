// What the two directions of contrastive_loss's Hopper form share: what they serve, and tiles on their way to the
// tensor cores.
//
// One warp of a block fetches, two warpgroups multiply. The vectors that prepare() left in memory come in tiles of 128
// by copies through one map: in panels of 64 elements as products take them, through a ring of stages with a barrier
// each way. Rows come the same way, from the ring into registers, where they are the products' left operand.
#pragma once

#include "../contrastive_loss.h"
#include "../hopper.h"

namespace dfkd::contrastive {

using namespace dfkd::hopper;

constexpr int kTile = 128;                      // vectors in a tile, of rows as of columns
constexpr int kPanelBytes = kTile * 64 * 2;
constexpr int kNumberBytes = kTile * 4;         // of one number of each vector of a tile
constexpr int kRoles = 3 * kWarpgroup;          // threads: those that fetch, of which one does, and two warpgroups
constexpr int kFetching = 24, kMultiplying = 240;  // registers of their threads

#ifdef DFKD_HOST
// Tests set them: fewer vectors are served, fewer processors split the work otherwise, and less cache.
inline int64_t smallest = 257, cached_bytes = int64_t{20} << 20;
#else
constexpr int64_t smallest = 257;  // vectors; fewer are the business of the form of one launch
// So many bytes of vectors stay in either half of the second-level cache, wherever blocks are in them.
constexpr int64_t cached_bytes = int64_t{20} << 20;
#endif

// ---- what is served -------------------------------------------------------------------------------------------------

constexpr int64_t kMostCount = int64_t{1} << 23;  // a block's tiles are counted in 32 bits

inline bool served(int64_t count, int64_t dim) {
  return 2 * count >= smallest && count <= kMostCount && dim >= 1 && dim <= 128;
}
inline bool served(double temperature, int normalize, int dtype) {
  return temperature > 0 && normalize && kLog2OfE / temperature <= kBound &&
         (dtype == DFKD_FLOAT16 || dtype == DFKD_BFLOAT16);
}

// ---- the ring -------------------------------------------------------------------------------------------------------

// Where a role is in it. A stage: a tile of SLAB / 64 panels, and ARRAYS numbers of each of its vectors.
template <int SLAB, int ARRAYS>
struct Ring {
  static constexpr int kStages = SLAB == 128 ? 6 : 8;
  static constexpr int kTileBytes = SLAB / 64 * kPanelBytes;
  static constexpr int kBytes = kStages * (kTileBytes + ARRAYS * kNumberBytes + 2 * static_cast<int>(sizeof(Barrier)));

  int slot = 0, parity = 0;

  __device__ __forceinline__ int offset() const { return slot * kTileBytes; }
  __device__ __forceinline__ unsigned char* tile() const { return shared_memory() + offset(); }
  __device__ __forceinline__ float* numbers() const {
    return reinterpret_cast<float*>(shared_memory() + kStages * kTileBytes + slot * ARRAYS * kNumberBytes);
  }
  __device__ __forceinline__ Barrier* full() const {
    return reinterpret_cast<Barrier*>(shared_memory() + kStages * (kTileBytes + ARRAYS * kNumberBytes)) + slot;
  }
  __device__ __forceinline__ Barrier* empty() const { return full() + kStages; }

  __device__ __forceinline__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
  }

  // By all threads of the block, before anything else.
  __device__ __forceinline__ void begin() const {
    if (threadIdx.x == 0) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        init(full() + stage, 1);
        init(empty() + stage, 2 * kWarpgroup / kLanes);
      }
      show_barriers();
    }
    __syncthreads();
  }

  // By one thread: vectors from `row` on, and numbers of theirs, or the vectors alone.
  __device__ __forceinline__ void fetch(const TensorMap& map, int row, const float* const (&arrays)[ARRAYS]) {
    begin_tile(map, row, ARRAYS * kNumberBytes);
#pragma unroll
    for (int array = 0; array < ARRAYS; ++array) {
      copy_bulk(numbers() + array * kTile, arrays[array] + row, kNumberBytes, full());
    }
    advance();
  }
  __device__ __forceinline__ void fetch(const TensorMap& map, int row) {
    begin_tile(map, row, 0);
    advance();
  }
  __device__ __forceinline__ void begin_tile(const TensorMap& map, int row, int more) const {
    hopper::wait(empty(), parity ^ 1);
    arrive_and_expect(full(), kTileBytes + more);
#pragma unroll
    for (int panel = 0; panel < SLAB / 64; ++panel) {
      load_tile(tile() + panel * kPanelBytes, map, 64 * panel, row, 0, full());
    }
  }

  // By the threads that multiply.
  __device__ __forceinline__ void wait_full() const { hopper::wait(full(), parity); }
  __device__ __forceinline__ void release() const {
    __syncwarp();
    if (threadIdx.x % kLanes == 0) arrive(empty());
  }
};

// 16 rows of the tile at an offset in shared memory, from ROW on, as a warp's part of the left operand.
template <int SLAB>
__device__ __forceinline__ void load_rows(uint32_t (&own)[SLAB / 16][4], int tile, int row) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int first = tile + 2 * swizzled<64>(row + lane % 16, lane / 16);  // two chunks further is this with other bits
#pragma unroll
  for (int k = 0; k < SLAB / 16; ++k) {
    load_matrices(own[k], shared_memory() + (first ^ (k % 4 * 32)) + k / 4 * kPanelBytes);
  }
}

// s = rows times the tile's vectors, asynchronously.
template <typename T, int SLAB>
__device__ __forceinline__ void multiply_rows(float (&s)[kTile / 8][4], uint32_t (&own)[SLAB / 16][4],
                                              const unsigned char* tile) {
#pragma unroll
  for (int k = 0; k < SLAB / 16; ++k) {
    hopper::multiply<T, kTile>(s, own[k], further(rows_of<64>(tile + k / 4 * kPanelBytes), k % 4 * 32), k > 0);
  }
}

// Which warpgroup this is, in a way that tells the compiler that a warp agrees; and the first of the thread's rows in
// 64 of its warpgroup.
__device__ __forceinline__ int my_warpgroup() {
  return __shfl_sync(kAll, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
}
__device__ __forceinline__ int my_row() {
  return static_cast<int>(threadIdx.x) % kWarpgroup / kLanes * 16 + static_cast<int>(threadIdx.x) % kLanes / 4;
}

// The two warpgroups ask for products in turn, each for all that it can: left to themselves they may do the same at the
// same time, and the tensor cores wait while both take exponentials. The second one lets the first begin, which awaits
// the turn that nobody takes.
__device__ __forceinline__ void await_turn(int warpgroup) { sync_some(warpgroup, 2 * kWarpgroup); }
__device__ __forceinline__ void pass_turn(int warpgroup) { arrive_some(3 - warpgroup, 2 * kWarpgroup); }
__device__ __forceinline__ void begin_turns(int warpgroup) {
  if (warpgroup == 2) pass_turn(warpgroup);
}
__device__ __forceinline__ void end_turns(int warpgroup) {
  if (warpgroup == 1) await_turn(warpgroup);
}

// ---- launches -------------------------------------------------------------------------------------------------------

// Of the vectors in scratch, in tiles.
inline int map_vectors(TensorMap* map, const Plan& plan, const void* vectors) {
  return make_tensor_map<64>(map, vectors, {plan.width, plan.padded, 1}, plan.width, plan.width * plan.padded,
                             {64, kTile, 1});
}

}  // namespace dfkd::contrastive
