// The instructions of sm_90a in the execution shim: what csrc/sm90.h calls when it is compiled as plain C++.
#pragma once

#include "shim.h"

namespace dfkd::host {

struct TensorMap {
  unsigned char* base;
  int64_t sizes[3], strides[3], tile[3];  // in elements; strides[0] is 1
  int width;                              // of a panel; 0 for rows as they are
};
// Whether the map is one that the card would take.
bool make_tensor_map(TensorMap* to, const void* base, const int64_t (&sizes)[3], int64_t stride_y, int64_t stride_z,
                     const int64_t (&tile)[3], int width);

void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier, int bytes);
void barrier_wait(uint64_t* barrier, int parity);

void copy_bulk(void* to, const void* from, int bytes, uint64_t* full);
void store_later(void* to, const uint32_t (&values)[4], uint64_t* full);
void load_tile(void* shared, const TensorMap& map, int x, int y, int z, uint64_t* full);
void store_tile(const TensorMap& map, const void* shared, int x, int y, int z);
void commit_stores();
void wait_stores(int newest_left);

void sync_some(int barrier, int threads, bool wait);
void global_barrier_arrive(unsigned* counter);
void global_barrier_wait(const unsigned* counter, unsigned arrivals);

// One thread's part in a product: where its elements of d and, unless a is in shared memory, of a are.
struct Product {
  float* d;
  const uint32_t* a;
  uint64_t a_operand, b_operand;
  int n;
  bool bfloat, transpose_a, transpose_b, add;
};
void multiply(const Product& product);
void commit_products();
void wait_products(int newest_left);

}  // namespace dfkd::host
