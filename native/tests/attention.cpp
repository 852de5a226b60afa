// Attention of every kernel over a paged cache, held to double precision.
#include <algorithm>
#include <limits>

#include "check.h"
#include "kernels/kernel.h"

namespace minicpm::tests {

namespace {

constexpr CacheType kCacheTypes[] = {CacheType::kF16, CacheType::kBF16, CacheType::kF32, CacheType::kQ8};

// Keys and values of one sequence, in blocks whose order is reversed, and the same as plain rows. The numbers are
// multiples of 1/16 that every float type holds exactly, so that one bound serves all; the plain rows of kQ8 are what
// the cache holds.
struct Pages {
    LayerCache cache;
    int positions;
    Exact<uint8_t> memory;
    std::vector<int32_t> table;
    Exact<float> keys, values;  // (kv heads, positions, head width)

    Pages(const Kernels& kernels, const LayerCache& shape, int num_positions, Random& random)
        : cache(shape),
          positions(num_positions),
          memory(num_blocks() * 2 * shape.part_bytes()),
          keys(size_t(shape.num_kv_heads) * num_positions * shape.head_width),
          values(keys.size()) {
        cache.data = memory.data();
        for (int i = num_blocks(); i > 0; --i) table.push_back(i - 1);
        for (size_t i = 0; i < keys.size(); ++i) {
            keys[i] = static_cast<float>(random.below(33) - 16) / 16.0f;
            values[i] = static_cast<float>(random.below(65) - 32) / 16.0f;
        }
        for (int head = 0; head < cache.num_kv_heads; ++head) {
            for (int p = 0; p < positions; ++p) {
                kernels.store(cache, table[p / cache.block_tokens], head, p % cache.block_tokens, key(head, p),
                              value(head, p));
                if (cache.type == CacheType::kQ8) read_back(head, p);
            }
        }
    }
    void read_back(int head, int p) {
        const int block = table[p / cache.block_tokens], offset = p % cache.block_tokens, width = cache.head_width;
        uint8_t *k = cache.keys(block, head), *v = cache.values(block, head);
        const size_t row = (size_t(head) * positions + p) * width;
        for (int d = 0; d < width; ++d) {
            const auto key_code = static_cast<int8_t>(k[d * cache.block_tokens + offset]);
            const auto value_code = static_cast<int8_t>(v[offset * width + d]);
            keys[row + d] = static_cast<float>(key_code) * cache.scales(k)[offset];
            values[row + d] = static_cast<float>(value_code) * cache.scales(v)[offset];
        }
    }
    size_t num_blocks() const { return (positions + cache.block_tokens - 1) / cache.block_tokens; }
    const float* key(int head, int p) const { return keys.data() + (size_t(head) * positions + p) * cache.head_width; }
    const float* value(int head, int p) const {
        return values.data() + (size_t(head) * positions + p) * cache.head_width;
    }
};

// Attends to all positions below `limit`, chunk by chunk as the decoder does; the result is in `sum`.
void attend_all(const Kernels& kernels, const Pages& pages, int head, const std::vector<const float*>& queries,
                const std::vector<int>& limits, std::vector<Partial>& sums, std::vector<Partial>& nexts) {
    const int last = *std::max_element(limits.begin(), limits.end());
    const int count = static_cast<int>(queries.size());
    for (int begin = 0; begin < last; begin += kChunkPositions) {
        kernels.attend(pages.cache, pages.table.data(), head, begin, std::min(last, begin + kChunkPositions),
                       queries.data(), limits.data(), count, {}, nexts.data());
        for (int i = 0; i < count; ++i) kernels.join(sums[i], nexts[i], pages.cache.head_width);
    }
}

void check_query(const Kernels& kernels, const Pages& pages, int head, const float* query, int limit,
                 const Partial& sum) {
    const int width = pages.cache.head_width;
    std::vector<double> scores(limit), truth(width);
    double largest = -1e300, total = 0.0;
    for (int p = 0; p < limit; ++p) {
        for (int d = 0; d < width; ++d) scores[p] += double{query[d]} * pages.key(head, p)[d];
        largest = std::max(largest, scores[p]);
    }
    for (int p = 0; p < limit; ++p) {
        const double weight = std::exp(scores[p] - largest);
        total += weight;
        for (int d = 0; d < width; ++d) truth[d] += weight * pages.value(head, p)[d];
    }
    for (int d = 0; d < width; ++d) {
        const double difference = std::abs(sum.values[d] / sum.total - truth[d] / total);
        CHECK(difference < 1e-5, std::string(kernels.name) + " width " + std::to_string(width) + " limit " +
                                     std::to_string(limit) + ": " + std::to_string(difference));
    }
}

void check_attention(const Kernels& kernels, CacheType type, int block_tokens, int width, int positions,
                     Random& random) {
    const Pages pages(kernels, {nullptr, type, block_tokens, 2, width}, positions, random);
    // More queries than any kernel takes at once, with limits in all chunks and at their ends.
    const std::vector<int> limits = {1, positions, 31, 33, positions - 1, std::min(128, positions), 2, 5, 17, 40, 64};
    const size_t count = limits.size();
    Exact<float> queries(count * width), values(2 * count * width);
    random.fill(queries, -0.5f, 0.5f);
    std::vector<const float*> pointers;
    for (size_t i = 0; i < count; ++i) pointers.push_back(queries.data() + i * width);
    for (int head = 0; head < 2; ++head) {
        std::vector<Partial> sums, nexts;
        for (size_t i = 0; i < count; ++i) {
            sums.push_back({values.data() + i * width, 0.0f, 0.0f});
            nexts.push_back({values.data() + (count + i) * width, 0.0f, 0.0f});
        }
        attend_all(kernels, pages, head, pointers, limits, sums, nexts);
        for (size_t i = 0; i < count; ++i) check_query(kernels, pages, head, pointers[i], limits[i], sums[i]);
    }
}

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

// Rounded to the nearest of 16 bits, ties to the even one.
uint16_t rounded_bf16(float x) {
    const uint32_t bits = bits_of(x);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// The half nearest to x, found by its distance: halves of one sign are ordered as their bits are.
uint16_t rounded_f16(float x) {
    const auto value = [](int bits) {
        const int exponent = bits >> 10, mantissa = bits & 1023;
        if (exponent == 31) return 65536.0;
        return exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    };
    const double magnitude = std::abs(double{x});
    int low = 0, high = 31 << 10;  // value(low) <= magnitude, or infinity
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (value(middle) <= magnitude ? low : high) = middle;
    }
    const double to_low = magnitude - value(low), to_high = value(high) - magnitude;
    const int nearest = to_low < to_high || (to_low == to_high && low % 2 == 0) ? low : high;
    return static_cast<uint16_t>(nearest | (std::signbit(x) ? 0x8000 : 0));
}

}  // namespace

TEST(attention_is_true) {
    Random random(8);
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
        for (const CacheType type : kCacheTypes) {
            for (const int width : {16, 64, 80, 128}) {
                check_attention(**k, type, width == 64 ? 64 : 32, width, is_quick() ? 140 : 301, random);
            }
        }
    }
}

TEST(attention_to_nothing_is_nothing) {
    Random random(9);
    for (const CacheType type : kCacheTypes) {
        for (const Kernels* const* k = available_kernels(); *k; ++k) {
            const Pages pages(**k, {nullptr, type, 32, 1, 16}, 140, random);
            Exact<float> query(16), values(32);
            const float* queries[] = {query.data(), query.data()};
            const int limits[] = {100, 140};
            Partial out[] = {{values.data(), 1.0f, 1.0f}, {values.data() + 16, 1.0f, 1.0f}};
            (*k)->attend(pages.cache, pages.table.data(), 0, 128, 140, queries, limits, 2, {}, out);
            CHECK(out[0].total == 0.0f, (*k)->name);
            CHECK(std::abs(out[1].total - 12.0f) < 1e-5f, (*k)->name);
        }
    }
}

TEST(stored_values_are_rounded_to_nearest) {
    Random random(10);
    std::vector<float> numbers = {0.0f,   -0.0f,   1.0f,       65504.0f,   65519.99f,  65520.0f, 70000.0f, 1e30f,
                                  6e-8f,  2.9e-8f, 0x1p-25f,   -0x1p-24f,  0x1.8p-24f, 6.1e-5f,  1e-40f,   -1e38f,
                                  1e-30f, -3e-6f,  0x1.002p0f, 0x1.006p0f, 0x1.01p0f,  0x1.03p0f};
    while (numbers.size() < 2048) numbers.push_back(std::ldexp(random.between(-1.0f, 1.0f), random.below(50) - 30));
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
        for (const CacheType type : {CacheType::kF16, CacheType::kBF16}) {
            LayerCache cache{nullptr, type, 32, 1, 16};
            const Exact<uint8_t> memory(2 * cache.part_bytes());
            cache.data = memory.data();
            for (size_t first = 0; first < numbers.size(); first += 16) {
                Exact<float> row(16);
                std::copy_n(numbers.data() + first, 16, row.data());
                (*k)->store(cache, 0, 0, 31, row.data(), row.data());
                for (int i = 0; i < 16; ++i) {
                    uint16_t key, value;
                    std::memcpy(&key, cache.keys(0, 0) + (size_t(i) * 32 + 31) * 2, 2);
                    std::memcpy(&value, cache.values(0, 0) + (31 * 16 + i) * 2, 2);
                    const uint16_t truth = type == CacheType::kF16 ? rounded_f16(row[i]) : rounded_bf16(row[i]);
                    CHECK(key == truth && value == truth, std::string((*k)->name) + " " + std::to_string(row[i]));
                }
            }
        }
    }
}

TEST(stored_codes_are_within_half_a_step) {
    Random random(11);
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
        LayerCache cache{nullptr, CacheType::kQ8, 32, 2, 48};
        const Exact<uint8_t> memory(2 * cache.part_bytes());
        cache.data = memory.data();
        for (const float size : {0.0f, 1e-38f, 1e-20f, 1.0f, 1e30f}) {
            Exact<float> key(48), value(48);
            random.fill(key, -size, size);
            random.fill(value, -size, size);
            const int head = random.below(2), offset = random.below(32);
            (*k)->store(cache, 0, head, offset, key.data(), value.data());
            uint8_t *keys = cache.keys(0, head), *values = cache.values(0, head);
            const double key_scale = cache.scales(keys)[offset], value_scale = cache.scales(values)[offset];
            for (int d = 0; d < 48; ++d) {
                const double key_error = key[d] - static_cast<int8_t>(keys[d * 32 + offset]) * key_scale;
                const double value_error = value[d] - static_cast<int8_t>(values[offset * 48 + d]) * value_scale;
                // Numbers next to nothing become zero.
                CHECK(std::abs(key_error) <= 0.50001 * key_scale || size < 1e-30f, (*k)->name);
                CHECK(std::abs(value_error) <= 0.50001 * value_scale || size < 1e-30f, (*k)->name);
            }
            CHECK(key_scale <= size / 127 * 1.00001 && value_scale <= size / 127 * 1.00001, (*k)->name);
        }
    }
}

TEST(stored_codes_of_what_is_not_finite_have_no_scale) {
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
        LayerCache cache{nullptr, CacheType::kQ8, 32, 1, 16};
        const Exact<uint8_t> memory(2 * cache.part_bytes());
        cache.data = memory.data();
        for (const float broken : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                                   -std::numeric_limits<float>::infinity()}) {
            Exact<float> row(16);
            std::fill_n(row.data(), 16, 1.0f);
            row[5] = broken;
            (*k)->store(cache, 0, 0, 7, row.data(), row.data());
            CHECK(std::isnan(cache.scales(cache.keys(0, 0))[7]), (*k)->name);
            CHECK(std::isnan(cache.scales(cache.values(0, 0))[7]), (*k)->name);
        }
    }
}

TEST(stored_nan_stays_nan) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
        for (const CacheType type : {CacheType::kF16, CacheType::kBF16}) {
            LayerCache cache{nullptr, type, 32, 1, 16};
            const Exact<uint8_t> memory(2 * cache.part_bytes());
            cache.data = memory.data();
            Exact<float> row(16);
            std::fill_n(row.data(), 16, nan);
            (*k)->store(cache, 0, 0, 0, row.data(), row.data());
            uint16_t bits;
            std::memcpy(&bits, cache.values(0, 0), 2);
            const int infinity = type == CacheType::kF16 ? 0x7C00 : 0x7F80;
            CHECK((bits & 0x7FFF) > infinity, (*k)->name);
        }
    }
}

}  // namespace minicpm::tests
