// Compiled merge kernels as one block of bytes; the format is written and described by plugins/archive.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace d3tom {

// Element types, by their codes in an archive.
enum class RowType : uint32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kNone = 3 };

struct Kernel {
    std::string name;    // nearest-wide, nearest-narrow, nearest-ragged, order, sum, sum-ragged
    std::string symbol;  // the entry's name in the image
    RowType type;        // kNone for `order`, which sees no rows
    uint32_t sm;         // compute capability without its point
    bool portable;       // PTX rather than a cubin
    uint32_t threads;    // of a program, one dimension
    uint32_t shared;     // dynamic shared memory in bytes
    uint32_t scratch;    // null pointers that Triton declares after the parameters
    uint32_t blockX;     // tile sizes along the first two grid dimensions
    uint32_t blockY;
    const uint8_t* image;  // within the archive's bytes, which must outlive this
    std::size_t imageSize;
};

// The kernels of an archive; throws std::runtime_error where the bytes are none of this version.
std::vector<Kernel> readArchive(const uint8_t* data, std::size_t size);

// The same kernels as an archive again, in the order given.
std::string writeArchive(const std::vector<Kernel>& kernels);

// The kernels that run on a GPU of `sm`, the best of each name and type; see `select` in plugins/archive.py.
std::vector<Kernel> selectKernels(const std::vector<Kernel>& kernels, uint32_t sm);

}  // namespace d3tom
