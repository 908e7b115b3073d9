// The TensorRT plugin d3tom_export::D3ToMMerge as a library without Python: for trtexec (--dynamicPlugins) and
// `IPluginRegistry::loadLibrary`; compiled with D3TOM_SELF_REGISTER, for ONNX Runtime and Triton Inference Server.
//
//   hidden (B, V, W) T, normed (B, V, D) T, kept (B, K) int64  ->  merged (B, K, W) T     T float32, float16, bfloat16
//
// With the attribute `rows` above 1, further row inputs follow, of any widths, and an output for each: who joins whom is
// searched once for all. It carries the kernels that plugins/embed.py compiled, writes them into the plan in the fields
// that the Python plugin writes too, and reads plans of either. It links to neither TensorRT nor CUDA.

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_driver.h"
#include "kernel_archive.h"

// Written by plugins/embed.py.
extern "C" const uint8_t d3tom_merge_kernels[];
extern "C" const uint8_t d3tom_merge_kernels_end[];

namespace d3tom {
namespace {

using namespace nvinfer1;

constexpr char kName[] = "D3ToMMerge";
constexpr char kNamespace[] = "d3tom_export";
constexpr char kVersion[] = "1";
constexpr char kKernelsField[] = "kernels";
constexpr char kRowsField[] = "rows";
constexpr int64_t kAlignment = 16;

ILoggerFinder* loggerFinder = nullptr;

void report(const std::exception& error) {
    ILogger* const logger = loggerFinder ? loggerFinder->findLogger() : nullptr;
    const std::string text = std::string(kName) + ": " + error.what();
    if (logger) {
        logger->log(ILogger::Severity::kERROR, text.c_str());
    } else {
        std::fprintf(stderr, "%s\n", text.c_str());
    }
}

// TensorRT's interfaces are noexcept and answer with a code: what goes wrong inside is logged.
template <typename Function>
int32_t guarded(Function function) noexcept {
    try {
        function();
        return 0;
    } catch (const std::exception& error) {
        report(error);
        return -1;
    }
}

RowType rowType(DataType type) {
    switch (type) {
        case DataType::kFLOAT: return RowType::kFloat32;
        case DataType::kHALF: return RowType::kFloat16;
        case DataType::kBF16: return RowType::kBfloat16;
        default: return RowType::kNone;
    }
}

// An archive of kernels, which all plugins of equal bytes share, and with it what is loaded of it.
class Archive {
   public:
    // That of `data`, which is copied, or of the library's own kernels where it is null.
    static std::shared_ptr<Archive> of(const uint8_t* data, std::size_t size) {
        // Never destroyed: the last plugin may outlive this library's statics.
        static std::mutex& mutex = *new std::mutex;
        static auto& known = *new std::vector<std::weak_ptr<Archive>>;
        const std::lock_guard<std::mutex> lock(mutex);
        std::size_t left = 0;
        std::shared_ptr<Archive> found;
        for (const std::weak_ptr<Archive>& each : known) {
            const std::shared_ptr<Archive> archive = each.lock();
            if (!archive) continue;
            known[left++] = archive;
            const bool own = archive->bytes_.empty();
            if (own ? data == nullptr
                    : data && archive->bytes_.size() == size && std::memcmp(archive->bytes_.data(), data, size) == 0) {
                found = archive;
            }
        }
        known.resize(left);
        if (!found) {
            found = std::make_shared<Archive>(data, size);
            known.push_back(found);
        }
        return found;
    }

    Archive(const uint8_t* data, std::size_t size) : bytes_(data, data + (data ? size : 0)) {
        const auto own = static_cast<std::size_t>(d3tom_merge_kernels_end - d3tom_merge_kernels);
        kernels = data ? readArchive(bytes_.data(), bytes_.size()) : readArchive(d3tom_merge_kernels, own);
    }

    // As a plan's field held it; empty where the kernels are the library's own.
    const std::vector<uint8_t>& bytes() const { return bytes_; }

    std::vector<Kernel> kernels;
    KernelCache cache;

   private:
    std::vector<uint8_t> bytes_;
};

class MergePlugin final : public IPluginV3,
                          public IPluginV3OneCore,
                          public IPluginV3OneBuild,
                          public IPluginV3OneRuntime {
   public:
    MergePlugin(std::shared_ptr<Archive> archive, int32_t rows) : archive_(std::move(archive)), rows_(rows) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    IPluginV3* clone() noexcept override {
        MergePlugin* twin = nullptr;
        guarded([&] {
            twin = new MergePlugin(archive_, rows_);
            twin->type_ = type_;
            twin->depth_ = depth_;
            twin->widths_ = widths_;
            twin->loaded_ = loaded_;
        });
        return twin;
    }

    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }
    int32_t getNbOutputs() const noexcept override { return rows_; }

    int32_t getOutputDataTypes(DataType* outputs, int32_t, DataType const* inputs, int32_t) const noexcept override {
        for (int32_t row = 0; row < rows_; ++row) outputs[row] = inputs[0];
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t count, DimsExprs const*, int32_t, DimsExprs* outputs,
                            int32_t, IExprBuilder&) noexcept override {
        return guarded([&] {
            if (count != rows_ + 2) {
                throw std::runtime_error("a node of " + std::to_string(rows_) + " row inputs (its attribute `rows`) takes " +
                                         std::to_string(rows_ + 2) + " inputs with `normed` and `kept`, found " +
                                         std::to_string(count));
            }
            for (int32_t index = 0; index < count; ++index) {
                const int32_t wanted = index == 2 ? 2 : 3;
                if (inputs[index].nbDims != wanted) {
                    throw std::runtime_error("input " + std::to_string(index) + " has " +
                                             std::to_string(inputs[index].nbDims) + " dimensions, expected " +
                                             std::to_string(wanted));
                }
            }
            for (int32_t row = 0; row < rows_; ++row) {
                outputs[row].nbDims = 3;
                outputs[row].d[0] = inputs[0].d[0];
                outputs[row].d[1] = inputs[2].d[1];
                outputs[row].d[2] = inputs[rowInput(row)].d[2];
            }
        });
    }

    bool supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t,
                                   int32_t) noexcept override {
        const PluginTensorDesc& desc = inOut[pos].desc;
        if (desc.format != TensorFormat::kLINEAR) return false;
        if (pos == 2) return desc.type == DataType::kINT64;
        return rowType(desc.type) != RowType::kNone && desc.type == inOut[0].desc.type;
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*,
                            int32_t) noexcept override {
        return guarded([&] {
            type_ = rowType(in[0].desc.type);
            depth_ = in[1].desc.dims.d[2];
            widths_.clear();
            for (int32_t row = 0; row < rows_; ++row) widths_.push_back(in[rowInput(row)].desc.dims.d[2]);
        });
    }

    std::size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*,
                                 int32_t) const noexcept override {
        return workspaceOf(sizesOf([&](int32_t input) -> const Dims& { return in[input].max; })).size;
    }

    char const* getTimingCacheID() noexcept override { return ""; }  // shapes and types say all

    PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        const int32_t status = guarded([&] {
            // What a plan held is written again as it was; its plugin has not been told its type.
            const void* data = archive_->bytes().data();
            std::size_t size = archive_->bytes().size();
            if (size == 0) {
                serialized_ = writeArchive(needed());
                data = serialized_.data();
                size = serialized_.size();
            }
            stored_[0] = PluginField(kKernelsField, data, PluginFieldType::kINT8, static_cast<int32_t>(size));
            stored_[1] = PluginField(kRowsField, &rows_, PluginFieldType::kINT32, 1);
            fields_.nbFields = 2;
            fields_.fields = stored_;
        });
        return status == 0 ? &fields_ : nullptr;
    }

    // Called with 0 where a plugin offers no tactics.
    int32_t setTactic(int32_t tactic) noexcept override {
        return guarded([&] {
            if (tactic != 0) {
                throw std::runtime_error("tactic " + std::to_string(tactic) +
                                         " was chosen of a plugin that offers none (0, for its one way to run, was "
                                         "expected); build the engine again");
            }
        });
    }

    int32_t onShapeChange(PluginTensorDesc const* in, int32_t, PluginTensorDesc const*, int32_t) noexcept override {
        type_ = rowType(in[0].type);
        return 0;
    }

    // Kernels are loaded here, before any capture begins.
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
        const int32_t status = guarded([&] { loaded_ = archive_->cache.inCurrentContext(archive_->kernels); });
        return status == 0 ? clone() : nullptr;
    }

    int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        return guarded([&] {
            const MergeSizes sizes = sizesOf([&](int32_t input) -> const Dims& { return inputDesc[input].dims; });
            const RowType type = rowType(inputDesc[0].type);
            if (!prepared_ || !prepared_->serves(sizes, type)) {
                if (!loaded_) loaded_ = archive_->cache.inCurrentContext(archive_->kernels);
                prepared_ = std::make_unique<PreparedMerge>(loaded_, sizes, type);
            }
            prepared_->enqueue(inputs, outputs, workspace, reinterpret_cast<CUstream>(stream));
        });
    }

   private:
    // The input that holds a row input: the first, then those behind `normed` and `kept`.
    static int32_t rowInput(int32_t row) { return row == 0 ? 0 : row + 2; }

    // The sizes of a merge whose inputs' dimensions `dims` gives.
    template <typename DimsOf>
    MergeSizes sizesOf(DimsOf dims) const {
        MergeSizes sizes{dims(0).d[0], dims(0).d[1], dims(2).d[1], dims(1).d[2], rows_, {}};
        for (int32_t row = 0; row < rows_; ++row) sizes.widths[row] = dims(rowInput(row)).d[2];
        return sizes;
    }

    // The kernels that this node's type and widths can meet: what goes into the plan.
    std::vector<Kernel> needed() const {
        if (type_ == RowType::kNone) {
            throw std::runtime_error("TensorRT asked for the kernels before telling the type of the rows; report this");
        }
        const auto fits = [](int64_t size, bool ragged) { return size < 0 || (size % kAlignment != 0) == ragged; };
        std::vector<Kernel> kept;
        for (const Kernel& kernel : archive_->kernels) {
            bool wanted = kernel.name == "order";
            if (kernel.type == type_) {
                if (kernel.name.rfind("nearest", 0) == 0) {
                    wanted = fits(depth_, kernel.name == "nearest-ragged");
                } else {
                    const bool ragged = kernel.name == "sum-ragged";
                    for (int64_t width : widths_) wanted = wanted || fits(width, ragged);
                }
            }
            if (wanted) kept.push_back(kernel);
        }
        return kept;
    }

    std::shared_ptr<Archive> archive_;
    int32_t rows_;
    RowType type_ = RowType::kNone;
    int64_t depth_ = -1;
    std::vector<int64_t> widths_;
    std::shared_ptr<const LoadedKernels> loaded_;
    std::unique_ptr<PreparedMerge> prepared_;  // of the last sizes: contexts run one at a time
    std::string serialized_;
    PluginField stored_[2];
    PluginFieldCollection fields_{};
};

class MergePluginCreator final : public IPluginCreatorV3One {
   public:
    // Without the kernels' field, as at build time, the plugin takes the library's own. Plans and nodes without the
    // rows' field have one row input.
    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* fields, TensorRTPhase) noexcept override {
        IPluginV3* plugin = nullptr;
        guarded([&] {
            const uint8_t* data = nullptr;
            std::size_t size = 0;
            int32_t rows = 1;
            for (int32_t index = 0; fields && index < fields->nbFields; ++index) {
                const PluginField& field = fields->fields[index];
                if (std::strcmp(field.name, kKernelsField) == 0) {
                    data = static_cast<const uint8_t*>(field.data);
                    size = static_cast<std::size_t>(field.length);
                } else if (std::strcmp(field.name, kRowsField) == 0 && field.length == 1) {
                    rows = *static_cast<const int32_t*>(field.data);
                }
            }
            if (rows < 1 || rows > kMostRows) {
                throw std::runtime_error("a merge takes 1 to " + std::to_string(kMostRows) +
                                         " row inputs by one search, found " + std::to_string(rows));
            }
            plugin = new MergePlugin(Archive::of(data, size), rows);
        });
        return plugin;
    }

    PluginFieldCollection const* getFieldNames() noexcept override { return &fields_; }
    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

   private:
    PluginField rows_{kRowsField, nullptr, PluginFieldType::kINT32, 1};
    PluginFieldCollection fields_{1, &rows_};  // the node's attribute
};

MergePluginCreator& creator() {
    static MergePluginCreator instance;
    return instance;
}

#ifdef D3TOM_SELF_REGISTER

// For programs that open plugin libraries and ask nothing of them (ONNX Runtime, Triton Inference Server): the library
// registers itself with the TensorRT that this process has already loaded, under whichever name, and loads none.
IPluginRegistry* registryOf(void* library) {
    using Registry = IPluginRegistry* (*)();
    using Version = int32_t (*)();
    void* const found = dlsym(library, "getPluginRegistry");
    if (!found) return nullptr;
    // The registry's methods are called by their place in these headers, which another major version has elsewhere.
    // TensorRT-RTX counts from 1 and has the interfaces of TensorRT 11.
    void* const version = dlsym(library, "getInferLibMajorVersion");
    const int32_t loaded = version ? reinterpret_cast<Version>(version)() : NV_TENSORRT_MAJOR;
    const int32_t interfaces = loaded < 8 && NV_TENSORRT_MAJOR >= 8 ? 11 : loaded;
    if (interfaces != NV_TENSORRT_MAJOR) {
        std::fprintf(stderr, "%s: built with headers of TensorRT %d, this process has loaded %d\n", kName,
                     static_cast<int>(NV_TENSORRT_MAJOR), static_cast<int>(loaded));
        return nullptr;
    }
    return reinterpret_cast<Registry>(found)();
}

IPluginRegistry* loadedRegistry() {
    if (dlsym(RTLD_DEFAULT, "getPluginRegistry")) return registryOf(RTLD_DEFAULT);
    for (const char* name : {"libnvinfer.so.11", "libnvinfer.so.10", "libnvinfer.so", "libtensorrt_rtx.so.1",
                             "libtensorrt_rtx.so"}) {
        void* const library = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
        if (library) return registryOf(library);
    }
    return nullptr;
}

__attribute__((constructor)) void registerAtLoad() {
    IPluginRegistry* const registry = loadedRegistry();
    if (!registry || !registry->registerCreator(creator(), kNamespace)) {
        std::fprintf(stderr, "%s: not registered: %s\n", kName,
                     registry ? "another plugin has its name" : "this process has loaded no TensorRT that fits");
    }
}

#endif

}  // namespace
}  // namespace d3tom

#ifndef D3TOM_SELF_REGISTER

#define D3TOM_EXPORT extern "C" __attribute__((visibility("default")))

// TensorRT calls these two of every plugin library it loads.
D3TOM_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { d3tom::loggerFinder = finder; }

D3TOM_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&d3tom::creator()};
    count = 1;
    return creators;
}

#endif
