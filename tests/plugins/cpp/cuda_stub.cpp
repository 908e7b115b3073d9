// A libcuda.so.1 for machines without one: the few driver functions that the plugin calls, handed to the test.

#include <cuda.h>
#include <dlfcn.h>

#include <cstdint>

namespace {
int sm = 0;
uint64_t (*loadImage)(const void* image) = nullptr;
int (*isSymbol)(uint64_t kernel, const char* symbol) = nullptr;
void (*setShared)(uint64_t kernel, int bytes) = nullptr;
void (*launch)(uint64_t kernel, const unsigned* numbers, void* stream, void** parameters) = nullptr;
}  // namespace

extern "C" {

void stub_install(int deviceSm, decltype(loadImage) load, decltype(isSymbol) symbol, decltype(setShared) shared,
                  decltype(launch) run) {
    sm = deviceSm;
    loadImage = load;
    isSymbol = symbol;
    setShared = shared;
    launch = run;
}

// cuda-python finds every function through this one.
CUresult cuGetProcAddress_v2(const char* symbol, void** function, int, cuuint64_t, CUdriverProcAddressQueryResult*) {
    Dl_info own;
    dladdr(reinterpret_cast<void*>(&stub_install), &own);
    void* const library = dlopen(own.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    *function = dlsym(library, symbol);
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult cuGetErrorName(CUresult, const char** name) {
    *name = "STUB";
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = reinterpret_cast<CUcontext>(1);
    return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) {
    *device = 0;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? sm / 10 : sm % 10;
    return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    const uint64_t kernel = loadImage(image);
    *module = reinterpret_cast<CUmodule>(kernel);
    return kernel ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* symbol) {
    *function = reinterpret_cast<CUfunction>(module);
    return isSymbol(reinterpret_cast<uint64_t>(module), symbol) ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute, int value) {
    setShared(reinterpret_cast<uint64_t>(function), value);
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void** parameters, void**) {
    const unsigned numbers[7] = {x, y, z, bx, by, bz, shared};
    launch(reinterpret_cast<uint64_t>(function), numbers, stream, parameters);
    return CUDA_SUCCESS;
}

}  // extern "C"
