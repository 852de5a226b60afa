// The merge rules of a SentencePiece vocabulary, which stores pieces and scores only.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace minicpm {

// For each piece of `order`, every way to cut it into two pieces: ids of the left and right one, by these ids.
// Where `is_part` is 0, a piece is no half of another. Pieces differ from each other; an empty one is never a half.
std::vector<std::pair<int32_t, int32_t>> find_merges(std::span<const std::u32string_view> pieces,
                                                     std::span<const int32_t> order, std::span<const uint8_t> is_part);

}  // namespace minicpm
