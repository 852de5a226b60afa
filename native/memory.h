// Zeroed memory straight from the operating system, in huge pages where it grants them, untouched pages costing
// nothing.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

namespace minicpm {

constexpr size_t kHugePage = size_t{2} << 20;

// Tell AddressSanitizer which bytes of a mapping someone asked for: it knows nothing of mappings by itself.
inline void mark_used([[maybe_unused]] const void* begin, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(begin, bytes);
#endif
}
inline void mark_unused([[maybe_unused]] const void* begin, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(begin, bytes);
#endif
}

constexpr size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// Gives back the pages of a mapped file that hold these bytes; whoever looks at them again reads them again.
inline void release_file_pages(const uint8_t* begin, size_t bytes) {
    static const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t first = reinterpret_cast<uintptr_t>(begin) / page * page;
    const uintptr_t last = round_up(reinterpret_cast<uintptr_t>(begin) + bytes, page);
    madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

// One mapping; aligned to a huge page if it is as large as one.
class Region {
  public:
    Region() = default;
    explicit Region(size_t bytes) : bytes_(round_up(bytes ? bytes : 1, 4096)) {
        mapped_ = bytes_ + (bytes_ >= kHugePage ? kHugePage : 0);
        base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base_ == MAP_FAILED) {
            base_ = nullptr;
            throw std::bad_alloc();
        }
        data_ = static_cast<uint8_t*>(base_);
        if (bytes_ >= kHugePage) {
            data_ = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(base_), kHugePage));
#ifdef MADV_HUGEPAGE
            madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
        }
        mark_unused(data_ + bytes, bytes_ - bytes);
    }
    Region(Region&& other) noexcept { swap(other); }
    Region& operator=(Region&& other) noexcept {
        swap(other);
        return *this;
    }
    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;
    ~Region() {
        if (!base_) return;
        mark_used(base_, mapped_);  // whoever is given these addresses next
        munmap(base_, mapped_);
    }

    uint8_t* data() const { return data_; }
    size_t bytes() const { return bytes_; }

  private:
    void swap(Region& other) {
        std::swap(base_, other.base_);
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        std::swap(mapped_, other.mapped_);
    }

    void* base_ = nullptr;
    uint8_t* data_ = nullptr;
    size_t bytes_ = 0;
    size_t mapped_ = 0;
};

// Hands out 64-byte-aligned pieces that live as long as the arena. Many small weights share huge pages if room for them
// was reserved.
class Arena {
  public:
    // The next pieces, of this many bytes together, come from one region.
    void reserve(size_t bytes) {
        if (bytes > left_) add_region(bytes);
    }
    uint8_t* take(size_t bytes) {
        const size_t asked = bytes;
        bytes = round_up(bytes, 64);
        reserve(bytes);
        uint8_t* piece = next_;
        mark_used(piece, asked);
        next_ += bytes;
        left_ -= bytes;
        used_ += bytes;
        return piece;
    }
    size_t used_bytes() const { return used_; }

  private:
    void add_region(size_t bytes) {
        regions_.emplace_back(bytes);
        next_ = regions_.back().data();
        left_ = bytes;
        mark_unused(next_, left_);
    }

    std::vector<Region> regions_;
    uint8_t* next_ = nullptr;
    size_t left_ = 0;
    size_t used_ = 0;
};

// A buffer that grows and never shrinks; growing loses the contents.
template <class T>
class Buffer {
  public:
    T* reserve(size_t count) {
        if (count * sizeof(T) > region_.bytes()) region_ = Region(count * sizeof(T));
        mark_unused(region_.data(), region_.bytes());
        mark_used(region_.data(), count * sizeof(T));
        return data();
    }
    T* data() const { return reinterpret_cast<T*>(region_.data()); }
    size_t bytes() const { return region_.bytes(); }

  private:
    Region region_;
};

}  // namespace minicpm
