// Range asymmetric numeral systems: eight states of 32 bits that take turns, words of 16 bits.
// A stream: the number of words (4 bytes), the states (4 bytes each), the words; all little-endian.
// Source: J. Duda, "Asymmetric numeral systems", arXiv:1311.2540; interleaving: F. Giesen, arXiv:1402.3392.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "tables.h"

namespace minicpm::history {

constexpr int kNumStates = 8;
constexpr uint32_t kLowestState = 1u << 16;

class NumeralReader {
  public:
    explicit NumeralReader(std::span<const uint8_t> bytes) {
        constexpr size_t start = 4 + 4 * kNumStates;
        if (bytes.size() < start) throw std::invalid_argument("fewer bytes than a stream has at least");
        const uint64_t num_words = word32(bytes.data());
        if (num_words > (bytes.size() - start) / 2) throw std::invalid_argument("more words than bytes");
        for (int i = 0; i < kNumStates; ++i) states_[i] = word32(bytes.data() + 4 + 4 * i);
        next_ = bytes.data() + start;
        end_ = next_ + 2 * num_words;
        rest_ = bytes.subspan(start + 2 * num_words);
    }
    // What follows the stream.
    std::span<const uint8_t> rest() const { return rest_; }

    int take(const Table& table) {
        uint32_t& state = states_[turn_];
        turn_ = (turn_ + 1) % kNumStates;
        const uint32_t slot = state & (kTotal - 1);
        const int symbol = table.symbol_of(static_cast<uint16_t>(slot));
        const uint32_t first = table.first[symbol];
        uint32_t x = (table.end(symbol) - first) * (state >> kProbabilityBits) + slot - first;
        if (x < kLowestState) {
            if (next_ == end_) throw std::invalid_argument("fewer words than its cells take");
            x = x << 16 | next_[0] | uint32_t{next_[1]} << 8;
            next_ += 2;
        }
        state = x;
        return symbol;
    }
    void finish() const {
        for (const uint32_t state : states_) {
            if (state != kLowestState) throw std::invalid_argument("states that do not end where they began");
        }
        if (next_ != end_) throw std::invalid_argument("more words than its cells take");
    }

  private:
    static uint32_t word32(const uint8_t* p) {
        return p[0] | uint32_t{p[1]} << 8 | uint32_t{p[2]} << 16 | uint32_t{p[3]} << 24;
    }

    uint32_t states_[kNumStates];
    unsigned turn_ = 0;
    const uint8_t* next_;
    const uint8_t* end_;
    std::span<const uint8_t> rest_;
};

// Slots of a symbol.
struct Slots {
    uint16_t first;
    uint16_t count;
};

// Writes the stream of `symbols`, and room behind it for what follows.
inline std::vector<uint8_t> write_numerals(std::span<const Slots> symbols) {
    uint32_t states[kNumStates];
    for (uint32_t& state : states) state = kLowestState;
    // Read forwards, so written backwards.
    std::vector<uint16_t> words;
    words.reserve(symbols.size() / 4);
    for (size_t i = symbols.size(); i-- > 0;) {
        uint32_t& state = states[i % kNumStates];
        const auto [first, count] = symbols[i];
        if (state >> (32 - kProbabilityBits) >= count) {
            words.push_back(static_cast<uint16_t>(state));
            state >>= 16;
        }
        state = (state / count << kProbabilityBits) + state % count + first;
    }
    std::vector<uint8_t> bytes;
    bytes.reserve(4 + 4 * kNumStates + 2 * words.size());
    const auto put = [&](uint32_t value, int count) {
        for (int i = 0; i < count; ++i) bytes.push_back(static_cast<uint8_t>(value >> 8 * i));
    };
    put(static_cast<uint32_t>(words.size()), 4);
    for (const uint32_t state : states) put(state, 4);
    for (size_t i = words.size(); i-- > 0;) put(words[i], 2);
    return bytes;
}

}  // namespace minicpm::history
