// CUDA's execution model on a CPU, for tests alone: the kernels of csrc/ compile against this as plain C++.
//
// A block's threads are fibers of one host thread. One runs until it waits - for its block, its warp, its cluster or
// something asynchronous - and then another one does, in an order that the test picks: a result that depends on the
// order lacks a barrier. What is asynchronous happens at once or as late as it can, as the test picks too. Blocks run
// one after the other, but for those of a cluster or of a cooperative launch, so nothing here finds a race between
// others. Shared memory is exactly as large as the launch asked for and begins as NaN; AddressSanitizer knows its ends,
// and those of everything else.
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

// Run a grid: blocks one after the other, or those of a cluster (neighbours along x) together, or all if cooperative.
// Aborts with a message where threads wait for each other for ever.
void run(dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& thread, int cluster = 1,
         bool cooperative = false);

// ---- what host/sm90.cpp builds on -----------------------------------------------------------------------------

// Wait until something is so.
void wait_until(const char* what, std::function<bool()> ready);
// Whether something asynchronous is to happen at once.
bool at_once();
// Do something at once, or when nobody can go on without it, or sometime between.
void later(std::function<void()> work);

// Several threads meet: the last one acts for all, and then they go on.
struct Meeting {
  int arrived = 0;
  unsigned turn = 0;
};
void meet(Meeting& meeting, int threads, bool wait, const char* what, const std::function<void()>& act = {});

int thread_index();
// Shared memory as the asynchronous units see it: what ordinary instructions wrote shows there after a fence of any
// thread alone. The place there of an address in shared memory, and itself for any other.
unsigned char* asynchronous_view(const void* address);
void fence_asynchronous();
// The cluster's blocks are numbered from 0; memory of another one's at the place that this address is of ours.
int cluster_rank();
int cluster_size();
void* at_rank(const void* mine, int rank);
void cluster_arrive();
void cluster_wait();
// Kept for each block as long as it runs; the first time it is asked for it is made. A thread that ends asks it, where
// it is there, whether something is left over.
struct Extension {
  virtual ~Extension() = default;
  virtual const char* left_over() const = 0;
};
Extension* extension(Extension* (*make)());

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The order in which threads run: 0 forward, 1 backward, else a random one of this seed. Of even ones every warp takes
// its turn from wait to wait; of odd ones one warp runs until it waits for its block, before another begins. What is
// asynchronous happens late in order 0, at once in order 1, at random in others.
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
