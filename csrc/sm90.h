// What the kernels are written in: element types, PTX instructions of sm_90a under CUTLASS's names, launches.
//
// Compiled by nvcc these are CUDA's own; compiled as plain C++ with DFKD_HOST they are those of host/, with a body in
// C++ for each instruction, where asynchronous work happens at once or as late as possible, as the test chooses. A
// kernel uses nothing of CUDA but this header, threadIdx and its kin, __syncthreads and the warp shuffles here, so that
// all of its index arithmetic runs in tests without a GPU. All its shared memory is dynamic: shared_memory().
//
// Operands of wgmma lie in shared memory in panels: rows of WIDTH (16, 32 or 64) elements, whose 16-byte chunks are
// permuted within each 128 bytes (swizzle_offset()), which is also what TMA loads through a TensorMap of the same width
// write. A panel begins at a multiple of 16 * WIDTH bytes: 1024, 512 or 256.
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
inline float to_float(float16 x) {
  _Float16 value;
  std::memcpy(&value, &x, 2);
  return static_cast<float>(value);
}
inline float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline float16 from_float<float16>(float x) {
  const _Float16 value = static_cast<_Float16>(x);
  float16 result;
  std::memcpy(&result, &value, 2);
  return result;
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return {0x7fff};
  bits += 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  return {static_cast<uint16_t>(bits >> 16)};
}

inline float mul_rn(float a, float b) { return a * b; }
inline float exp2_approx_ftz(float x) { return std::exp2(x); }
inline float rsqrt_exact(float x) { return 1.0f / std::sqrt(x); }
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

// A product that is rounded: not one half of a fused operation.
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
// 2^x, where denormal results may be zero: beside larger terms of a sum, or added to one.
__device__ __forceinline__ float exp2_approx_ftz(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float rsqrt_exact(float x) { return 1.0f / sqrtf(x); }
__device__ __forceinline__ float fast_divide(float a, float b) { return __fdividef(a, b); }

#endif

// Two elements in one register, the first in its low half, as the matrix instructions take them.
template <typename T>
__device__ __forceinline__ uint32_t pack(T low, T high) {
  static_assert(sizeof(T) == 2);
  return static_cast<uint32_t>(low.bits) | (static_cast<uint32_t>(high.bits) << 16);
}
// The same of two numbers, rounded to nearest.
template <typename T>
__device__ __forceinline__ uint32_t pack_rn(float low, float high) {
  static_assert(sizeof(T) == 2);
#ifdef DFKD_HOST
  return pack(from_float<T>(low), from_float<T>(high));
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
constexpr int kWarpgroupSize = 128;  // threads: four warps, the first of a number divisible by four
constexpr unsigned kFullMask = 0xffffffffu;

// Over groups of WIDTH neighbouring lanes; every lane of a group has the result, and all lanes of the warp take part.
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
    x = other > x || other != other ? other : x;  // a NaN stays
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

// Four 8 x 8 matrices of 16-bit elements out of shared memory. Lane l names 16 aligned bytes: row l % 8 of matrix
// l / 8. In r[i] it then holds of matrix i row l / 4, columns 2 (l % 4) and the next.
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

// ---- panels ---------------------------------------------------------------------------------------------------------

// The element of a panel where a chunk of 8 elements begins.
template <int WIDTH>
__host__ __device__ __forceinline__ constexpr int swizzle_offset(int row, int chunk) {
  static_assert(WIDTH == 16 || WIDTH == 32 || WIDTH == 64);
  const int number = row * (WIDTH / 8) + chunk;
  return (number ^ (number / 8 % (WIDTH / 8))) * 8;
}

// An operand of wgmma in panels of WIDTH. K-major (the panel's rows are those of a, or the columns of b): its WIDTH
// elements are WIDTH / 16 steps, 32 bytes apart. MN-major (the panel's rows are the columns of a, or the rows of b): 16
// of them are a step, and where M or N is more than WIDTH, further panels follow at a distance of `leading` bytes.
template <int WIDTH>
__device__ __forceinline__ uint64_t make_smem_desc(const void* panel, int leading = 16) {
  constexpr uint64_t kMode = WIDTH == 64 ? 1 : WIDTH == 32 ? 2 : 3, kEightRows = 16 * WIDTH;
#ifdef DFKD_HOST
  const uint64_t place = static_cast<uint64_t>(static_cast<const unsigned char*>(panel) - shared_memory());
#else
  const uint64_t place = cast_smem_ptr_to_uint(panel);
#endif
  return (kMode << 62) | ((kEightRows / 16) << 32) | (static_cast<uint64_t>(leading / 16) << 16) |
         ((place & 0x3ffff) / 16);
}
// The same so many bytes further.
__device__ __forceinline__ uint64_t advance_desc(uint64_t operand, int bytes) {
  return operand + static_cast<uint64_t>(bytes / 16);
}

// ---- TMA descriptors ------------------------------------------------------------------------------------------------

// A tensor of 16-bit elements in memory and the tile of one copy, at most three dimensions each, the innermost first. A
// kernel takes it as `const __grid_constant__ TensorMap`. Loads fill with zeros outside of the tensor, and stores write
// nothing there.
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
// The driver's function, found at run time since the driver is not linked; null without a driver.
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

// sizes and tile in elements; strides (y and z) in elements, multiples of 8; base aligned to 16 bytes. The tile's width
// is that of a panel, or with WIDTH = 0 any multiple of 8, and its rows then lie without exchanged chunks. Returns a
// cudaError_t.
template <int WIDTH>
int make_tensor_map(TensorMap* to, const void* base, Shape sizes, int64_t stride_y, int64_t stride_z, Shape tile) {
#ifdef DFKD_HOST
  const int64_t all[3] = {sizes.x, sizes.y, sizes.z}, tiles[3] = {tile.x, tile.y, tile.z};
  return host::make_tensor_map(&to->map, base, all, stride_y, stride_z, tiles, WIDTH) ? 0 : DFKD_INVALID;
#else
  static_assert(WIDTH == 0 || WIDTH == 16 || WIDTH == 32 || WIDTH == 64);
  if (dfkd_recorded() >= 0) return 0;  // nothing will be launched, and there may be no driver
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t all[3] = {static_cast<cuuint64_t>(sizes.x), static_cast<cuuint64_t>(sizes.y),
                             static_cast<cuuint64_t>(sizes.z)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(2 * stride_y), static_cast<cuuint64_t>(2 * stride_z)};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(tile.x), static_cast<cuuint32_t>(tile.y),
                             static_cast<cuuint32_t>(tile.z)};
  const cuuint32_t every[3] = {1, 1, 1};
  const CUtensorMapSwizzle mode = WIDTH == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                  : WIDTH == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                  : WIDTH == 16 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                : CU_TENSOR_MAP_SWIZZLE_NONE;
  // Of 16-bit elements only the size matters: nothing here computes with them.
  const CUresult result = encode(
      &to->map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(base), all, strides, box, every,
      CU_TENSOR_MAP_INTERLEAVE_NONE, mode, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : DFKD_INVALID;
#endif
}

// ---- barriers in shared memory --------------------------------------------------------------------------------------

// Counts arrivals, and bytes that copies bring. A phase ends when as many have arrived as it was made for and all bytes
// that were announced are there; then the next one begins. Phases are told apart by parity, the first being 0.
struct alignas(8) Barrier {
  uint64_t state;
};

#ifdef DFKD_HOST

inline void mbarrier_init(Barrier* barrier, int arrivals) { host::barrier_init(&barrier->state, arrivals); }
inline void fence_barrier_init() {}
inline void mbarrier_arrive(Barrier* barrier) { host::barrier_arrive(&barrier->state, 0); }
inline void mbarrier_arrive_expect_tx(Barrier* barrier, int bytes) { host::barrier_arrive(&barrier->state, bytes); }
inline void mbarrier_arrive_cluster(Barrier* barrier, int rank) {
  host::barrier_arrive(static_cast<uint64_t*>(host::at_rank(&barrier->state, rank)), 0);
}
inline void mbarrier_arrive_cluster_relaxed(Barrier* barrier, int rank) { mbarrier_arrive_cluster(barrier, rank); }
inline void mbarrier_wait(Barrier* barrier, int parity) { host::barrier_wait(&barrier->state, parity); }
inline void mbarrier_wait_cluster(Barrier* barrier, int parity) { host::barrier_wait(&barrier->state, parity); }
inline void fence_proxy_async() { host::fence_asynchronous(); }
inline void fence_proxy_async_global() {}

#else

// By one thread; then fence_barrier_init() by it, and a barrier of the block, or of the cluster where others use it.
__device__ __forceinline__ void mbarrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(cast_smem_ptr_to_uint(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(cast_smem_ptr_to_uint(barrier)) : "memory");
}
// One arrival, and so many more bytes that copies of this phase will bring.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(cast_smem_ptr_to_uint(barrier)), "r"(bytes)
               : "memory");
}
// At the barrier in the same place of another block of the cluster, or of this one.
__device__ __forceinline__ void mbarrier_arrive_cluster(Barrier* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(cast_smem_ptr_to_uint(barrier)),
      "r"(rank)
      : "memory");
}
// The same without release semantics: it says that something has been read, and does not wait for the thread's stores.
__device__ __forceinline__ void mbarrier_arrive_cluster_relaxed(Barrier* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(cast_smem_ptr_to_uint(barrier)),
      "r"(rank)
      : "memory");
}
#ifdef DFKD_WATCH  // for debugging: a wait of two seconds ends the kernel
#define DFKD_BEGIN_WAIT ".reg .u32 began, now;\nmov.u32 began, %%globaltimer_lo;\n"
#define DFKD_WAIT_AGAIN                                                                                             \
  "@done bra over;\nmov.u32 now, %%globaltimer_lo;\nsub.u32 now, now, began;\nsetp.lt.u32 done, now, 2000000000;\n" \
  "@done bra again;\ntrap;\nover:\n"
#else
#define DFKD_BEGIN_WAIT ""
#define DFKD_WAIT_AGAIN "@!done bra again;\n"
#endif
#define DFKD_WAIT(words)                                                                                             \
  asm volatile("{\n.reg .pred done;\n" DFKD_BEGIN_WAIT "again:\nmbarrier.try_wait.parity" words                     \
               ".shared::cta.b64 done, [%0], %1;\n" DFKD_WAIT_AGAIN "}" ::"r"(cast_smem_ptr_to_uint(barrier)),                \
               "r"(parity)                                                                                           \
               : "memory")
// Until the phase of this parity has ended; in a cluster, where other blocks arrive with what they wrote.
__device__ __forceinline__ void mbarrier_wait(Barrier* barrier, int parity) { DFKD_WAIT(""); }
__device__ __forceinline__ void mbarrier_wait_cluster(Barrier* barrier, int parity) { DFKD_WAIT(".acquire.cluster"); }
// By each thread that wrote shared memory which products or bulk copies read next, before the barrier between.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for memory of the device that bulk copies of the same kernel read: by the thread that wrote it or waited for
// its stores, and by the one that copies, after the barrier between.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

#endif

// A stage of a circular buffer, and the parity of the phase that ends when the stage is full. A producer waits for the
// other parity, of the phase that ended when the stage was emptied: at once in the first round.
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
// Each by one thread, except st_async(). Addresses in shared memory are aligned to 128 bytes for tiles and to 16 for
// other copies, as are addresses in memory and sizes. `full` counts all bytes of a tile, also those outside of the
// tensor.

#ifdef DFKD_HOST

inline void cp_async_bulk(void* shared, const void* global, int bytes, Barrier* full) {
  host::copy_bulk(shared, global, bytes, &full->state);
}
inline void st_async(void* there, const uint32_t (&values)[4], Barrier* full, int rank) {
  host::store_later(host::at_rank(there, rank), values, static_cast<uint64_t*>(host::at_rank(&full->state, rank)));
}
inline void tma_load(void* shared, const TensorMap& map, int x, int y, int z, Barrier* full) {
  host::load_tile(shared, map.map, x, y, z, &full->state);
}
inline void tma_load_multicast(unsigned ranks, void* shared, const TensorMap& map, int x, int y, int z, Barrier* full) {
  for (int rank = 0; rank < 16; ++rank) {
    if (ranks >> rank & 1u) {
      host::load_tile(host::at_rank(shared, rank), map.map, x, y, z,
                      static_cast<uint64_t*>(host::at_rank(&full->state, rank)));
    }
  }
}
inline void tma_store(const TensorMap& map, const void* shared, int x, int y, int z) {
  host::store_tile(map.map, shared, x, y, z);
}
inline void tma_store_commit() { host::commit_stores(); }
template <int PENDING>
void tma_store_wait_read() {
  host::wait_stores(PENDING);
}
template <int PENDING>
void tma_store_wait() {
  host::wait_stores(PENDING);
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
// By any thread: 16 bytes to the same place of another block, whose barrier in the place of `full` counts them.
__device__ __forceinline__ void st_async(void* there, const uint32_t (&values)[4], Barrier* full, int rank) {
  asm volatile(
      "{\n.reg .b32 to, counts;\n"
      "mapa.shared::cluster.u32 to, %0, %6;\n"
      "mapa.shared::cluster.u32 counts, %5, %6;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%1, %2, %3, %4}, [counts];\n}" ::"r"(
          cast_smem_ptr_to_uint(there)),
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
// To the same place of each block of the cluster whose bit is set, and counted by each one's barrier.
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
// Of the calling thread: a group of stores ends here; wait until all but the newest groups have been read from shared
// memory, or are in memory. A thread waits for its own before it ends.
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
template <int PENDING>
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void prefetch_tensormap(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

#endif

// ---- warps with roles -----------------------------------------------------------------------------------------------

// Barriers 1 to 15 of some of a block's warps: `threads` of them, 32 a warp, wait or arrive.
#ifdef DFKD_HOST
inline void named_barrier_sync(int barrier, int threads) { host::sync_some(barrier, threads, true); }
inline void named_barrier_arrive(int barrier, int threads) { host::sync_some(barrier, threads, false); }
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
// By all of a warpgroup: have so many registers a thread, more or fewer than the launch gave.
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
// Neighbouring blocks along x that run at the same time and see each other's shared memory.

#ifdef DFKD_HOST
inline int cluster_rank() { return host::cluster_rank(); }
inline int cluster_size() { return host::cluster_size(); }
inline void cluster_arrive() { host::cluster_arrive(); }
inline void cluster_wait() { host::cluster_wait(); }
template <typename T>
T* map_shared_rank(T* mine, int rank) {
  return static_cast<T*>(host::at_rank(mine, rank));
}
inline void global_barrier_arrive(unsigned* counter) { host::global_barrier_arrive(counter); }
inline void global_barrier_wait(const unsigned* counter, unsigned arrivals) { host::global_barrier_wait(counter, arrivals); }
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
// By every thread of the cluster. A block must not end while others use its shared memory.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// The same place in another block's shared memory, to be read and written as any.
template <typename T>
__device__ __forceinline__ T* map_shared_rank(T* mine, int rank) {
  uint64_t there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(mine), "r"(rank));
  return reinterpret_cast<T*>(there);
}
// Between blocks of a cooperative launch, through a counter in memory that begins at 0: one thread of a block after a
// barrier of its block; and until so many have arrived, before one.
__device__ __forceinline__ void global_barrier_arrive(unsigned* counter) {
  asm volatile("fence.acq_rel.gpu;\nred.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ void global_barrier_wait(const unsigned* counter, unsigned arrivals) {
  unsigned found;
  [[maybe_unused]] unsigned tries = 0;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
#ifdef DFKD_WATCH
    if (++tries == 100000000) asm volatile("trap;");
#endif
  } while (found < arrivals);
}
#endif
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// ---- products of a warpgroup ----------------------------------------------------------------------------------------

// d = a b, or d += a b, for a (64 x 16), b (16 x N) and d (64 x N) float32, by all 128 threads. Thread 32 w + l holds
// in d[n] of columns 8 n + 2 (l % 4) and the next those of row 16 w + l / 4, then those of the row 8 further. a in
// registers: a[0] that row's columns 2 (l % 4) and the next, a[1] those of the row 8 further, a[2] and a[3] the same 8
// columns further. It is asynchronous: between warpgroup_arrive() and warpgroup_wait() nothing may touch d, a in
// registers or the operands in shared memory; warpgroup_fence_operand() keeps the compiler from doing so. TRANSPOSE_A,
// TRANSPOSE_B: that operand is MN-major.
template <typename T, int N, bool TRANSPOSE_A = false, bool TRANSPOSE_B = false>
__device__ __forceinline__ void wgmma(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool add);
template <typename T, int N, bool TRANSPOSE_B = false>
__device__ __forceinline__ void wgmma(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool add);

#ifdef DFKD_HOST

template <typename T, int N, bool TRANSPOSE_A, bool TRANSPOSE_B>
void wgmma(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool add) {
  host::multiply({&d[0][0], nullptr, a, b, N, std::is_same_v<T, bfloat16>, TRANSPOSE_A, TRANSPOSE_B, add});
}
template <typename T, int N, bool TRANSPOSE_B>
void wgmma(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  host::multiply({&d[0][0], a, 0, b, N, std::is_same_v<T, bfloat16>, false, TRANSPOSE_B, add});
}
inline void warpgroup_arrive() {}
inline void warpgroup_commit_batch() { host::commit_products(); }
template <int PENDING>
void warpgroup_wait() {
  host::wait_products(PENDING);
}
template <int N>
void warpgroup_fence_operand(float (&)[N][4]) {}
template <int N>
void warpgroup_fence_operand(uint32_t (&)[N][4]) {}

#else

// Before the first product, and where registers that products use have been written since.
__device__ __forceinline__ void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_commit_batch() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all but the newest groups are done.
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

// Lists of registers, by tens: "%0, %1, ...", the tens' digit being t.
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
#define DFKD_128 \
  DFKD_80 ", " DFKD_TEN(8) ", " DFKD_TEN(9) ", " DFKD_TEN(10) ", " DFKD_TEN(11) \
  ", %120, %121, %122, %123, %124, %125, %126, %127"

#define DFKD_D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define DFKD_D8(i) DFKD_D4(i), DFKD_D4(i + 1)
#define DFKD_D16(i) DFKD_D8(i), DFKD_D8(i + 2)
#define DFKD_D24(i) DFKD_D16(i), DFKD_D8(i + 4)
#define DFKD_D32(i) DFKD_D16(i), DFKD_D16(i + 4)
#define DFKD_D48(i) DFKD_D32(i), DFKD_D16(i + 8)
#define DFKD_D64(i) DFKD_D32(i), DFKD_D32(i + 8)
#define DFKD_D96(i) DFKD_D64(i), DFKD_D32(i + 16)
#define DFKD_D128(i) DFKD_D64(i), DFKD_D64(i + 16)

// With R registers of d, further operands are numbers R to R + 6.
#define DFKD_SHARED(TYPE, N, R, A, B, P, TA, TB)                                                                     \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #P ", 0;\n"                                                  \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" DFKD_##R "}, %" #A ", %" #B      \
               ", add, 1, 1, %" #TA ", %" #TB ";\n}"                                                                 \
               : DFKD_D##R(0)                                                                                        \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(TRANSPOSE_A ? 1 : 0), "n"(TRANSPOSE_B ? 1 : 0))
#define DFKD_REGISTERS(TYPE, N, R, A0, A1, A2, A3, B, P, TB)                                                         \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #P ", 0;\n"                                                  \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" DFKD_##R "}, {%" #A0 ", %" #A1   \
               ", %" #A2 ", %" #A3 "}, %" #B ", add, 1, 1, %" #TB ";\n}"                                             \
               : DFKD_D##R(0)                                                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),                     \
                 "n"(TRANSPOSE_B ? 1 : 0))
#define DFKD_CASE(KIND, N, ...)                       \
  if constexpr (std::is_same_v<T, bfloat16>) {        \
    KIND("bf16", N, __VA_ARGS__);                     \
  } else {                                            \
    KIND("f16", N, __VA_ARGS__);                      \
  }

template <typename T, int N, bool TRANSPOSE_A, bool TRANSPOSE_B>
__device__ __forceinline__ void wgmma(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool add) {
  static_assert(sizeof(T) == 2);
  if constexpr (N == 16) {
    DFKD_CASE(DFKD_SHARED, 16, 8, 8, 9, 10, 11, 12)
  } else if constexpr (N == 32) {
    DFKD_CASE(DFKD_SHARED, 32, 16, 16, 17, 18, 19, 20)
  } else if constexpr (N == 48) {
    DFKD_CASE(DFKD_SHARED, 48, 24, 24, 25, 26, 27, 28)
  } else if constexpr (N == 64) {
    DFKD_CASE(DFKD_SHARED, 64, 32, 32, 33, 34, 35, 36)
  } else if constexpr (N == 96) {
    DFKD_CASE(DFKD_SHARED, 96, 48, 48, 49, 50, 51, 52)
  } else if constexpr (N == 128) {
    DFKD_CASE(DFKD_SHARED, 128, 64, 64, 65, 66, 67, 68)
  } else if constexpr (N == 192) {
    DFKD_CASE(DFKD_SHARED, 192, 96, 96, 97, 98, 99, 100)
  } else {
    static_assert(N == 256);
    DFKD_CASE(DFKD_SHARED, 256, 128, 128, 129, 130, 131, 132)
  }
}

template <typename T, int N, bool TRANSPOSE_B>
__device__ __forceinline__ void wgmma(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(sizeof(T) == 2);
  if constexpr (N == 16) {
    DFKD_CASE(DFKD_REGISTERS, 16, 8, 8, 9, 10, 11, 12, 13, 14)
  } else if constexpr (N == 32) {
    DFKD_CASE(DFKD_REGISTERS, 32, 16, 16, 17, 18, 19, 20, 21, 22)
  } else if constexpr (N == 48) {
    DFKD_CASE(DFKD_REGISTERS, 48, 24, 24, 25, 26, 27, 28, 29, 30)
  } else if constexpr (N == 64) {
    DFKD_CASE(DFKD_REGISTERS, 64, 32, 32, 33, 34, 35, 36, 37, 38)
  } else if constexpr (N == 96) {
    DFKD_CASE(DFKD_REGISTERS, 96, 48, 48, 49, 50, 51, 52, 53, 54)
  } else if constexpr (N == 128) {
    DFKD_CASE(DFKD_REGISTERS, 128, 64, 64, 65, 66, 67, 68, 69, 70)
  } else if constexpr (N == 192) {
    DFKD_CASE(DFKD_REGISTERS, 192, 96, 96, 97, 98, 99, 100, 101, 102)
  } else {
    static_assert(N == 256);
    DFKD_CASE(DFKD_REGISTERS, 256, 128, 128, 129, 130, 131, 132, 133, 134)
  }
}

#endif

// ---- launches -------------------------------------------------------------------------------------------------------

// Launch a kernel in clusters of so many blocks along x, or, if cooperative, with all blocks resident; or write the
// launch down where a record is set (launchers.h). Arguments are converted to the parameters' types. Returns a
// cudaError_t, 0 for success.
template <typename... Parameters, typename... Arguments>
int launch_cluster(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared, int cluster,
                   bool cooperative, void* stream, Arguments... arguments) {
#ifdef DFKD_HOST
  (void)stream;
  host::run(blocks, threads, shared, [=] { kernel(static_cast<Parameters>(arguments)...); }, cluster, cooperative);
  return 0;
#else
  const void* const address = reinterpret_cast<const void*>(kernel);
  const dfkd_launch noted{address,
                          {blocks.x, blocks.y, blocks.z},
                          {threads.x, threads.y, threads.z},
                          static_cast<int64_t>(shared),
                          cluster,
                          cooperative};
  if (dfkd_record_launch(&noted)) return 0;
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

// Call f with a value of the 16-bit element type that a dtype names; DFKD_INVALID with the reason for another dtype.
template <typename F>
int dispatch_dtype(int dtype, F f) {
  if (dtype == DFKD_FLOAT16) return f(float16{});
  if (dtype == DFKD_BFLOAT16) return f(bfloat16{});
  return dfkd_unsupported("dtype must be float16 or bfloat16");
}

// 0 for a size that a kernel serves; otherwise DFKD_INVALID, with a reason that names the size and its limits.
inline int require_size(const char* name, int64_t value, int64_t least, int64_t most, int multiple_of = 1) {
  if (value >= least && value <= most && value % multiple_of == 0) return 0;
  const auto number = [](int64_t x) { return static_cast<long long>(x); };
  if (multiple_of == 1) {
    return dfkd_unsupported("%s is %lld; the kernel supports %lld to %lld", name, number(value), number(least), number(most));
  }
  return dfkd_unsupported("%s is %lld; the kernel supports multiples of %d up to %lld", name, number(value), multiple_of,
                     number(most));
}

}  // namespace dfkd
