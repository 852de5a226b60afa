#include "packing.h"

#include <cstring>

namespace minicpm {

namespace {

constexpr uint32_t kNibbles = 0x0F0F0F0F;

uint32_t word(const uint8_t* p) {
    uint32_t w;
    std::memcpy(&w, p, 4);
    return w;
}

void put(uint8_t* p, uint32_t w) { std::memcpy(p, &w, 4); }

float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t{half & 0x8000u} << 16;
    uint32_t bits = uint32_t{half & 0x7FFFu} << 13;
    if (bits >= 0x0F800000) {
        bits |= 0x7F800000;
        bits |= sign;
        float special;
        std::memcpy(&special, &bits, 4);
        return special;
    }
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude *= 0x1p112f;
    return sign ? -magnitude : magnitude;
}

// The codes of input group `group` (32 inputs) of one tile.
uint8_t* codes_of(const Matrix& m, uint8_t* tile, int group) {
    const size_t group_bytes = size_t{kGroupInputs} * kTileRows / (is_four_bit(m.packing) ? 2 : 1);
    return tile + group / 2 * block_bytes(m.packing) + block_header_bytes(m.packing) + group % 2 * group_bytes;
}

uint8_t* header_of(const Matrix& m, uint8_t* tile, int group) { return tile + group / 2 * block_bytes(m.packing); }

// Copies the fp16 at `value` to where halves number `slot` (of 16 rows each) stand.
void put_half(uint8_t* header, int slot, int lane, const uint8_t* value) {
    std::memcpy(header + (slot * kTileRows + lane) * 2, value, 2);
}

// Packs 32 codes of 4 bits; word i holds inputs 4i … 4i + 3, a byte each.
void put_nibbles(uint8_t* codes, int lane, const uint32_t (&words)[8]) {
    for (int i = 0; i < 4; ++i) put(codes + 64 * i + 4 * lane, words[2 * i] | words[2 * i + 1] << 4);
}

void put_bytes(uint8_t* codes, int lane, const int8_t (&bytes)[32]) {
    for (int i = 0; i < 8; ++i) std::memcpy(codes + 64 * i + 4 * lane, bytes + 4 * i, 4);
}

template <class Value>
void pack_floats(const uint8_t* row, const Matrix& m, int lane, uint8_t* tile) {
    for (int k = 0; k < m.inputs; ++k) {
        std::memcpy(tile + (size_t(k) * kTileRows + lane) * sizeof(Value), row + k * sizeof(Value), sizeof(Value));
    }
}

// Low nibbles are inputs 0..15, high ones 16..31.
void pack_split_nibbles(const uint8_t* q, uint8_t* codes, int lane) {
    uint32_t words[8];
    for (int i = 0; i < 4; ++i) {
        words[i] = word(q + 4 * i) & kNibbles;
        words[4 + i] = word(q + 4 * i) >> 4 & kNibbles;
    }
    put_nibbles(codes, lane, words);
}

void pack_q4_0(const uint8_t* row, const Matrix& m, int lane, uint8_t* tile) {
    for (int g = 0; g < m.inputs / 32; ++g, row += 18) {
        put_half(header_of(m, tile, g), g % 2, lane, row);
        pack_split_nibbles(row + 2, codes_of(m, tile, g), lane);
    }
}

void pack_q4_1(const uint8_t* row, const Matrix& m, int lane, uint8_t* tile) {
    for (int g = 0; g < m.inputs / 32; ++g, row += 20) {
        put_half(header_of(m, tile, g), g % 2, lane, row);
        put_half(header_of(m, tile, g), 2 + g % 2, lane, row + 2);
        pack_split_nibbles(row + 4, codes_of(m, tile, g), lane);
    }
}

void pack_q8_0(const uint8_t* row, const Matrix& m, int lane, uint8_t* tile) {
    for (int g = 0; g < m.inputs / 32; ++g, row += 34) {
        put_half(header_of(m, tile, g), g % 2, lane, row);
        uint8_t* codes = codes_of(m, tile, g);
        for (int i = 0; i < 8; ++i) std::memcpy(codes + 64 * i + 4 * lane, row + 2 + 4 * i, 4);
    }
}

// Five-bit codes: nibbles as in four-bit types, the fifth bits of inputs 0..31 in one word.
void five_bits(const uint8_t* q, uint32_t fifth, int zero, int8_t (&bytes)[32]) {
    for (int i = 0; i < 16; ++i) {
        bytes[i] = static_cast<int8_t>((q[i] & 15) + static_cast<int>(fifth >> i & 1) * 16 - zero);
        bytes[16 + i] = static_cast<int8_t>((q[i] >> 4) + static_cast<int>(fifth >> (16 + i) & 1) * 16 - zero);
    }
}

void pack_q5_0(const uint8_t* row, const Matrix& m, int lane, uint8_t* tile) {
    for (int g = 0; g < m.inputs / 32; ++g, row += 22) {
        put_half(header_of(m, tile, g), g % 2, lane, row);
        int8_t bytes[32];
        five_bits(row + 6, word(row + 2), 16, bytes);
        put_bytes(codes_of(m, tile, g), lane, bytes);
    }
}

void pack_q5_1(const uint8_t* row, const Matrix& m, int lane, uint8_t* tile) {
    for (int g = 0; g < m.inputs / 32; ++g, row += 24) {
        put_half(header_of(m, tile, g), g % 2, lane, row);
        put_half(header_of(m, tile, g), 2 + g % 2, lane, row + 2);
        int8_t bytes[32];
        five_bits(row + 8, word(row + 4), 0, bytes);
        put_bytes(codes_of(m, tile, g), lane, bytes);
    }
}

// The 6-bit scale and minimum of group `g` of 8, from the 12 bytes that hold both.
void super_scales(const uint8_t* s, int g, uint8_t& scale, uint8_t& minimum) {
    if (g < 4) {
        scale = s[g] & 63;
        minimum = s[g + 4] & 63;
    } else {
        scale = static_cast<uint8_t>((s[g + 4] & 15) | (s[g - 4] >> 6 << 4));
        minimum = static_cast<uint8_t>((s[g + 4] >> 4) | (s[g] >> 6 << 4));
    }
}

void put_super_header(const Matrix& m, uint8_t* tile, int group, int lane, const uint8_t* block) {
    uint8_t* header = header_of(m, tile, group);
    put_half(header, 0, lane, block);
    put_half(header, 1, lane, block + 2);
    super_scales(block + 4, group % 8, header[64 + group % 2 * 16 + lane], header[96 + group % 2 * 16 + lane]);
}

// Pairs of groups share 32 bytes: the first has the low nibbles, the second the high ones.
void pack_q4_k(const uint8_t* row, const Matrix& m, int lane, uint8_t* tile) {
    for (int g = 0; g < m.inputs / 32; ++g) {
        const uint8_t* block = row + g / 8 * 144;
        put_super_header(m, tile, g, lane, block);
        const uint8_t* q = block + 16 + g % 8 / 2 * 32;
        uint32_t words[8];
        for (int i = 0; i < 8; ++i) words[i] = word(q + 4 * i) >> (g % 2 * 4) & kNibbles;
        put_nibbles(codes_of(m, tile, g), lane, words);
    }
}

void pack_q5_k(const uint8_t* row, const Matrix& m, int lane, uint8_t* tile) {
    for (int g = 0; g < m.inputs / 32; ++g) {
        const uint8_t* block = row + g / 8 * 176;
        put_super_header(m, tile, g, lane, block);
        const uint8_t* fifth = block + 16;
        const uint8_t* q = block + 48 + g % 8 / 2 * 32;
        int8_t bytes[32];
        for (int i = 0; i < 32; ++i) {
            bytes[i] = static_cast<int8_t>((q[i] >> (g % 2 * 4) & 15) | (fifth[i] >> (g % 8) & 1) << 4);
        }
        put_bytes(codes_of(m, tile, g), lane, bytes);
    }
}

// Halves of 128 inputs: 64 bytes of low nibbles and high nibbles, 32 bytes of upper pairs of bits, 8 scales.
void pack_q6_k(const uint8_t* row, const Matrix& m, int lane, uint8_t* tile) {
    for (int g = 0; g < m.inputs / 32; ++g) {
        const uint8_t* block = row + g / 8 * 210;
        const int half = g % 8 / 4, quarter = g % 4;
        const uint8_t* low = block + half * 64 + quarter % 2 * 32;
        const uint8_t* high = block + 128 + half * 32;
        int8_t bytes[32];
        for (int i = 0; i < 32; ++i) {
            const int code = (low[i] >> (quarter / 2 * 4) & 15) | (high[i] >> (2 * quarter) & 3) << 4;
            bytes[i] = static_cast<int8_t>(code - 32);
        }
        put_bytes(codes_of(m, tile, g), lane, bytes);
        uint8_t* header = header_of(m, tile, g);
        put_half(header, 0, lane, block + 208);
        for (int i = 0; i < 2; ++i) header[64 + (g % 2 * 2 + i) * 16 + lane] = block[192 + g % 8 * 2 + i];
    }
}

constexpr BlockType kBlockTypes[] = {
    {"F32", Packing::kF32, 1, 4, pack_floats<uint32_t>},   {"F16", Packing::kF16, 1, 2, pack_floats<uint16_t>},
    {"BF16", Packing::kBF16, 1, 2, pack_floats<uint16_t>}, {"Q4_0", Packing::kU4Scale, 32, 18, pack_q4_0},
    {"Q4_1", Packing::kU4ScaleMin, 32, 20, pack_q4_1},     {"Q5_0", Packing::kS8Scale, 32, 22, pack_q5_0},
    {"Q5_1", Packing::kS8ScaleMin, 32, 24, pack_q5_1},     {"Q8_0", Packing::kS8Scale, 32, 34, pack_q8_0},
    {"Q4_K", Packing::kU4Super, 256, 144, pack_q4_k},      {"Q5_K", Packing::kS8Super, 256, 176, pack_q5_k},
    {"Q6_K", Packing::kS8Super16, 256, 210, pack_q6_k},
};

float half_at(const uint8_t* header, int slot, int lane) {
    uint16_t bits;
    std::memcpy(&bits, header + (slot * kTileRows + lane) * 2, 2);
    return half_to_float(bits);
}

float float_weight(const Matrix& m, const uint8_t* tile, int k, int lane) {
    const size_t index = size_t(k) * kTileRows + lane;
    if (m.packing == Packing::kF32) {
        float value;
        std::memcpy(&value, tile + index * 4, 4);
        return value;
    }
    uint16_t bits;
    std::memcpy(&bits, tile + index * 2, 2);
    if (m.packing == Packing::kF16) return half_to_float(bits);
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// Factor and minimum of 16 inputs from `k` on, a multiple of 16.
void scale_of(const Matrix& m, const uint8_t* header, int k, int lane, float& factor, float& minimum) {
    const int g = k / 32 % 2;
    minimum = 0.0f;
    switch (m.packing) {
        case Packing::kU4Scale:
            factor = half_at(header, g, lane);
            minimum = -8.0f * factor;
            break;
        case Packing::kS8Scale:
            factor = half_at(header, g, lane);
            break;
        case Packing::kU4ScaleMin:
        case Packing::kS8ScaleMin:
            factor = half_at(header, g, lane);
            minimum = half_at(header, 2 + g, lane);
            break;
        case Packing::kS8Super16:
            factor = half_at(header, 0, lane) * static_cast<int8_t>(header[64 + k / 16 % 4 * 16 + lane]);
            break;
        default:
            factor = half_at(header, 0, lane) * header[64 + g * 16 + lane];
            minimum = -half_at(header, 1, lane) * header[96 + g * 16 + lane];
    }
}

}  // namespace

const BlockType* find_block_type(std::string_view name) {
    for (const BlockType& type : kBlockTypes) {
        if (type.name == name) return &type;
    }
    return nullptr;
}

void pack_tile(const BlockType& type, const uint8_t* rows, size_t stride, const Matrix& matrix, int tile) {
    uint8_t* out = matrix.data + tile * matrix.tile_bytes();
    for (int lane = 0; lane < kTileRows && tile * kTileRows + lane < matrix.rows; ++lane) {
        type.pack_row(rows + size_t(tile * kTileRows + lane) * stride, matrix, lane, out);
    }
}

void unpack_row(const Matrix& m, int row, float* out) {
    uint8_t* tile = m.data + row / kTileRows * m.tile_bytes();
    const int lane = row % kTileRows;
    if (is_float(m.packing)) {
        for (int k = 0; k < m.inputs; ++k) out[k] = float_weight(m, tile, k, lane);
        return;
    }
    float factor = 0.0f, minimum = 0.0f;
    for (int k = 0; k < m.inputs; ++k) {
        if (k % 16 == 0) scale_of(m, header_of(m, tile, k / 32), k, lane, factor, minimum);
        const uint8_t* codes = codes_of(m, tile, k / 32) + 4 * lane + k % 4;
        const float code = is_four_bit(m.packing) ? static_cast<float>(codes[k % 32 / 8 * 64] >> (k % 8 / 4 * 4) & 15)
                                                  : static_cast<float>(static_cast<int8_t>(codes[k % 32 / 4 * 64]));
        out[k] = code * factor + minimum;
    }
}

}  // namespace minicpm
