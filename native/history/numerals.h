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
constexpr size_t kLongestRun = 1024;

class NumeralReader {
  public:
    explicit NumeralReader(std::span<const uint8_t> bytes) {
        constexpr size_t start = 4 + 4 * kNumStates;
        if (bytes.size() < start) throw std::invalid_argument("fewer bytes than a stream has at least");
        const uint64_t num_words = word32(bytes.data());
        if (num_words > (bytes.size() - start) / 2) throw std::invalid_argument("more words than bytes");
        for (int i = 0; i < kNumStates; ++i) states_[i] = word32(bytes.data() + 4 + 4 * i);
        rest_ = bytes.subspan(start + 2 * num_words);
        words_.resize(num_words + kLongestRun);
        for (size_t i = 0; i < num_words; ++i) {
            words_[i] = static_cast<uint16_t>(bytes[start + 2 * i] | bytes[start + 2 * i + 1] << 8);
        }
        num_words_ = num_words;
    }
    // What follows the stream.
    std::span<const uint8_t> rest() const { return rest_; }

    // Reads one symbol from each table, at most kLongestRun: there are so many words beyond the end.
    void read(std::span<const Table* const> tables, uint8_t* symbols) {
        size_t next = next_;
        const uint16_t* const words = words_.data();
        for (size_t i = 0; i < tables.size(); ++i) {
            uint32_t& state = states_[(turn_ + i) % kNumStates];
            const Table& table = *tables[i];
            const uint32_t slot = state & (kTotal - 1);
            const int symbol = table.symbol_of(slot);
            const uint32_t first = table.first[symbol];
            const uint32_t x = (table.end(symbol) - first) * (state >> kProbabilityBits) + slot - first;
            // Arithmetic instead of a branch, which would be guessed wrong as often as a word is read.
            const uint32_t is_low = x < kLowestState;
            state = x << 16 * is_low | (words[next] & (0 - is_low));
            next += is_low;
            symbols[i] = static_cast<uint8_t>(symbol);
        }
        turn_ = (turn_ + tables.size()) % kNumStates;
        next_ = next;
        if (next_ > num_words_) throw std::invalid_argument("fewer words than its cells take");
    }
    void finish() const {
        for (const uint32_t state : states_) {
            if (state != kLowestState) throw std::invalid_argument("states that do not end where they began");
        }
        if (next_ != num_words_) throw std::invalid_argument("more words than its cells take");
    }

  private:
    static uint32_t word32(const uint8_t* p) {
        return p[0] | uint32_t{p[1]} << 8 | uint32_t{p[2]} << 16 | uint32_t{p[3]} << 24;
    }

    uint32_t states_[kNumStates];
    size_t turn_ = 0;
    std::vector<uint16_t> words_;
    size_t next_ = 0, num_words_ = 0;
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
