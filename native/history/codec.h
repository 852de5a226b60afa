// The codec of checkpoints: a tensor's cells, given the base layer of the checkpoint before, in two layers.
//
// Every cell falls into a bin of its row's step (`cells.h`). The base layer codes the bins by range asymmetric numeral
// systems: the prediction, beta times the cell before, has a place within a bin; with the scale of row and column it
// chooses a table of probabilities for the distance in bins. The refinement holds the bits that a bin leaves open, as
// they are: within a bin that is no wider than the update, all cells are nearly equally likely for their width.
// Byte format: docs/history_format.md.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace minicpm::history {

// What one row is coded with, as stored.
struct Row {
    uint8_t exponent;  // of the step, plus 128
    uint8_t beta;      // x 2^kBetaBits
    uint8_t scale;     // class of the row's residual in steps, where its column's offset is 0
};

// The distribution of a tensor's residuals by size: `within[i]` / 65535 lie within i / kKnotsPerScale scales of 0.
constexpr int kNumKnots = 64, kKnotsPerScale = 8;
using Knots = std::array<uint16_t, kNumKnots>;  // from i = 1 on

struct Plan {
    std::vector<Row> rows;
    std::vector<int8_t> columns;  // each column's offset of the class
    Knots within;
};

template <class Bits>
struct Matrix {
    const Bits* cells;
    const Bits* before;  // null in a key frame
    int64_t num_cells;   // the last row may be shorter
    int64_t num_columns;
    int64_t num_rows() const { return (num_cells + num_columns - 1) / num_columns; }
};

// Chooses how a tensor is coded.
// base_error: wanted root mean square error of the base layer, as a share of the row's standard deviation.
// coarseness: largest step as a share of the row's residual; a larger one makes the base layer smaller and the whole
// larger.
template <class Bits>
Plan fit(const Matrix<Bits>& matrix, double base_error, double coarseness);

struct Layers {
    std::vector<uint8_t> base, refinement;
};

// Codes whole rows; `base` gets the cells that the base layer stands for, and may be where those before are.
template <class Bits>
Layers encode(const Matrix<Bits>& matrix, std::span<const Row> rows, std::span<const int8_t> columns,
              const Knots& within, Bits* base);

// The reverse. `cells` of `matrix` is not used; `exact` may be null, and `refinement` is not read then.
// Throws std::invalid_argument for bytes that `encode` did not write, as far as they show.
template <class Bits>
void decode(const Matrix<Bits>& matrix, std::span<const Row> rows, std::span<const int8_t> columns, const Knots& within,
            std::span<const uint8_t> base_layer, std::span<const uint8_t> refinement, Bits* base, Bits* exact);

}  // namespace minicpm::history
