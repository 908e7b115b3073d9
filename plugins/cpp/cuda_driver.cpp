#include "cuda_driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <set>
#include <stdexcept>
#include <utility>

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
    // Never destroyed: the last plugin may outlive this library's statics.
    static const Driver& get() {
        static const Driver* const driver = new Driver;
        return *driver;
    }

    void check(CUresult status, const char* function) const {
        if (status == CUDA_SUCCESS) return;
        const char* name = nullptr;
        getErrorName(status, &name);
        throw std::runtime_error(std::string(function) + " failed: " + (name ? name : std::to_string(status)));
    }

    // The current context, and a number that no other context of this process ever has: a new one may be given the
    // address of one that was destroyed.
    CUcontext currentContext(uint64_t& identity) const {
        CUcontext context = nullptr;
        check(ctxGetCurrent(&context), "cuCtxGetCurrent");
        unsigned long long id = reinterpret_cast<uint64_t>(context);
        if (ctxGetId) check(ctxGetId(context, &id), "cuCtxGetId");
        identity = id;
        return context;
    }

    decltype(&cuGetErrorName) getErrorName;
    decltype(&cuCtxGetCurrent) ctxGetCurrent;
    decltype(&cuCtxPushCurrent) ctxPushCurrent;
    decltype(&cuCtxPopCurrent) ctxPopCurrent;
    decltype(&cuCtxGetDevice) ctxGetDevice;
    decltype(&cuDeviceGetAttribute) deviceGetAttribute;
    decltype(&cuModuleLoadData) moduleLoadData;
    decltype(&cuModuleUnload) moduleUnload;
    decltype(&cuModuleGetFunction) moduleGetFunction;
    decltype(&cuFuncSetAttribute) funcSetAttribute;
    decltype(&cuLaunchKernel) launchKernel;
    CUresult (*ctxGetId)(CUcontext, unsigned long long*) = nullptr;  // CUDA 12 and later
    CUresult (*funcLoad)(CUfunction) = nullptr;                      // CUDA 12.4 and later

   private:
    Driver() {
        library_ = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (!library_) {
            throw std::runtime_error("the CUDA driver's libcuda.so.1 cannot be opened; running needs an NVIDIA GPU");
        }
        find("cuGetErrorName", getErrorName);
        find("cuCtxGetCurrent", ctxGetCurrent);
        find("cuCtxPushCurrent_v2", ctxPushCurrent);
        find("cuCtxPopCurrent_v2", ctxPopCurrent);
        find("cuCtxGetDevice", ctxGetDevice);
        find("cuDeviceGetAttribute", deviceGetAttribute);
        find("cuModuleLoadData", moduleLoadData);
        find("cuModuleUnload", moduleUnload);
        find("cuModuleGetFunction", moduleGetFunction);
        find("cuFuncSetAttribute", funcSetAttribute);
        find("cuLaunchKernel", launchKernel);
        ctxGetId = reinterpret_cast<CUresult (*)(CUcontext, unsigned long long*)>(dlsym(library_, "cuCtxGetId"));
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

// The first cells of a prepared merge, in the order of the node's inputs and outputs: hidden, normed, kept, further row
// inputs, outputs; then the parts of the workspace.
constexpr int kNormed = 1, kKept = 2;
int hiddenCell(int row) { return row == 0 ? 0 : row + 2; }
int mergedCell(int rows, int row) { return rows + 2 + row; }
int workspaceCell(int rows) { return 2 * rows + 2; }

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

bool MergeSizes::operator==(const MergeSizes& other) const {
    return batch == other.batch && visual == other.visual && kept == other.kept && depth == other.depth &&
           rows == other.rows && std::equal(widths, widths + rows, other.widths);
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
    context_ = driver.currentContext(identity_);
    try {
        for (const Kernel& kernel : chosen) load(kernel);
    } catch (...) {
        unload();
        throw;
    }
}

LoadedKernels::~LoadedKernels() { unload(); }

void LoadedKernels::load(const Kernel& kernel) {
    const Driver& driver = Driver::get();
    CUmodule module;
    CUfunction function;
    modules_.reserve(modules_.size() + 1);
    driver.check(driver.moduleLoadData(&module, kernel.image), "cuModuleLoadData");
    modules_.push_back(module);
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

// In whatever thread the last plugin ended. What fails is left: a context that is gone took its modules along, and at
// the end of a process so does the driver.
void LoadedKernels::unload() noexcept {
    const Driver& driver = Driver::get();
    if (modules_.empty() || driver.ctxPushCurrent(context_) != CUDA_SUCCESS) return;
    try {
        uint64_t identity = 0;
        driver.currentContext(identity);
        for (CUmodule module : modules_) {
            if (identity == identity_) driver.moduleUnload(module);
        }
    } catch (const std::exception&) {
    }
    CUcontext popped;
    driver.ctxPopCurrent(&popped);
}

const LoadedKernels::Entry& LoadedKernels::find(const std::string& name, RowType type) const {
    for (const Entry& entry : entries_) {
        if (entry.kernel.name == name && entry.kernel.type == type) return entry;
    }
    throw std::runtime_error("the engine holds no kernel `" + name + "` for these rows; build it again");
}

PreparedMerge::PreparedMerge(std::shared_ptr<const LoadedKernels> loaded, const MergeSizes& sizes, RowType type)
    : loaded_(std::move(loaded)), sizes_(sizes), type_(type), parts_(workspaceOf(sizes)) {
    const int64_t widest = std::max(sizes.depth, *std::max_element(sizes.widths, sizes.widths + sizes.rows));
    if (sizes.kept > sizes.visual || sizes.kept > kMaxGrid || sizes.batch > kMaxGrid ||
        std::max(sizes.visual * widest, sizes.visual * (sizes.kept + 1) + kOrderBlock) >= kAddressLimit) {
        throw std::runtime_error("a merge of " + std::to_string(sizes.visual) + " tokens of width " +
                                 std::to_string(widest) + " into " + std::to_string(sizes.kept) +
                                 " is beyond the kernels' limits");
    }
    cells_.assign(static_cast<std::size_t>(workspaceCell(sizes.rows) + 4), 0);
    plan();
    // The cells have their places only now that all are there.
    for (Launch& each : launches_) {
        for (void*& argument : each.arguments) argument = &cells_[reinterpret_cast<std::size_t>(argument)];
    }
}

// The cell of a size: the kernel reads its low half.
int PreparedMerge::number(int64_t value) {
    cells_.push_back(static_cast<uint32_t>(value));
    return static_cast<int>(cells_.size()) - 1;
}

void PreparedMerge::launch(const LoadedKernels::Entry& entry, int64_t x, int64_t y, int64_t z,
                           std::vector<int> cells) {
    for (uint32_t index = 0; index < entry.kernel.scratch; ++index) cells.push_back(number(0));
    Launch made{entry.function, static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z),
                entry.kernel.threads, entry.kernel.shared, {}};
    for (int cell : cells) made.arguments.push_back(reinterpret_cast<void*>(static_cast<std::size_t>(cell)));
    launches_.push_back(std::move(made));
}

void PreparedMerge::plan() {
    const int64_t batch = sizes_.batch, visual = sizes_.visual, kept = sizes_.kept, depth = sizes_.depth;
    const bool written = *std::max_element(sizes_.widths, sizes_.widths + sizes_.rows) > 0;
    if (batch == 0 || visual == 0 || kept == 0 || !written) return;

    const LoadedKernels::Entry* nearest = &loaded_->find(depth % kAlignment == 0 ? "nearest-wide" : "nearest-ragged",
                                                         type_);
    const auto tiles = [&](const LoadedKernels::Entry& entry) {
        return batch * ceilDiv(visual, entry.kernel.blockX) * ceilDiv(kept, entry.kernel.blockY);
    };
    if (depth % kAlignment == 0 && tiles(*nearest) < kWidePrograms) nearest = &loaded_->find("nearest-narrow", type_);
    const int64_t keptBlocks = ceilDiv(kept, nearest->kernel.blockY);
    const int scores = workspaceCell(sizes_.rows), slots = scores + 1, order = scores + 2, starts = scores + 3;
    launch(*nearest, ceilDiv(visual, nearest->kernel.blockX), keptBlocks, batch,
           {kNormed, kKept, number(visual), number(kept), number(depth), scores, slots});

    const LoadedKernels::Entry& sort = loaded_->find("order", RowType::kNone);
    launch(sort, ceilDiv(visual, sort.kernel.blockX), batch, 1,
           {scores, slots, kKept, number(visual), number(kept), number(keptBlocks), order, starts});

    for (int row = 0; row < sizes_.rows; ++row) {
        const int64_t width = sizes_.widths[row];
        if (width == 0) continue;
        const LoadedKernels::Entry& total = loaded_->find(width % kAlignment == 0 ? "sum" : "sum-ragged", type_);
        launch(total, ceilDiv(width, total.kernel.blockX), kept, batch,
               {hiddenCell(row), order, starts, number(visual), number(kept), number(width),
                mergedCell(sizes_.rows, row)});
    }
}

void PreparedMerge::enqueue(const void* const* inputs, void* const* outputs, void* workspace, CUstream stream) {
    const Driver& driver = Driver::get();
    uint64_t* cell = cells_.data();
    for (int index = 0; index < sizes_.rows + 2; ++index) *cell++ = reinterpret_cast<uint64_t>(inputs[index]);
    for (int index = 0; index < sizes_.rows; ++index) *cell++ = reinterpret_cast<uint64_t>(outputs[index]);
    for (std::size_t offset : {parts_.scores, parts_.slots, parts_.order, parts_.starts}) {
        *cell++ = reinterpret_cast<uint64_t>(workspace) + offset;
    }
    for (Launch& each : launches_) {
        driver.check(driver.launchKernel(each.function, each.x, each.y, each.z, each.threads, 1, 1, each.shared, stream,
                                         each.arguments.data(), nullptr),
                     "cuLaunchKernel");
    }
}

std::shared_ptr<const LoadedKernels> KernelCache::inCurrentContext(const std::vector<Kernel>& kernels) {
    uint64_t identity = 0;
    Driver::get().currentContext(identity);
    const std::lock_guard<std::mutex> lock(mutex_);
    std::weak_ptr<const LoadedKernels>& known = loaded_[identity];
    std::shared_ptr<const LoadedKernels> loaded = known.lock();
    if (!loaded) known = loaded = std::make_shared<const LoadedKernels>(kernels);
    return loaded;
}

}  // namespace d3tom
