// The sm_90a instructions of the CPU emulation, called by csrc/sm90.h when it is compiled as plain C++.
#pragma once

#include "shim.h"

namespace dfkd::host {

struct TensorMap {
  unsigned char* base;
  int64_t sizes[3], strides[3], tile[3];  // in elements; strides[0] is 1
  int width;                              // of a swizzled row, in elements; 0 without swizzle
};
// Returns false for a descriptor that the driver would reject.
bool make_tensor_map(TensorMap* to, const void* base, const int64_t (&sizes)[3], int64_t stride_y, int64_t stride_z,
                     const int64_t (&tile)[3], int width);

void mbarrier_init(uint64_t* barrier, int arrivals);
void mbarrier_arrive(uint64_t* barrier, int bytes);
void mbarrier_wait(uint64_t* barrier, int parity);

void cp_async_bulk(void* to, const void* from, int bytes, uint64_t* full);
void st_async(void* to, const uint32_t (&values)[4], uint64_t* full);
void tma_load(void* shared, const TensorMap& map, int x, int y, int z, uint64_t* full);
void tma_store(const TensorMap& map, const void* shared, int x, int y, int z);
void tma_store_commit();
void tma_store_wait(int pending);

void named_barrier(int barrier, int threads, bool wait);
void global_barrier_arrive(unsigned* counter);
void global_barrier_wait(const unsigned* counter, unsigned arrivals);

// One thread's arguments of a wgmma: its accumulator fragment and its fragment of A, null if A is in shared memory.
struct Wgmma {
  float* d;
  const uint32_t* a;
  uint64_t a_desc, b_desc;
  int n;
  bool bfloat, transpose_a, transpose_b, accumulate;
};
void wgmma(const Wgmma& arguments);
void warpgroup_commit_batch();
void warpgroup_wait(int pending);

}  // namespace dfkd::host
