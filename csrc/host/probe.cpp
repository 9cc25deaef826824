// Kernels that test the CPU emulation itself; see tests/cuda/test_host_shim.py.
#include "../sm90.h"

namespace {

using namespace dfkd;

// Each thread sends its index to its neighbor through shared memory, with or without a barrier in between.
__global__ void neighbor(int* out, int barrier) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int me = static_cast<int>(threadIdx.x), count = static_cast<int>(blockDim.x);
  shared[me] = me;
  if (barrier) __syncthreads();
  out[static_cast<int>(blockIdx.x) * count + me] = shared[(me + 1) % count];
}

// Two warps read each other's values and overwrite them, with or without a barrier in between.
__global__ void exchange(int* out, int barrier) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int me = static_cast<int>(threadIdx.x);
  for (int step = 0; step < 2; ++step) {
    shared[me] = 100 * step + me;
    __syncthreads();
    out[64 * step + me] = shared[(me + 32) % 64];
    __syncwarp();
    if (barrier) __syncthreads();
  }
}

__global__ void shared_store(int* out, int index) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[index] = 1;
  out[0] = shared[index];
}

__global__ void divergent_barrier() {
  if (threadIdx.x == 0) __syncthreads();
  if (threadIdx.x != 0) __syncwarp();
}

constexpr int kK = 128;
constexpr int kN = 128;

// c (64, N) = a (64, K) b (N, K)^T. With `registers`, `a` is a register operand. With wait = 0, c is read before wgmma
// completes.
__global__ void gemm(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                     const bfloat16* a, float* c, int registers, int wait) {
  constexpr int kBoxBytesA = 64 * 64 * 2, kBoxBytesB = kN * 64 * 2;
  unsigned char* a_smem = shared_memory();
  unsigned char* b_smem = a_smem + kK / 64 * kBoxBytesA;
  Barrier* full = reinterpret_cast<Barrier*>(b_smem + kK / 64 * kBoxBytesB);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  if (thread == 0) {
    mbarrier_init(full, 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (thread == 0) {
    mbarrier_arrive_expect_tx(full, kK / 64 * (kBoxBytesA + kBoxBytesB));
    for (int box = 0; box < kK / 64; ++box) {
      tma_load(a_smem + box * kBoxBytesA, a_map, box * 64, 0, 0, full);
      tma_load(b_smem + box * kBoxBytesB, b_map, box * 64, 0, 0, full);
    }
  }
  mbarrier_wait(full, 0);
  float d[kN / 8][4];
  uint32_t a_fragment[kK / 16][4];
  for (int i = 0; i < kK / 4; ++i) {
    const bfloat16* pair = a + (row + i % 2 * 8) * kK + i / 4 * 16 + i % 4 / 2 * 8 + 2 * (lane % 4);
    a_fragment[i / 4][i % 4] = pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
  }
  warpgroup_fence_operand(d);
  warpgroup_arrive();
  for (int k = 0; k < kK / 16; ++k) {
    const uint64_t desc_a = advance_desc(make_smem_desc<64>(a_smem + k / 4 * kBoxBytesA), k % 4 * 32);
    const uint64_t desc_b = advance_desc(make_smem_desc<64>(b_smem + k / 4 * kBoxBytesB), k % 4 * 32);
    if (registers) {
      wgmma<bfloat16, kN>(d, a_fragment[k], desc_b, k > 0);
    } else {
      wgmma<bfloat16, kN>(d, desc_a, desc_b, k > 0);
    }
  }
  warpgroup_commit_batch();
  if (wait) warpgroup_wait<0>();
  warpgroup_fence_operand(d);
  for (int i = 0; i < kN / 2; ++i) {
    c[(row + i % 4 / 2 * 8) * kN + i / 4 * 8 + 2 * (lane % 4) + i % 2] = d[i / 4][i % 4];
  }
  warpgroup_wait<0>();
}

// Copies a tile of one tensor to the same coordinates of another. With wait = 0, it does not wait for the load.
template <int WIDTH>
__global__ void tma_copy(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, int x, int y,
                         int z, int bytes, int wait) {
  Barrier* full = reinterpret_cast<Barrier*>(shared_memory() + 4096);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_barrier_init();
    mbarrier_arrive_expect_tx(full, bytes);
    tma_load(shared_memory(), from, x, y, z, full);
    if (wait) mbarrier_wait(full, 0);
    tma_store(to, shared_memory(), x, y, z);
    tma_store_commit();
    tma_store_wait<0>();
    mbarrier_wait(full, 0);
  }
}

// Each block of a cluster sends its row to all others. mode: 0 st.async, 1 mapped pointers, 2 TMA multicast.
__global__ void cluster_exchange(const __grid_constant__ TensorMap rows, int* out, int mode, int stay) {
  int* mine = reinterpret_cast<int*>(shared_memory());  // one row of 32, then one row per block
  int* all = mine + 32;
  const int rank = cluster_rank(), size = cluster_size(), thread = static_cast<int>(threadIdx.x);
  Barrier* full = reinterpret_cast<Barrier*>(all + 32 * size);
  mine[thread] = 100 * rank + thread;
  if (thread == 0) {
    mbarrier_init(full, 1);
    fence_barrier_init();
    mbarrier_arrive_expect_tx(full, mode == 1 ? 0 : 128 * size);
  }
  cluster_sync();
  if (mode == 0 && thread < 8) {
    uint32_t values[4];
    for (int i = 0; i < 4; ++i) values[i] = static_cast<uint32_t>(mine[4 * thread + i]);
    for (int other = 0; other < size; ++other) st_async(all + 32 * rank + 4 * thread, values, full, other);
  } else if (mode == 1) {
    for (int other = 0; other < size; ++other) map_shared_rank(all, other)[32 * rank + thread] = mine[thread];
    cluster_sync();
  } else if (mode == 2 && thread == 0) {
    tma_load_multicast((1u << size) - 1u, all + 32 * rank, rows, 0, rank, 0, full);
  }
  mbarrier_wait_cluster(full, 0);
  for (int other = 0; other < size; ++other) out[(rank * size + other) * 32 + thread] = all[32 * other + thread];
  if (stay) cluster_sync();
  if (!stay && rank > 0) map_shared_rank(all, 0)[thread] = 0;
}

// Stores a row from shared memory to a tensor by TMA. With fence = 0, the proxy fence is missing.
__global__ void tma_store_row(const __grid_constant__ TensorMap to, int fence) {
  int* row = reinterpret_cast<int*>(shared_memory());
  row[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (fence) fence_proxy_async();
  __syncwarp();
  if (threadIdx.x == 0) {
    tma_store(to, row, 0, 0, 0);
    tma_store_commit();
    tma_store_wait<0>();
  }
}

// A pipeline of two stages between a producer and a consumer warp. mode: 0 the producer does not wait for empty stages;
// 1 correct; 2 the consumer never releases a stage.
__global__ void pipeline(const float* in, float* out, int steps, int mode) {
  float* stages = reinterpret_cast<float*>(shared_memory());
  Barrier* full = reinterpret_cast<Barrier*>(stages + 64);
  Barrier* empty = full + 2;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 32);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    if (lane == 0) {
      for (int step = 0; step < steps; ++step) {
        const int stage = step % 2;
        if (mode && step >= 2) mbarrier_wait(empty + stage, (step / 2 - 1) % 2);
        mbarrier_arrive_expect_tx(full + stage, 128);
        cp_async_bulk(stages + 32 * stage, in + 32 * step, 128, full + stage);
      }
    }
  } else {
    for (int step = 0; step < steps; ++step) {
      const int stage = step % 2;
      mbarrier_wait(full + stage, step / 2 % 2);
      out[32 * step + lane] = stages[32 * stage + lane];
      if (mode < 2) mbarrier_arrive(empty + stage);
    }
  }
}

// Two warps wait at a named barrier for a third one, which only arrives.
__global__ void named_barrier(int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp == 2) {
    shared[threadIdx.x - 64] = static_cast<int>(threadIdx.x);
    named_barrier_arrive(3, 96);
  } else {
    named_barrier_sync(3, 96);
    out[threadIdx.x] = shared[threadIdx.x % 32];
  }
}

// Each block of a cooperative launch reads the value of the next block from global memory.
__global__ void global_barrier(int* values, unsigned* counter, int* out) {
  values[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
  global_barrier_arrive(counter);
  global_barrier_wait(counter, gridDim.x);
  out[blockIdx.x] = values[(blockIdx.x + 1) % gridDim.x];
}

}  // namespace

extern "C" {

int probe_neighbor(int* out, int blocks, int threads, int barrier) {
  return launch(neighbor, blocks, threads, sizeof(int) * static_cast<size_t>(threads), nullptr, out, barrier);
}
int probe_exchange(int* out, int barrier) { return launch(exchange, 1, 64, 256, nullptr, out, barrier); }
int probe_shared_store(int* out, int index) { return launch(shared_store, 1, 1, 64, nullptr, out, index); }
int probe_divergent_barrier() { return launch(divergent_barrier, 1, 32, 0, nullptr); }
int probe_wgmma(const void* a, const void* b, float* c, int registers, int wait) {
  TensorMap a_map, b_map;
  if (make_tensor_map<64>(&a_map, a, {kK, 64, 1}, kK, kK * 64, {64, 64, 1}) ||
      make_tensor_map<64>(&b_map, b, {kK, kN, 1}, kK, kK * kN, {64, kN, 1})) {
    return DFKD_INVALID;
  }
  return launch(gemm, 1, kWarpgroupSize, 2 * kK * (64 + kN) + 8, nullptr, a_map, b_map,
                static_cast<const bfloat16*>(a), c, registers, wait);
}

int probe_tma(void* tensor, int64_t size_x, int64_t size_y, int64_t size_z, int x, int y, int z, int width, int wait) {
  const auto run = [&](auto box_width) {
    constexpr int kWidth = decltype(box_width)::value;
    TensorMap from, to;
    const Shape sizes{size_x, size_y, size_z}, box{kWidth ? kWidth : 24, 3, 2};
    uint16_t* base = static_cast<uint16_t*>(tensor);
    if (make_tensor_map<kWidth>(&from, base, sizes, size_x, size_x * size_y, box) ||
        make_tensor_map<kWidth>(&to, base + size_x * size_y * size_z, sizes, size_x, size_x * size_y, box)) {
      return DFKD_INVALID;
    }
    const int bytes = static_cast<int>(2 * box.x * box.y * box.z);
    return launch_cluster(tma_copy<kWidth>, 1, 32, 4096 + 8, 1, false, nullptr, from, to, x, y, z, bytes, wait);
  };
  return width == 64 ? run(std::integral_constant<int, 64>{}) : run(std::integral_constant<int, 0>{});
}

int probe_tma_store(int* row, int fence) {
  TensorMap map;
  if (make_tensor_map<0>(&map, row, {64, 1, 1}, 64, 64, {64, 1, 1})) return DFKD_INVALID;
  return launch(tma_store_row, 1, 32, 128, nullptr, map, fence);
}

int probe_cluster(const void* rows, int* out, int clusters, int size, int mode, int stay) {
  TensorMap map;
  if (make_tensor_map<0>(&map, rows, {64, size, 1}, 64, int64_t{64} * size, {64, 1, 1})) return DFKD_INVALID;
  return launch_cluster(cluster_exchange, static_cast<unsigned>(clusters * size), 32,
                        static_cast<size_t>(128 * (size + 1) + 8), size, false, nullptr, map, out, mode, stay);
}

int probe_pipeline(const float* in, float* out, int steps, int mode) {
  return launch(pipeline, 1, 64, 256 + 32, nullptr, in, out, steps, mode);
}
int probe_named_barrier(int* out) { return launch(named_barrier, 1, 96, 128, nullptr, out); }
int probe_global_barrier(int* values, unsigned* counter, int* out, int blocks) {
  return launch_cluster(global_barrier, static_cast<unsigned>(blocks), 1, 0, 1, true, nullptr, values, counter, out);
}
}
