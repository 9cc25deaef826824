// CUDA's execution model on a CPU, for tests alone: the kernels of csrc/ compile against this as plain C++.
//
// A block's threads are fibers of one host thread. One runs until it waits - for its block, its warp or an
// asynchronous copy - and then another one does, in an order that the test picks: a result that depends on the order
// lacks a barrier. Blocks run one after the other, so nothing here finds a race between blocks. Shared memory is
// exactly as large as the launch asked for and begins as NaN; AddressSanitizer knows its ends, and those of everything
// else.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace dfkd::host {

constexpr int kWarp = 32;

// What the running thread sees of itself.
struct Place {
  dim3 thread, block, threads, blocks;
};

const Place& place();

// Wait until every thread of the block, or every lane of the warp, that has not ended is here too.
void block_barrier();
void warp_barrier();

// A warp's scratch: 32 slots of 64 bytes, one a lane.
constexpr int kSlot = 64;
unsigned char* slot(int lane);
int lane();

unsigned char* shared_memory();
size_t shared_bytes();

// Copies that begin now and may end at any time until they are waited for: here, not before.
void copy_later(void* to, const void* from, int bytes, int valid);
void commit_copies();
void wait_copies(int newest_left);

// Run a grid. Aborts with a message where threads wait for each other for ever.
void run(dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& thread);

// The order in which threads run: 0 forward, 1 backward, else a random one of this seed. Of even ones every warp takes
// its turn from wait to wait; of odd ones one warp runs until it waits for its block, before another begins.
extern unsigned order;

template <typename T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= kSlot);
  std::memcpy(slot(lane()), &value, sizeof(T));
  warp_barrier();
  T result;
  std::memcpy(&result, slot(from), sizeof(T));
  warp_barrier();
  return result;
}

}  // namespace dfkd::host

#define threadIdx (dfkd::host::place().thread)
#define blockIdx (dfkd::host::place().block)
#define blockDim (dfkd::host::place().threads)
#define gridDim (dfkd::host::place().blocks)

inline void __syncthreads() { dfkd::host::block_barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { dfkd::host::warp_barrier(); }

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return dfkd::host::exchange(value, from & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return dfkd::host::exchange(value, dfkd::host::lane() ^ mask);
}

using cudaStream_t = void*;
