// A step that is no larger than one before it asks the heap for nothing, on any thread.
#include <atomic>
#include <cstdlib>
#include <new>
#include <string>

#include "models.h"

namespace {

std::atomic<bool> is_counting{false};
std::atomic<int> num_allocations{0};

void* allocate(size_t bytes, size_t alignment) {
    if (is_counting.load(std::memory_order_relaxed)) num_allocations.fetch_add(1);
    void* p = alignment ? std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment)
                        : std::malloc(bytes ? bytes : 1);
    if (!p) throw std::bad_alloc();
    return p;
}

}  // namespace

// In place of the library's for the whole program; the other forms call these.
void* operator new(size_t bytes) { return allocate(bytes, 0); }
void* operator new(size_t bytes, std::align_val_t alignment) { return allocate(bytes, static_cast<size_t>(alignment)); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }

namespace minicpm::tests {

namespace {

// Allocations of one step of `count` sequences, each with one row at `position`.
int count_allocations(Decoder& decoder, int count, int position, Exact<float>& out) {
    std::vector<int32_t> tokens(count, 7), positions(count, position), sequences(count), rows(count);
    std::vector<int32_t> tables(size_t(count) * kMaxBlocks);
    for (int i = 0; i < count; ++i) sequences[i] = rows[i] = i;
    for (size_t i = 0; i < tables.size(); ++i) tables[i] = static_cast<int32_t>(i);
    std::vector<float> frequencies(decoder.shape().head_dim / 2, 0.5f);
    const Step step{tokens, positions, sequences, tables, kMaxBlocks, frequencies, rows, true, nullptr};
    num_allocations = 0;
    is_counting = true;
    decoder.step(step, out.data());
    is_counting = false;
    return num_allocations;
}

}  // namespace

TEST(a_token_allocates_nothing) {
    const Model model(tiny_shape(), {"Q4_0", "Q8_0", "F16"});
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
        const auto decoder = model.decoder({.kernel = (*k)->name, .num_threads = 3});
        Exact<float> out(size_t{4} * model.shape().vocab_size);
        CHECK(count_allocations(*decoder, 4, kMaxBlocks * 32 - 1, out) > 0, "the largest step plans without memory");
        for (const int count : {1, 4, 2}) {
            for (const int position : {0, 31, 32, 300, kMaxBlocks * 32 - 1}) {
                const int found = count_allocations(*decoder, count, position, out);
                CHECK(found == 0, std::string((*k)->name) + ": " + std::to_string(found) + " allocations at position " +
                                      std::to_string(position));
            }
        }
    }
}

}  // namespace minicpm::tests
