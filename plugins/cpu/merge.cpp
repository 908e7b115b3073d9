// D3ToMCacheMerge for ONNX Runtime on the CPU: a kernel in the place of the operator's body, which
// d3tom_export/cpu/cache_merge.py has, with what goes in and comes out. Sessions that register this library have it.
//
//   c++ -std=c++17 -O3 -march=native -shared -fPIC -fvisibility=hidden merge.cpp -o libd3tom_merge_cpu.so
//
// Rows are read where they lie: each goes straight to the sum of its target, with neither a sorted copy nor an assignment
// matrix. B batch, P rows of a prompt, C of them kept, N heads of d numbers, D numbers of the rows that are compared.
#include <algorithm>
#include <cmath>
#include <exception>
#include <limits>
#include <mutex>
#include <string>
#include <vector>

#include "onnxruntime_abi.h"

namespace d3tom {
namespace {

using onnxruntime::Context;
using onnxruntime::Status;

constexpr size_t kLanes = 16;
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

#ifdef __AVX512F__
constexpr int64_t kRows = 8;  // as many accumulators as hide a product's latency, and as registers hold
#else
constexpr int64_t kRows = 4;
#endif
constexpr int64_t kSearched = 64;   // rows that a thread looks up at a time
constexpr int64_t kSummed = 128;    // numbers of a row that it adds at a time
constexpr int64_t kTerms = 128;     // of a product before they join its sum: 4096 in a row would lose a digit

const onnxruntime::Api* api = nullptr;

struct Tensor {
  std::vector<int64_t> sizes;
  void* data = nullptr;
  int type = 0;
};

struct Failed {
  Status* status;
};

void check(Status* status) {
  if (status != nullptr) throw Failed{status};
}

[[noreturn]] void refuse(const std::string& why) {
  throw Failed{api->status(onnxruntime::kInvalidArgument, ("D3ToMCacheMerge: " + why).c_str())};
}

Tensor input(const Context* context, size_t index, size_t rank, int type) {
  const onnxruntime::Value* value = nullptr;
  check(api->input(context, index, &value));
  if (value == nullptr) refuse("input " + std::to_string(index) + " is missing");
  onnxruntime::TensorInfo* info = nullptr;
  check(api->info(value, &info));
  Tensor found;
  size_t axes = 0;
  Status* failed = api->element_type(info, &found.type);
  if (failed == nullptr) failed = api->rank(info, &axes);
  found.sizes.resize(axes);
  if (failed == nullptr) failed = api->sizes(info, found.sizes.data(), axes);
  api->release(info);
  check(failed);
  if (axes != rank || found.type != type) {
    refuse("input " + std::to_string(index) + " has " + std::to_string(axes) + " axes of type " +
           std::to_string(found.type) + ", expected " + std::to_string(rank) + " of type " + std::to_string(type));
  }
  check(api->data(value, &found.data));
  return found;
}

// Keys or values.
struct Rows {
  const float* rows;            // (B, P, N, d)
  float* merged;                // (B, N, C, d)
  std::vector<double> norms;    // (B, N): of the kept rows of a head, added up
};

struct Merge {
  const float* keys = nullptr;    // (B, P, N, d)
  const float* normed = nullptr;  // (B, P, D); null: the keys' means over heads, D = d
  const int64_t* kept = nullptr;  // (B, C)
  bool drops = false;             // whether norms are restored
  int64_t batch = 0, prompt = 0, keep = 0, depth = 0, heads = 0, size = 0;
  int64_t groups = 0;         // of kLanes kept rows
  std::vector<float> unit;    // (B, groups, D, kLanes): the kept rows over their norms, side by side
  std::vector<int32_t> target;  // (B, P)
  Rows rows[2];

  // A task is some heads of the keys or the values of a batch row: enough of them to read lines of a cache in a row.
  int64_t together() const { return std::max<int64_t>(1, kSummed / std::max<int64_t>(size, 1)); }
  int64_t parts() const { return (heads + together() - 1) / together(); }
  size_t tasks() const { return size_t(2 * batch * parts()); }
};

struct Task {
  Rows& rows;
  int64_t b, first, last;  // heads

  Task(Merge& merge, size_t part)
      : rows(merge.rows[part % 2]), b(int64_t(part) / 2 / merge.parts()),
        first(int64_t(part) / 2 % merge.parts() * merge.together()),
        last(std::min(first + merge.together(), merge.heads)) {}
};

// The row that is compared, of `merge.depth` numbers: where it lies, or in `room`.
const float* compared(const Merge& merge, int64_t b, int64_t row, float* room) {
  if (merge.normed != nullptr) return merge.normed + (b * merge.prompt + row) * merge.depth;
  const float* key = merge.keys + (b * merge.prompt + row) * merge.heads * merge.size;
  std::copy_n(key, merge.size, room);
  for (int64_t head = 1; head < merge.heads; ++head) {
    key += merge.size;
    for (int64_t k = 0; k < merge.size; ++k) room[k] += key[k];
  }
  for (int64_t k = 0; k < merge.size; ++k) room[k] /= float(merge.heads);
  return room;
}

void normalise(Merge& merge) {
  merge.groups = (merge.keep + int64_t{kLanes} - 1) / int64_t{kLanes};
  merge.unit.resize(merge.batch * merge.groups * merge.depth * kLanes);
  std::vector<float> room(merge.depth);
  for (int64_t b = 0; b < merge.batch; ++b) {
    for (int64_t slot = 0; slot < merge.groups * int64_t{kLanes}; ++slot) {
      // Behind the last one, that again: it comes later, so it is never taken.
      int64_t row = merge.kept[b * merge.keep + std::min(slot, merge.keep - 1)];
      const float* from = compared(merge, b, row, room.data());
      double squares = 0;
      for (int64_t k = 0; k < merge.depth; ++k) squares += double(from[k]) * from[k];
      float norm = std::max(float(std::sqrt(squares)), 1e-12f);
      float* to = &merge.unit[(b * merge.groups + slot / kLanes) * merge.depth * kLanes + slot % kLanes];
      for (int64_t k = 0; k < merge.depth; ++k) to[k * kLanes] = from[k] / norm;
    }
  }
}

// The nearest kept rows of kRows rows; of equally near ones the first.
void nearest(const Merge& merge, int64_t b, const float* const rows[kRows], int32_t found[kRows]) {
  Floats best[kRows];
  Ints where[kRows];
  Ints index;
  for (size_t lane = 0; lane < kLanes; ++lane) index[lane] = int32_t(lane);
  for (int64_t r = 0; r < kRows; ++r) {
    best[r] = Floats{} - std::numeric_limits<float>::infinity();
    where[r] = Ints{};
  }
  const float* unit = &merge.unit[b * merge.groups * merge.depth * kLanes];
  for (int64_t group = 0; group < merge.groups; ++group) {
    Floats similarity[kRows] = {};
    for (int64_t start = 0; start < merge.depth; start += kTerms) {
      Floats sums[kRows] = {};
      for (int64_t k = start; k < std::min(start + kTerms, merge.depth); ++k) {
        Floats column = *reinterpret_cast<const Floats*>(unit + k * kLanes);
        for (int64_t r = 0; r < kRows; ++r) sums[r] += column * rows[r][k];
      }
      for (int64_t r = 0; r < kRows; ++r) similarity[r] += sums[r];
    }
    for (int64_t r = 0; r < kRows; ++r) {
      Ints nearer = similarity[r] > best[r];
      best[r] = nearer ? similarity[r] : best[r];
      where[r] = nearer ? index : where[r];
    }
    unit += merge.depth * kLanes;
    index += int32_t(kLanes);
  }
  for (int64_t r = 0; r < kRows; ++r) {
    size_t first = 0;
    for (size_t lane = 1; lane < kLanes; ++lane) {
      if (best[r][lane] > best[r][first] || (best[r][lane] == best[r][first] && where[r][lane] < where[r][first])) {
        first = lane;
      }
    }
    found[r] = where[r][first];
  }
}

void search(void* data, size_t part) {
  Merge& merge = *static_cast<Merge*>(data);
  int64_t parts = (merge.prompt + kSearched - 1) / kSearched;
  int64_t b = int64_t(part) / parts, begin = int64_t(part) % parts * kSearched;
  int64_t end = std::min(begin + kSearched, merge.prompt);
  std::vector<float> room(kRows * merge.depth);
  for (int64_t row = begin; row < end; row += kRows) {
    const float* rows[kRows];
    int32_t found[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      rows[r] = compared(merge, b, std::min(row + r, end - 1), &room[r * merge.depth]);
    }
    nearest(merge, b, rows, found);
    for (int64_t r = 0; r < std::min(kRows, end - row); ++r) merge.target[b * merge.prompt + row + r] = found[r];
  }
}

float norm(const float* row, int64_t size) {
  Floats squares = {};
  int64_t k = 0;
  for (; k + int64_t{kLanes} <= size; k += kLanes) {
    Floats numbers = *reinterpret_cast<const Floats*>(row + k);
    squares += numbers * numbers;
  }
  float sum = 0;
  for (size_t lane = 0; lane < kLanes; ++lane) sum += squares[lane];
  for (; k < size; ++k) sum += row[k] * row[k];
  return std::sqrt(sum);
}

void sum(void* data, size_t part) {
  Merge& merge = *static_cast<Merge*>(data);
  Task task(merge, part);
  int64_t width = merge.heads * merge.size, one_head = merge.keep * merge.size;
  const float* rows = task.rows.rows + task.b * merge.prompt * width;
  float* merged = task.rows.merged + task.b * merge.heads * one_head;
  const int64_t* kept = merge.kept + task.b * merge.keep;
  for (int64_t head = task.first; head < task.last && merge.drops; ++head) {
    double norms = 0;
    for (int64_t slot = 0; slot < merge.keep; ++slot) {
      norms += norm(rows + kept[slot] * width + head * merge.size, merge.size);
    }
    task.rows.norms[task.b * merge.heads + head] = norms;
  }
  std::fill(merged + task.first * one_head, merged + task.last * one_head, 0.0f);
  const int32_t* target = &merge.target[task.b * merge.prompt];
  for (int64_t row = 0; row < merge.prompt; ++row) {
    for (int64_t head = task.first; head < task.last; ++head) {
      const float* from = rows + row * width + head * merge.size;
      float* to = merged + head * one_head + target[row] * merge.size;
      for (int64_t k = 0; k < merge.size; ++k) to[k] += from[k];
    }
  }
}

// The norm of every sum becomes the mean norm of the rows that were kept.
void restore(void* data, size_t part) {
  Merge& merge = *static_cast<Merge*>(data);
  Task task(merge, part);
  double norms = 0;
  for (int64_t head = 0; head < merge.heads; ++head) norms += task.rows.norms[task.b * merge.heads + head];
  float wanted = float(norms / double(merge.heads * merge.keep));
  float* merged = task.rows.merged + task.b * merge.heads * merge.keep * merge.size;
  for (int64_t row = task.first * merge.keep; row < task.last * merge.keep; ++row) {
    float* numbers = merged + row * merge.size;
    float scale = wanted / (norm(numbers, merge.size) + 1e-8f);
    for (int64_t k = 0; k < merge.size; ++k) numbers[k] *= scale;
  }
}

void run(Context* context) {
  Tensor keys = input(context, 0, 4, onnxruntime::kFloat);
  Tensor values = input(context, 1, 4, onnxruntime::kFloat);
  Tensor kept = input(context, 2, 2, onnxruntime::kInt64);
  Tensor drops = input(context, 3, 1, onnxruntime::kBool);
  size_t inputs = 0;
  check(api->input_count(context, &inputs));
  Tensor normed;
  if (inputs > 4) {
    normed = input(context, 4, 3, onnxruntime::kFloat);
    if (normed.sizes[0] != keys.sizes[0] || normed.sizes[1] != keys.sizes[1]) {
      refuse("rows to sum and rows to compare differ in number");
    }
  }
  if (values.sizes != keys.sizes) refuse("keys and values differ in shape");
  if (kept.sizes[0] != keys.sizes[0]) refuse("kept and keys differ in their batch");
  if (drops.sizes[0] != 1) refuse("one drops is expected");
  Merge merge;
  merge.keys = static_cast<const float*>(keys.data);
  merge.normed = static_cast<const float*>(normed.data);
  merge.kept = static_cast<const int64_t*>(kept.data);
  merge.drops = *static_cast<const bool*>(drops.data);
  merge.batch = keys.sizes[0], merge.prompt = keys.sizes[1], merge.heads = keys.sizes[2], merge.size = keys.sizes[3];
  merge.depth = inputs > 4 ? normed.sizes[2] : merge.size, merge.keep = kept.sizes[1];
  if (merge.prompt > std::numeric_limits<int32_t>::max()) refuse("there are too many rows");
  if (merge.keep < 1 && merge.prompt > 0) refuse("no row is kept");
  for (int64_t slot = 0; slot < merge.batch * merge.keep; ++slot) {
    if (merge.kept[slot] < 0 || merge.kept[slot] >= merge.prompt) refuse("a kept row is none of the rows");
  }
  for (size_t place = 0; place < 2; ++place) {
    int64_t sizes[] = {merge.batch, merge.heads, merge.keep, merge.size};
    onnxruntime::Value* value = nullptr;
    void* merged = nullptr;
    check(api->output(context, place, sizes, 4, &value));
    check(api->data(value, &merged));
    const void* rows = place == 0 ? keys.data : values.data;
    merge.rows[place] = {static_cast<const float*>(rows), static_cast<float*>(merged),
                         std::vector<double>(merge.batch * merge.heads)};
  }
  if (merge.batch == 0 || merge.prompt == 0) return;
  normalise(merge);
  merge.target.resize(merge.batch * merge.prompt);
  size_t searches = size_t(merge.batch * ((merge.prompt + kSearched - 1) / kSearched));
  check(api->parallel_for(context, search, searches, &merge));
  for (int64_t b = 0; b < merge.batch; ++b) {  // a kept row stays itself, beside an identical twin too
    for (int64_t slot = 0; slot < merge.keep; ++slot) {
      merge.target[b * merge.prompt + merge.kept[b * merge.keep + slot]] = int32_t(slot);
    }
  }
  check(api->parallel_for(context, sum, merge.tasks(), &merge));
  if (merge.drops) check(api->parallel_for(context, restore, merge.tasks(), &merge));
}

Status* compute(void*, Context* context) {
  try {
    run(context);
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const std::exception& error) {
    return api->status(onnxruntime::kFailed, error.what());
  }
  return nullptr;
}

onnxruntime::CustomOp describe() {
  using Op = onnxruntime::CustomOp;
  Op op;
  op.name = [](const Op*) { return "D3ToMCacheMerge"; };
  op.provider = [](const Op*) -> const char* { return nullptr; };  // the CPU's
  op.input_count = [](const Op*) -> size_t { return 5; };
  op.output_count = [](const Op*) -> size_t { return 2; };
  op.input_type = [](const Op*, size_t place) {
    return place == 2 ? onnxruntime::kInt64 : place == 3 ? onnxruntime::kBool : onnxruntime::kFloat;
  };
  op.output_type = [](const Op*, size_t) { return onnxruntime::kFloat; };
  op.input_kind = [](const Op*, size_t place) {
    return place == 4 ? onnxruntime::kOptional : onnxruntime::kRequired;
  };
  op.output_kind = [](const Op*, size_t) { return onnxruntime::kRequired; };
  op.input_memory = [](const Op*, size_t) { return 0; };
  op.create_kernel = [](const Op* self, const void*, const void*, void** kernel) -> Status* {
    *kernel = const_cast<Op*>(self);  // it keeps nothing
    return nullptr;
  };
  op.destroy_kernel = [](void*) {};
  op.compute = compute;
  op.first_version = op.last_version = [](const Op*) { return 1; };
  return op;
}

}  // namespace
}  // namespace d3tom

// ONNX Runtime calls it by this name for every session that registers the library.
extern "C" __attribute__((visibility("default"))) d3tom::onnxruntime::Status* RegisterCustomOps(
    d3tom::onnxruntime::SessionOptions* options, const d3tom::onnxruntime::ApiBase* base) {
  namespace onnxruntime = d3tom::onnxruntime;
  static const onnxruntime::Api table(base->get_api(onnxruntime::kVersion));
  static const onnxruntime::CustomOp op = d3tom::describe();
  static onnxruntime::Domain* domain = nullptr;  // of all sessions
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  if (domain == nullptr) {
    d3tom::api = &table;
    onnxruntime::Domain* made = nullptr;
    if (onnxruntime::Status* failed = table.create_domain("d3tom_export", &made)) return failed;
    if (onnxruntime::Status* failed = table.add_operator(made, &op)) return failed;
    domain = made;
  }
  return table.add_domain(options, domain);
}
