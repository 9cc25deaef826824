// Reasons, recorded launches and their resources; see launchers.h.
#include "launchers.h"

#include <cstdarg>
#include <cstdio>

namespace {

thread_local char reason[256] = "";

}  // namespace

extern "C" {

const char* dfkd_unsupported_reason(void) { return reason; }

int dfkd_unsupported(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(reason, sizeof(reason), format, arguments);
  va_end(arguments);
  return DFKD_INVALID;
}
}

#ifndef DFKD_HOST  // the CPU emulation does not record launches
#include <cuda_runtime.h>

#include <cstddef>
#include <unordered_map>

namespace {

thread_local dfkd_launch* record = nullptr;
thread_local int64_t record_capacity = 0, record_count = 0;

// Kernel names by the address that launches use. cudaFuncGetName needs a driver.
std::unordered_map<const void*, const char*>& names() {
  static std::unordered_map<const void*, const char*> map;
  return map;
}

dim3 dimensions(const uint32_t (&size)[3]) { return {size[0], size[1], size[2]}; }

}  // namespace

extern "C" {

// Called for each kernel when this library is loaded. The linker redirects it here (--wrap in CMakeLists.txt).
void __real___cudaRegisterFunction(void** module, const char* kernel, char* device_kernel, const char* name,
                                   int thread_limit, void* thread, void* block, void* block_size, void* grid_size,
                                   int* warp_size);
void __wrap___cudaRegisterFunction(void** module, const char* kernel, char* device_kernel, const char* name,
                                   int thread_limit, void* thread, void* block, void* block_size, void* grid_size,
                                   int* warp_size) {
  names()[kernel] = name;
  __real___cudaRegisterFunction(module, kernel, device_kernel, name, thread_limit, thread, block, block_size,
                                grid_size, warp_size);
}

void dfkd_record(dfkd_launch* to, int64_t capacity) {
  record = to;
  record_capacity = capacity;
  record_count = 0;
}

int64_t dfkd_recorded(void) { return record == nullptr ? -1 : record_count; }

int dfkd_record_launch(const dfkd_launch* launch) {
  if (record == nullptr) return 0;
  if (record_count < record_capacity) record[record_count] = *launch;
  ++record_count;
  return 1;
}

const char* dfkd_kernel_name(const void* kernel) {
  const auto found = names().find(kernel);
  return found == names().end() ? nullptr : found->second;
}

int64_t dfkd_kernel_names(const char** to, int64_t capacity) {
  int64_t count = 0;
  for (const auto& [kernel, name] : names()) {
    if (count < capacity) to[count] = name;
    ++count;
  }
  return count;
}

int dfkd_resources_of(const dfkd_launch* launch, dfkd_resources* to) {
  *to = {};
  cudaFuncAttributes kernel{};
  cudaError_t error = cudaFuncGetAttributes(&kernel, launch->kernel);
  if (error != cudaSuccess) return error;
  to->registers = kernel.numRegs;
  to->static_shared = static_cast<int64_t>(kernel.sharedSizeBytes);
  to->local = static_cast<int64_t>(kernel.localSizeBytes);
  int device = 0;
  if (error = cudaGetDevice(&device); error != cudaSuccess) return error;
  for (const auto& [value, attribute] :
       {std::pair{&to->multiprocessors, cudaDevAttrMultiProcessorCount},
        std::pair{&to->threads_per_multiprocessor, cudaDevAttrMaxThreadsPerMultiProcessor}}) {
    if (error = cudaDeviceGetAttribute(value, attribute, device); error != cudaSuccess) return error;
  }
  const auto shared = static_cast<size_t>(launch->shared);
  error = cudaFuncSetAttribute(launch->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  const dim3 block = dimensions(launch->block);
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&to->blocks_per_multiprocessor, launch->kernel,
                                                        static_cast<int>(block.x * block.y * block.z), shared);
  if (error != cudaSuccess) return error;
  to->active_clusters = to->blocks_per_multiprocessor * to->multiprocessors;
  if (launch->cluster <= 1) return cudaSuccess;
  if (launch->cluster > 8) {
    error = cudaFuncSetAttribute(launch->kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(launch->cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dimensions(launch->grid);
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(&to->active_clusters, launch->kernel, &config);
}

}  // extern "C"
#endif
