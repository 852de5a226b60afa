// Streams of bits, lowest first.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

namespace minicpm::history {

inline uint64_t little_endian(uint64_t word) {
    return std::endian::native == std::endian::big ? __builtin_bswap64(word) : word;
}
inline uint64_t load64(const uint8_t* p) {
    uint64_t word;
    std::memcpy(&word, p, sizeof word);
    return little_endian(word);
}
inline void store64(uint8_t* p, uint64_t word) {
    word = little_endian(word);
    std::memcpy(p, &word, sizeof word);
}

class BitWriter {
  public:
    // `count` of at most 56; bits above are zeros.
    void put(uint64_t bits, int count) {
        if (size_ + 8 > bytes_.size()) bytes_.resize(2 * bytes_.size() + 64);
        buffer_ |= bits << held_;
        held_ += count;
        store64(bytes_.data() + size_, buffer_);
        size_ += static_cast<size_t>(held_ >> 3);
        buffer_ >>= held_ & ~7;
        held_ &= 7;
    }
    // Ends with the last byte, which is filled up with zeros.
    std::vector<uint8_t>& finish() {
        bytes_.resize(size_ + (held_ > 0));
        return bytes_;
    }

  private:
    std::vector<uint8_t> bytes_;
    size_t size_ = 0;
    uint64_t buffer_ = 0;
    int held_ = 0;
};

// Beyond the end there are zeros, which `is_finished` tells afterwards.
class BitReader {
  public:
    explicit BitReader(std::span<const uint8_t> bytes) : bytes_(bytes) {}

    // Bits from here on; at least 56 of them are right.
    uint64_t peek() const {
        const size_t byte = position_ >> 3;
        uint64_t word = 0;
        if (byte + 8 <= bytes_.size()) {
            word = load64(bytes_.data() + byte);
        } else {
            for (size_t i = byte; i < bytes_.size(); ++i) word |= uint64_t{bytes_[i]} << 8 * (i - byte);
        }
        return word >> (position_ & 7);
    }
    void skip(int count) { position_ += static_cast<uint64_t>(count); }
    // `count` of at most 56.
    uint64_t take(int count) {
        const uint64_t bits = peek() & ((uint64_t{1} << count) - 1);
        skip(count);
        return bits;
    }
    // Whether reading ended in the last byte.
    bool is_finished() const { return (position_ + 7) >> 3 == bytes_.size(); }

  private:
    std::span<const uint8_t> bytes_;
    uint64_t position_ = 0;
};

}  // namespace minicpm::history
