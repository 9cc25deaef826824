// Element types, wrappers of sm_90a PTX instructions under the names of CUTLASS and PTX, and kernel launches.
//
// nvcc compiles the PTX. With DFKD_HOST the header is plain C++ and calls host/, which implements each instruction on
// the CPU. Kernels use only this header, threadIdx and the other index variables, __syncthreads and the warp shuffles,
// so all of their index arithmetic is tested without a GPU. All shared memory is dynamic: shared_memory().
//
// A wgmma operand in shared memory is one or more TMA boxes with rows of WIDTH = 16, 32 or 64 elements, in the 32, 64
// or 128-byte swizzle mode (swizzle_offset()). A box is aligned to 16 * WIDTH bytes, the size of its swizzle atom.
#pragma once

#ifdef DFKD_HOST
#include "host/sm90.h"
#define __grid_constant__
#else
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#endif

#include <bit>
#include <type_traits>

#include "launchers.h"

namespace dfkd {

// ---- element types ----------------------------------------------------------------------------------------------

struct alignas(2) float16 {
  uint16_t bits;
};
struct alignas(2) bfloat16 {
  uint16_t bits;
};

#ifdef DFKD_HOST

inline float to_float(float x) { return x; }
inline float to_float(float16 x) { return static_cast<float>(std::bit_cast<_Float16>(x)); }
inline float to_float(bfloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline float16 from_float<float16>(float x) {
  return std::bit_cast<float16>(static_cast<_Float16>(x));
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  if (std::isnan(x)) return {0x7fff};
  uint32_t bits = std::bit_cast<uint32_t>(x);
  bits += 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  return {static_cast<uint16_t>(bits >> 16)};
}

inline float mul_rn(float a, float b) { return a * b; }
inline float exp2_approx_ftz(float x) { return std::exp2(x); }
inline float fast_divide(float a, float b) { return a / b; }

#else

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ float16 from_float<float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

// A rounded product, which the compiler does not contract to an FMA.
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
// 2^x; denormal results are flushed to zero.
__device__ __forceinline__ float exp2_approx_ftz(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// a / b with an error of up to 2 ulp; 0 if |b| > 2^126.
__device__ __forceinline__ float fast_divide(float a, float b) { return __fdividef(a, b); }

#endif

// Rounds two float32 values to nearest and packs them into a register, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack_rn(float low, float high) {
  static_assert(sizeof(T) == 2);
#ifdef DFKD_HOST
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
#else
  uint32_t result;
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  }
  return result;
#endif
}

// ---- warps --------------------------------------------------------------------------------------------------------

constexpr int kWarpSize = 32;
constexpr int kWarpgroupSize = 128;
constexpr unsigned kFullMask = 0xffffffffu;

// Reductions over groups of WIDTH adjacent lanes. All lanes of the warp take part, and all get the result.
template <int WIDTH = kWarpSize>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = WIDTH / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kFullMask, x, distance);
  return x;
}
template <int WIDTH = kWarpSize>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int distance = WIDTH / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kFullMask, x, distance);
    x = other > x || other != other ? other : x;  // propagates NaN
  }
  return x;
}

// ---- shared memory --------------------------------------------------------------------------------------------------

#ifdef DFKD_HOST
inline unsigned char* shared_memory() { return host::shared_memory(); }
#else
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}
__device__ __forceinline__ uint32_t cast_smem_ptr_to_uint(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#endif

// Loads four 8 x 8 matrices of 16-bit elements from shared memory. Lane l passes the address of row l % 8 of matrix
// l / 8. In r[i] it gets columns 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i.
#ifdef DFKD_HOST
inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  std::memcpy(host::slot(host::lane()), row, 16);
  host::warp_barrier();
  const int g = host::lane() / 4, t = host::lane() % 4;
  for (int i = 0; i < 4; ++i) std::memcpy(&r[i], host::slot(8 * i + g) + 4 * t, 4);
  host::warp_barrier();
}
#else
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(cast_smem_ptr_to_uint(row))
               : "memory");
}
#endif

// ---- swizzle --------------------------------------------------------------------------------------------------------

// Returns the offset, in elements, of a chunk of 8 elements in a swizzled box.
template <int WIDTH>
__host__ __device__ __forceinline__ constexpr int swizzle_offset(int row, int chunk) {
  static_assert(WIDTH == 16 || WIDTH == 32 || WIDTH == 64);
  const int linear = row * (WIDTH / 8) + chunk;
  return (linear ^ (linear / 8 % (WIDTH / 8))) * 8;
}

// The smem descriptor of a wgmma operand that is stored in boxes with rows of WIDTH elements. K-major: a row of the box
// is a row of A or a column of B. The WIDTH / 16 k-blocks of a box are 32 bytes apart, and `leading` is ignored.
// MN-major: a row of the box is a column of A or a row of B, and a k-block is 16 rows of the box. If M or N exceeds
// WIDTH, the next boxes follow at distances of `leading` bytes, the leading-dimension byte offset.
template <int WIDTH>
__device__ __forceinline__ uint64_t make_smem_desc(const void* box, int leading = 16) {
  constexpr uint64_t kSwizzle = WIDTH == 64 ? 1 : WIDTH == 32 ? 2 : 3, kStride = 16 * WIDTH;
#ifdef DFKD_HOST
  const uint64_t start = static_cast<uint64_t>(static_cast<const unsigned char*>(box) - shared_memory());
#else
  const uint64_t start = cast_smem_ptr_to_uint(box);
#endif
  return (kSwizzle << 62) | ((kStride / 16) << 32) | (static_cast<uint64_t>(leading / 16) << 16) |
         ((start & 0x3ffff) / 16);
}
// Advances the start address of a descriptor.
__device__ __forceinline__ uint64_t advance_desc(uint64_t desc, int bytes) {
  return desc + static_cast<uint64_t>(bytes / 16);
}

// ---- TMA descriptors ------------------------------------------------------------------------------------------------

// The TMA descriptor of a tensor of 16-bit elements with up to three dimensions, innermost first. Kernels take it as
// `const __grid_constant__ TensorMap`. Outside of the tensor, loads return zeros and stores write nothing.
struct TensorMap {
#ifdef DFKD_HOST
  host::TensorMap map;
#else
  CUtensorMap map;
#endif
};

struct Shape {
  int64_t x, y, z;
};

#ifndef DFKD_HOST
// Looks the function up at run time, because the driver is not linked. Returns null without a driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return found;
}
#endif

// Encodes a TMA descriptor. Sizes, box and strides are in elements; strides are multiples of 8, and base is aligned to
// 16 bytes. box.x is WIDTH; with WIDTH = 0 it is any multiple of 8, and the box is not swizzled. Returns a cudaError_t.
template <int WIDTH>
int make_tensor_map(TensorMap* to, const void* base, Shape sizes, int64_t stride_y, int64_t stride_z, Shape box) {
#ifdef DFKD_HOST
  const int64_t global_dim[3] = {sizes.x, sizes.y, sizes.z}, box_dim[3] = {box.x, box.y, box.z};
  return host::make_tensor_map(&to->map, base, global_dim, stride_y, stride_z, box_dim, WIDTH) ? 0 : DFKD_INVALID;
#else
  static_assert(WIDTH == 0 || WIDTH == 16 || WIDTH == 32 || WIDTH == 64);
  if (dfkd_recorded() >= 0) return 0;  // a recorded launch is not executed, and there may be no driver
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t global_dim[3] = {static_cast<cuuint64_t>(sizes.x), static_cast<cuuint64_t>(sizes.y),
                                    static_cast<cuuint64_t>(sizes.z)};
  const cuuint64_t global_strides[2] = {static_cast<cuuint64_t>(2 * stride_y), static_cast<cuuint64_t>(2 * stride_z)};
  const cuuint32_t box_dim[3] = {static_cast<cuuint32_t>(box.x), static_cast<cuuint32_t>(box.y),
                                 static_cast<cuuint32_t>(box.z)};
  const cuuint32_t element_strides[3] = {1, 1, 1};
  const CUtensorMapSwizzle mode = WIDTH == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                  : WIDTH == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                  : WIDTH == 16 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                : CU_TENSOR_MAP_SWIZZLE_NONE;
  const CUresult result = encode(
      &to->map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(base), global_dim, global_strides, box_dim,
      element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, mode, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : DFKD_INVALID;
#endif
}

// ---- mbarriers ------------------------------------------------------------------------------------------------------

// An mbarrier. A phase completes when the pending arrivals and the pending transaction bytes are both zero; then the
// next phase begins. Waits take the parity of a phase; the first phase has parity 0.
struct alignas(8) Barrier {
  uint64_t state;
};

#ifdef DFKD_HOST

inline void mbarrier_init(Barrier* barrier, int arrivals) { host::mbarrier_init(&barrier->state, arrivals); }
inline void fence_barrier_init() {}
inline void mbarrier_arrive(Barrier* barrier) { host::mbarrier_arrive(&barrier->state, 0); }
inline void mbarrier_arrive_expect_tx(Barrier* barrier, int bytes) { host::mbarrier_arrive(&barrier->state, bytes); }
inline void mbarrier_arrive_cluster(Barrier* barrier, int rank) {
  host::mbarrier_arrive(static_cast<uint64_t*>(host::at_rank(&barrier->state, rank)), 0);
}
inline void mbarrier_arrive_cluster_cta_release(Barrier* barrier, int rank) { mbarrier_arrive_cluster(barrier, rank); }
inline void mbarrier_wait(Barrier* barrier, int parity) { host::mbarrier_wait(&barrier->state, parity); }
inline void mbarrier_wait_cluster(Barrier* barrier, int parity) { host::mbarrier_wait(&barrier->state, parity); }
inline void fence_proxy_async() { host::fence_proxy_async(); }
inline void fence_proxy_async_global() {}

#else

// Called by one thread, followed by fence_barrier_init() and a barrier of the block or the cluster.
__device__ __forceinline__ void mbarrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(cast_smem_ptr_to_uint(barrier)), "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(cast_smem_ptr_to_uint(barrier)) : "memory");
}
// Arrives, and adds to the transaction bytes that the phase expects.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(cast_smem_ptr_to_uint(barrier)),
               "r"(bytes)
               : "memory");
}
// Arrives at the barrier at the same offset in the shared memory of another block of the cluster.
__device__ __forceinline__ void mbarrier_arrive_cluster(Barrier* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(cast_smem_ptr_to_uint(barrier)),
      "r"(rank)
      : "memory");
}
// Releases at block scope, the default of PTX and of CUTLASS's ClusterBarrier, instead of cluster scope. It does not
// make the thread's stores visible to the other block, so it is for consumers that have only read.
__device__ __forceinline__ void mbarrier_arrive_cluster_cta_release(Barrier* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(cast_smem_ptr_to_uint(barrier)),
      "r"(rank)
      : "memory");
}
#ifdef DFKD_WATCH  // for debugging: a wait of more than two seconds traps
#define DFKD_BEGIN_WAIT ".reg .u32 began, now;\nmov.u32 began, %%globaltimer_lo;\n"
#define DFKD_WAIT_REPEAT                                                                                            \
  "@done bra over;\nmov.u32 now, %%globaltimer_lo;\nsub.u32 now, now, began;\nsetp.lt.u32 done, now, 2000000000;\n" \
  "@done bra again;\ntrap;\nover:\n"
#else
#define DFKD_BEGIN_WAIT ""
#define DFKD_WAIT_REPEAT "@!done bra again;\n"
#endif
#define DFKD_WAIT(suffix)                                                                                            \
  asm volatile("{\n.reg .pred done;\n" DFKD_BEGIN_WAIT "again:\nmbarrier.try_wait.parity" suffix                     \
               ".shared::cta.b64 done, [%0], %1;\n" DFKD_WAIT_REPEAT "}" ::"r"(cast_smem_ptr_to_uint(barrier)),      \
               "r"(parity)                                                                                           \
               : "memory")
// Waits until the phase of this parity completes. The cluster variant acquires the writes of other blocks.
__device__ __forceinline__ void mbarrier_wait(Barrier* barrier, int parity) { DFKD_WAIT(""); }
__device__ __forceinline__ void mbarrier_wait_cluster(Barrier* barrier, int parity) { DFKD_WAIT(".acquire.cluster"); }
// Makes the thread's stores to shared memory visible to wgmma and TMA. Called by each writer before a barrier.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Makes stores to global memory visible to bulk copies that the same kernel issues later. Called by each writer before
// a barrier, and after it by the thread that issues the copy.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

#endif

// The stage and phase of a producer or consumer. Consumers wait for the full barrier with `phase`; producers wait for
// the empty barrier with `phase ^ 1`, which returns immediately in the first round.
struct PipelineState {
  int index = 0, phase = 0;

  __device__ __forceinline__ void advance(int stages, int by = 1) {
    index += by;
    if (index >= stages) {
      index -= stages;
      phase ^= 1;
    }
  }
};

// ---- bulk copies ----------------------------------------------------------------------------------------------------
// One thread issues each, except st_async(). TMA boxes in shared memory are aligned to 128 bytes (swizzled boxes: see
// the top of this file), other addresses and sizes to 16. Loads subtract the bytes that they write from the pending
// transaction bytes of `full`; a TMA load writes its whole box, including the part outside of the tensor.

#ifdef DFKD_HOST

inline void cp_async_bulk(void* shared, const void* global, int bytes, Barrier* full) {
  host::cp_async_bulk(shared, global, bytes, &full->state);
}
inline void st_async(void* shared, const uint32_t (&values)[4], Barrier* full, int rank) {
  host::st_async(host::at_rank(shared, rank), values, static_cast<uint64_t*>(host::at_rank(&full->state, rank)));
}
inline void tma_load(void* shared, const TensorMap& map, int x, int y, int z, Barrier* full) {
  host::tma_load(shared, map.map, x, y, z, &full->state);
}
inline void tma_load_multicast(unsigned ranks, void* shared, const TensorMap& map, int x, int y, int z, Barrier* full) {
  for (int rank = 0; rank < 16; ++rank) {
    if (ranks >> rank & 1u) {
      host::tma_load(host::at_rank(shared, rank), map.map, x, y, z,
                     static_cast<uint64_t*>(host::at_rank(&full->state, rank)));
    }
  }
}
inline void tma_store(const TensorMap& map, const void* shared, int x, int y, int z) {
  host::tma_store(map.map, shared, x, y, z);
}
inline void tma_store_commit() { host::tma_store_commit(); }
template <int PENDING>
void tma_store_wait_read() {
  host::tma_store_wait(PENDING);
}
template <int PENDING>
void tma_store_wait() {
  host::tma_store_wait(PENDING);
}
inline void prefetch_tensormap(const TensorMap&) {}

#else

__device__ __forceinline__ void cp_async_bulk(void* shared, const void* global, int bytes, Barrier* full) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          cast_smem_ptr_to_uint(shared)),
      "l"(global), "r"(bytes), "r"(cast_smem_ptr_to_uint(full))
      : "memory");
}
// Stores 16 bytes to the same offset in the shared memory of another block, and subtracts them from the pending
// transaction bytes of that block's `full`.
__device__ __forceinline__ void st_async(void* shared, const uint32_t (&values)[4], Barrier* full, int rank) {
  asm volatile(
      "{\n.reg .b32 remote, remote_barrier;\n"
      "mapa.shared::cluster.u32 remote, %0, %6;\n"
      "mapa.shared::cluster.u32 remote_barrier, %5, %6;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [remote], {%1, %2, %3, %4}, "
      "[remote_barrier];\n}" ::
      "r"(cast_smem_ptr_to_uint(shared)),
      "r"(values[0]), "r"(values[1]), "r"(values[2]), "r"(values[3]), "r"(cast_smem_ptr_to_uint(full)), "r"(rank)
      : "memory");
}
__device__ __forceinline__ void tma_load(void* shared, const TensorMap& map, int x, int y, int z, Barrier* full) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(cast_smem_ptr_to_uint(shared)),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(cast_smem_ptr_to_uint(full))
      : "memory");
}
// Loads to the same offset in each block of the cluster whose bit is set in `ranks`, and signals each block's barrier.
__device__ __forceinline__ void tma_load_multicast(unsigned ranks, void* shared, const TensorMap& map, int x, int y,
                                                   int z, Barrier* full) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(cast_smem_ptr_to_uint(shared)),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(cast_smem_ptr_to_uint(full)), "h"(static_cast<uint16_t>(ranks))
      : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* shared, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(cast_smem_ptr_to_uint(shared)), "r"(x), "r"(y), "r"(z)
               : "memory");
}
// Commits the thread's stores as a group.
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until all but the last PENDING groups have read shared memory, which may then be overwritten.
template <int PENDING>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
// Waits until all but the last PENDING groups are complete. Called by each storing thread before it exits.
template <int PENDING>
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void prefetch_tensormap(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

#endif

// ---- warp specialization --------------------------------------------------------------------------------------------

// Named barriers 1 to 15. `threads` is the number of threads that sync plus the number that only arrive.
#ifdef DFKD_HOST
inline void named_barrier_sync(int barrier, int threads) { host::named_barrier(barrier, threads, true); }
inline void named_barrier_arrive(int barrier, int threads) { host::named_barrier(barrier, threads, false); }
template <int REGISTERS>
void warpgroup_reg_alloc() {}
template <int REGISTERS>
void warpgroup_reg_dealloc() {}
#else
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// setmaxnreg: called by all threads of a warpgroup.
template <int REGISTERS>
__device__ __forceinline__ void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
#endif

// ---- clusters -------------------------------------------------------------------------------------------------------
// A cluster consists of adjacent blocks along x that run concurrently and access each other's shared memory (DSMEM).

#ifdef DFKD_HOST
inline int cluster_rank() { return host::cluster_rank(); }
inline int cluster_size() { return host::cluster_size(); }
inline void cluster_arrive() { host::cluster_arrive(); }
inline void cluster_wait() { host::cluster_wait(); }
template <typename T>
T* map_shared_rank(T* shared, int rank) {
  return static_cast<T*>(host::at_rank(shared, rank));
}
inline void global_barrier_arrive(unsigned* counter) { host::global_barrier_arrive(counter); }
inline void global_barrier_wait(const unsigned* counter, unsigned arrivals) {
  host::global_barrier_wait(counter, arrivals);
}
#else
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ int cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}
// Called by all threads of the cluster. A block must not exit while others access its shared memory.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// Maps an address in shared memory to the same offset in another block, for ordinary loads and stores.
template <typename T>
__device__ __forceinline__ T* map_shared_rank(T* shared, int rank) {
  uint64_t remote;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(shared), "r"(rank));
  return reinterpret_cast<T*>(remote);
}
// A barrier between blocks of a cooperative launch: a counter in global memory, initially 0. One thread per warp or
// block arrives, after __syncwarp() or __syncthreads(). One thread per warp or block waits until the counter is at
// least `arrivals`, and __syncwarp() or __syncthreads() follows.
__device__ __forceinline__ void global_barrier_arrive(unsigned* counter) {
  asm volatile("fence.acq_rel.gpu;\nred.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ void global_barrier_wait(const unsigned* counter, unsigned arrivals) {
  unsigned value;
  [[maybe_unused]] unsigned tries = 0;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
#ifdef DFKD_WATCH
    if (++tries == 100000000) asm volatile("trap;");
#endif
  } while (value < arrivals);
}
#endif
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------

// A warpgroup computes D = A B, or D += A B if `accumulate`, for A (64 x 16), B (16 x N) and a float32 D (64 x N). For
// thread 32 w + l, let i = 16 w + l / 4 and j = 2 (l % 4). Accumulator fragment: d[n][0] and d[n][1] hold columns 8 n +
// j and 8 n + j + 1 of row i; d[n][2] and d[n][3] hold the same columns of row i + 8. Register operand: a[0] and a[1]
// hold columns j and j + 1 of rows i and i + 8; a[2] and a[3] hold columns j + 8 and j + 9 of these rows. wgmma is
// asynchronous: between warpgroup_arrive() and warpgroup_wait(), the registers of D and A and the operands in shared
// memory must not be accessed; warpgroup_fence_operand() enforces this on the compiler. TRANSPOSE_A or TRANSPOSE_B
// means that the operand is MN-major.
template <typename T, int N, bool TRANSPOSE_A = false, bool TRANSPOSE_B = false>
__device__ __forceinline__ void wgmma(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool accumulate);
template <typename T, int N, bool TRANSPOSE_B = false>
__device__ __forceinline__ void wgmma(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate);

#ifdef DFKD_HOST

template <typename T, int N, bool TRANSPOSE_A, bool TRANSPOSE_B>
void wgmma(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool accumulate) {
  host::wgmma({&d[0][0], nullptr, a, b, N, std::is_same_v<T, bfloat16>, TRANSPOSE_A, TRANSPOSE_B, accumulate});
}
template <typename T, int N, bool TRANSPOSE_B>
void wgmma(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  host::wgmma({&d[0][0], a, 0, b, N, std::is_same_v<T, bfloat16>, false, TRANSPOSE_B, accumulate});
}
inline void warpgroup_arrive() {}
inline void warpgroup_commit_batch() { host::warpgroup_commit_batch(); }
template <int PENDING>
void warpgroup_wait() {
  host::warpgroup_wait(PENDING);
}
template <int N>
void warpgroup_fence_operand(float (&)[N][4]) {}
template <int N>
void warpgroup_fence_operand(uint32_t (&)[N][4]) {}

#else

// Called before the first wgmma, and again after registers that wgmma uses have been written.
__device__ __forceinline__ void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_commit_batch() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most PENDING groups are in flight.
template <int PENDING>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
template <int N>
__device__ __forceinline__ void warpgroup_fence_operand(float (&d)[N][4]) {
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) asm volatile("" : "+f"(d[i / 4][i % 4])::"memory");
}
template <int N>
__device__ __forceinline__ void warpgroup_fence_operand(uint32_t (&a)[N][4]) {
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// Register lists "%0, %1, ...", ten at a time; t is the tens digit.
#define DFKD_TEN(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define DFKD_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define DFKD_16 DFKD_TEN() ", %10, %11, %12, %13, %14, %15"
#define DFKD_24 DFKD_TEN() ", " DFKD_TEN(1) ", %20, %21, %22, %23"
#define DFKD_32 DFKD_TEN() ", " DFKD_TEN(1) ", " DFKD_TEN(2) ", %30, %31"
#define DFKD_40 DFKD_TEN() ", " DFKD_TEN(1) ", " DFKD_TEN(2) ", " DFKD_TEN(3)
#define DFKD_48 DFKD_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define DFKD_64 DFKD_40 ", " DFKD_TEN(4) ", " DFKD_TEN(5) ", %60, %61, %62, %63"
#define DFKD_80 DFKD_40 ", " DFKD_TEN(4) ", " DFKD_TEN(5) ", " DFKD_TEN(6) ", " DFKD_TEN(7)
#define DFKD_96 DFKD_80 ", " DFKD_TEN(8) ", %90, %91, %92, %93, %94, %95"

#define DFKD_D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define DFKD_D8(i) DFKD_D4(i), DFKD_D4(i + 1)
#define DFKD_D16(i) DFKD_D8(i), DFKD_D8(i + 2)
#define DFKD_D24(i) DFKD_D16(i), DFKD_D8(i + 4)
#define DFKD_D32(i) DFKD_D16(i), DFKD_D16(i + 4)
#define DFKD_D48(i) DFKD_D32(i), DFKD_D16(i + 8)
#define DFKD_D64(i) DFKD_D32(i), DFKD_D32(i + 8)
#define DFKD_D96(i) DFKD_D64(i), DFKD_D32(i + 16)

// d uses R registers; the other operands are numbered from R.
#define DFKD_WGMMA_SS(TYPE, N, R, A, B, P, TA, TB)                                                                   \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #P ", 0;\n"                                                  \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" DFKD_##R "}, %" #A ", %" #B      \
               ", add, 1, 1, %" #TA ", %" #TB ";\n}"                                                                 \
               : DFKD_D##R(0)                                                                                        \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(TRANSPOSE_A ? 1 : 0), "n"(TRANSPOSE_B ? 1 : 0))
#define DFKD_WGMMA_RS(TYPE, N, R, A0, A1, A2, A3, B, P, TB)                                                          \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #P ", 0;\n"                                                  \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" DFKD_##R "}, {%" #A0 ", %" #A1   \
               ", %" #A2 ", %" #A3 "}, %" #B ", add, 1, 1, %" #TB ";\n}"                                             \
               : DFKD_D##R(0)                                                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),              \
                 "n"(TRANSPOSE_B ? 1 : 0))
#define DFKD_WGMMA(KIND, N, ...)                      \
  if constexpr (std::is_same_v<T, bfloat16>) {        \
    KIND("bf16", N, __VA_ARGS__);                     \
  } else {                                            \
    KIND("f16", N, __VA_ARGS__);                      \
  }

template <typename T, int N, bool TRANSPOSE_A, bool TRANSPOSE_B>
__device__ __forceinline__ void wgmma(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(sizeof(T) == 2);
  if constexpr (N == 16) {
    DFKD_WGMMA(DFKD_WGMMA_SS, 16, 8, 8, 9, 10, 11, 12)
  } else if constexpr (N == 32) {
    DFKD_WGMMA(DFKD_WGMMA_SS, 32, 16, 16, 17, 18, 19, 20)
  } else if constexpr (N == 48) {
    DFKD_WGMMA(DFKD_WGMMA_SS, 48, 24, 24, 25, 26, 27, 28)
  } else if constexpr (N == 64) {
    DFKD_WGMMA(DFKD_WGMMA_SS, 64, 32, 32, 33, 34, 35, 36)
  } else if constexpr (N == 96) {
    DFKD_WGMMA(DFKD_WGMMA_SS, 96, 48, 48, 49, 50, 51, 52)
  } else if constexpr (N == 128) {
    DFKD_WGMMA(DFKD_WGMMA_SS, 128, 64, 64, 65, 66, 67, 68)
  } else {
    static_assert(N == 192);
    DFKD_WGMMA(DFKD_WGMMA_SS, 192, 96, 96, 97, 98, 99, 100)
  }
}

template <typename T, int N, bool TRANSPOSE_B>
__device__ __forceinline__ void wgmma(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(sizeof(T) == 2);
  if constexpr (N == 48) {
    DFKD_WGMMA(DFKD_WGMMA_RS, 48, 24, 24, 25, 26, 27, 28, 29, 30)
  } else if constexpr (N == 64) {
    DFKD_WGMMA(DFKD_WGMMA_RS, 64, 32, 32, 33, 34, 35, 36, 37, 38)
  } else {
    static_assert(N == 128);
    DFKD_WGMMA(DFKD_WGMMA_RS, 128, 64, 64, 65, 66, 67, 68, 69, 70)
  }
}

#endif

// ---- launches -------------------------------------------------------------------------------------------------------

// Launches a kernel in clusters of `cluster` blocks along x, cooperatively if requested. While launches are recorded
// (launchers.h), it only records the launch. Arguments are converted to the parameters' types. Returns a cudaError_t.
template <typename... Parameters, typename... Arguments>
int launch_cluster(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared, int cluster,
                   bool cooperative, void* stream, Arguments... arguments) {
#ifdef DFKD_HOST
  (void)stream;
  host::run(blocks, threads, shared, [=] { kernel(static_cast<Parameters>(arguments)...); }, cluster, cooperative);
  return 0;
#else
  const void* const address = reinterpret_cast<const void*>(kernel);
  const dfkd_launch record{address,
                           {blocks.x, blocks.y, blocks.z},
                           {threads.x, threads.y, threads.z},
                           static_cast<int64_t>(shared),
                           cluster,
                           cooperative};
  if (dfkd_record_launch(&record)) return 0;
  cudaError_t error = cudaSuccess;
  if (shared > 48 * 1024) {
    error = cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  }
  if (error == cudaSuccess && cluster > 8) {
    error = cudaFuncSetAttribute(address, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
#endif
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared, void* stream,
           Arguments... arguments) {
  return launch_cluster(kernel, blocks, threads, shared, 1, false, stream, arguments...);
}

// Calls f with a value of the 16-bit element type. Returns DFKD_INVALID with a reason for other dtypes.
template <typename F>
int dispatch_dtype(int dtype, F f) {
  if (dtype == DFKD_FLOAT16) return f(float16{});
  if (dtype == DFKD_BFLOAT16) return f(bfloat16{});
  return dfkd_unsupported("dtype must be float16 or bfloat16");
}

// Returns 0 for a supported size, otherwise DFKD_INVALID with a reason that names the size and its limits.
inline int require_size(const char* name, int64_t value, int64_t least, int64_t most, int multiple_of = 1) {
  if (value >= least && value <= most && value % multiple_of == 0) return 0;
  const long long size = value, low = least, high = most;  // for %lld
  if (multiple_of == 1) return dfkd_unsupported("%s is %lld; the kernel supports %lld to %lld", name, size, low, high);
  return dfkd_unsupported("%s is %lld; the kernel supports multiples of %d up to %lld", name, size, multiple_of, high);
}

}  // namespace dfkd
