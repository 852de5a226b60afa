// The decoder graph on tiny random models: every kernel against the portable one, every way to cut the work.
#include "decoder.h"

#include <thread>

#include "models.h"
#include "random_rows.h"

namespace minicpm::tests {

namespace {

// What rounding activations to 16 bits, and sums in another order, may change in the logits of a tiny model
// (measured: 2.8e-4, and 4.2e-7 where no weight is quantized).
constexpr double kAllowed = 1e-3;
constexpr double kAllowedOfFloats = 3e-6;

// The first kernels of the list, without the portable one at its end.
std::vector<const Kernels*> fast_kernels() {
    std::vector<const Kernels*> found;
    for (const Kernels* const* k = available_kernels(); k[1]; ++k) found.push_back(*k);
    return found;
}

std::vector<float> whole_then_one(const Model& model, const Setting& setting, int count) {
    const auto decoder = model.decoder(setting);
    const std::vector<int32_t> ids = some_ids(model.shape(), count + 1);
    std::vector<float> out = run_whole(*decoder, {ids.begin(), ids.end() - 1});
    Rows next;
    next.add(ids, 0, count, 1);
    const std::vector<float> last = run(*decoder, next);
    out.insert(out.end(), last.begin(), last.end());
    return out;
}

void check_against_portable(const Model& model, int count, double allowed, const std::string& where) {
    const std::vector<float> truth = whole_then_one(model, {.kernel = "portable"}, count);
    for (const float value : truth) CHECK(std::isfinite(value), where);
    for (const Kernels* k : fast_kernels()) {
        const double found = difference(whole_then_one(model, {.kernel = k->name}, count), truth);
        CHECK(found < allowed, where + " " + k->name + ": " + std::to_string(found * 1e6) + "e-6");
    }
}

}  // namespace

TEST(decoder_of_every_block_type_agrees_with_portable) {
    for (const char* name : kTypeNames) {
        const BlockType& type = *find_block_type(name);
        const Model model(tiny_shape(type.inputs), {name});
        check_against_portable(model, 20, is_float(type.packing) ? kAllowedOfFloats : kAllowed, name);
    }
    const Model mixed(tiny_shape(), {"Q4_1", "F32", "Q8_0", "BF16", "Q4_0", "F16", "Q5_1", "Q5_0"}, false);
    check_against_portable(mixed, 20, kAllowed, "mixed");
}

TEST(decoder_of_odd_sizes_agrees_with_portable) {
    struct Odd {
        int hidden, inner, heads, kv_heads, head_dim, vocab;
        const char* type;
    };
    constexpr Odd kOdd[] = {
        {52, 75, 3, 1, 10, 7, "F16"},    {33, 1, 1, 1, 2, 1, "F32"},        {90, 150, 2, 2, 80, 333, "BF16"},
        {64, 96, 4, 4, 16, 17, "Q4_0"},  {128, 96, 3, 1, 64, 15, "Q4_1"},   {96, 64, 4, 2, 80, 100, "Q8_0"},
        {96, 32, 2, 1, 128, 33, "Q5_1"}, {256, 256, 16, 8, 16, 16, "Q4_K"}, {256, 512, 2, 1, 128, 1, "Q6_K"},
    };
    for (const Odd& odd : kOdd) {
        Shape shape = tiny_shape();
        shape.hidden_size = odd.hidden;
        shape.intermediate_size = odd.inner;
        shape.num_heads = odd.heads;
        shape.num_kv_heads = odd.kv_heads;
        shape.head_dim = odd.head_dim;
        shape.vocab_size = odd.vocab;
        shape.num_layers = 2;
        const Model model(shape, {odd.type});
        const std::string where = std::string(odd.type) + " head_dim " + std::to_string(odd.head_dim);
        for (const int count : {1, 35}) {
            check_against_portable(model, count, odd.type[0] == 'Q' ? kAllowed : kAllowedOfFloats, where);
        }
    }
}

TEST(decoder_keeps_its_cache_in_every_type) {
    const Model model(tiny_shape(), {"Q4_0"});
    const std::vector<float> truth = whole_then_one(model, {.kernel = "portable"}, 40);
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
        for (const CacheType type : {CacheType::kF16, CacheType::kBF16, CacheType::kQ8}) {
            const Setting setting{.kernel = (*k)->name, .cache_type = type};
            const double found = difference(whole_then_one(model, setting, 40), truth);
            CHECK(found < (type == CacheType::kF16 ? 1e-3 : 1e-2), std::string((*k)->name) + std::to_string(found));
        }
    }
}

TEST(decoder_does_not_depend_on_threads) {
    // More than two chunks of attention, which a decode step spreads over threads.
    const int count = is_quick() ? 140 : 300;
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
        for (const char* type : {"Q4_0", "F16"}) {
            const Model model(tiny_shape(), {type});
            const std::vector<float> one = whole_then_one(model, {.kernel = (*k)->name, .num_threads = 1}, count);
            for (const int num_threads : {2, 5}) {
                const Setting setting{.kernel = (*k)->name, .num_threads = num_threads};
                const std::vector<float> many = whole_then_one(model, setting, count);
                CHECK(same_bits(one.data(), many.data(), one.size()), (*k)->name);
            }
        }
    }
}

TEST(decoder_does_not_depend_on_how_rows_are_cut) {
    const int count = is_quick() ? 60 : 150;
    const Model model(tiny_shape(), {"Q4_0", "F16", "Q8_0"});
    const std::vector<int32_t> ids = some_ids(model.shape(), count), other = some_ids(model.shape(), count, 9);
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
        for (const CacheType type : {CacheType::kF16, CacheType::kQ8}) {
            const Setting setting{.kernel = (*k)->name, .cache_type = type};
            const std::vector<float> whole = run_whole(*model.decoder(setting), ids);
            const auto decoder = model.decoder(setting);
            std::vector<float> pieces;
            // Beside another sequence whose pieces are as long as ours, which goes first.
            for (int at = 0, length = 1; at < count; at += length, length = std::min(count - at, length * 2 % 29 + 1)) {
                Rows rows;
                rows.add(other, 1, at, length);
                rows.output_rows.clear();
                Rows ours;
                ours.add(ids, 0, at, length);
                for (int i = 0; i < length; ++i) {
                    rows.output_rows.push_back(static_cast<int32_t>(rows.tokens.size()));
                    rows.tokens.push_back(ours.tokens[i]);
                    rows.positions.push_back(ours.positions[i]);
                    rows.sequences.push_back(0);
                }
                const std::vector<float> some = run(*decoder, rows);
                pieces.insert(pieces.end(), some.begin(), some.end());
            }
            CHECK(pieces.size() == whole.size() && same_bits(pieces.data(), whole.data(), whole.size()), (*k)->name);
        }
    }
}

TEST(decoder_reads_from_the_file_what_is_not_packed) {
    const Model model(tiny_shape(), {"Q4_0", "F16", "Q8_0"});
    const std::vector<int32_t> ids = some_ids(model.shape(), 20);
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
        const std::vector<float> packed = run_whole(*model.decoder({.kernel = (*k)->name}), ids);
        const auto decoder = model.decoder({.kernel = (*k)->name, .is_file = true});
        int states = 0;
        for (bool is_packed = false;; is_packed = decoder->pack(1e-9), ++states) {
            const std::vector<float> now = run_whole(*decoder, ids);
            CHECK(same_bits(now.data(), packed.data(), packed.size()), (*k)->name);
            if (is_packed) break;
        }
        CHECK(states == 7 * model.shape().num_layers + 1, std::to_string(states));
    }
}

TEST(decoder_gives_the_rows_that_are_wanted) {
    const Model model(tiny_shape(), {"Q8_0"});
    const size_t vocab = model.shape().vocab_size, hidden = model.shape().hidden_size;
    const std::vector<int32_t> ids = some_ids(model.shape(), 10);
    const auto decoder = model.decoder({});
    const std::vector<float> whole = run_whole(*decoder, ids);
    Rows rows;
    rows.add(ids, 0, 0, 10);
    rows.output_rows.clear();
    CHECK(run(*decoder, rows).empty(), "no row was wanted");
    // More output rows than rows, in any order.
    for (int i = 0; i < 23; ++i) rows.output_rows.push_back(i * 7 % 10);
    const std::vector<float> wanted = run(*decoder, rows);
    for (size_t i = 0; i < rows.output_rows.size(); ++i) {
        CHECK(same_bits(wanted.data() + i * vocab, whole.data() + rows.output_rows[i] * vocab, vocab), "");
    }
    CHECK(run(*decoder, rows, false).size() == rows.output_rows.size() * hidden, "hidden states");
    CHECK(run(*decoder, Rows{}).empty(), "an empty step");
}

}  // namespace minicpm::tests
