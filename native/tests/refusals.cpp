// What the decoder refuses, what an interrupted step leaves behind, and callers who do not wait for each other.
#include <algorithm>
#include <functional>
#include <thread>

#include "models.h"

namespace minicpm::tests {

namespace {

std::string message_of(const std::function<void()>& act) {
    try {
        act();
    } catch (const std::invalid_argument& error) {
        return error.what();
    }
    return "it was not refused";
}

struct Refusal {
    const char* message;
    std::function<void(Rows&)> spoil;
};

bool always() { return true; }

}  // namespace

TEST(refused_steps_name_their_fault_and_change_nothing) {
    const Model model(tiny_shape(), {"Q4_0"});
    const std::vector<int32_t> ids = some_ids(model.shape(), 40);
    const auto decoder = model.decoder({});
    const std::vector<float> before = run_whole(*decoder, ids);
    const Refusal refusals[] = {
        {"outside the vocabulary", [](Rows& rows) { rows.tokens[3] = 331; }},
        {"outside the vocabulary", [](Rows& rows) { rows.tokens[0] = -1; }},
        {"has no block table", [](Rows& rows) { rows.sequences[2] = -1; }},
        {"beyond the block table", [](Rows& rows) { rows.positions[0] = -1; }},
        {"beyond the block table", [](Rows& rows) { rows.positions[0] = kMaxBlocks * 32; }},
        {"consecutive positions", [](Rows& rows) { rows.positions[4] = 7; }},
        {"consecutive positions", [](Rows& rows) { rows.sequences[4] = 1; }},
        {"the same length", [](Rows& rows) { rows.positions.pop_back(); }},
        {"is no row of this step", [](Rows& rows) { rows.output_rows[0] = 40; }},
        {"is no row of this step", [](Rows& rows) { rows.output_rows[0] = -1; }},
        {"is none of", [](Rows& rows) { rows.sequences.assign(40, 4); }},
    };
    for (const Refusal& refusal : refusals) {
        Rows rows;
        rows.add(ids, 0, 0, 40);
        refusal.spoil(rows);
        const std::string message = message_of([&] { run(*decoder, rows); });
        CHECK(message.find(refusal.message) != std::string::npos, message);
    }
    const std::vector<float> after = run_whole(*decoder, ids);
    CHECK(same_bits(before.data(), after.data(), before.size()), "a refused step changed something");
}

TEST(refused_weights_name_their_fault) {
    const Model model(tiny_shape(), {"F32"});
    const auto decoder = model.decoder({});
    const BlockType& type = *find_block_type("Q4_0");
    const Exact<uint8_t> data(16 * 18);
    const Exact<float> norm(95);
    const auto says = [](const char* part, const std::function<void()>& act) {
        const std::string message = message_of(act);
        CHECK(message.find(part) != std::string::npos, message);
    };
    says("no whole number of blocks", [&] { decoder->add_matrix("q_proj", 0, type, data.data(), 16, 33); });
    says("heads of a multiple of 32 rows",
         [&] { decoder->add_matrix("q_proj", 0, type, data.data(), 16, 32, false, 48); });
    says("heads of a multiple of 32 rows",
         [&] { decoder->add_matrix("q_proj", 0, type, data.data(), 16, 32, false, 32); });
    says("no matrix called", [&] { decoder->add_matrix("z_proj", 0, type, data.data(), 16, 32); });
    says("no norm called", [&] { decoder->set_norm("a_norm", 0, {Exact<float>(96).data(), 96}); });
    says("hidden_size weights", [&] { decoder->set_norm("norm", -1, {norm.data(), norm.size()}); });
    bool is_refused = false;
    try {
        decoder->add_matrix("q_proj", 99, type, data.data(), 16, 32);
    } catch (const std::out_of_range&) {
        is_refused = true;
    }
    CHECK(is_refused, "a layer that does not exist");
    CHECK(!find_block_type("Q3_K") && !find_block_type(""), "block types that the engine does not run");
    CHECK(!kernel_by_name("no such kernel"), "a kernel that does not exist");
}

TEST(interrupted_steps_may_be_run_again) {
    Shape shape = tiny_shape();
    shape.num_layers = 12;
    const Model model(shape, {"Q4_0"});
    const Setting setting{.kernel = "portable", .num_threads = 1, .num_blocks = 6 * kMaxBlocks};
    const auto decoder = model.decoder(setting);
    const std::vector<int32_t> ids = some_ids(shape, kMaxBlocks * 32);
    // The decoder asks only when 50 ms have passed: as many rows as that takes.
    for (int num_rows = 32; num_rows <= 6 * kMaxBlocks * 32; num_rows *= 2) {
        Rows rows;
        for (int s = 0; s * kMaxBlocks * 32 < num_rows; ++s) {
            rows.add(ids, s, 0, std::min(num_rows - s * kMaxBlocks * 32, kMaxBlocks * 32));
        }
        rows.output_rows = {31};
        try {
            run(*decoder, rows, true, always);
        } catch (const Interrupted&) {
            const std::vector<float> again = run(*decoder, rows), fresh = run(*model.decoder(setting), rows);
            CHECK(same_bits(again.data(), fresh.data(), fresh.size()), "the interrupted step left something behind");
            return;
        }
    }
    CHECK(false, "no step took long enough to be interrupted");
}

TEST(callers_of_one_decoder_take_turns) {
    const Model model(tiny_shape(), {"Q4_0"});
    constexpr int kCallers = 3;
    const int count = is_quick() ? 12 : 40;
    const std::vector<int32_t> ids = some_ids(model.shape(), count);
    const std::vector<float> truth = run_whole(*model.decoder({}), ids);
    const auto decoder = model.decoder({});
    std::vector<std::vector<float>> found(kCallers);
    std::vector<std::thread> callers;
    for (int s = 0; s < kCallers; ++s) {
        callers.emplace_back([&, s] {
            for (int i = 0; i < count; ++i) {
                Rows rows;
                rows.add(ids, s, i, 1);
                const std::vector<float> row = run(*decoder, rows);
                found[s].insert(found[s].end(), row.begin(), row.end());
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    for (const std::vector<float>& values : found) {
        CHECK(values.size() == truth.size() && same_bits(values.data(), truth.data(), truth.size()), "");
    }
}

}  // namespace minicpm::tests
