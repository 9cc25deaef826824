// What every kernel of csrc/ is written in: element types, reductions, matrix and copy instructions, launches.
//
// Compiled by nvcc these are CUDA's own; compiled as plain C++ with DFKD_HOST they are those of host/shim.h, with a
// body in C++ for each instruction. A kernel uses nothing of CUDA but this header, threadIdx and its kin,
// __syncthreads and the warp shuffles here, so that all of its index arithmetic runs in tests without a GPU. All its
// shared memory is dynamic: shared_memory().
#pragma once

#ifdef DFKD_HOST
#include "host/shim.h"
#else
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

inline float rounded_product(float a, float b) { return a * b; }
inline float exp2_flushed(float x) { return std::exp2(x); }
inline float exp_fast(float x) { return std::exp(x); }
inline float rsqrt_exact(float x) { return 1.0f / std::sqrt(x); }
inline float divide_fast(float a, float b) { return a / b; }

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
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
// 2^x, where denormal results may be zero: beside larger terms of a sum, or added to one.
__device__ __forceinline__ float exp2_flushed(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float exp_fast(float x) { return __expf(x); }
__device__ __forceinline__ float rsqrt_exact(float x) { return 1.0f / sqrtf(x); }
__device__ __forceinline__ float divide_fast(float a, float b) { return __fdividef(a, b); }

#endif

// Two elements in one register, the first in its low half, as the matrix instructions take them.
template <typename T>
__device__ __forceinline__ uint32_t pack(T low, T high) {
  static_assert(sizeof(T) == 2);
  return static_cast<uint32_t>(low.bits) | (static_cast<uint32_t>(high.bits) << 16);
}
// The same of two numbers, rounded to nearest.
template <typename T>
__device__ __forceinline__ uint32_t pack_rounded(float low, float high) {
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

constexpr int kLanes = 32;
constexpr unsigned kAll = 0xffffffffu;

// Over groups of WIDTH neighbouring lanes; every lane of a group has the result, and all lanes of the warp take part.
template <int WIDTH = kLanes>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = WIDTH / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAll, x, distance);
  return x;
}
template <int WIDTH = kLanes>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int distance = WIDTH / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kAll, x, distance);
    x = other > x || other != other ? other : x;  // a NaN stays
  }
  return x;
}

// ---- shared memory, asynchronous copies ----------------------------------------------------------------------------

#ifdef DFKD_HOST

inline unsigned char* shared_memory() { return host::shared_memory(); }
inline void copy_async_16(void* shared, const void* global, bool valid) {
  host::copy_later(shared, global, 16, valid ? 16 : 0);
}
inline void commit_copies() { host::commit_copies(); }
template <int NEWEST_LEFT>
void wait_copies() {
  host::wait_copies(NEWEST_LEFT);
}

#else

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}
// 16 bytes from global to shared memory, both aligned to 16; zeros where it is not valid, and then nothing is read.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the newest groups of this thread have arrived; __syncthreads() then shows them to the others.
template <int NEWEST_LEFT>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(NEWEST_LEFT) : "memory");
}

#endif

// ---- matrix instructions (sm_80 and later) --------------------------------------------------------------------------

// d += a b for a (16 x 16), b (16 x 8), d (16 x 8) float32, spread over a warp. With g = lane / 4 and t = lane % 4:
//   a[0] row g,     columns 2t, 2t + 1      a[1] row g + 8, the same
//   a[2] row g,     columns 2t + 8, + 9     a[3] row g + 8, the same
//   b[0] rows 2t, 2t + 1 of column g        b[1] rows 2t + 8, + 9 of column g
//   d[0], d[1] row g, columns 2t, 2t + 1    d[2], d[3] row g + 8, the same
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// Four 8 x 8 matrices of 16-bit elements out of shared memory. Lane l names 16 aligned bytes: row l % 8 of matrix
// l / 8. In r[i] it then holds of matrix i row l / 4, columns 2 (l % 4) and the next; transposed, column l / 4 of
// these rows.
template <bool TRANSPOSED = false>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row);

#ifdef DFKD_HOST

namespace host {

inline uint32_t element(const uint32_t* registers, int which) {
  return (registers[which / 2] >> (16 * (which % 2))) & 0xffffu;
}

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  std::memcpy(slot(lane()), mine, sizeof(mine));
  warp_barrier();
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    double sum = 0;
    for (int k = 0; k < 16; ++k) {
      uint32_t left[6], right[6];
      std::memcpy(left, slot((row % 8) * 4 + (k % 8) / 2), sizeof(left));
      std::memcpy(right, slot(column * 4 + (k % 8) / 2), sizeof(right));
      const T x{static_cast<uint16_t>(element(left + (row / 8) + 2 * (k / 8), k % 2))};
      const T y{static_cast<uint16_t>(element(right + 4 + k / 8, k % 2))};
      sum += static_cast<double>(to_float(x)) * static_cast<double>(to_float(y));
    }
    d[i] += static_cast<float>(sum);
  }
  warp_barrier();
}

}  // namespace host

template <>
inline void mma_16x8x16<bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::mma<bfloat16>(d, a, b);
}
template <>
inline void mma_16x8x16<float16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::mma<float16>(d, a, b);
}

template <bool TRANSPOSED>
void load_matrices(uint32_t (&r)[4], const void* row) {
  uint16_t mine[8];
  std::memcpy(mine, row, 16);
  std::memcpy(host::slot(host::lane()), mine, 16);
  host::warp_barrier();
  const int g = host::lane() / 4, t = host::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int line = TRANSPOSED ? 2 * t + e : g, column = TRANSPOSED ? g : 2 * t + e;
      uint16_t line_of[8];
      std::memcpy(line_of, host::slot(8 * i + line), 16);
      pair[e] = line_of[column];
    }
    r[i] = static_cast<uint32_t>(pair[0]) | (static_cast<uint32_t>(pair[1]) << 16);
  }
  host::warp_barrier();
}

#else

template <>
__device__ __forceinline__ void mma_16x8x16<bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_16x8x16<float16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  }
}

#endif

// ---- launches -------------------------------------------------------------------------------------------------------

// Launch a kernel, or write it down where a record is set (launchers.h); the arguments are converted to its parameters'
// types. Returns a cudaError_t, 0 for success.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared, void* stream,
           Arguments... arguments) {
#ifdef DFKD_HOST
  (void)stream;
  host::run(blocks, threads, shared, [=] { kernel(static_cast<Parameters>(arguments)...); });
  return 0;
#else
  const dfkd_launch noted{reinterpret_cast<const void*>(kernel),
                          {blocks.x, blocks.y, blocks.z},
                          {threads.x, threads.y, threads.z},
                          static_cast<int64_t>(shared),
                          1,
                          0};
  if (dfkd_note(&noted)) return 0;
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
#endif
}

// Call f with a value of the element type that a dtype names. Returns what f does, or an error for another dtype.
template <typename F>
int with_type(int dtype, F f) {
  switch (dtype) {
    case DFKD_FLOAT32:
      return f(float{});
    case DFKD_FLOAT16:
      return f(float16{});
    case DFKD_BFLOAT16:
      return f(bfloat16{});
    default:
      return DFKD_INVALID;
  }
}

}  // namespace dfkd
