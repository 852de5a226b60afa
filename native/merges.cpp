#include "merges.h"

#include <algorithm>
#include <bit>

namespace minicpm {

namespace {

// A hash that grows with its text, so that those of all beginnings of a piece cost one walk.
constexpr uint64_t kStart = 0xCBF29CE484222325;
constexpr uint64_t extend(uint64_t hash, char32_t c) { return (hash ^ c) * 0x100000001B3; }

// Texts -> ids, by open addressing in a table that is at most half full.
class Index {
  public:
    explicit Index(std::span<const std::u32string_view> pieces)
        : pieces_(pieces), slots_(std::bit_ceil(2 * pieces.size() + 2), Slot{0, -1}) {}

    void add(int32_t id) {
        uint64_t hash = kStart;
        for (const char32_t c : pieces_[id]) hash = extend(hash, c);
        size_t at = place(hash);
        while (slots_[at].id >= 0) at = (at + 1) & (slots_.size() - 1);
        slots_[at] = {static_cast<uint32_t>(hash), id};
    }

    // The id of `text`, whose hash is given, or -1.
    int32_t find(std::u32string_view text, uint64_t hash) const {
        for (size_t at = place(hash); slots_[at].id >= 0; at = (at + 1) & (slots_.size() - 1)) {
            const Slot& slot = slots_[at];
            if (slot.hash == static_cast<uint32_t>(hash) && pieces_[slot.id] == text) return slot.id;
        }
        return -1;
    }

  private:
    struct Slot {
        uint32_t hash;
        int32_t id;
    };

    size_t place(uint64_t hash) const { return (hash ^ hash >> 32) & (slots_.size() - 1); }

    std::span<const std::u32string_view> pieces_;
    std::vector<Slot> slots_;
};

}  // namespace

std::vector<std::pair<int32_t, int32_t>> find_merges(std::span<const std::u32string_view> pieces,
                                                     std::span<const int32_t> order, std::span<const uint8_t> is_part) {
    Index parts(pieces);
    for (size_t id = 0; id < pieces.size(); ++id) {
        if (is_part[id]) parts.add(static_cast<int32_t>(id));
    }
    std::vector<std::pair<int32_t, int32_t>> merges;
    merges.reserve(2 * order.size());
    for (const int32_t id : order) {
        const std::u32string_view piece = pieces[id];
        const size_t first = merges.size();
        uint64_t left_hash = kStart;
        for (size_t at = 1; at < piece.size(); ++at) {
            left_hash = extend(left_hash, piece[at - 1]);
            const int32_t left = parts.find(piece.substr(0, at), left_hash);
            if (left < 0) continue;
            uint64_t right_hash = kStart;
            for (const char32_t c : piece.substr(at)) right_hash = extend(right_hash, c);
            const int32_t right = parts.find(piece.substr(at), right_hash);
            if (right >= 0) merges.emplace_back(left, right);
        }
        std::sort(merges.begin() + static_cast<ptrdiff_t>(first), merges.end());
    }
    return merges;
}

}  // namespace minicpm
