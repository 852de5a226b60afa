// Tables of probabilities, as cumulative frequencies, made from a distribution's knots with integers alone.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

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
    // The symbol of a slot below kTotal.
    int symbol_of(uint32_t slot) const;
};

#if defined(__SSE2__)
inline int Table::symbol_of(uint32_t slot) const {
    static_assert(kNumSymbols == 32 && kTotal <= 1 << 15);
    const auto* firsts = reinterpret_cast<const __m128i*>(first);
    const __m128i slots = _mm_set1_epi16(static_cast<int16_t>(slot));
    const auto above = [&](int i) { return _mm_cmpgt_epi16(_mm_load_si128(firsts + i), slots); };
    const auto low = static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(above(0), above(1))));
    const auto high = static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(above(2), above(3))));
    // Above every slot lies the end of the last symbol.
    return std::countr_zero(uint64_t{high} << 16 | low | uint64_t{1} << 32) - 1;
}
#else
inline int Table::symbol_of(uint32_t slot) const {
    uint16_t count = 0;
    for (int i = 0; i < kNumSymbols; ++i) count = static_cast<uint16_t>(count + (first[i] <= slot));
    return count - 1;
}
#endif

// How cells of one class are coded: with one table for each place of the prediction within its bin, and so many low
// bits of the bin as they are.
struct Scale {
    const Table* tables = nullptr;
    int coarse = 0;
};

class Tables {
  public:
    // Throws std::invalid_argument unless the knots rise.
    explicit Tables(const Knots& within);

    // How the cells of a row are coded, by the offset of their column, from -128 to 127.
    const Scale* scales(uint8_t row) const { return scales_.data() + row + 128; }

  private:
    void fill(Table* tables, int index) const;
    uint64_t below(int64_t place, int index) const;

    std::array<uint32_t, kNumKnots + 1> within_;
    std::unique_ptr<Table[]> tables_;
    std::array<Scale, 256 + 256> scales_;
};

}  // namespace minicpm::history
