// Drives the plugin library as TensorRT's runtime does: creator, plugin from a plan's field, context, enqueue.

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <string>

using namespace nvinfer1;

namespace {

struct Logger : ILogger {
    void log(Severity severity, AsciiChar const* text) noexcept override {
        if (severity <= Severity::kERROR) last = text;
    }
    std::string last;
} logger;

struct Finder : ILoggerFinder {
    ILogger* findLogger() override { return &logger; }
} finder;

PluginTensorDesc desc(DataType type, std::initializer_list<int64_t> shape) {
    PluginTensorDesc made{};
    made.type = type;
    made.format = TensorFormat::kLINEAR;
    made.dims.nbDims = static_cast<int32_t>(shape.size());
    std::memcpy(made.dims.d, shape.begin(), shape.size() * sizeof(int64_t));
    return made;
}

}  // namespace

// One merge with the library's own kernels, or those of `archive` where it is given. sizes: B V K D W. The text of the
// error, empty where there was none.
extern "C" const char* harness_merge(const char* path, const void* archive, int32_t length, int32_t typeCode,
                                     const int64_t* sizes, const void* const* inputs, void* output, void* workspace,
                                     void* stream) {
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return dlerror();
    using Creators = IPluginCreatorInterface* const* (*)(int32_t&);
    reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(&finder);
    int32_t count = 0;
    auto* const creators = reinterpret_cast<Creators>(dlsym(library, "getCreators"))(count);
    if (count != 1) return "one creator was expected";
    auto* const creator = static_cast<IPluginCreatorV3One*>(creators[0]);
    if (std::string(creator->getPluginName()) != "D3ToMMerge") return "wrong name";
    if (std::string(creator->getPluginNamespace()) != "d3tom_export") return "wrong namespace";
    if (std::string(creator->getPluginVersion()) != "1") return "wrong version";

    logger.last.clear();
    PluginField field("kernels", archive, PluginFieldType::kINT8, length);
    PluginFieldCollection fields{archive ? 1 : 0, &field};
    IPluginV3* const plugin = creator->createPlugin("merge", &fields, TensorRTPhase::kRUNTIME);
    if (!plugin) return logger.last.c_str();
    auto* const built = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    IPluginV3* const attached = built->attachToContext(nullptr);
    if (!attached) return logger.last.c_str();
    auto* const runtime =
        static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));

    const DataType types[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};
    const DataType type = types[typeCode];
    const PluginTensorDesc in[] = {desc(type, {sizes[0], sizes[1], sizes[4]}), desc(type, {sizes[0], sizes[1], sizes[3]}),
                                   desc(DataType::kINT64, {sizes[0], sizes[2]})};
    const PluginTensorDesc out[] = {desc(type, {sizes[0], sizes[2], sizes[4]})};
    void* const outputs[] = {output};
    const int32_t status = runtime->onShapeChange(in, 3, out, 1) |
                           runtime->enqueue(in, out, inputs, outputs, workspace, static_cast<cudaStream_t>(stream));
    delete attached;
    delete plugin;
    return status == 0 ? "" : logger.last.c_str();
}

// The workspace that the plugin asks for, for profiles up to `sizes`.
extern "C" int64_t harness_workspace(const char* path, const int64_t* sizes) {
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    using Creators = IPluginCreatorInterface* const* (*)(int32_t&);
    int32_t count = 0;
    auto* const creators = reinterpret_cast<Creators>(dlsym(library, "getCreators"))(count);
    IPluginV3* const plugin =
        static_cast<IPluginCreatorV3One*>(creators[0])->createPlugin("merge", nullptr, TensorRTPhase::kBUILD);
    auto* const build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    DynamicPluginTensorDesc in[3]{};
    in[0].max = desc(DataType::kHALF, {sizes[0], sizes[1], sizes[4]}).dims;
    in[1].max = desc(DataType::kHALF, {sizes[0], sizes[1], sizes[3]}).dims;
    in[2].max = desc(DataType::kINT64, {sizes[0], sizes[2]}).dims;
    const auto size = static_cast<int64_t>(build->getWorkspaceSize(in, 3, nullptr, 0));
    delete plugin;
    return size;
}
