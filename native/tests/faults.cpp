// Deliberate faults, each run alone and by name only: a sanitizer that lets one pass would let others pass too.
#include <thread>

#include "check.h"
#include "memory.h"

namespace minicpm::tests {

namespace {

// Keeps the compiler from seeing what a number is, or that nobody needs a result.
template <class T>
T hidden(T value) {
    volatile T kept = value;
    return kept;
}

}  // namespace

FAULT(heap) {
    Exact<float> values(10);
    hidden(values[hidden(10)]);
}

FAULT(mapping) {
    Arena arena;
    uint8_t* piece = arena.take(100);
    hidden(piece[hidden(100)]);
}

FAULT(overflow) { hidden(hidden(2147483647) + 1); }

FAULT(race) {
    int value = 0;
    std::thread other([&] { value = 1; });
    value = 2;
    other.join();
    hidden(value);
}

}  // namespace minicpm::tests
