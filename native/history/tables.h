// Tables of probabilities, as cumulative frequencies, made from a distribution's knots with integers alone.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>

#include "cells.h"
#include "codec.h"

namespace minicpm::history {

constexpr int kProbabilityBits = 15;
constexpr uint32_t kTotal = 1u << kProbabilityBits;
// Distances from -kReach to kReach have symbols; the last symbol stands for a cell written out whole.
constexpr int kReach = 15, kNumSymbols = 2 * kReach + 2, kEscape = kNumSymbols - 1;
constexpr int kNumFractions = 1 << kFractionBits;
// A class is a scale: 2^(class / 4 - 4) steps. Above those with tables, bins are taken together, 2^coarse at a time.
constexpr int kClassesPerOctave = 4, kNumTableClasses = 23, kNumClasses = 64;

struct Table {
    // The first of each symbol's slots; a symbol without slots is never written.
    alignas(64) uint16_t first[kNumSymbols];

    uint32_t end(int symbol) const { return symbol == kEscape ? kTotal : first[symbol + 1]; }
    // The symbol of a slot below kTotal. Written so that compilers count with vectors.
    int symbol_of(uint16_t slot) const {
        uint16_t count = 0;
        for (int i = 0; i < kNumSymbols; ++i) count = static_cast<uint16_t>(count + (first[i] <= slot));
        return count - 1;
    }
};

class Tables {
  public:
    // Throws std::invalid_argument unless the knots rise.
    explicit Tables(const Knots& within);

    static int coarse(int scale) {
        return std::max(0, (scale - kNumTableClasses + kClassesPerOctave) / kClassesPerOctave);
    }
    // The tables of a class, one for each place of the prediction within its bin.
    const Table* of(int scale) {
        const int index = scale - kClassesPerOctave * coarse(scale);
        if (!tables_[index]) make(index);
        return tables_[index].get();
    }

  private:
    void make(int index);
    uint64_t below(int64_t place, int index) const;

    std::array<uint32_t, kNumKnots + 1> within_;
    std::array<std::unique_ptr<Table[]>, kNumTableClasses> tables_;
};

inline int class_of(uint8_t row, int8_t column) { return std::clamp(int{row} + int{column}, 0, kNumClasses - 1); }

}  // namespace minicpm::history
