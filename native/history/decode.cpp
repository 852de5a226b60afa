#include <cstring>
#include <stdexcept>

#include "bits.h"
#include "numerals.h"
#include "tables.h"

namespace minicpm::history {

namespace {

// Cells of a row that are read in one go.
constexpr size_t kSegment = kLongestRun;

// Where in its bin the prediction lies, and the bin; of a whole segment, so that the loops stay simple.
struct Context {
    const Table* tables[kSegment];
    int32_t bins[kSegment];
    uint8_t coarse[kSegment];
    uint8_t symbols[kSegment];
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
            const auto part = columns.subspan(i, std::min(kSegment, columns.size() - i));
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
        const Scale* const scales = tables_.scales(row.scale);
        for (size_t i = 0; i < columns.size(); ++i) {
            const Scale& scale = scales[columns[i]];
            const int32_t units = (before ? predict(before[i], row.beta, exponent_) : 0) >> scale.coarse;
            context_.tables[i] = scale.tables + (units & (kNumFractions - 1));
            context_.bins[i] = units >> kFractionBits;
            context_.coarse[i] = static_cast<uint8_t>(scale.coarse);
        }
    }

    void bins(size_t count, Bits* base) {
        numerals_.read({context_.tables, count}, context_.symbols);
        for (size_t i = 0; i < count; ++i) {
            const int symbol = context_.symbols[i];
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
        constexpr int mantissa = Cell<Bits>::kMantissaBits;
        for (size_t i = 0; i < count; ++i) {
            const int32_t bin = context_.bins[i];
            if (bin == kNoBin) [[unlikely]] {
                exact[i] = base[i];
                continue;
            }
            const auto magnitude = static_cast<uint32_t>(magnitude_of(bin));
            if (magnitude == 0) {
                exact[i] = small(bin < 0);
                continue;
            }
            const int above = std::bit_width(magnitude) - 1, open = mantissa - above;
            const uint64_t fraction = open >= 0 ? uint64_t{magnitude} << open | open_.take(open) : magnitude >> -open;
            exact[i] = cell_of<Bits>(bin < 0, exponent_ + above, fraction);
        }
    }

    // A cell below the step: a zero for each exponent that it drops, a one, its mantissa; or, without that one, all
    // bits but the sign.
    Bits small(bool is_negative) {
        constexpr int mantissa = Cell<Bits>::kMantissaBits;
        const uint64_t bits = open_.peek();
        const int drops = std::countr_zero(bits | uint64_t{1} << kNumDrops);
        if (drops < kNumDrops) [[likely]] {
            open_.skip(drops + 1 + mantissa);
            return cell_of<Bits>(is_negative, exponent_ - 1 - drops, bits >> (drops + 1));
        }
        open_.skip(kNumDrops);
        return static_cast<Bits>(uint64_t{is_negative} << (Cell<Bits>::kWidth - 1) | open_.take(mantissa + 8));
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
