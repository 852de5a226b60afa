// Floating point is allowed here: what comes out is stored.
#include <algorithm>
#include <bit>
#include <cmath>

#include "tables.h"

namespace minicpm::history {

namespace {

// A normal distribution's mean magnitude is so much smaller than its scale.
constexpr float kScalePerMean = 1.2533141F;
// Fewer rows cannot tell a column's scale from chance.
constexpr int64_t kFewestRows = 16;
// Of a large tensor, so many residuals are enough to tell their distribution.
constexpr int64_t kMostResiduals = int64_t{1} << 20;
// How many residuals of a normal distribution are added to those seen, so that a small tensor rules nothing out.
constexpr double kPriorResiduals = 64;

float value_of(uint16_t cell) { return std::bit_cast<float>(uint32_t{cell} << 16); }
float value_of(uint32_t cell) { return std::bit_cast<float>(cell); }

// A sum that compilers spread over a vector; float lanes, since rows are short.
template <class Term>
float sum(int64_t count, const Term& term) {
    constexpr int64_t kLanes = 16;
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
    }
    float total = 0;
    for (; i < count; ++i) total += term(i);
    for (const float lane : lanes) total += lane;
    return total;
}

uint8_t bounded(float value, int low, int high) {
    // The negation also turns away what is no number.
    if (!(value > static_cast<float>(low))) return static_cast<uint8_t>(low);
    return static_cast<uint8_t>(std::lround(std::min(value, static_cast<float>(high))));
}

template <class Bits>
class Fitter {
  public:
    Fitter(const Matrix<Bits>& matrix, double base_error, double coarseness)
        : matrix_(matrix),
          error_(static_cast<float>(base_error)),
          coarseness_(static_cast<float>(coarseness)),
          values_(matrix.num_columns),
          residuals_(matrix.num_columns),
          columns_(matrix.num_columns, 1.0F),
          inverse_(matrix.num_columns, 1.0F) {}

    Plan run() {
        const int64_t num_rows = matrix_.num_rows();
        plan_.rows.resize(num_rows);
        plan_.columns.assign(matrix_.num_columns, 0);
        if (num_rows >= kFewestRows) fit_columns();
        const int64_t stride = 1 + matrix_.num_cells / kMostResiduals;
        for (int64_t r = 0; r < num_rows; ++r) fit_row(r, r % stride == 0);
        fit_distribution();
        return std::move(plan_);
    }

  private:
    // Fills values_ and residuals_; returns beta as stored.
    int64_t load(int64_t r) {
        const int64_t at = r * matrix_.num_columns;
        const int64_t count = std::min(matrix_.num_columns, matrix_.num_cells - at);
        const auto finite = [](float x) { return std::fabs(x) < 1e30F ? x : 0.0F; };
        for (int64_t i = 0; i < count; ++i) values_[i] = finite(value_of(matrix_.cells[at + i]));
        beta_ = 0;
        if (!matrix_.before) {
            std::copy_n(values_.begin(), count, residuals_.begin());
            return count;
        }
        for (int64_t i = 0; i < count; ++i) residuals_[i] = finite(value_of(matrix_.before[at + i]));
        const float with = sum(count, [&](int64_t i) { return values_[i] * residuals_[i]; });
        const float own = sum(count, [&](int64_t i) { return residuals_[i] * residuals_[i]; });
        // Where squares fall out of range, cells stay as they are.
        const bool is_known = own > 1e-30F && own < 1e30F;
        beta_ = bounded(is_known ? with / own * (1 << kBetaBits) : 1 << kBetaBits, 0, 255);
        const float beta = static_cast<float>(beta_) / (1 << kBetaBits);
        for (int64_t i = 0; i < count; ++i) residuals_[i] = values_[i] - beta * residuals_[i];
        return count;
    }

    void fit_columns() {
        std::vector<float> sums(matrix_.num_columns, 0.0F);
        for (int64_t r = 0; r < matrix_.num_rows(); ++r) {
            const int64_t count = load(r);
            const float total = sum(count, [&](int64_t i) { return std::fabs(residuals_[i]); });
            if (!(total > 0)) continue;
            const float scale = static_cast<float>(count) / total;
            for (int64_t i = 0; i < count; ++i) sums[i] += std::fabs(residuals_[i]) * scale;
        }
        const float mean = sum(matrix_.num_columns, [&](int64_t i) { return sums[i]; }) / float(matrix_.num_columns);
        for (int64_t i = 0; i < matrix_.num_columns; ++i) {
            const float octaves = sums[i] > 0 && mean > 0 ? std::log2(sums[i] / mean) : 0;
            const float offset = std::clamp(std::round(kClassesPerOctave * octaves), -32.0F, 31.0F);
            plan_.columns[i] = static_cast<int8_t>(offset);
            columns_[i] = std::exp2(offset / kClassesPerOctave);
            inverse_[i] = 1 / columns_[i];
        }
    }

    void fit_row(int64_t r, bool is_counted) {
        const int64_t count = load(r);
        const float n = static_cast<float>(count);
        const float mean = sum(count, [&](int64_t i) { return values_[i]; }) / n;
        const float deviation =
            std::sqrt(sum(count, [&](int64_t i) { return (values_[i] - mean) * (values_[i] - mean); }) / n);
        const float scale =
            sum(count, [&](int64_t i) { return std::fabs(residuals_[i]) * inverse_[i]; }) / n * kScalePerMean;
        // A step's error is that of a uniform distribution. Rounding to powers of two keeps the mean of squares.
        const float size = deviation > 0 ? deviation : std::fabs(mean);
        // What no longer changes gets a step below its cells, and costs nothing from then on.
        const float finest = size * std::exp2(-static_cast<float>(std::min(Cell<Bits>::kMantissaBits + 6, 17)));
        const float wanted = std::min(error_ * std::sqrt(12.0F) * size, std::max(coarseness_ * scale, finest));
        const float octaves = std::round(std::log2(std::max(wanted, 0x1p-126F)) - 0.06F);
        Row& row = plan_.rows[r];
        row.exponent = bounded(octaves + 128, kSmallestExponent + 128, kLargestExponent + 128);
        row.beta = static_cast<uint8_t>(beta_);
        const float step = std::exp2(static_cast<float>(row.exponent) - 128);
        row.scale = bounded(kClassesPerOctave * (std::log2(std::max(scale, 0x1p-126F) / step) + 4), 0, kNumClasses - 1);
        if (is_counted) count_residuals(count, step * std::exp2(row.scale / float(kClassesPerOctave) - 4));
    }

    void count_residuals(int64_t count, float scale) {
        const float knots = kKnotsPerScale / scale;
        for (int64_t i = 0; i < count; ++i) {
            const float knot = std::fabs(residuals_[i]) * inverse_[i] * knots;
            ++counts_[knot < kNumKnots ? static_cast<int>(knot) : kNumKnots];
        }
    }

    void fit_distribution() {
        double total = kPriorResiduals;
        for (const int64_t count : counts_) total += static_cast<double>(count);
        double within = 0;
        for (int i = 0; i < kNumKnots; ++i) {
            const auto normal = [](int knot) { return std::erf(knot / (kKnotsPerScale * std::sqrt(2.0))); };
            within += static_cast<double>(counts_[i]) + kPriorResiduals * (normal(i + 1) - normal(i));
            plan_.within[i] = static_cast<uint16_t>(std::lround(std::min(within / total, 1.0) * 65535));
        }
    }

    const Matrix<Bits>& matrix_;
    const float error_, coarseness_;
    std::vector<float> values_, residuals_, columns_, inverse_;
    int beta_ = 0;
    Plan plan_;
    int64_t counts_[kNumKnots + 1] = {};
};

}  // namespace

template <class Bits>
Plan fit(const Matrix<Bits>& matrix, double base_error, double coarseness) {
    return Fitter<Bits>(matrix, base_error, coarseness).run();
}

template Plan fit(const Matrix<uint16_t>&, double, double);
template Plan fit(const Matrix<uint32_t>&, double, double);

}  // namespace minicpm::history
