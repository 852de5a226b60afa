// Floating-point cells as integers. A row has a step 2^exponent; the bin of a cell is its magnitude in whole steps,
// with the sign: bins of one width, each made of whole cells, so that what a bin leaves open is the cell's low bits.
//
// All arithmetic here is on integers: it decides how bytes are read, and gives the same on every processor.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace minicpm::history {

// Bins beyond, and cells that are no numbers, are written out whole.
constexpr int kLargestBinExponent = 21;
constexpr int32_t kNoBin = std::numeric_limits<int32_t>::min();
// Below the step, a cell has so many exponents; what is smaller is written out whole. Denormals are far below.
constexpr int kNumDrops = 12;
constexpr int kSmallestExponent = -100, kLargestExponent = 127;
// Predictions have so many fractional bits of a step, and scales of so many.
constexpr int kFractionBits = 4, kBetaBits = 7;

template <class Bits>
struct Cell;
template <>
struct Cell<uint16_t> {
    static constexpr int kMantissaBits = 7, kWidth = 16;
};
template <>
struct Cell<uint32_t> {
    static constexpr int kMantissaBits = 23, kWidth = 32;
};

template <class Bits>
constexpr Bits kMantissaMask = (Bits{1} << Cell<Bits>::kMantissaBits) - 1;

template <class Bits>
int biased_exponent(Bits cell) {
    return static_cast<int>(cell >> Cell<Bits>::kMantissaBits & 255);
}

template <class Bits>
bool is_negative(Bits cell) {
    return cell >> (Cell<Bits>::kWidth - 1);
}

inline int32_t magnitude_of(int32_t bin) { return bin < 0 ? ~bin : bin; }

// The bin of a cell: 0 is [0, step), -1 is (-step, -0].
template <class Bits>
int32_t bin_of(Bits cell, int exponent) {
    constexpr int mantissa = Cell<Bits>::kMantissaBits;
    const int biased = biased_exponent(cell), above = biased - 127 - exponent;
    if (biased == 255 || above > kLargestBinExponent) return kNoBin;
    int32_t magnitude = 0;
    if (biased > 0 && above >= 0) {
        const uint32_t whole = (cell & kMantissaMask<Bits>) | uint32_t{1} << mantissa;
        magnitude = static_cast<int32_t>(above <= mantissa ? whole >> (mantissa - above) : whole << (above - mantissa));
    }
    return is_negative(cell) ? ~magnitude : magnitude;
}

// How many low bits of the mantissa a bin with a magnitude of at least 1 leaves open; may be negative.
template <class Bits>
int open_bits(int32_t magnitude) {
    return Cell<Bits>::kMantissaBits - (std::bit_width(static_cast<uint32_t>(magnitude)) - 1);
}

template <class Bits>
Bits cell_of(bool is_negative, int exponent, uint64_t fraction) {
    constexpr int mantissa = Cell<Bits>::kMantissaBits;
    return static_cast<Bits>(uint64_t{is_negative} << (Cell<Bits>::kWidth - 1) |
                             uint64_t{uint8_t(exponent + 127)} << mantissa | (fraction & kMantissaMask<Bits>));
}

// The middle of a bin, which the base layer stands for; of a bin that is one cell, that cell.
template <class Bits>
Bits middle_cell(int32_t bin, int exponent) {
    constexpr int mantissa = Cell<Bits>::kMantissaBits;
    // In half steps; its last bit falls away where the bin leaves nothing open.
    const uint32_t halves = static_cast<uint32_t>(magnitude_of(bin)) << 1 | 1;
    const int above = std::bit_width(halves) - 1;
    const uint32_t fraction = above <= mantissa ? halves << (mantissa - above) : halves >> (above - mantissa);
    return cell_of<Bits>(bin < 0, exponent - 1 + above, fraction);
}

// beta x cell, as a place within a bin, in units of step / 2^kFractionBits, bounded.
template <class Bits>
int32_t predict(Bits cell, int beta, int exponent) {
    constexpr int mantissa = Cell<Bits>::kMantissaBits;
    const int biased = biased_exponent(cell);
    if (biased == 0 || biased == 255) return 0;
    const uint64_t product = uint64_t((cell & kMantissaMask<Bits>) | uint32_t{1} << mantissa) * uint32_t(beta);
    const int shift = biased - 127 - mantissa - exponent + kFractionBits - kBetaBits;
    constexpr uint64_t bound = uint64_t{1} << (kLargestBinExponent + kFractionBits);
    uint64_t units = 0;
    if (shift >= 0) {
        units = shift > 30 ? bound : product << shift;
    } else if (shift > -63) {
        units = product >> -shift;
    }
    // A cell that takes whole bins stands at the lower edge of its own.
    if (biased - 127 - exponent >= mantissa) units += uint64_t{1} << (kFractionBits - 1);
    const auto value = static_cast<int32_t>(units < bound ? units : bound);
    return is_negative(cell) ? -value : value;
}

}  // namespace minicpm::history
