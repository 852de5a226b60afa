// From the block types of files to tiles, without changing a weight.
#pragma once

#include <optional>
#include <string_view>

#include "kernels/kernel.h"

namespace minicpm {

// How a file stores a row: blocks of `inputs` weights in `bytes` bytes.
struct BlockType {
    std::string_view name;
    Packing packing;
    int inputs;
    int bytes;
    // Packs up to 16 rows, `stride` bytes apart, into a tile that is zero so far.
    void (*pack_rows)(const uint8_t* rows, size_t stride, int count, const Matrix& matrix, uint8_t* tile);
};

// The type called `name`, or nullptr.
const BlockType* find_block_type(std::string_view name);

// Packs tile `tile` of `matrix` from rows that start at `rows`, `stride` bytes apart.
void pack_tile(const BlockType& type, const uint8_t* rows, size_t stride, const Matrix& matrix, int tile);

// Writes the weights of one row as float32 (inputs).
void unpack_row(const Matrix& matrix, int row, float* out);

}  // namespace minicpm
