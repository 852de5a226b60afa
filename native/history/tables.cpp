#include "tables.h"

namespace minicpm::history {

Tables::Tables(const Knots& within) : tables_(std::make_unique<Table[]>(kNumTableClasses * kNumFractions)) {
    within_[0] = 0;
    for (int i = 0; i < kNumKnots; ++i) {
        within_[i + 1] = within[i];
        if (within_[i + 1] < within_[i]) throw std::invalid_argument("the distribution's knots do not rise");
    }
    for (int index = 0; index < kNumTableClasses; ++index) fill(&tables_[index * kNumFractions], index);
    for (int i = 0; i < static_cast<int>(scales_.size()); ++i) {
        const int scale = std::clamp(i - 128, 0, kNumClasses - 1);
        const int coarse = std::max(0, (scale - kNumTableClasses + kClassesPerOctave) / kClassesPerOctave);
        scales_[i] = {&tables_[(scale - kClassesPerOctave * coarse) * kNumFractions], coarse};
    }
}

// How much of the distribution lies below `place`, of 2^33. place: in 1 / kNumFractions of a step of this class.
uint64_t Tables::below(int64_t place, int index) const {
    // 2^(16 - i / 4), rounded
    static constexpr uint64_t kQuarters[] = {65536, 55109, 46341, 38968};
    static_assert(kClassesPerOctave == 4 && kKnotsPerScale == 8 && kFractionBits == 4);
    // place / 16 steps, 2^(index / 4 - 4) steps to a scale, 8 knots to a scale
    const uint64_t size = static_cast<uint64_t>(place < 0 ? -place : place);
    const uint64_t knots = size * kQuarters[index % 4] << 3 >> index / 4;
    const uint64_t i = knots >> 16, rest = knots & 65535;
    const uint64_t mass = i >= kNumKnots ? uint64_t{within_[kNumKnots]} << 16
                                         : (uint64_t{within_[i]} << 16) + (within_[i + 1] - within_[i]) * rest;
    const uint64_t half = uint64_t{1} << 32;
    return place < 0 ? half - mass : half + mass;
}

void Tables::fill(Table* tables, int index) const {
    for (int fraction = 0; fraction < kNumFractions; ++fraction) {
        const auto edge = [&](int symbol) { return below(int64_t{symbol - kReach} * kNumFractions - fraction, index); };
        // What lies outside goes to the escape, which has at least one slot.
        const uint64_t lowest = edge(0);
        for (int symbol = 0; symbol < kNumSymbols; ++symbol) {
            tables[fraction].first[symbol] = static_cast<uint16_t>((edge(symbol) - lowest) * (kTotal - 1) >> 33);
        }
    }
}

}  // namespace minicpm::history
