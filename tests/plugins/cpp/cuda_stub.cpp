// A libcuda.so.1 for machines without one: the few driver functions that the plugins call. It keeps count of what is
// loaded, refuses what a driver would refuse, notes every call, and hands launches to the test.

#include <cuda.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <set>
#include <string>
#include <vector>

namespace {

struct Module {
    uint64_t kernel;  // the test's number of the image
    uint64_t context;
};

// As the driver's own, these outlive every library that may still call at the end of the process.
auto& live = *new std::set<Module*>;
auto& contexts = *new std::vector<uint64_t>{1};  // the thread's stack of them, by their numbers
auto& destroyed = *new std::set<uint64_t>;
auto& calls = *new std::string;
auto& taken = *new std::string;
int sm = 0;
bool noting = true;
uint64_t (*loadImage)(const void* image) = nullptr;
int (*isSymbol)(uint64_t kernel, const char* symbol) = nullptr;
void (*setShared)(uint64_t kernel, int bytes) = nullptr;
void (*launch)(uint64_t kernel, const unsigned* numbers, void* stream, void** parameters) = nullptr;

void note(const char* name) {
    if (noting) calls.append(name).append("\n");
}

Module* known(void* handle) {
    auto* const module = static_cast<Module*>(handle);
    return live.count(module) && module->context == contexts.back() ? module : nullptr;
}

CUcontext handle(uint64_t context) { return reinterpret_cast<CUcontext>(context); }

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

// Names of the functions called since the last time this was asked, a line each.
const char* stub_calls() {
    taken.swap(calls);
    calls.clear();
    return taken.c_str();
}
// Whether calls are noted: not while they are timed.
void stub_note(int on) { noting = on; }
int stub_live() { return static_cast<int>(live.size()); }
// The context that is current from now on. Its handle is the same for every eighth: a destroyed one's is given again.
void stub_context(uint64_t context) { contexts.back() = context; }
// Destroys a context, with what is loaded in it.
void stub_destroy(uint64_t context) {
    destroyed.insert(context);
    for (auto each = live.begin(); each != live.end();) {
        each = (*each)->context == context ? live.erase(each) : std::next(each);
    }
}

// cuda-python finds every function through this one.
CUresult cuGetProcAddress_v2(const char* symbol, void** function, int, cuuint64_t, CUdriverProcAddressQueryResult*) {
    Dl_info own;
    dladdr(reinterpret_cast<void*>(&stub_install), &own);
    void* const library = dlopen(own.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    *function = dlsym(library, symbol);
    if (!*function) *function = dlsym(library, (std::string(symbol) + "_v2").c_str());
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult cuGetErrorName(CUresult, const char** name) {
    *name = "STUB";
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
    note("cuCtxGetCurrent");
    *context = handle(1 + contexts.back() % 8);
    return CUDA_SUCCESS;
}
CUresult cuCtxGetId(CUcontext, unsigned long long* id) {
    *id = contexts.back();
    return CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent_v2(CUcontext context) {
    for (uint64_t each = contexts.front(); each > 0; --each) {
        if (handle(1 + each % 8) != context || destroyed.count(each)) continue;
        contexts.push_back(each);
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_INVALID_CONTEXT;
}
CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    *context = handle(1 + contexts.back() % 8);
    contexts.pop_back();
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
    note("cuModuleLoadData");
    const uint64_t kernel = loadImage(image);
    if (!kernel) return CUDA_ERROR_INVALID_IMAGE;
    auto* const made = new Module{kernel, contexts.back()};  // never freed: no handle is given twice
    live.insert(made);
    *module = reinterpret_cast<CUmodule>(made);
    return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
    Module* const found = known(module);
    note(found ? "cuModuleUnload" : "cuModuleUnload of none");
    live.erase(found);
    return found ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* symbol) {
    *function = reinterpret_cast<CUfunction>(module);
    Module* const found = known(module);
    return found && isSymbol(found->kernel, symbol) ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute, int value) {
    Module* const found = known(function);
    if (found) setShared(found->kernel, value);
    return found ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void** parameters, void**) {
    note("cuLaunchKernel");
    Module* const found = known(function);
    if (!found) return CUDA_ERROR_INVALID_HANDLE;
    const unsigned numbers[7] = {x, y, z, bx, by, bz, shared};
    if (launch) launch(found->kernel, numbers, stream, parameters);
    return CUDA_SUCCESS;
}

}  // extern "C"
