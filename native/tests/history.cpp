// The codec of checkpoints: round trips, bytes that are the same on every processor, damage.
#include <cstring>
#include <numeric>

#include "check.h"
#include "history/cells.h"
#include "history/codec.h"

namespace minicpm::tests {

namespace {

using namespace minicpm::history;

template <class Bits>
std::vector<Bits> random_cells(Random& random, size_t count, float scale) {
    std::vector<Bits> cells(count);
    for (Bits& cell : cells) {
        const float sum = random.between(-1, 1) + random.between(-1, 1) + random.between(-1, 1);
        cell = static_cast<Bits>(std::bit_cast<uint32_t>(sum * scale) >> (32 - 8 * sizeof(Bits)));
    }
    return cells;
}

template <class Bits>
std::vector<Bits> moved(Random& random, const std::vector<Bits>& cells) {
    std::vector<Bits> after(cells);
    for (Bits& cell : after) {
        const float value = std::bit_cast<float>(uint32_t{cell} << (32 - 8 * sizeof(Bits)));
        const float changed = value * 0.984375F + random.between(-0.0078125F, 0.0078125F);
        cell = static_cast<Bits>(std::bit_cast<uint32_t>(changed) >> (32 - 8 * sizeof(Bits)));
    }
    return after;
}

// Cells that no bin holds, or hardly.
template <class Bits>
void spoil(Random& random, std::vector<Bits>& cells) {
    const uint32_t kinds[] = {0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF, 0, 0x80000000, 1, 0x00010000, 0x7F7FFFFF};
    for (const uint32_t kind : kinds) {
        for (int i = 0; i < 3; ++i) {
            cells[random.below(static_cast<int>(cells.size()))] = static_cast<Bits>(kind >> (32 - 8 * sizeof(Bits)));
        }
    }
}

// A plan of whole numbers alone: what `fit` finds depends on how a processor rounds, and is stored.
Plan fixed_plan(int64_t num_rows, int64_t num_columns) {
    Plan plan;
    for (int64_t r = 0; r < num_rows; ++r) {
        plan.rows.push_back({static_cast<uint8_t>(128 - 8 + r % 3), static_cast<uint8_t>(120 + r % 9),
                             static_cast<uint8_t>(14 + r % 7)});
    }
    for (int64_t i = 0; i < num_columns; ++i) plan.columns.push_back(static_cast<int8_t>(i % 23 - 7));
    for (int i = 0; i < kNumKnots; ++i) {
        plan.within[i] = static_cast<uint16_t>(65000 - 65000 * (63 - i) / 64 * (63 - i) / 64 * (63 - i) / 64);
    }
    return plan;
}

uint64_t fingerprint(const std::vector<uint8_t>& bytes) {
    uint64_t hash = 0xCBF29CE484222325;  // FNV-1a
    for (const uint8_t byte : bytes) hash = (hash ^ byte) * 0x100000001B3;
    return hash;
}

std::span<const uint8_t> copied(const Exact<uint8_t>& memory, const std::vector<uint8_t>& bytes) {
    if (!bytes.empty()) std::memcpy(memory.data(), bytes.data(), bytes.size());
    return {memory.data(), bytes.size()};
}

// Decodes from memory of exactly the right size.
template <class Bits>
void decode_into(const Matrix<Bits>& matrix, const Plan& plan, const Layers& layers, const Exact<Bits>& base,
                 const Exact<Bits>& exact) {
    const Exact<uint8_t> low(layers.base.size()), high(layers.refinement.size());
    decode<Bits>(matrix, plan.rows, plan.columns, plan.within, copied(low, layers.base),
                 copied(high, layers.refinement), base.data(), exact.data());
}

template <class Bits>
void check_chain(int64_t num_cells, int64_t num_columns, bool is_fitted) {
    Random random(static_cast<uint64_t>(num_cells + num_columns));
    std::vector<Bits> cells = random_cells<Bits>(random, num_cells, 0.03125F), before;
    for (int step = 0; step < 4; ++step) {
        if (step == 2) spoil(random, cells);
        const Matrix<Bits> matrix{cells.data(), before.empty() ? nullptr : before.data(), num_cells, num_columns};
        const Plan plan = is_fitted ? fit(matrix, 0.07, 1.0) : fixed_plan(matrix.num_rows(), num_columns);
        std::vector<Bits> base(num_cells);
        const Layers layers = encode<Bits>(matrix, plan.rows, plan.columns, plan.within, base.data());
        const Exact<Bits> decoded(num_cells), exact(num_cells);
        decode_into(matrix, plan, layers, decoded, exact);
        CHECK(std::equal(cells.begin(), cells.end(), exact.data()), "step " + std::to_string(step));
        CHECK(std::equal(base.begin(), base.end(), decoded.data()), "step " + std::to_string(step));
        before = std::move(base);
        cells = moved(random, cells);
    }
}

}  // namespace

TEST(history_gives_back_every_bit) {
    for (const bool is_fitted : {false, true}) {
        check_chain<uint16_t>(60 * 331, 331, is_fitted);
        check_chain<uint32_t>(60 * 331, 331, is_fitted);
        check_chain<uint16_t>(5 * 2500 - 77, 2500, is_fitted);
        check_chain<uint32_t>(1, 1, is_fitted);
        check_chain<uint16_t>(9, 9, is_fitted);
    }
}

// Every build writes these bytes, and so reads those that others wrote.
TEST(history_writes_the_same_bytes_everywhere) {
    Random random(7);
    const int64_t num_cells = 40 * 500, num_columns = 500;
    const std::vector<uint16_t> first = random_cells<uint16_t>(random, num_cells, 0.03125F);
    std::vector<uint16_t> second = moved(random, first);
    spoil(random, second);
    const Plan plan = fixed_plan(40, num_columns);
    std::vector<uint16_t> base(num_cells);
    Layers layers = encode<uint16_t>({first.data(), nullptr, num_cells, num_columns}, plan.rows, plan.columns,
                                     plan.within, base.data());
    const uint64_t key[] = {fingerprint(layers.base), fingerprint(layers.refinement)};
    layers = encode<uint16_t>({second.data(), base.data(), num_cells, num_columns}, plan.rows, plan.columns,
                              plan.within, base.data());
    const uint64_t found[] = {key[0], key[1], fingerprint(layers.base), fingerprint(layers.refinement)};
    const uint64_t expected[] = {11341041717495993430u, 6950408515853141671u, 7643502560677510313u,
                                 12146468720411225598u};
    std::string shown;
    for (const uint64_t hash : found) shown += std::to_string(hash) + "u, ";
    CHECK(std::equal(found, found + 4, expected), "found " + shown);
}

// Whatever the bytes, decoding ends with cells or with an error, inside of its memory.
TEST(history_survives_damage) {
    Random random(11);
    const int64_t num_cells = 6 * 200, num_columns = 200;
    std::vector<uint16_t> cells = random_cells<uint16_t>(random, num_cells, 0.03125F);
    spoil(random, cells);
    const Matrix<uint16_t> matrix{cells.data(), nullptr, num_cells, num_columns};
    const Plan sound = fixed_plan(6, num_columns);
    std::vector<uint16_t> base(num_cells);
    const Layers whole = encode<uint16_t>(matrix, sound.rows, sound.columns, sound.within, base.data());
    const Matrix<uint16_t> next{nullptr, base.data(), num_cells, num_columns};
    int num_refused = 0;
    for (int i = 0; i < (is_quick() ? 300 : 3000); ++i) {
        Layers layers = whole;
        Plan plan = sound;
        for (std::vector<uint8_t>* bytes : {&layers.base, &layers.refinement}) {
            if (random.below(2)) bytes->resize(random.below(static_cast<int>(bytes->size()) + 1));
            for (int k = random.below(3); k > 0 && !bytes->empty(); --k) {
                (*bytes)[random.below(static_cast<int>(bytes->size()))] = static_cast<uint8_t>(random.next());
            }
        }
        if (random.below(4) == 0) plan.rows[random.below(6)].exponent = static_cast<uint8_t>(random.next());
        if (random.below(4) == 0) plan.rows[random.below(6)].scale = static_cast<uint8_t>(random.next());
        if (random.below(4) == 0) plan.columns[random.below(200)] = static_cast<int8_t>(random.next());
        if (random.below(8) == 0) plan.within[random.below(kNumKnots)] = static_cast<uint16_t>(random.next());
        const Exact<uint16_t> decoded(num_cells), exact(num_cells);
        try {
            decode_into(random.below(2) ? matrix : next, plan, layers, decoded, exact);
        } catch (const std::invalid_argument&) {
            ++num_refused;
        }
    }
    CHECK(num_refused > 0, "no damage was seen");
}

}  // namespace minicpm::tests
