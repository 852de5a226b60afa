#include "packing.h"

#include <algorithm>
#include <cstring>

namespace minicpm {

namespace {

constexpr uint32_t kNibbles = 0x0F0F0F0F;

uint32_t word(const uint8_t* p) {
    uint32_t w;
    std::memcpy(&w, p, 4);
    return w;
}

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

// Four words that are worked on together; compilers have registers for them on every machine.
using Words = uint32_t __attribute__((vector_size(16)));

Words load(const uint8_t* p) {
    Words w;
    std::memcpy(&w, p, 16);
    return w;
}

template <int A, int B, int C, int D>
Words pick(Words x, Words y) {
    return __builtin_shufflevector(x, y, A, B, C, D);
}

// What one group of a row becomes: where its halves and bytes stand in the block's header, and its codes in words of
// four inputs (W = 4: two nibbles to a byte, words 2i and 2i + 1 of a row in the low and high ones of word i; W = 8).
struct Lane {
    uint8_t* header;
    int row;

    // Puts the fp16 at `value` where halves number `slot` (of 16 rows each) stand.
    void put_half(int slot, const uint8_t* value) const {
        std::memcpy(header + (slot * kTileRows + row) * 2, value, 2);
    }
    void put_byte(int offset, uint8_t value) const { header[offset + row] = value; }
};

// Packs 32 codes of 4 bits, one in each byte.
void put_nibbles(uint32_t* words, Words first, Words second) {
    const Words packed = pick<0, 2, 4, 6>(first, second) | pick<1, 3, 5, 7>(first, second) << 4;
    std::memcpy(words, &packed, 16);
}

// Low nibbles are inputs 0..15, high ones 16..31.
void split_nibbles(const uint8_t* q, uint32_t* words) {
    const Words both = load(q);
    put_nibbles(words, both & kNibbles, both >> 4 & kNibbles);
}

void pack_q4_0(const uint8_t* row, int g, const Lane& lane, uint32_t* words) {
    row += size_t(g) * 18;
    lane.put_half(g % 2, row);
    split_nibbles(row + 2, words);
}

void pack_q4_1(const uint8_t* row, int g, const Lane& lane, uint32_t* words) {
    row += size_t(g) * 20;
    lane.put_half(g % 2, row);
    lane.put_half(2 + g % 2, row + 2);
    split_nibbles(row + 4, words);
}

void pack_q8_0(const uint8_t* row, int g, const Lane& lane, uint32_t* words) {
    row += size_t(g) * 34;
    lane.put_half(g % 2, row);
    std::memcpy(words, row + 2, 32);
}

// Five-bit codes: nibbles as in four-bit types, the fifth bits of inputs 0..31 in one word.
void five_bits(const uint8_t* q, uint32_t fifth, int zero, uint32_t* words) {
    int8_t bytes[32];
    for (int i = 0; i < 16; ++i) {
        bytes[i] = static_cast<int8_t>((q[i] & 15) + static_cast<int>(fifth >> i & 1) * 16 - zero);
        bytes[16 + i] = static_cast<int8_t>((q[i] >> 4) + static_cast<int>(fifth >> (16 + i) & 1) * 16 - zero);
    }
    std::memcpy(words, bytes, 32);
}

void pack_q5_0(const uint8_t* row, int g, const Lane& lane, uint32_t* words) {
    row += size_t(g) * 22;
    lane.put_half(g % 2, row);
    five_bits(row + 6, word(row + 2), 16, words);
}

void pack_q5_1(const uint8_t* row, int g, const Lane& lane, uint32_t* words) {
    row += size_t(g) * 24;
    lane.put_half(g % 2, row);
    lane.put_half(2 + g % 2, row + 2);
    five_bits(row + 8, word(row + 4), 0, words);
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

void put_super_header(const Lane& lane, int g, const uint8_t* block) {
    lane.put_half(0, block);
    lane.put_half(1, block + 2);
    uint8_t scale, minimum;
    super_scales(block + 4, g % 8, scale, minimum);
    lane.put_byte(64 + g % 2 * kTileRows, scale);
    lane.put_byte(96 + g % 2 * kTileRows, minimum);
}

// Pairs of groups share 32 bytes: the first has the low nibbles, the second the high ones.
void pack_q4_k(const uint8_t* row, int g, const Lane& lane, uint32_t* words) {
    const uint8_t* block = row + size_t(g / 8) * 144;
    put_super_header(lane, g, block);
    const uint8_t* q = block + 16 + g % 8 / 2 * 32;
    const int shift = g % 2 * 4;
    put_nibbles(words, load(q) >> shift & kNibbles, load(q + 16) >> shift & kNibbles);
}

void pack_q5_k(const uint8_t* row, int g, const Lane& lane, uint32_t* words) {
    const uint8_t* block = row + size_t(g / 8) * 176;
    put_super_header(lane, g, block);
    const uint8_t* fifth = block + 16;
    const uint8_t* q = block + 48 + g % 8 / 2 * 32;
    uint8_t bytes[32];
    for (int i = 0; i < 32; ++i) {
        bytes[i] = static_cast<uint8_t>((q[i] >> (g % 2 * 4) & 15) | (fifth[i] >> (g % 8) & 1) << 4);
    }
    std::memcpy(words, bytes, 32);
}

// Halves of 128 inputs: 64 bytes of low nibbles and high nibbles, 32 bytes of upper pairs of bits, 8 scales.
void pack_q6_k(const uint8_t* row, int g, const Lane& lane, uint32_t* words) {
    const uint8_t* block = row + size_t(g / 8) * 210;
    const int half = g % 8 / 4, quarter = g % 4;
    const uint8_t* low = block + half * 64 + quarter % 2 * 32;
    const uint8_t* high = block + 128 + half * 32;
    int8_t bytes[32];
    for (int i = 0; i < 32; ++i) {
        const int code = (low[i] >> (quarter / 2 * 4) & 15) | (high[i] >> (2 * quarter) & 3) << 4;
        bytes[i] = static_cast<int8_t>(code - 32);
    }
    std::memcpy(words, bytes, 32);
    lane.put_half(0, block + 208);
    for (int i = 0; i < 2; ++i) lane.put_byte(64 + (g % 2 * 2 + i) * kTileRows, block[192 + g % 8 * 2 + i]);
}

// Writes W words of each of 16 rows so that words number i of all rows stand side by side.
template <int W>
void transpose(const uint32_t (&words)[kTileRows][W], uint8_t* out) {
    for (int row = 0; row < kTileRows; row += 4) {
        for (int i = 0; i < W; i += 4) {
            Words in[4];
            for (int k = 0; k < 4; ++k) std::memcpy(&in[k], &words[row + k][i], 16);
            const Words low = pick<0, 4, 1, 5>(in[0], in[1]), high = pick<2, 6, 3, 7>(in[0], in[1]);
            const Words low2 = pick<0, 4, 1, 5>(in[2], in[3]), high2 = pick<2, 6, 3, 7>(in[2], in[3]);
            const Words lines[4] = {pick<0, 1, 4, 5>(low, low2), pick<2, 3, 6, 7>(low, low2),
                                    pick<0, 1, 4, 5>(high, high2), pick<2, 3, 6, 7>(high, high2)};
            for (int k = 0; k < 4; ++k) std::memcpy(out + 64 * (i + k) + 4 * row, &lines[k], 16);
        }
    }
}

template <int W, void PackGroup(const uint8_t* row, int group, const Lane& lane, uint32_t* words)>
void pack_groups(const uint8_t* rows, size_t stride, int count, const Matrix& m, uint8_t* tile) {
    alignas(64) uint32_t words[kTileRows][W] = {};
    const size_t share = kTileRows * stride / (m.inputs / kGroupInputs);
    for (int g = 0; g < m.inputs / kGroupInputs; ++g) {
        // Sixteen rows are read side by side, which the processor's own prefetching does not follow: the next tile's
        // bytes, which lie in one piece, come in meanwhile. Beyond the last tile a prefetch does nothing.
        const uint8_t* next = rows + kTileRows * stride + g * share;
        for (size_t i = 0; i < share; i += 64) __builtin_prefetch(next + i);
        uint8_t* header = header_of(m, tile, g);
        for (int row = 0; row < count; ++row) PackGroup(rows + row * stride, g, {header, row}, words[row]);
        transpose<W>(words, codes_of(m, tile, g));
    }
}

template <class Value>
void pack_floats(const uint8_t* rows, size_t stride, int count, const Matrix& m, uint8_t* tile) {
    for (int row = 0; row < count; ++row) {
        for (int k = 0; k < m.inputs; ++k) {
            const uint8_t* value = rows + row * stride + k * sizeof(Value);
            std::memcpy(tile + (size_t(k) * kTileRows + row) * sizeof(Value), value, sizeof(Value));
        }
    }
}

constexpr BlockType kBlockTypes[] = {
    {"F32", Packing::kF32, 1, 4, pack_floats<uint32_t>},
    {"F16", Packing::kF16, 1, 2, pack_floats<uint16_t>},
    {"BF16", Packing::kBF16, 1, 2, pack_floats<uint16_t>},
    {"Q4_0", Packing::kU4Scale, 32, 18, pack_groups<4, pack_q4_0>},
    {"Q4_1", Packing::kU4ScaleMin, 32, 20, pack_groups<4, pack_q4_1>},
    {"Q5_0", Packing::kS8Scale, 32, 22, pack_groups<8, pack_q5_0>},
    {"Q5_1", Packing::kS8ScaleMin, 32, 24, pack_groups<8, pack_q5_1>},
    {"Q8_0", Packing::kS8Scale, 32, 34, pack_groups<8, pack_q8_0>},
    {"Q4_K", Packing::kU4Super, 256, 144, pack_groups<4, pack_q4_k>},
    {"Q5_K", Packing::kS8Super, 256, 176, pack_groups<8, pack_q5_k>},
    {"Q6_K", Packing::kS8Super16, 256, 210, pack_groups<8, pack_q6_k>},
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
    const int first = tile * kTileRows;
    const int count = std::min(kTileRows, matrix.rows - first);
    type.pack_rows(rows + size_t(first) * stride, stride, count, matrix, matrix.data + tile * matrix.tile_bytes());
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
