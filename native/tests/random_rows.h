// Random weights in every block type of files.
#pragma once

#include "check.h"
#include "packing.h"

namespace minicpm::tests {

inline constexpr const char* kTypeNames[] = {"F32",  "F16",  "BF16", "Q4_0", "Q4_1", "Q5_0",
                                             "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"};

// Rows of random weights, about as large as those of a layer with `inputs` inputs that keeps its input's size.
Exact<uint8_t> random_rows(const BlockType& type, int rows, int inputs, Random& random);

// The rows in tiles; `memory` holds them.
struct Packed {
    Exact<uint8_t> memory;
    Matrix matrix;
};
Packed packed(const BlockType& type, const Exact<uint8_t>& rows, int num_rows, int inputs);

}  // namespace minicpm::tests
