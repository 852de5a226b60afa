#include <cstring>
#include <stdexcept>

#include "bits.h"
#include "numerals.h"
#include "tables.h"

namespace minicpm::history {

namespace {

// Cells of a row that are read in one go.
constexpr int64_t kSegment = 1024;

// Where in its bin the prediction lies, and the bin; of a whole segment, so that the loops stay simple.
struct Context {
    const Table* tables[kSegment];
    int32_t bins[kSegment];
    uint8_t coarse[kSegment];
};

template <class Bits>
class Decoder {
  public:
    Decoder(std::span<const uint8_t> base_layer, std::span<const uint8_t> refinement, const Knots& within)
        : tables_(within), numerals_(base_layer), whole_(numerals_.rest()), open_(refinement) {}

    void row(const Row& row, std::span<const int8_t> columns, const Bits* before, Bits* base, Bits* exact) {
        exponent_ = int{row.exponent} - 128;
        if (exponent_ < kSmallestExponent) throw std::invalid_argument("a row's step is too small");
        for (size_t i = 0; i < columns.size(); i += kSegment) {
            const auto part = columns.subspan(i, std::min<size_t>(kSegment, columns.size() - i));
            look(row, part, before ? before + i : nullptr);
            bins(part.size(), base + i);
            if (exact) refine(part.size(), base + i, exact + i);
        }
    }
    void finish(bool is_exact) const {
        numerals_.finish();
        if (!whole_.is_finished() || (is_exact && !open_.is_finished())) {
            throw std::invalid_argument("more or fewer bits than its cells take");
        }
    }

  private:
    void look(const Row& row, std::span<const int8_t> columns, const Bits* before) {
        for (size_t i = 0; i < columns.size(); ++i) {
            const int scale = class_of(row.scale, columns[i]), coarse = Tables::coarse(scale);
            const int32_t units = (before ? predict(before[i], row.beta, exponent_) : 0) >> coarse;
            context_.tables[i] = tables_.of(scale) + (units & (kNumFractions - 1));
            context_.bins[i] = units >> kFractionBits;
            context_.coarse[i] = static_cast<uint8_t>(coarse);
        }
    }

    void bins(size_t count, Bits* base) {
        for (size_t i = 0; i < count; ++i) {
            const int symbol = numerals_.take(*context_.tables[i]);
            if (symbol == kEscape) [[unlikely]] {
                context_.bins[i] = kNoBin;
                base[i] = static_cast<Bits>(whole_.take(Cell<Bits>::kWidth));
                continue;
            }
            int32_t bin = context_.bins[i] + symbol - kReach;
            if (const int coarse = context_.coarse[i]) {
                bin = static_cast<int32_t>(uint32_t(bin) << coarse | uint32_t(whole_.take(coarse)));
            }
            context_.bins[i] = bin;
            base[i] = middle_cell<Bits>(bin, exponent_);
        }
    }

    void refine(size_t count, const Bits* base, Bits* exact) {
        for (size_t i = 0; i < count; ++i) {
            const int32_t bin = context_.bins[i];
            if (bin == kNoBin) [[unlikely]] {
                exact[i] = base[i];
            } else if (const int32_t magnitude = magnitude_of(bin)) {
                const int open = std::max(0, open_bits<Bits>(magnitude));
                exact[i] = static_cast<Bits>(lowest_cell<Bits>(bin, exponent_) | open_.take(open));
            } else {
                exact[i] = small(bin);
            }
        }
    }

    // A cell below the step: zeros for each exponent that it drops, a one, the mantissa; or no one, and all but the
    // sign.
    Bits small(int32_t bin) {
        constexpr int mantissa = Cell<Bits>::kMantissaBits;
        const int drops = std::countr_zero(open_.peek() | uint64_t{1} << kNumDrops);
        Bits bits = 0;
        if (drops == kNumDrops) {
            open_.skip(kNumDrops);
            bits = static_cast<Bits>(open_.take(mantissa + 8));
        } else {
            open_.skip(drops + 1);
            bits = static_cast<Bits>(open_.take(mantissa) | uint64_t(exponent_ - 1 - drops + 127) << mantissa);
        }
        return static_cast<Bits>(bits | (bin < 0 ? Bits{1} << (Cell<Bits>::kWidth - 1) : 0));
    }

    Tables tables_;
    NumeralReader numerals_;
    BitReader whole_, open_;
    Context context_;
    int exponent_ = 0;
};

}  // namespace

template <class Bits>
void decode(const Matrix<Bits>& matrix, std::span<const Row> rows, std::span<const int8_t> columns, const Knots& within,
            std::span<const uint8_t> base_layer, std::span<const uint8_t> refinement, Bits* base, Bits* exact) {
    Decoder<Bits> decoder(base_layer, refinement, within);
    for (int64_t r = 0; r < matrix.num_rows(); ++r) {
        const int64_t at = r * matrix.num_columns, count = std::min(matrix.num_columns, matrix.num_cells - at);
        decoder.row(rows[r], columns.first(count), matrix.before ? matrix.before + at : nullptr, base + at,
                    exact ? exact + at : nullptr);
    }
    decoder.finish(exact != nullptr);
}

template void decode(const Matrix<uint16_t>&, std::span<const Row>, std::span<const int8_t>, const Knots&,
                     std::span<const uint8_t>, std::span<const uint8_t>, uint16_t*, uint16_t*);
template void decode(const Matrix<uint32_t>&, std::span<const Row>, std::span<const int8_t>, const Knots&,
                     std::span<const uint8_t>, std::span<const uint8_t>, uint32_t*, uint32_t*);

}  // namespace minicpm::history
