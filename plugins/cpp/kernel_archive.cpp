#include "kernel_archive.h"

#include <cstring>
#include <stdexcept>

namespace d3tom {
namespace {

constexpr char kMagic[9] = "D3TMKRN1";

struct Head {
    char magic[8];
    uint32_t count;
    uint32_t zero;
};

struct Entry {
    char name[24];
    char symbol[32];
    uint32_t type, sm, portable, threads, shared, scratch, blockX, blockY, length, zero;
};

static_assert(sizeof(Head) == 16 && sizeof(Entry) == 96, "the archive's layout");

std::string text(const char* field, std::size_t size) { return std::string(field, strnlen(field, size)); }

// 8.0, 8.6 and 8.9, of which later ones run cubins of earlier ones; no other architectures do.
bool desktopAmpere(uint32_t sm) { return sm == 80 || sm == 86 || sm == 89; }

std::size_t padded(std::size_t size) { return (size + 7) / 8 * 8; }

}  // namespace

std::vector<Kernel> readArchive(const uint8_t* data, std::size_t size) {
    Head head;
    if (size < sizeof head || (std::memcpy(&head, data, sizeof head), std::memcmp(head.magic, kMagic, 8) != 0)) {
        throw std::runtime_error("the compiled kernels were written by another version of d3tom-export, or damaged");
    }
    std::vector<Kernel> kernels;
    std::size_t at = sizeof head;
    for (uint32_t index = 0; index < head.count; ++index) {
        Entry entry;
        if (size - at < sizeof entry) throw std::runtime_error("the compiled kernels are cut short");
        std::memcpy(&entry, data + at, sizeof entry);
        at += sizeof entry;
        if (size - at < entry.length || size - at < padded(entry.length)) {
            throw std::runtime_error("the compiled kernels are cut short");
        }
        if (entry.type > static_cast<uint32_t>(RowType::kNone)) {
            throw std::runtime_error("the compiled kernels are of an unknown element type");
        }
        kernels.push_back({text(entry.name, sizeof entry.name), text(entry.symbol, sizeof entry.symbol),
                           static_cast<RowType>(entry.type), entry.sm, entry.portable != 0, entry.threads,
                           entry.shared, entry.scratch, entry.blockX, entry.blockY, data + at, entry.length});
        at += padded(entry.length);
    }
    return kernels;
}

std::string writeArchive(const std::vector<Kernel>& kernels) {
    Head head{};
    std::memcpy(head.magic, kMagic, 8);
    head.count = static_cast<uint32_t>(kernels.size());
    std::string bytes(reinterpret_cast<const char*>(&head), sizeof head);
    for (const Kernel& kernel : kernels) {
        Entry entry{};
        std::memcpy(entry.name, kernel.name.data(), kernel.name.size());
        std::memcpy(entry.symbol, kernel.symbol.data(), kernel.symbol.size());
        entry.type = static_cast<uint32_t>(kernel.type);
        entry.sm = kernel.sm;
        entry.portable = kernel.portable ? 1 : 0;
        entry.threads = kernel.threads;
        entry.shared = kernel.shared;
        entry.scratch = kernel.scratch;
        entry.blockX = kernel.blockX;
        entry.blockY = kernel.blockY;
        entry.length = static_cast<uint32_t>(kernel.imageSize);
        bytes.append(reinterpret_cast<const char*>(&entry), sizeof entry);
        bytes.append(reinterpret_cast<const char*>(kernel.image), kernel.imageSize);
        bytes.resize(bytes.size() + padded(kernel.imageSize) - kernel.imageSize);
    }
    return bytes;
}

std::vector<Kernel> selectKernels(const std::vector<Kernel>& kernels, uint32_t sm) {
    std::vector<Kernel> chosen;
    for (const Kernel& kernel : kernels) {
        const bool fits = kernel.portable ? kernel.sm <= sm
                                          : kernel.sm == sm || (kernel.sm < sm && desktopAmpere(kernel.sm) &&
                                                                desktopAmpere(sm));
        if (!fits) continue;
        bool known = false;
        for (Kernel& other : chosen) {
            if (other.name != kernel.name || other.type != kernel.type) continue;
            known = true;
            const bool better = kernel.portable != other.portable ? other.portable : kernel.sm > other.sm;
            if (better) other = kernel;
        }
        if (!known) chosen.push_back(kernel);
    }
    return chosen;
}

}  // namespace d3tom
