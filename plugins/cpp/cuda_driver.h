// The CUDA driver, opened when first needed: the library loads on machines without one, where engines are only built.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernel_archive.h"

namespace d3tom {

constexpr int kMostRows = 8;  // row inputs of one merge

// One merge: normed (batch, visual, depth), kept (batch, kept), and `rows` times hidden (batch, visual, widths[...]).
struct MergeSizes {
    int64_t batch, visual, kept, depth;
    int rows;
    int64_t widths[kMostRows];

    bool operator==(const MergeSizes& other) const;
};

// Byte offsets of the intermediate buffers in the workspace; see `workspace` in plugins/launch.py.
struct Workspace {
    std::size_t scores, slots, order, starts, size;
};

Workspace workspaceOf(const MergeSizes& sizes);

// Kernels loaded into one CUDA context, for as long as this lives.
class LoadedKernels {
   public:
    struct Entry {
        Kernel kernel;
        CUfunction function;
    };

    // Loads those of `kernels` that the current context's GPU runs; throws std::runtime_error where any is missing.
    explicit LoadedKernels(const std::vector<Kernel>& kernels);
    ~LoadedKernels();
    LoadedKernels(const LoadedKernels&) = delete;
    LoadedKernels& operator=(const LoadedKernels&) = delete;

    // Throws std::runtime_error where there is no such kernel.
    const Entry& find(const std::string& name, RowType type) const;

   private:
    void load(const Kernel& kernel);
    void unload() noexcept;

    CUcontext context_ = nullptr;
    uint64_t identity_ = 0;
    std::vector<CUmodule> modules_;
    std::vector<Entry> entries_;
};

// The launches of one merge's sizes, ready but for the buffers' addresses: see `PreparedMerge` in plugins/driver.py.
// Calls must not overlap: one for each user.
class PreparedMerge {
   public:
    // Throws std::runtime_error for sizes beyond the kernels' limits, or of a width they were not compiled for.
    PreparedMerge(std::shared_ptr<const LoadedKernels> loaded, const MergeSizes& sizes, RowType type);
    PreparedMerge(const PreparedMerge&) = delete;
    PreparedMerge& operator=(const PreparedMerge&) = delete;

    bool serves(const MergeSizes& sizes, RowType type) const { return type == type_ && sizes == sizes_; }

    // Puts one merge on `stream`: launches only, no allocation and no waiting. Inputs and outputs in the node's order.
    void enqueue(const void* const* inputs, void* const* outputs, void* workspace, CUstream stream);

   private:
    struct Launch {
        CUfunction function;
        unsigned x, y, z, threads, shared;
        std::vector<void*> arguments;  // pointers into cells_
    };

    void plan();
    void launch(const LoadedKernels::Entry& entry, int64_t x, int64_t y, int64_t z, std::vector<int> cells);
    int number(int64_t value);

    std::shared_ptr<const LoadedKernels> loaded_;
    MergeSizes sizes_;
    RowType type_;
    Workspace parts_;
    // Arguments of all launches: addresses, which each call writes, then sizes and the null of scratch pointers.
    std::vector<uint64_t> cells_;
    std::vector<Launch> launches_;
};

// The kernels of one archive, loaded once into every context that its plugins meet, for as long as one there holds them.
class KernelCache {
   public:
    std::shared_ptr<const LoadedKernels> inCurrentContext(const std::vector<Kernel>& kernels);

   private:
    std::mutex mutex_;
    std::map<uint64_t, std::weak_ptr<const LoadedKernels>> loaded_;
};

}  // namespace d3tom
