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

// One merge: hidden (batch, visual, width), normed (batch, visual, depth), kept (batch, kept).
struct MergeSizes {
    int64_t batch, visual, kept, depth, width;
};

// Byte offsets of the intermediate buffers in the workspace; see `workspace` in plugins/launch.py.
struct Workspace {
    std::size_t scores, slots, order, starts, size;
};

Workspace workspaceOf(const MergeSizes& sizes);

struct Buffers {
    const void* hidden;
    const void* normed;
    const void* kept;
    void* workspace;
    void* merged;
};

// Kernels loaded into one CUDA context.
class LoadedKernels {
   public:
    // Loads those of `kernels` that the current context's GPU runs; throws std::runtime_error where any is missing.
    explicit LoadedKernels(const std::vector<Kernel>& kernels);

    // Puts one merge on `stream`: launches only, no allocation and no waiting.
    void enqueue(const MergeSizes& sizes, RowType type, const Buffers& buffers, CUstream stream) const;

   private:
    struct Entry {
        Kernel kernel;
        CUfunction function;
    };

    const Entry& find(const std::string& name, RowType type) const;

    std::vector<Entry> entries_;
};

// The kernels of one plugin and its clones, loaded once into every context that they meet.
class KernelCache {
   public:
    std::shared_ptr<LoadedKernels> inCurrentContext(const std::vector<Kernel>& kernels);

   private:
    std::mutex mutex_;
    std::map<CUcontext, std::shared_ptr<LoadedKernels>> loaded_;
};

}  // namespace d3tom
