#include "cuda_driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <set>
#include <stdexcept>

namespace d3tom {
namespace {

// The launch plan's constants, which plugins/launch.py decides.
constexpr int64_t kWidePrograms = 96;
constexpr int64_t kAlignment = 16;
constexpr int64_t kNarrowKept = 32;
constexpr int64_t kOrderBlock = 256;
constexpr int64_t kMaxGrid = 65535;
constexpr int64_t kAddressLimit = int64_t{1} << 31;
constexpr uint32_t kDefaultShared = 48 * 1024;

int64_t ceilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Driver {
   public:
    static const Driver& get() {
        static const Driver driver;
        return driver;
    }

    void check(CUresult status, const char* function) const {
        if (status == CUDA_SUCCESS) return;
        const char* name = nullptr;
        getErrorName(status, &name);
        throw std::runtime_error(std::string(function) + " failed: " + (name ? name : std::to_string(status)));
    }

    decltype(&cuGetErrorName) getErrorName;
    decltype(&cuCtxGetCurrent) ctxGetCurrent;
    decltype(&cuCtxGetDevice) ctxGetDevice;
    decltype(&cuDeviceGetAttribute) deviceGetAttribute;
    decltype(&cuModuleLoadData) moduleLoadData;
    decltype(&cuModuleGetFunction) moduleGetFunction;
    decltype(&cuFuncSetAttribute) funcSetAttribute;
    decltype(&cuLaunchKernel) launchKernel;
    CUresult (*funcLoad)(CUfunction) = nullptr;  // CUDA 12.4 and later

   private:
    Driver() {
        library_ = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (!library_) {
            throw std::runtime_error("the CUDA driver's libcuda.so.1 cannot be opened; running needs an NVIDIA GPU");
        }
        find("cuGetErrorName", getErrorName);
        find("cuCtxGetCurrent", ctxGetCurrent);
        find("cuCtxGetDevice", ctxGetDevice);
        find("cuDeviceGetAttribute", deviceGetAttribute);
        find("cuModuleLoadData", moduleLoadData);
        find("cuModuleGetFunction", moduleGetFunction);
        find("cuFuncSetAttribute", funcSetAttribute);
        find("cuLaunchKernel", launchKernel);
        funcLoad = reinterpret_cast<CUresult (*)(CUfunction)>(dlsym(library_, "cuFuncLoad"));
    }

    template <typename Function>
    void find(const char* name, Function& function) {
        function = reinterpret_cast<Function>(dlsym(library_, name));
        if (!function) throw std::runtime_error(std::string("the CUDA driver has no ") + name + "; update it");
    }

    void* library_;
};

uint32_t currentSm() {
    const Driver& driver = Driver::get();
    CUdevice device;
    int major = 0, minor = 0;
    driver.check(driver.ctxGetDevice(&device), "cuCtxGetDevice");
    driver.check(driver.deviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device),
                 "cuDeviceGetAttribute");
    driver.check(driver.deviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device),
                 "cuDeviceGetAttribute");
    return static_cast<uint32_t>(major * 10 + minor);
}

// The argument block of one launch: values, and the array of pointers to them that cuLaunchKernel reads.
class Arguments {
   public:
    void pointer(const void* address) { add(reinterpret_cast<uint64_t>(address)); }
    void size(int64_t value) { add(static_cast<uint32_t>(value)); }  // the kernel reads the low half

    void** pointers(uint32_t scratch) {
        for (uint32_t index = 0; index < scratch; ++index) add(0);
        for (std::size_t index = 0; index < count_; ++index) pointers_[index] = &values_[index];
        return pointers_;
    }

   private:
    void add(uint64_t value) {
        if (count_ == kMost) throw std::runtime_error("a merge kernel declares too many parameters");
        values_[count_++] = value;
    }

    static constexpr std::size_t kMost = 16;
    uint64_t values_[kMost];
    void* pointers_[kMost];
    std::size_t count_ = 0;
};

}  // namespace

Workspace workspaceOf(const MergeSizes& sizes) {
    const int64_t perBlock = 4 * sizes.batch * sizes.visual * ceilDiv(sizes.kept, kNarrowKept);
    const int64_t parts[] = {perBlock, perBlock, 4 * sizes.batch * sizes.visual, 4 * sizes.batch * sizes.kept};
    std::size_t offsets[5] = {0};
    for (int index = 0; index < 4; ++index) {
        offsets[index + 1] = offsets[index] + static_cast<std::size_t>(ceilDiv(parts[index], 256)) * 256;
    }
    return {offsets[0], offsets[1], offsets[2], offsets[3], offsets[4]};
}

LoadedKernels::LoadedKernels(const std::vector<Kernel>& kernels) {
    const Driver& driver = Driver::get();
    const uint32_t sm = currentSm();
    const std::vector<Kernel> chosen = selectKernels(kernels, sm);
    std::set<std::pair<std::string, RowType>> wanted;
    for (const Kernel& kernel : kernels) wanted.emplace(kernel.name, kernel.type);
    if (kernels.empty() || chosen.size() != wanted.size()) {
        throw std::runtime_error("the engine holds no kernels for this GPU, compute capability " + std::to_string(sm) +
                                 "; build it again for this GPU");
    }
    for (const Kernel& kernel : chosen) {
        CUmodule module;
        CUfunction function;
        driver.check(driver.moduleLoadData(&module, kernel.image), "cuModuleLoadData");
        driver.check(driver.moduleGetFunction(&function, module, kernel.symbol.c_str()), "cuModuleGetFunction");
        if (kernel.shared > kDefaultShared) {
            driver.check(driver.funcSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                                 static_cast<int>(kernel.shared)),
                         "cuFuncSetAttribute");
        }
        // A driver that loads lazily would allocate at the first launch, which may be under capture.
        if (driver.funcLoad) driver.check(driver.funcLoad(function), "cuFuncLoad");
        entries_.push_back({kernel, function});
    }
}

const LoadedKernels::Entry& LoadedKernels::find(const std::string& name, RowType type) const {
    for (const Entry& entry : entries_) {
        if (entry.kernel.name == name && entry.kernel.type == type) return entry;
    }
    throw std::runtime_error("the engine holds no kernel `" + name + "` for these rows; build it again");
}

void LoadedKernels::enqueue(const MergeSizes& sizes, RowType type, const Buffers& buffers, CUstream stream) const {
    const int64_t batch = sizes.batch, visual = sizes.visual, kept = sizes.kept;
    const int64_t depth = sizes.depth, width = sizes.width;
    if (kept > visual || kept > kMaxGrid || batch > kMaxGrid ||
        std::max(visual * std::max(depth, width), visual * (kept + 1) + kOrderBlock) >= kAddressLimit) {
        throw std::runtime_error("a merge of " + std::to_string(visual) + " tokens of width " +
                                 std::to_string(std::max(depth, width)) + " into " + std::to_string(kept) +
                                 " is beyond the kernels' limits");
    }
    if (batch == 0 || visual == 0 || kept == 0 || width == 0) return;

    const Workspace parts = workspaceOf(sizes);
    auto* const workspace = static_cast<char*>(buffers.workspace);
    const auto launch = [stream](const Entry& entry, int64_t x, int64_t y, int64_t z, Arguments& arguments) {
        const Driver& driver = Driver::get();
        driver.check(driver.launchKernel(entry.function, static_cast<unsigned>(x), static_cast<unsigned>(y),
                                         static_cast<unsigned>(z), entry.kernel.threads, 1, 1, entry.kernel.shared,
                                         stream, arguments.pointers(entry.kernel.scratch), nullptr),
                     "cuLaunchKernel");
    };

    const Entry* nearest = &find(depth % kAlignment == 0 ? "nearest-wide" : "nearest-ragged", type);
    const auto tiles = [&](const Entry& entry) {
        return batch * ceilDiv(visual, entry.kernel.blockX) * ceilDiv(kept, entry.kernel.blockY);
    };
    if (depth % kAlignment == 0 && tiles(*nearest) < kWidePrograms) nearest = &find("nearest-narrow", type);
    const int64_t keptBlocks = ceilDiv(kept, nearest->kernel.blockY);
    Arguments search;
    search.pointer(buffers.normed);
    search.pointer(buffers.kept);
    search.size(visual);
    search.size(kept);
    search.size(depth);
    search.pointer(workspace + parts.scores);
    search.pointer(workspace + parts.slots);
    launch(*nearest, ceilDiv(visual, nearest->kernel.blockX), keptBlocks, batch, search);

    const Entry& order = find("order", RowType::kNone);
    Arguments sort;
    sort.pointer(workspace + parts.scores);
    sort.pointer(workspace + parts.slots);
    sort.pointer(buffers.kept);
    sort.size(visual);
    sort.size(kept);
    sort.size(keptBlocks);
    sort.pointer(workspace + parts.order);
    sort.pointer(workspace + parts.starts);
    launch(order, ceilDiv(visual, order.kernel.blockX), batch, 1, sort);

    const Entry& total = find(width % kAlignment == 0 ? "sum" : "sum-ragged", type);
    Arguments sum;
    sum.pointer(buffers.hidden);
    sum.pointer(workspace + parts.order);
    sum.pointer(workspace + parts.starts);
    sum.size(visual);
    sum.size(kept);
    sum.size(width);
    sum.pointer(buffers.merged);
    launch(total, ceilDiv(width, total.kernel.blockX), kept, batch, sum);
}

std::shared_ptr<LoadedKernels> KernelCache::inCurrentContext(const std::vector<Kernel>& kernels) {
    const Driver& driver = Driver::get();
    CUcontext context = nullptr;
    driver.check(driver.ctxGetCurrent(&context), "cuCtxGetCurrent");
    const std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<LoadedKernels>& loaded = loaded_[context];
    if (!loaded) loaded = std::make_shared<LoadedKernels>(kernels);
    return loaded;
}

}  // namespace d3tom
