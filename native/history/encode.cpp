#include <algorithm>

#include "bits.h"
#include "numerals.h"
#include "tables.h"

namespace minicpm::history {

namespace {

template <class Bits>
class Encoder {
  public:
    Encoder(const Knots& within, int64_t num_cells) : tables_(within) {
        symbols_.reserve(static_cast<size_t>(num_cells));
    }

    void row(const Row& row, std::span<const int8_t> columns, const Bits* cells, const Bits* before, Bits* base) {
        const int exponent = int{row.exponent} - 128;
        const Scale* const scales = tables_.scales(row.scale);
        for (size_t i = 0; i < columns.size(); ++i) {
            const auto [tables, coarse] = scales[columns[i]];
            const int32_t units = (before ? predict(before[i], row.beta, exponent) : 0) >> coarse;
            const Table& table = tables[units & (kNumFractions - 1)];
            const int32_t bin = bin_of(cells[i], exponent);
            const int32_t distance = bin == kNoBin ? kReach + 1 : (bin >> coarse) - (units >> kFractionBits);
            if (std::abs(distance) > kReach || !put(table, distance + kReach)) {
                put(table, kEscape);
                whole_.put(cells[i], Cell<Bits>::kWidth);
                base[i] = cells[i];
                continue;
            }
            if (coarse > 0) whole_.put(uint32_t(bin) & ((1u << coarse) - 1), coarse);
            refine(cells[i], bin, exponent);
            base[i] = middle_cell<Bits>(bin, exponent);
        }
    }
    Layers finish() {
        Layers layers{write_numerals(symbols_), std::move(open_.finish())};
        const std::vector<uint8_t>& whole = whole_.finish();
        layers.base.insert(layers.base.end(), whole.begin(), whole.end());
        return layers;
    }

  private:
    bool put(const Table& table, int symbol) {
        const uint32_t first = table.first[symbol], count = table.end(symbol) - first;
        if (count == 0) return false;
        symbols_.push_back({static_cast<uint16_t>(first), static_cast<uint16_t>(count)});
        return true;
    }

    void refine(Bits cell, int32_t bin, int exponent) {
        constexpr int mantissa = Cell<Bits>::kMantissaBits;
        if (const int32_t magnitude = magnitude_of(bin)) {
            const int open = open_bits<Bits>(magnitude);
            if (open > 0) open_.put(cell & ((Bits{1} << open) - 1), open);
            return;
        }
        const int drops = exponent - 1 + 127 - biased_exponent(cell);
        if (drops < kNumDrops) {
            open_.put(uint64_t{1} << drops, drops + 1);
            open_.put(cell & kMantissaMask<Bits>, mantissa);
        } else {
            open_.put(0, kNumDrops);
            open_.put(cell & ((Bits{1} << (mantissa + 8)) - 1), mantissa + 8);
        }
    }

    Tables tables_;
    std::vector<Slots> symbols_;
    BitWriter whole_, open_;
};

}  // namespace

template <class Bits>
Layers encode(const Matrix<Bits>& matrix, std::span<const Row> rows, std::span<const int8_t> columns,
              const Knots& within, Bits* base) {
    Encoder<Bits> encoder(within, matrix.num_cells);
    for (int64_t r = 0; r < matrix.num_rows(); ++r) {
        const int64_t at = r * matrix.num_columns, count = std::min(matrix.num_columns, matrix.num_cells - at);
        encoder.row(rows[r], columns.first(count), matrix.cells + at, matrix.before ? matrix.before + at : nullptr,
                    base + at);
    }
    return encoder.finish();
}

template Layers encode(const Matrix<uint16_t>&, std::span<const Row>, std::span<const int8_t>, const Knots&, uint16_t*);
template Layers encode(const Matrix<uint32_t>&, std::span<const Row>, std::span<const int8_t>, const Knots&, uint32_t*);

}  // namespace minicpm::history
