// Kernels that show the execution shim to be as strict as it says; see tests/cuda/test_host_shim.py.
#include "../sm90.h"

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

__global__ void reduced(const float* in, float* sums, float* largest) {
  const int me = static_cast<int>(threadIdx.x);
  sums[me] = warp_sum(in[me]);
  largest[me] = warp_max<8>(in[me]);
}

// What each lane gets of 32 rows of 8 elements.
__global__ void matrices(const uint16_t* rows, uint32_t* out) {
  uint16_t* shared = reinterpret_cast<uint16_t*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) shared[8 * lane + i] = rows[8 * lane + i];
  __syncwarp();
  uint32_t r[4];
  ldmatrix(r, shared + 8 * lane);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
}

constexpr int kDepth = 128;

// c (64, N) = a b over 128 elements. a is (64, 128), or with TRANSPOSE_A (128, 64); b (N, 128), or with TRANSPOSE_B
// (128, N). With a in registers it comes from memory. wait: 0 reads c before the products are done.
template <typename T, int N, int WIDTH, bool TRANSPOSE_A, bool TRANSPOSE_B>
__global__ void product(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, const T* a,
                        float* c, int registers, int wait) {
  constexpr int kPanelA = (TRANSPOSE_A ? kDepth : 64) * WIDTH * 2, kPanelB = (TRANSPOSE_B ? kDepth : N) * WIDTH * 2;
  constexpr int kPanelsA = (TRANSPOSE_A ? 64 : kDepth) / WIDTH, kPanelsB = (TRANSPOSE_B ? N : kDepth) / WIDTH;
  unsigned char* a_panels = shared_memory();
  unsigned char* b_panels = a_panels + kPanelsA * kPanelA;
  Barrier* full = reinterpret_cast<Barrier*>(b_panels + kPanelsB * kPanelB);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  if (thread == 0) {
    mbarrier_init(full, 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (thread == 0) {
    mbarrier_arrive_expect_tx(full, kPanelsA * kPanelA + kPanelsB * kPanelB);
    for (int p = 0; p < kPanelsA; ++p) tma_load(a_panels + p * kPanelA, a_map, p * WIDTH, 0, 0, full);
    for (int p = 0; p < kPanelsB; ++p) tma_load(b_panels + p * kPanelB, b_map, p * WIDTH, 0, 0, full);
  }
  mbarrier_wait(full, 0);
  float d[N / 8][4];
  uint32_t left[kDepth / 16][4];
  for (int step = 0; step < kDepth / 16; ++step) {
    for (int i = 0; i < 4; ++i) {
      T pair[2];
      for (int e = 0; e < 2; ++e) {
        const int m = row + i % 2 * 8, k = 16 * step + i / 2 * 8 + 2 * (lane % 4) + e;
        pair[e] = a[TRANSPOSE_A ? k * 64 + m : m * kDepth + k];
      }
      left[step][i] = pack(pair[0], pair[1]);
    }
  }
  warpgroup_fence_operand(d);
  warpgroup_arrive();
  for (int step = 0; step < kDepth / 16; ++step) {
    const int at = 16 * step;
    const int a_panel = at / WIDTH * kPanelA, b_panel = at / WIDTH * kPanelB;
    const uint64_t from_a = TRANSPOSE_A ? advance_desc(make_smem_desc<WIDTH>(a_panels, kPanelA), at * WIDTH * 2)
                                      : advance_desc(make_smem_desc<WIDTH>(a_panels + a_panel), at % WIDTH * 2);
    const uint64_t from_b = TRANSPOSE_B ? advance_desc(make_smem_desc<WIDTH>(b_panels, kPanelB), at * WIDTH * 2)
                                      : advance_desc(make_smem_desc<WIDTH>(b_panels + b_panel), at % WIDTH * 2);
    if (registers) {
      wgmma<T, N, TRANSPOSE_B>(d, left[step], from_b, step > 0);
    } else {
      wgmma<T, N, TRANSPOSE_A, TRANSPOSE_B>(d, from_a, from_b, step > 0);
    }
  }
  warpgroup_commit_batch();
  if (wait) warpgroup_wait<0>();
  warpgroup_fence_operand(d);
  for (int i = 0; i < N / 2; ++i) {
    c[(row + i % 4 / 2 * 8) * N + i / 4 * 8 + 2 * (lane % 4) + i % 2] = d[i / 4][i % 4];
  }
  warpgroup_wait<0>();
}

template <typename T, int N, int WIDTH, bool TRANSPOSE_A, bool TRANSPOSE_B>
int run_product(const void* a, const void* b, float* c, int registers, int wait) {
  TensorMap a_map, b_map;
  constexpr int64_t kWideA = TRANSPOSE_A ? 64 : kDepth, kHighA = TRANSPOSE_A ? kDepth : 64;
  constexpr int64_t kWideB = TRANSPOSE_B ? N : kDepth, kHighB = TRANSPOSE_B ? kDepth : N;
  int error = make_tensor_map<WIDTH>(&a_map, a, {kWideA, kHighA, 1}, kWideA, kWideA * kHighA, {WIDTH, kHighA, 1});
  if (error) return error;
  error = make_tensor_map<WIDTH>(&b_map, b, {kWideB, kHighB, 1}, kWideB, kWideB * kHighB, {WIDTH, kHighB, 1});
  if (error) return error;
  return launch_cluster(product<T, N, WIDTH, TRANSPOSE_A, TRANSPOSE_B>, 1, kWarpgroupSize, 2 * kDepth * (64 + N) + 8, 1, false,
                        nullptr, a_map, b_map, static_cast<const T*>(a), c, registers, wait);
}

// A tile from the middle of a tensor to another place of it, 2 further along z; wait: 0 does not wait for its coming.
template <int WIDTH>
__global__ void tile(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, int x, int y, int z,
                     int bytes, int wait) {
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

// Each block of a cluster sends its row to all others, by st.async, through pointers, and as tiles for all.
__global__ void sent(const __grid_constant__ TensorMap rows, int* out, int mode, int stay) {
  int* mine = reinterpret_cast<int*>(shared_memory());  // one row of 32 and room for everybody's
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

// A row from shared memory to a tensor; fence: 0 does not tell TMA of what was stored.
__global__ void stored(const __grid_constant__ TensorMap to, int fence) {
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

// A ring of two stages between a warp that fills it and one that empties it. careful: 0 fills stages that are still
// read; 2 never says that they have been.
__global__ void ring(const float* in, float* out, int steps, int careful) {
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
        if (careful && step >= 2) mbarrier_wait(empty + stage, (step / 2 - 1) % 2);
        mbarrier_arrive_expect_tx(full + stage, 128);
        cp_async_bulk(stages + 32 * stage, in + 32 * step, 128, full + stage);
      }
    }
  } else {
    for (int step = 0; step < steps; ++step) {
      const int stage = step % 2;
      mbarrier_wait(full + stage, step / 2 % 2);
      out[32 * step + lane] = stages[32 * stage + lane];
      if (careful < 2) mbarrier_arrive(empty + stage);
    }
  }
}

// Two warps wait for a third one, which waits for nobody.
__global__ void some(int* out) {
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

// All blocks of a launch pass their numbers on through memory.
__global__ void grid(int* numbers, unsigned* counter, int* out) {
  numbers[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
  global_barrier_arrive(counter);
  global_barrier_wait(counter, gridDim.x);
  out[blockIdx.x] = numbers[(blockIdx.x + 1) % gridDim.x];
}

}  // namespace

extern "C" {

int probe_neighbour(int* out, int blocks, int threads, int barrier) {
  return launch(neighbour, blocks, threads, sizeof(int) * static_cast<size_t>(threads), nullptr, out, barrier);
}
int probe_turns(int* out, int barrier) { return launch(turns, 1, 64, 256, nullptr, out, barrier); }
int probe_beyond(int* out, int index) { return launch(beyond, 1, 1, 64, nullptr, out, index); }
int probe_never_all() { return launch(never_all, 1, 32, 0, nullptr); }
int probe_reduced(const float* in, float* sums, float* largest) {
  return launch(reduced, 1, 32, 0, nullptr, in, sums, largest);
}
int probe_matrices(const uint16_t* rows, uint32_t* out) { return launch(matrices, 1, 32, 512, nullptr, rows, out); }
int probe_wgmma(const void* a, const void* b, float* c, int dtype, int n, int width, int transpose_a, int transpose_b,
                int registers, int wait) {
  const auto run = [&](auto type, auto columns, auto panel) {
    using T = decltype(type);
    constexpr int kColumns = decltype(columns)::value, kWidth = decltype(panel)::value;
    if constexpr (kColumns % kWidth != 0) {
      return DFKD_INVALID;
    } else if (transpose_a) {
      return transpose_b ? run_product<T, kColumns, kWidth, true, true>(a, b, c, registers, wait)
                       : run_product<T, kColumns, kWidth, true, false>(a, b, c, registers, wait);
    } else {
      return transpose_b ? run_product<T, kColumns, kWidth, false, true>(a, b, c, registers, wait)
                       : run_product<T, kColumns, kWidth, false, false>(a, b, c, registers, wait);
    }
  };
  return dispatch_dtype(dtype, [&](auto type) {
    using std::integral_constant;
    if (n == 16 && width == 16) return run(type, integral_constant<int, 16>{}, integral_constant<int, 16>{});
    if (n == 96 && width == 32) return run(type, integral_constant<int, 96>{}, integral_constant<int, 32>{});
    if (n == 128 && width == 64) return run(type, integral_constant<int, 128>{}, integral_constant<int, 64>{});
    return DFKD_INVALID;
  });
}

int probe_tile(void* tensor, int64_t size_x, int64_t size_y, int64_t size_z, int x, int y, int z, int width, int wait) {
  const auto run = [&](auto panel) {
    constexpr int kWidth = decltype(panel)::value;
    TensorMap from, to;
    const Shape sizes{size_x, size_y, size_z}, box{kWidth ? kWidth : 24, 3, 2};
    uint16_t* base = static_cast<uint16_t*>(tensor);
    if (make_tensor_map<kWidth>(&from, base, sizes, size_x, size_x * size_y, box) ||
        make_tensor_map<kWidth>(&to, base + size_x * size_y * size_z, sizes, size_x, size_x * size_y, box)) {
      return DFKD_INVALID;
    }
    const int bytes = static_cast<int>(2 * box.x * box.y * box.z);
    return launch_cluster(tile<kWidth>, 1, 32, 4096 + 8, 1, false, nullptr, from, to, x, y, z, bytes, wait);
  };
  return width == 64 ? run(std::integral_constant<int, 64>{}) : run(std::integral_constant<int, 0>{});
}

int probe_stored(int* row, int fence) {
  TensorMap map;
  if (make_tensor_map<0>(&map, row, {64, 1, 1}, 64, 64, {64, 1, 1})) return DFKD_INVALID;
  return launch(stored, 1, 32, 128, nullptr, map, fence);
}

int probe_sent(const void* rows, int* out, int clusters, int size, int mode, int stay) {
  TensorMap map;
  if (make_tensor_map<0>(&map, rows, {64, size, 1}, 64, int64_t{64} * size, {64, 1, 1})) return DFKD_INVALID;
  return launch_cluster(sent, static_cast<unsigned>(clusters * size), 32,
                        static_cast<size_t>(128 * (size + 1) + 8), size, false, nullptr, map, out, mode, stay);
}

int probe_ring(const float* in, float* out, int steps, int careful) {
  return launch(ring, 1, 64, 256 + 32, nullptr, in, out, steps, careful);
}
int probe_some(int* out) { return launch(some, 1, 96, 128, nullptr, out); }
int probe_grid(int* numbers, unsigned* counter, int* out, int blocks) {
  return launch_cluster(grid, static_cast<unsigned>(blocks), 1, 0, 1, true, nullptr, numbers, counter, out);
}
}
