// A stub of libcuda.so.1 for tests without a GPU. It implements what Triton's driver and launchers call, checks each
// launch against the limits of its device, records it, and executes nothing. Device i is the i-th of `targets`.

#include "cuda.h"
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_PARAMS = 512, DEFAULT_SHARED = 48 * 1024 };

// Compute capability, multiprocessors (A100, RTX 3090, H100, B200, RTX 5090), shared memory per block.
static const struct {
  int major, minor, num_sms, shared;
} targets[] = {
    {8, 0, 108, 166912}, {8, 6, 82, 101376}, {9, 0, 132, 232448}, {10, 0, 148, 232448}, {12, 0, 170, 101376},
};

struct CUfunc_st {
  int max_dynamic_shared;
};

// Read and written by stub_driver.py.
int stub_device;      // index of the current device
int stub_num_params;  // number of parameters of the next launch, because cuLaunchKernelEx does not pass it
struct {
  uint64_t count;
  uint32_t grid[3], block[3], shared, reserved;
  uint64_t stream;
  uint64_t params[MAX_PARAMS];  // each parameter has up to eight bytes and is in the low bytes
} stub_launch;

static const char *reason = "not implemented by the stub";

static CUresult fail(const char *why) {
  reason = why;
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_SUCCESS ? "no error" : reason;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  if (device < 0 || device >= (int)(sizeof targets / sizeof *targets)) return fail("no such device");
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = targets[device].num_sms; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = targets[device].major; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = targets[device].minor; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = targets[device].shared; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = targets[device].shared + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)(uintptr_t)(stub_device + 1);
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (memcmp(image, "\x7f"
                    "ELF",
             4))
    return fail("a module that is not an ELF file");
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = malloc(sizeof **function);
  (*function)->max_dynamic_shared = DEFAULT_SHARED;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if (value > targets[stub_device].shared) return fail("more dynamic shared memory than the device has");
  function->max_dynamic_shared = value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  memcpy(data, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  uint64_t threads = (uint64_t)config->blockDimX * config->blockDimY * config->blockDimZ;
  if (config->gridDimX < 1 || config->gridDimX > INT32_MAX) return fail("grid x is not in 1 .. 2^31 - 1");
  if (config->gridDimY < 1 || config->gridDimY > 65535) return fail("grid y is not in 1 .. 65535");
  if (config->gridDimZ < 1 || config->gridDimZ > 65535) return fail("grid z is not in 1 .. 65535");
  if (threads < 1 || threads > 1024) return fail("a block has 1 to 1024 threads");
  if (config->sharedMemBytes > (unsigned)function->max_dynamic_shared) return fail("too much dynamic shared memory");
  if (stub_num_params > MAX_PARAMS) return fail("more parameters than the stub records");
  stub_launch.count++;
  memcpy(stub_launch.grid, &config->gridDimX, sizeof stub_launch.grid);
  memcpy(stub_launch.block, &config->blockDimX, sizeof stub_launch.block);
  stub_launch.shared = config->sharedMemBytes;
  stub_launch.stream = (uint64_t)(uintptr_t)config->hStream;
  for (int i = 0; i < stub_num_params; i++) memcpy(stub_launch.params + i, params[i], 8);
  return CUDA_SUCCESS;
}
