// Kernels that show the execution shim to be as strict as it says; see tests/test_host_shim.py.
#include "../device.h"

namespace {

using namespace dfkd;

// Each thread passes its number to its neighbour through shared memory, with or without the barrier between.
__global__ void neighbour(int* out, int barrier) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int me = static_cast<int>(threadIdx.x), count = static_cast<int>(blockDim.x);
  shared[me] = me;
  if (barrier) __syncthreads();
  out[static_cast<int>(blockIdx.x) * count + me] = shared[(me + 1) % count];
}

// Two warps read each other's numbers and write new ones, with or without the barrier between.
__global__ void turns(int* out, int barrier) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int me = static_cast<int>(threadIdx.x);
  for (int turn = 0; turn < 2; ++turn) {
    shared[me] = 100 * turn + me;
    __syncthreads();
    out[64 * turn + me] = shared[(me + 32) % 64];
    __syncwarp();
    if (barrier) __syncthreads();
  }
}

__global__ void beyond(int* out, int index) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[index] = 1;
  out[0] = shared[index];
}

__global__ void never_all() {
  if (threadIdx.x == 0) __syncthreads();
  if (threadIdx.x != 0) __syncwarp();
}

__global__ void copied(const float* in, float* out, int wait) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int me = static_cast<int>(threadIdx.x);
  copy_async_16(shared + 4 * me, in + 4 * me, me % 2 == 0);
  commit_copies();
  if (wait) wait_copies<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[4 * me + i] = shared[4 * me + i];
  wait_copies<0>();
}

// c (16 x 8) = a (16 x 16) b (16 x 8), row-major; b comes transposed out of shared memory.
template <typename T>
__global__ void product(const T* a, const T* b, float* c) {
  T* shared = reinterpret_cast<T*>(shared_memory());
  T *as = shared, *bs = shared + 256;
  const int l = static_cast<int>(threadIdx.x);
  for (int i = l; i < 256; i += 32) as[i] = a[i];
  for (int i = l; i < 128; i += 32) bs[i] = b[i];
  __syncwarp();
  uint32_t left[4], right[4];
  load_matrices(left, as + (l % 16) * 16 + (l / 16) * 8);
  load_matrices<true>(right, bs + (l % 16) * 8);
  const uint32_t both[2] = {right[0], right[1]};
  float d[4] = {0, 0, 0, 0};
  mma_16x8x16<T>(d, left, both);
  for (int i = 0; i < 4; ++i) c[(l / 4 + 8 * (i / 2)) * 8 + 2 * (l % 4) + i % 2] = d[i];
}

__global__ void reduced(const float* in, float* sums, float* largest) {
  const int me = static_cast<int>(threadIdx.x);
  sums[me] = warp_sum(in[me]);
  largest[me] = warp_max<8>(in[me]);
}

}  // namespace

extern "C" {

int probe_neighbour(int* out, int blocks, int threads, int barrier) {
  return launch(neighbour, blocks, threads, sizeof(int) * static_cast<size_t>(threads), nullptr, out, barrier);
}
int probe_turns(int* out, int barrier) { return launch(turns, 1, 64, 256, nullptr, out, barrier); }
int probe_beyond(int* out, int index) { return launch(beyond, 1, 1, 64, nullptr, out, index); }
int probe_never_all() { return launch(never_all, 1, 32, 0, nullptr); }
int probe_copied(const float* in, float* out, int wait) {
  return launch(copied, 1, 64, 1024, nullptr, in, out, wait);
}
int probe_product(const void* a, const void* b, float* c, int dtype) {
  return with_type(dtype, [=](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      return launch(product<T>, 1, 32, 768, nullptr, static_cast<const T*>(a), static_cast<const T*>(b), c);
    } else {
      return DFKD_INVALID;
    }
  });
}
int probe_reduced(const float* in, float* sums, float* largest) {
  return launch(reduced, 1, 32, 0, nullptr, in, sums, largest);
}
}
