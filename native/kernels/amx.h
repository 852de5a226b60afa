// Products on matrix tiles of bytes: 16 activation rows with the 16 rows of a weight tile at once. amx.cpp includes
// this with the processor's tiles, a test with tiles in software.
//
// A group's codes are already what a tile of weights looks like: row i holds inputs 4i .. 4i + 3 of 16 outputs. The
// high and the low bytes of the activations are a tile each, and so are their integer sums, which leave the tiles after
// every group to be scaled in vectors. Integers and the order of all other additions are those of the vector kernel: so
// are the results, to the last bit, and rows that do not fill a tile go there.

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

// `Tiles` has configure, release and, for tiles by number, zero, load, store and add_products.
template <class Tiles>
struct TileProducts {
    using V = Avx512;
    using B = Body<V>;
    static constexpr int kHighSums = 0, kLowSums = 1, kHigh = 2, kLow = 3, kCodes = 4;
    static constexpr int kRows = 16;

    // Inputs that share a scale: those of one tile product.
    template <Packing P>
    static constexpr int kInputs = P == Packing::kS8Super16 ? 16 : 32;

    template <Packing P>
    static TileShapes shapes() {
        TileShapes out;
        for (int i = 0; i <= kCodes; ++i) {
            const bool is_input = i == kHigh || i == kLow;
            out.rows[i] = static_cast<uint8_t>(i == kCodes ? kInputs<P> / 4 : kRows);
            out.row_bytes[i] = static_cast<uint16_t>(is_input ? kInputs<P> : 4 * kTileRows);
        }
        return out;
    }

    // One group, or the half of one that `begin` (0, 4) tells, of 16 rows: `codes` are kInputs / 4 lines of 64 bytes.
    template <Packing P>
    MINICPM_INLINE static void add_group(const uint8_t* codes, const uint8_t* x, size_t stride, const uint8_t* meta,
                                         int begin, V::F factor, V::F* sums) {
        alignas(64) int32_t high[kRows][kTileRows], low[kRows][kTileRows];
        Tiles::template zero<kHighSums>();
        Tiles::template zero<kLowSums>();
        Tiles::template load<kCodes>(codes, 64);
        Tiles::template load<kHigh>(x + 4 * begin, stride);
        Tiles::template load<kLow>(x + 32 + 4 * begin, stride);
        Tiles::template add_products<kHighSums, kHigh, kCodes>();
        Tiles::template add_products<kLowSums, kLow, kCodes>();
        Tiles::template store<kHighSums>(high, 64);
        Tiles::template store<kLowSums>(low, 64);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
            const auto& of_row = *reinterpret_cast<const GroupMeta*>(meta + m * stride);
            V::I sum = V::joined(_mm512_load_si512(high[m]), _mm512_load_si512(low[m]));
            // Signed codes have no bias here.
            if constexpr (P == Packing::kU4Scale) sum = _mm512_add_epi32(sum, V::broadcast4(&of_row.offset4));
            sums[m] = V::fma(V::mul(V::to_float(sum), V::broadcast(&of_row.scale)), factor, sums[m]);
        }
    }

    template <Packing P>
    static void multiply_tile(const uint8_t* tile, int num_blocks, const uint8_t* x, size_t stride, V::F* sums) {
        constexpr size_t kCodeBytes = size_t{kGroupInputs} * kTileRows / (is_four_bit(P) ? 2 : 1);
        const uint8_t* metas = x + size_t(num_blocks) * 2 * 64;
        for (int group = 0; group < 2 * num_blocks; ++group) {
            const uint8_t* block = tile + group / 2 * block_bytes(P);
            const uint8_t* codes = block + block_header_bytes(P) + group % 2 * kCodeBytes;
            const uint8_t *row = x + group * 64, *meta = metas + group * sizeof(GroupMeta);
            for (size_t line = 0; line < block_bytes(P) / 2; line += 64) {
                __builtin_prefetch(codes + B::kAhead + line, 0, 3);
            }
            alignas(64) uint8_t bytes[8][64];
            if constexpr (is_four_bit(P)) {
                for (int i = 0; i < 8; ++i) _mm512_store_si512(bytes[i], V::codes4(codes, i));
                codes = bytes[0];
            }
            const auto scale = B::template scales<P>(block, group % 2, 0, 0);
            add_group<P>(codes, row, stride, meta, 0, scale.factor, sums);
            if constexpr (P == Packing::kS8Super16) {
                const V::F factor = B::template scales<P>(block, group % 2, 1, 0).factor;
                add_group<P>(codes + 4 * 64, row, stride, meta, 4, factor, sums);
            }
            if constexpr (B::has_min(P)) {
#pragma GCC unroll 16
                for (int m = 0; m < kRows; ++m) {
                    const auto& of_row = *reinterpret_cast<const GroupMeta*>(meta + m * stride);
                    sums[m] = V::fma(V::broadcast(&of_row.sum), scale.min, sums[m]);
                }
            }
        }
    }

    template <Packing P>
    static void multiply_packed(const Matrix& w, int tile_begin, int tile_end, const Prepared& x, const Output& y) {
        const TileShapes wanted = shapes<P>();
        Tiles::configure(wanted);
        // Rows are taken in portions that stay in the second-level cache while the tiles pass by.
        const int whole = x.rows / kRows * kRows, fitting = static_cast<int>(B::kPortionBytes / (x.stride * kRows));
        const int portion = (fitting > 1 ? fitting : 1) * kRows;
        for (int begin = 0; begin < whole; begin += portion) {
            const int end = begin + portion < whole ? begin + portion : whole;
            for (int tile = tile_begin; tile < tile_end; ++tile) {
                for (int first = begin; first < end; first += kRows) {
                    V::F sums[kRows];
                    for (int m = 0; m < kRows; ++m) sums[m] = V::zero();
                    multiply_tile<P>(w.tile(tile), w.num_blocks(), x.data + first * x.stride, x.stride, sums);
                    const int output = tile * kTileRows;
                    for (int m = 0; m < kRows; ++m) B::write(y, first + m, output, w.rows - output, sums[m]);
                }
            }
        }
        Tiles::release();
        if (whole == x.rows) return;
        const Prepared rest{x.data + whole * x.stride, x.stride, x.rows - whole};
        const Output below{y.data + whole * y.stride, y.stride, y.scale, y.accumulate};
        B::template multiply_packed<P>(w, tile_begin, tile_end, rest, below);
    }

    static void multiply(const Matrix& w, int tile_begin, int tile_end, const Prepared& x, const Output& y) {
        if (x.rows < kRows) return B::multiply(w, tile_begin, tile_end, x, y);
        switch (w.packing) {
            case Packing::kU4Scale:
                return multiply_packed<Packing::kU4Scale>(w, tile_begin, tile_end, x, y);
            case Packing::kU4ScaleMin:
                return multiply_packed<Packing::kU4ScaleMin>(w, tile_begin, tile_end, x, y);
            case Packing::kU4Super:
                return multiply_packed<Packing::kU4Super>(w, tile_begin, tile_end, x, y);
            case Packing::kS8Scale:
                return multiply_packed<Packing::kS8Scale>(w, tile_begin, tile_end, x, y);
            case Packing::kS8ScaleMin:
                return multiply_packed<Packing::kS8ScaleMin>(w, tile_begin, tile_end, x, y);
            case Packing::kS8Super:
                return multiply_packed<Packing::kS8Super>(w, tile_begin, tile_end, x, y);
            case Packing::kS8Super16:
                return multiply_packed<Packing::kS8Super16>(w, tile_begin, tile_end, x, y);
            default:
                return B::multiply(w, tile_begin, tile_end, x, y);
        }
    }
};
