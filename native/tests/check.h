// A test is a function that returns, or throws through CHECK. No framework: the tests are built for other processors
// and under sanitizers, where every dependency would have to be built too.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace minicpm::tests {

struct Test {
    const char* name;
    void (*run)();
};
std::vector<Test>& tests();
std::vector<Test>& faults();
struct Registration {
    Registration(std::vector<Test>& list, const char* name, void (*run)()) { list.push_back({name, run}); }
};
// Whether this run is to be short, because an emulator or a sanitizer makes every instruction many.
bool is_quick();

#define MINICPM_REGISTER(list, name)                                                                          \
    static void list##_##name();                                                                              \
    static const ::minicpm::tests::Registration registration_##list##_##name(::minicpm::tests::list(), #name, \
                                                                             list##_##name);                  \
    static void list##_##name()
#define TEST(name) MINICPM_REGISTER(tests, name)
// Runs only when it is asked for by `--fault NAME`.
#define FAULT(name) MINICPM_REGISTER(faults, name)

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
    throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + what);
}
#define CHECK(condition, context) \
    if (!(condition)) ::minicpm::tests::fail(__FILE__, __LINE__, std::string(#condition) + ": " + (context))

// Memory of exactly this size, so that AddressSanitizer sees the first byte beyond.
template <class T>
class Exact {
  public:
    explicit Exact(size_t count) : count_(count) {
        const size_t bytes = count ? count * sizeof(T) : sizeof(T);
        void* memory = nullptr;
        if (posix_memalign(&memory, 64, bytes)) throw std::bad_alloc();
        std::memset(memory, 0, bytes);
        data_.reset(static_cast<T*>(memory));
    }
    T* data() const { return data_.get(); }
    size_t size() const { return count_; }
    T& operator[](size_t i) const { return data_.get()[i]; }

  private:
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    size_t count_;
    std::unique_ptr<T, Free> data_;
};

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    // splitmix64
    uint64_t next() {
        uint64_t z = state_ += 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        return z ^ z >> 31;
    }
    int below(int n) { return static_cast<int>(next() % static_cast<uint64_t>(n)); }
    float between(float low, float high) { return low + (high - low) * static_cast<float>(next() >> 40) * 0x1p-24f; }
    template <class Array>
    void fill(Array& array, float low, float high) {
        for (size_t i = 0; i < array.size(); ++i) array[i] = between(low, high);
    }

  private:
    uint64_t state_;
};

inline bool same_bits(const float* a, const float* b, size_t count) {
    return std::memcmp(a, b, count * sizeof(float)) == 0;
}

}  // namespace minicpm::tests
