// The products on tiles, run on tiles in software: so they are tested where the processor has none. Where it has them,
// every other test of products and decoders runs the kernel itself.
#include <immintrin.h>

#include <algorithm>

#include "random_rows.h"

namespace minicpm::tests {

namespace {

#include "kernels/avx512.h"
// After the vector class, which they use.
#include "kernels/body.h"
// After the body, which it uses.
#include "kernels/amx.h"

// What the processor does with tiles, and what it refuses (Intel's manual, volume 2: LDTILECFG, TILELOADD, TDPBSSD).
struct SoftTiles {
    struct Tile {
        int rows, row_bytes;
        int8_t bytes[16][64];
    };
    inline static Tile tiles[8];
    inline static bool is_configured = false;

    static void configure(const TileShapes& shapes) {
        CHECK(shapes.palette == 1 && shapes.start_row == 0, "");
        for (const uint8_t byte : shapes.reserved) CHECK(byte == 0, "");
        for (int i = 0; i < 16; ++i) {
            CHECK(i < 8 || (shapes.rows[i] == 0 && shapes.row_bytes[i] == 0), "");
            CHECK(shapes.rows[i] <= 16 && shapes.row_bytes[i] <= 64, "");
            CHECK((shapes.rows[i] == 0) == (shapes.row_bytes[i] == 0), "");
            if (i < 8) tiles[i] = {shapes.rows[i], shapes.row_bytes[i], {}};
        }
        is_configured = true;
    }
    static void release() { is_configured = false; }
    static Tile& tile(int i) {
        CHECK(is_configured && tiles[i].rows > 0, "tile " + std::to_string(i));
        return tiles[i];
    }
    template <int kTile>
    static void zero() {
        std::memset(tile(kTile).bytes, 0, sizeof(Tile::bytes));
    }
    template <int kTile>
    static void load(const void* from, size_t stride) {
        zero<kTile>();
        Tile& to = tile(kTile);
        for (int i = 0; i < to.rows; ++i)
            std::memcpy(to.bytes[i], static_cast<const uint8_t*>(from) + i * stride, to.row_bytes);
    }
    template <int kTile>
    static void store(void* to, size_t stride) {
        const Tile& from = tile(kTile);
        for (int i = 0; i < from.rows; ++i)
            std::memcpy(static_cast<uint8_t*>(to) + i * stride, from.bytes[i], from.row_bytes);
    }
    template <int kSums, int kInputs, int kCodes>
    static void add_products() {
        static_assert(kSums != kInputs && kSums != kCodes && kInputs != kCodes);
        Tile &sums = tile(kSums), &inputs = tile(kInputs), &codes = tile(kCodes);
        CHECK(inputs.rows == sums.rows && codes.row_bytes == sums.row_bytes, "");
        CHECK(inputs.row_bytes == 4 * codes.rows && sums.row_bytes % 4 == 0, "");
        for (int m = 0; m < sums.rows; ++m) {
            for (int n = 0; n < sums.row_bytes / 4; ++n) {
                uint32_t sum;
                std::memcpy(&sum, sums.bytes[m] + 4 * n, 4);
                for (int k = 0; k < inputs.row_bytes; ++k)
                    sum += static_cast<uint32_t>(inputs.bytes[m][k] * codes.bytes[k / 4][4 * n + k % 4]);
                std::memcpy(sums.bytes[m] + 4 * n, &sum, 4);
            }
        }
    }
};

using Multiply = decltype(Kernels::multiply);

Exact<float> multiply(Multiply multiply, const Matrix& w, const Prepared& x, int tile_begin, int tile_end) {
    const size_t stride = size_t(w.rows) + 3;
    Exact<float> y((x.rows - 1) * stride + w.rows);
    std::fill_n(y.data(), y.size(), 0.25f);
    multiply(w, tile_begin, tile_end, x, {y.data(), stride, 0.5f, true});
    return y;
}

void check_type(const Kernels& vectors, const char* name, int rows, int inputs, std::initializer_list<int> counts,
                Random& random) {
    const BlockType& type = *find_block_type(name);
    const Packed w = packed(type, random_rows(type, rows, inputs, random), rows, inputs);
    const Form form = vectors.form(type.packing);
    const size_t stride = prepared_bytes(form, inputs);
    for (const int count : counts) {
        Exact<float> x(inputs);
        Exact<uint8_t> prepared(count * stride);
        for (int row = 0; row < count; ++row) {
            random.fill(x, -3.0f, 3.0f);
            vectors.prepare(form, x.data(), inputs, prepared.data() + row * stride);
        }
        const int tiles = w.matrix.num_tiles();
        const Prepared all{prepared.data(), stride, count};
        for (const int begin : {0, tiles - 1}) {
            const Exact<float> expected = multiply(vectors.multiply, w.matrix, all, begin, tiles);
            const Exact<float> found = multiply(TileProducts<SoftTiles>::multiply, w.matrix, all, begin, tiles);
            CHECK(same_bits(found.data(), expected.data(), expected.size()),
                  std::string(name) + " " + std::to_string(count) + " rows");
        }
        CHECK(!SoftTiles::is_configured, name);
    }
}

}  // namespace

TEST(products_on_tiles_have_the_bits_of_vectors) {
    const Kernels* vectors = kernel_by_name("avx512vnni");
    if (!vectors) return;
    Random random(11);
    for (const char* name : kTypeNames) check_type(*vectors, name, 45, 256, {1, 15, 16, 17, 35}, random);
    // Rows so long that fewer than these are taken at a time.
    check_type(*vectors, "Q4_0", 17, 6144, {48}, random);
}

}  // namespace minicpm::tests
