// What of ONNX Runtime's C interface a custom operator needs. Its wheel carries no headers, and an interface only ever
// grows at its end, so the places of functions and fields are facts of every version from 1.17 (17) on. They are those
// of onnxruntime_c_api.h; tests/cpu/test_library.py runs the operator on the ONNX Runtime that is installed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace d3tom::onnxruntime {

constexpr uint32_t kVersion = 17;

struct Status;
struct Context;
struct Value;
struct TensorInfo;
struct Domain;
struct SessionOptions;

constexpr int kFailed = 1;           // ORT_FAIL
constexpr int kInvalidArgument = 2;  // ORT_INVALID_ARGUMENT
constexpr int kFloat = 1;            // ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT and so on: ONNX's own numbers
constexpr int kInt64 = 7;
constexpr int kBool = 9;
constexpr int kRequired = 0;         // INPUT_OUTPUT_REQUIRED
constexpr int kOptional = 1;

// A table of functions, OrtApi.
class Api {
 public:
  explicit Api(const void* table) : functions_(static_cast<const void* const*>(table)) {}

  Status* status(int code, const char* message) const { return at<Status*(int, const char*)>(0)(code, message); }
  Status* create_domain(const char* name, Domain** domain) const {
    return at<Status*(const char*, Domain**)>(26)(name, domain);
  }
  Status* add_operator(Domain* domain, const void* op) const {
    return at<Status*(Domain*, const void*)>(27)(domain, op);
  }
  Status* add_domain(SessionOptions* options, Domain* domain) const {
    return at<Status*(SessionOptions*, Domain*)>(28)(options, domain);
  }
  Status* data(const Value* value, void** data) const { return at<Status*(const Value*, void**)>(51)(value, data); }
  Status* element_type(const TensorInfo* info, int* type) const {
    return at<Status*(const TensorInfo*, int*)>(60)(info, type);
  }
  Status* rank(const TensorInfo* info, size_t* rank) const {
    return at<Status*(const TensorInfo*, size_t*)>(61)(info, rank);
  }
  Status* sizes(const TensorInfo* info, int64_t* sizes, size_t rank) const {
    return at<Status*(const TensorInfo*, int64_t*, size_t)>(62)(info, sizes, rank);
  }
  Status* info(const Value* value, TensorInfo** info) const {
    return at<Status*(const Value*, TensorInfo**)>(65)(value, info);
  }
  Status* input_count(const Context* context, size_t* count) const {
    return at<Status*(const Context*, size_t*)>(88)(context, count);
  }
  Status* input(const Context* context, size_t index, const Value** value) const {
    return at<Status*(const Context*, size_t, const Value**)>(90)(context, index, value);
  }
  Status* output(Context* context, size_t index, const int64_t* sizes, size_t rank, Value** value) const {
    return at<Status*(Context*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, sizes, rank, value);
  }
  void release(TensorInfo* info) const { at<void(TensorInfo*)>(99)(info); }
  // `work` is called with 0 .. total - 1, on the session's own threads.
  Status* parallel_for(const Context* context, void (*work)(void*, size_t), size_t total, void* data) const {
    using Work = void (*)(void*, size_t);
    return at<Status*(const Context*, Work, size_t, size_t, void*)>(274)(context, work, total, 0, data);
  }

 private:
  template <typename Function>
  Function* at(size_t place) const {
    return reinterpret_cast<Function*>(const_cast<void*>(functions_[place]));
  }

  const void* const* functions_;
};

// OrtApiBase
struct ApiBase {
  const void* (*get_api)(uint32_t version);
  const char* (*version)();
};

// OrtCustomOp: what is null is not called by a version that is told of kVersion. Of CreateKernel and KernelCompute their
// second versions are called, which may fail.
struct CustomOp {
  uint32_t version = kVersion;
  const void* create_kernel_without_status = nullptr;
  const char* (*name)(const CustomOp*) = nullptr;
  const char* (*provider)(const CustomOp*) = nullptr;
  int (*input_type)(const CustomOp*, size_t) = nullptr;
  size_t (*input_count)(const CustomOp*) = nullptr;
  int (*output_type)(const CustomOp*, size_t) = nullptr;
  size_t (*output_count)(const CustomOp*) = nullptr;
  const void* compute_without_status = nullptr;
  void (*destroy_kernel)(void*) = nullptr;
  int (*input_kind)(const CustomOp*, size_t) = nullptr;
  int (*output_kind)(const CustomOp*, size_t) = nullptr;
  int (*input_memory)(const CustomOp*, size_t) = nullptr;
  int (*fewest_inputs)(const CustomOp*) = nullptr;
  int (*inputs_alike)(const CustomOp*) = nullptr;
  int (*fewest_outputs)(const CustomOp*) = nullptr;
  int (*outputs_alike)(const CustomOp*) = nullptr;
  Status* (*create_kernel)(const CustomOp*, const void* api, const void* info, void** kernel) = nullptr;
  Status* (*compute)(void* kernel, Context*) = nullptr;
  const void* infer_shapes = nullptr;
  int (*first_version)(const CustomOp*) = nullptr;
  int (*last_version)(const CustomOp*) = nullptr;
};

}  // namespace d3tom::onnxruntime
