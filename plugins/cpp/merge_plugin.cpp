// The TensorRT plugin d3tom_export::D3ToMMerge as a library without Python: for trtexec (--dynamicPlugins) and
// `IPluginRegistry::loadLibrary`; compiled with D3TOM_SELF_REGISTER, for ONNX Runtime and Triton Inference Server.
//
//   hidden (B, V, W) T, normed (B, V, D) T, kept (B, K) int64  ->  merged (B, K, W) T     T float32, float16, bfloat16
//
// It carries the kernels that plugins/embed.py compiled, writes them into the plan in the one field that the Python
// plugin writes too, and reads plans of either. It links to neither TensorRT nor CUDA.

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
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

// The archive that a plugin and its clones share.
struct Archive {
    std::vector<uint8_t> bytes;  // empty where the kernels are the library's own
    std::vector<Kernel> kernels;
    KernelCache cache;
};

class MergePlugin final : public IPluginV3,
                          public IPluginV3OneCore,
                          public IPluginV3OneBuild,
                          public IPluginV3OneRuntime {
   public:
    explicit MergePlugin(std::shared_ptr<Archive> archive) : archive_(std::move(archive)) {}

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
            twin = new MergePlugin(archive_);
            twin->type_ = type_;
            twin->depth_ = depth_;
            twin->width_ = width_;
        });
        return twin;
    }

    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }
    int32_t getNbOutputs() const noexcept override { return 1; }

    int32_t getOutputDataTypes(DataType* outputs, int32_t, DataType const* inputs, int32_t) const noexcept override {
        outputs[0] = inputs[0];
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t count, DimsExprs const*, int32_t, DimsExprs* outputs,
                            int32_t, IExprBuilder&) noexcept override {
        if (count != 3 || inputs[0].nbDims != 3 || inputs[1].nbDims != 3 || inputs[2].nbDims != 2) return -1;
        outputs[0].nbDims = 3;
        outputs[0].d[0] = inputs[0].d[0];
        outputs[0].d[1] = inputs[2].d[1];
        outputs[0].d[2] = inputs[0].d[2];
        return 0;
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
        type_ = rowType(in[0].desc.type);
        width_ = in[0].desc.dims.d[2];
        depth_ = in[1].desc.dims.d[2];
        return 0;
    }

    std::size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*,
                                 int32_t) const noexcept override {
        return workspaceOf({in[0].max.d[0], in[0].max.d[1], in[2].max.d[1], in[1].max.d[2], in[0].max.d[2]}).size;
    }

    char const* getTimingCacheID() noexcept override { return ""; }  // shapes and types say all

    PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        const int32_t status = guarded([&] {
            serialized_ = writeArchive(needed());
            field_ = PluginField(kKernelsField, serialized_.data(), PluginFieldType::kINT8,
                                 static_cast<int32_t>(serialized_.size()));
            fields_.nbFields = 1;
            fields_.fields = &field_;
        });
        return status == 0 ? &fields_ : nullptr;
    }

    int32_t onShapeChange(PluginTensorDesc const* in, int32_t, PluginTensorDesc const*, int32_t) noexcept override {
        type_ = rowType(in[0].type);
        return 0;
    }

    // Kernels are loaded here, before any capture begins.
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
        IPluginV3* const twin = clone();
        if (twin && guarded([&] { archive_->cache.inCurrentContext(archive_->kernels); }) == 0) return twin;
        delete twin;
        return nullptr;
    }

    int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        return guarded([&] {
            const Dims& hidden = inputDesc[0].dims;
            const MergeSizes sizes{hidden.d[0], hidden.d[1], inputDesc[2].dims.d[1], inputDesc[1].dims.d[2],
                                   hidden.d[2]};
            archive_->cache.inCurrentContext(archive_->kernels)
                ->enqueue(sizes, rowType(inputDesc[0].type),
                          {inputs[0], inputs[1], inputs[2], workspace, outputs[0]},
                          reinterpret_cast<CUstream>(stream));
        });
    }

   private:
    // The kernels that this node's type and widths can meet: what goes into the plan.
    std::vector<Kernel> needed() const {
        const auto unused = [](int64_t size, const std::string& name, const char* ragged) {
            return size >= 0 && (size % kAlignment != 0) != (name == ragged);
        };
        std::vector<Kernel> kept;
        for (const Kernel& kernel : archive_->kernels) {
            if (kernel.name == "order") {
                kept.push_back(kernel);
            } else if (kernel.type == type_) {
                const bool search = kernel.name.rfind("nearest", 0) == 0;
                if (search ? unused(depth_, kernel.name, "nearest-ragged") : unused(width_, kernel.name, "sum-ragged"))
                    continue;
                kept.push_back(kernel);
            }
        }
        if (kept.size() < 3) throw std::runtime_error("there are no kernels for this type of rows");
        return kept;
    }

    std::shared_ptr<Archive> archive_;
    RowType type_ = RowType::kNone;
    int64_t depth_ = -1;
    int64_t width_ = -1;
    std::string serialized_;
    PluginField field_;
    PluginFieldCollection fields_{};
};

class MergePluginCreator final : public IPluginCreatorV3One {
   public:
    // Without the field, as at build time, the plugin takes the library's own kernels.
    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* fields, TensorRTPhase) noexcept override {
        IPluginV3* plugin = nullptr;
        guarded([&] {
            auto archive = std::make_shared<Archive>();
            const uint8_t* data = d3tom_merge_kernels;
            std::size_t size = static_cast<std::size_t>(d3tom_merge_kernels_end - d3tom_merge_kernels);
            for (int32_t index = 0; fields && index < fields->nbFields; ++index) {
                const PluginField& field = fields->fields[index];
                if (std::strcmp(field.name, kKernelsField) != 0) continue;
                const auto* const bytes = static_cast<const uint8_t*>(field.data);
                archive->bytes.assign(bytes, bytes + field.length);
                data = archive->bytes.data();
                size = archive->bytes.size();
            }
            archive->kernels = readArchive(data, size);
            plugin = new MergePlugin(std::move(archive));
        });
        return plugin;
    }

    PluginFieldCollection const* getFieldNames() noexcept override { return &fields_; }
    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

   private:
    PluginFieldCollection fields_{0, nullptr};  // the node has no attributes
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
