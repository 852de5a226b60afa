// Streams of bits, lowest first.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

namespace minicpm::history {

class BitWriter {
  public:
    // `count` of at most 32.
    void put(uint64_t bits, int count) {
        buffer_ |= bits << held_;
        held_ += count;
        while (held_ >= 8) {
            bytes_.push_back(static_cast<uint8_t>(buffer_));
            buffer_ >>= 8;
            held_ -= 8;
        }
    }
    // Ends with the last byte, which is filled up with zeros.
    std::vector<uint8_t>& finish() {
        if (held_ > 0) bytes_.push_back(static_cast<uint8_t>(buffer_));
        held_ = 0;
        buffer_ = 0;
        return bytes_;
    }

  private:
    std::vector<uint8_t> bytes_;
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
            std::memcpy(&word, bytes_.data() + byte, 8);
            if constexpr (std::endian::native == std::endian::big) word = __builtin_bswap64(word);
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
