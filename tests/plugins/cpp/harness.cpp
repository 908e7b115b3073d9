// TensorRT's side of the plugin's contract: each call of the C++ interface as a C function, for tests to make them in
// the order that TensorRT does. The creator is the one that the real registry gives, whichever form made it.

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

using namespace nvinfer1;

// The registry of TensorRT 11, which is TensorRT-RTX's, by the places of its methods. The headers at hand may be those
// of TensorRT 10, whose registry has others before them; the plugins' own interfaces are the same in both. (In an
// unnamed namespace the compiler would see that nothing implements it.)
struct Registry11 {
    virtual ~Registry11() = default;
    virtual void setErrorRecorder(void*) noexcept = 0;
    virtual void* getErrorRecorder() const noexcept = 0;
    virtual bool isParentSearchEnabled() const = 0;
    virtual void setParentSearchEnabled(bool) = 0;
    virtual void* loadLibrary(char const*) noexcept = 0;
    virtual void deregisterLibrary(void*) noexcept = 0;
    virtual bool registerCreator(IPluginCreatorInterface&, char const*) noexcept = 0;
    virtual IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept = 0;
    virtual IPluginCreatorInterface* getCreator(char const*, char const*, char const*) noexcept = 0;
};

namespace {

Dims dims(std::initializer_list<int64_t> shape) {
    Dims made{};
    made.nbDims = static_cast<int32_t>(shape.size());
    std::memcpy(made.d, shape.begin(), shape.size() * sizeof(int64_t));
    return made;
}

PluginTensorDesc desc(DataType type, std::initializer_list<int64_t> shape) {
    PluginTensorDesc made{};
    made.dims = dims(shape);
    made.type = type;
    made.format = TensorFormat::kLINEAR;
    made.scale = 1;
    return made;
}

// What describes a node's tensors: type 0..2, then B V K D and the width of every row input.
struct Tensors {
    std::vector<PluginTensorDesc> in, out;

    Tensors(int32_t type, const int64_t* sizes, int32_t rows) {
        const DataType types[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};
        const int64_t batch = sizes[0], visual = sizes[1], kept = sizes[2];
        for (int32_t row = 0; row < rows; ++row) {
            in.push_back(desc(types[type], {batch, visual, sizes[4 + row]}));
            out.push_back(desc(types[type], {batch, kept, sizes[4 + row]}));
            if (row > 0) continue;
            in.push_back(desc(types[type], {batch, visual, sizes[3]}));
            in.push_back(desc(DataType::kINT64, {batch, kept}));
        }
    }

    int32_t inputs() const { return static_cast<int32_t>(in.size()); }
    int32_t outputs() const { return static_cast<int32_t>(out.size()); }

    // For a profile that goes up to these sizes; all but widths are dynamic.
    static std::vector<DynamicPluginTensorDesc> profile(const std::vector<PluginTensorDesc>& descs) {
        std::vector<DynamicPluginTensorDesc> made;
        for (const PluginTensorDesc& each : descs) {
            DynamicPluginTensorDesc dynamic{};
            dynamic.desc = each;
            dynamic.min = dynamic.opt = dynamic.max = each.dims;
            dynamic.desc.dims.d[0] = dynamic.desc.dims.d[1] = -1;
            made.push_back(dynamic);
        }
        return made;
    }
};

IPluginV3OneRuntime* runtime(IPluginV3* plugin) {
    return static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

IPluginV3OneBuild* build(IPluginV3* plugin) {
    return static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
}

}  // namespace

extern "C" {

// The plugin's creator out of the registry of the loaded `tensorrt`; null where there is none.
IPluginCreatorV3One* harness_creator(const char* tensorrt) {
    void* const library = dlopen(tensorrt, RTLD_NOW | RTLD_NOLOAD);
    void* const registry = reinterpret_cast<void* (*)()>(dlsym(library, "getPluginRegistry"))();
    return static_cast<IPluginCreatorV3One*>(
        static_cast<Registry11*>(registry)->getCreator("D3ToMMerge", "1", "d3tom_export"));
}

// Whether it is written in Python.
int32_t harness_is_python(IPluginCreatorV3One* creator) { return creator->getAPILanguage() == APILanguage::kPYTHON; }

const char* harness_names(IPluginCreatorV3One* creator) {
    static std::string text;
    text = std::string(creator->getPluginNamespace()) + "::" + creator->getPluginName() + " " +
           creator->getPluginVersion();
    const PluginFieldCollection* const fields = creator->getFieldNames();
    for (int32_t index = 0; index < fields->nbFields; ++index) text += std::string(" ") + fields->fields[index].name;
    return text.c_str();
}

// A plugin from a plan's fields, or from a node's where there is no archive; rows 0: no field of rows.
IPluginV3* harness_create(IPluginCreatorV3One* creator, const void* archive, int32_t length, int32_t rows) {
    std::vector<PluginField> fields;
    if (archive) fields.emplace_back("kernels", archive, PluginFieldType::kINT8, length);
    if (rows) fields.emplace_back("rows", &rows, PluginFieldType::kINT32, 1);
    const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
    return creator->createPlugin("merge", &collection, archive ? TensorRTPhase::kRUNTIME : TensorRTPhase::kBUILD);
}

// A plugin from the fields of another, as a plan would hold them: copied before that one is asked anything else.
IPluginV3* harness_again(IPluginCreatorV3One* creator, IPluginV3* plugin) {
    const PluginFieldCollection* const given = runtime(plugin)->getFieldsToSerialize();
    if (!given) return nullptr;
    std::vector<std::string> names, contents;
    std::vector<PluginField> fields;
    for (int32_t index = 0; index < given->nbFields; ++index) {
        const PluginField& field = given->fields[index];
        const int32_t size = field.type == PluginFieldType::kINT32 ? 4 : 1;
        names.emplace_back(field.name);
        contents.emplace_back(static_cast<const char*>(field.data), static_cast<std::size_t>(field.length * size));
    }
    for (int32_t index = 0; index < given->nbFields; ++index) {
        const PluginField& field = given->fields[index];
        fields.emplace_back(names[index].c_str(), contents[index].data(), field.type, field.length);
    }
    const PluginFieldCollection collection{given->nbFields, fields.data()};
    return creator->createPlugin("merge", &collection, TensorRTPhase::kRUNTIME);
}

// The bytes of a serialized field, and its length; null where there is none of that name.
const void* harness_field(IPluginV3* plugin, const char* name, int64_t* length) {
    const PluginFieldCollection* const fields = runtime(plugin)->getFieldsToSerialize();
    for (int32_t index = 0; fields && index < fields->nbFields; ++index) {
        const PluginField& field = fields->fields[index];
        if (std::strcmp(field.name, name) != 0) continue;
        *length = field.length * (field.type == PluginFieldType::kINT32 ? 4 : 1);
        return field.data;
    }
    return nullptr;
}

IPluginV3* harness_clone(IPluginV3* plugin) { return plugin->clone(); }
void harness_delete(IPluginV3* plugin) { delete plugin; }
int32_t harness_set_tactic(IPluginV3* plugin, int32_t tactic) { return runtime(plugin)->setTactic(tactic); }
IPluginV3* harness_attach(IPluginV3* plugin) { return runtime(plugin)->attachToContext(nullptr); }
int32_t harness_outputs(IPluginV3* plugin) { return build(plugin)->getNbOutputs(); }

int32_t harness_configure(IPluginV3* plugin, int32_t type, const int64_t* sizes, int32_t rows) {
    const Tensors tensors(type, sizes, rows);
    const auto in = Tensors::profile(tensors.in), out = Tensors::profile(tensors.out);
    return build(plugin)->configurePlugin(in.data(), tensors.inputs(), out.data(), tensors.outputs());
}

int64_t harness_workspace(IPluginV3* plugin, int32_t type, const int64_t* sizes, int32_t rows) {
    const Tensors tensors(type, sizes, rows);
    const auto in = Tensors::profile(tensors.in), out = Tensors::profile(tensors.out);
    return static_cast<int64_t>(
        build(plugin)->getWorkspaceSize(in.data(), tensors.inputs(), out.data(), tensors.outputs()));
}

int32_t harness_shape(IPluginV3* plugin, int32_t type, const int64_t* sizes, int32_t rows) {
    const Tensors tensors(type, sizes, rows);
    return runtime(plugin)->onShapeChange(tensors.in.data(), tensors.inputs(), tensors.out.data(), tensors.outputs());
}

// Enqueues `times` merges; mean microseconds of one, negative where one failed.
double harness_enqueue(IPluginV3* plugin, int32_t type, const int64_t* sizes, int32_t rows, const void* const* inputs,
                       void* const* outputs, void* workspace, void* stream, int32_t times) {
    const Tensors tensors(type, sizes, rows);
    IPluginV3OneRuntime* const asked = runtime(plugin);
    int32_t status = 0;
    const auto start = std::chrono::steady_clock::now();
    for (int32_t time = 0; time < times && status == 0; ++time) {
        status = asked->enqueue(tensors.in.data(), tensors.out.data(), inputs, outputs, workspace,
                                static_cast<cudaStream_t>(stream));
    }
    const std::chrono::duration<double, std::micro> taken = std::chrono::steady_clock::now() - start;
    return status == 0 ? taken.count() / times : -1;
}

}  // extern "C"
