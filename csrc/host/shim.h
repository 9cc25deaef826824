// CUDA's execution model on a CPU, for tests only: the kernels of csrc/ compile against this header as plain C++.
//
// A block's threads are fibers of one host thread. A fiber runs until it waits for its block, its warp, its cluster or
// an asynchronous operation. Then another one runs, in an order that the test selects: if a result depends on the
// order, a barrier is missing. Asynchronous operations complete immediately or as late as possible, which the test
// selects too. Blocks run one after the other, except those of a cluster or a cooperative launch: races between
// independent blocks are not found. Shared memory has exactly the launch's size and is initialized to NaN.
// AddressSanitizer checks its bounds and those of all arrays.
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

// The indices of the running thread.
struct ThreadIndices {
  dim3 thread, block, threads, blocks;
};

const ThreadIndices& indices();

// Waits for all threads of the block, or all lanes of the warp, that have not finished.
void block_barrier();
void warp_barrier();

// Exchange buffer of a warp: 32 slots of 64 bytes, one per lane.
constexpr int kSlot = 64;
unsigned char* slot(int lane);
int lane();

unsigned char* shared_memory();

// Runs a grid: blocks one after the other, the blocks of a cluster (neighbors along x) concurrently, all blocks
// concurrently if cooperative. Aborts with a message on a deadlock.
void run(dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& thread, int cluster = 1,
         bool cooperative = false);

// ---- used by host/sm90.cpp ---------------------------------------------------------------------------------------

// Waits until a condition holds.
void wait_until(const char* what, std::function<bool()> ready);
// Whether the next asynchronous operation completes immediately.
bool immediate();
// Performs an asynchronous operation: immediately, when all threads wait, or at some time in between.
void enqueue(std::function<void()> operation);

// A barrier of several threads. The last one to arrive calls `act`.
struct ThreadBarrier {
  int arrived = 0;
  unsigned generation = 0;
};
void arrive(ThreadBarrier& barrier, int threads, bool wait, const char* what, const std::function<void()>& act = {});

int thread_index();
// Shared memory as the async proxy sees it: ordinary stores become visible there only after a proxy fence. Maps an
// address in shared memory to its copy in this view, and any other address to itself.
unsigned char* async_proxy_view(const void* address);
void fence_proxy_async();
// Maps an address in this block's shared memory to the same offset in another block of the cluster.
int cluster_rank();
int cluster_size();
void* at_rank(const void* mine, int rank);
void cluster_arrive();
void cluster_wait();
// State of a block that host/sm90.cpp adds. It is created on first use. When the block finishes, pending() names
// operations that were never waited for.
struct BlockState {
  virtual ~BlockState() = default;
  virtual const char* pending() const = 0;
};
BlockState* block_state(BlockState* (*make)());

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The order in which threads run: 0 ascending, 1 descending, otherwise random with this seed. In even orders, warps
// alternate at every wait; in odd orders, a warp runs until it waits for its block. Asynchronous operations complete
// late in order 0, immediately in order 1, at random times in others.
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

#define threadIdx (dfkd::host::indices().thread)
#define blockIdx (dfkd::host::indices().block)
#define blockDim (dfkd::host::indices().threads)
#define gridDim (dfkd::host::indices().blocks)

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
