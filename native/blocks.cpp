// Whole cache blocks in and out of the decoder.
#include <cstring>
#include <stdexcept>
#include <string>

#include "decoder.h"

namespace minicpm {

// Calls `copy` with the place of each layer of each block and the matching offset outside, and the bytes there.
template <class Copy>
void Decoder::each_block_layer(std::span<const int32_t> blocks, const Copy& copy) {
    const std::lock_guard lock(mutex_);
    for (const int32_t block : blocks) {
        if (block < 0 || block >= cache_.num_blocks) {
            throw std::invalid_argument("cache block " + std::to_string(block) + " is none of " +
                                        std::to_string(cache_.num_blocks));
        }
    }
    const size_t bytes = 2 * cache_of(0).part_bytes();
    size_t offset = 0;
    for (const int32_t block : blocks) {
        for (int layer = 0; layer < shape_.num_layers; ++layer, offset += bytes) {
            copy(cache_of(layer).keys(block, 0), offset, bytes);
        }
    }
}

void Decoder::read_blocks(std::span<const int32_t> blocks, uint8_t* out) {
    each_block_layer(
        blocks, [&](const uint8_t* place, size_t offset, size_t bytes) { std::memcpy(out + offset, place, bytes); });
}

void Decoder::write_blocks(std::span<const int32_t> blocks, const uint8_t* data) {
    each_block_layer(blocks,
                     [&](uint8_t* place, size_t offset, size_t bytes) { std::memcpy(place, data + offset, bytes); });
}

}  // namespace minicpm
