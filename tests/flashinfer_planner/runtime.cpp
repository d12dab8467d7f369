// The CUDA runtime that FlashInfer's planner sees: one device of compute capability 8.0 or later.
#include <cstddef>
#include <cstring>

static int num_sms, blocks_per_sm, max_shared;

extern "C" {
void set_device(int sms, int blocks, int shared) { num_sms = sms, blocks_per_sm = blocks, max_shared = shared; }
int cudaGetDevice(int* device) { return *device = 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 16: *value = num_sms; return 0;        // cudaDevAttrMultiProcessorCount
    case 75: *value = 8; return 0;              // cudaDevAttrComputeCapabilityMajor
    case 76: *value = 0; return 0;              // cudaDevAttrComputeCapabilityMinor
    case 97: *value = max_shared; return 0;     // cudaDevAttrMaxSharedMemoryPerBlockOptin
  }
  return 1;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = blocks_per_sm;
  return 0;
}
int cudaMemcpyAsync(void* to, const void* from, size_t size, int, void*) {
  std::memcpy(to, from, size);
  return 0;
}
const char* cudaGetErrorString(int) { return "error of the stand-in runtime"; }
int cudaGetLastError() { return 0; }
// What nvcc's host code registers kernels with.
void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaInitModule(void**) {}
int __cudaGetKernel(void**, const void*) { return 1; }
int __cudaLaunchKernel(void*) { return 1; }
int __cudaPopCallConfiguration(void*, void*, size_t*, void*) { return 1; }
}
