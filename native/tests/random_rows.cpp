#include "random_rows.h"

#include <algorithm>

namespace minicpm::tests {

namespace {

// A random half of about 2^exponent, from its fields; below 2^-14 a subnormal one.
uint16_t random_half(int exponent, bool is_signed, Random& random) {
    const int sign = is_signed ? random.below(2) << 15 : 0;
    return static_cast<uint16_t>(sign | std::max(0, 15 + exponent) << 10 | random.below(1024));
}

void put_half(uint8_t* at, uint16_t half) { std::memcpy(at, &half, 2); }

void fill_floats(const BlockType& type, uint8_t* row, int inputs, float size, Random& random) {
    const int exponent = std::ilogb(size);
    for (int k = 0; k < inputs; ++k, row += type.bytes) {
        if (type.packing == Packing::kF16) {
            put_half(row, random_half(exponent - random.below(3), true, random));
            continue;
        }
        const float value = random.between(-2 * size, 2 * size);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if (type.packing == Packing::kF32) {
            std::memcpy(row, &bits, 4);
        } else {
            put_half(row, static_cast<uint16_t>(bits >> 16));
        }
    }
}

// Codes are random bytes; the scales are chosen so that weights have the wanted size.
void fill_block(const BlockType& type, uint8_t* block, float size, Random& random) {
    for (int i = 0; i < type.bytes; ++i) block[i] = static_cast<uint8_t>(random.next());
    const int exponent = std::ilogb(size);
    if (type.name == "Q6_K") return put_half(block + 208, random_half(exponent - 10, true, random));
    if (type.name == "Q8_0") return put_half(block, random_half(exponent - 6, true, random));
    if (type.name == "Q4_0") return put_half(block, random_half(exponent - 2, true, random));
    if (type.name == "Q5_0") return put_half(block, random_half(exponent - 3, true, random));
    if (type.name == "Q4_1" || type.name == "Q5_1") {
        put_half(block, random_half(exponent - (type.name == "Q4_1" ? 2 : 3), true, random));
        return put_half(block + 2, random_half(exponent, true, random));
    }
    put_half(block, random_half(exponent - (type.name == "Q4_K" ? 7 : 8), false, random));
    put_half(block + 2, random_half(exponent - 4, false, random));
}

}  // namespace

Exact<uint8_t> random_rows(const BlockType& type, int rows, int inputs, Random& random) {
    const size_t blocks = size_t(inputs) / type.inputs;
    Exact<uint8_t> out(rows * blocks * type.bytes);
    const float size = 1.0f / std::sqrt(static_cast<float>(inputs));
    for (int row = 0; row < rows; ++row) {
        uint8_t* at = out.data() + row * blocks * type.bytes;
        if (is_float(type.packing)) {
            fill_floats(type, at, inputs, size, random);
        } else {
            for (size_t b = 0; b < blocks; ++b) fill_block(type, at + b * type.bytes, size, random);
        }
    }
    return out;
}

Packed packed(const BlockType& type, const Exact<uint8_t>& rows, int num_rows, int inputs) {
    Matrix matrix{type.packing, num_rows, inputs, nullptr};
    Packed out{Exact<uint8_t>(matrix.bytes()), matrix};
    out.matrix.data = out.memory.data();
    const size_t stride = size_t(inputs) / type.inputs * type.bytes;
    for (int tile = 0; tile < matrix.num_tiles(); ++tile) pack_tile(type, rows.data(), stride, out.matrix, tile);
    return out;
}

}  // namespace minicpm::tests
