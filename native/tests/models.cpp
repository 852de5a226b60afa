#include "models.h"

#include <sys/mman.h>

#include <algorithm>

#include "random_rows.h"

namespace minicpm::tests {

namespace {

// A copy whose pages may be given back and come again, as those of a file.
std::shared_ptr<uint8_t> mapped_copy(const Exact<uint8_t>& data) {
    const size_t bytes = data.size();
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED, "no memory");
    std::copy_n(data.data(), bytes, static_cast<uint8_t*>(memory));
    return {static_cast<uint8_t*>(memory), [bytes](uint8_t* copy) { munmap(copy, bytes); }};
}

}  // namespace

Shape tiny_shape(int block_inputs) {
    Shape shape{};
    const bool is_super = block_inputs == 256;
    shape.hidden_size = is_super ? 256 : 96;
    shape.intermediate_size = is_super ? 512 : 160;
    shape.num_layers = 3;
    shape.num_heads = is_super ? 4 : 6;
    shape.num_kv_heads = 2;
    shape.head_dim = is_super ? 64 : 16;
    shape.vocab_size = 331;
    shape.rms_norm_eps = 1e-5f;
    shape.scale_emb = 12.0f;
    shape.residual_scale = 0.8f;
    shape.logit_divisor = 4.0f;
    shape.attention_scale = 0.25f;
    return shape;
}

Model::Model(const Shape& shape, const std::vector<std::string>& types, bool is_tied, uint64_t seed) : shape_(shape) {
    Random random(seed);
    const auto add = [&](const char* name, int layer, int rows, int columns) {
        const BlockType& type = *find_block_type(types[matrices_.size() % types.size()]);
        CHECK(columns % type.inputs == 0, name);
        matrices_.push_back({name, layer, rows, columns, &type, random_rows(type, rows, columns, random)});
    };
    const auto add_norm = [&](const char* name, int layer) {
        norms_.push_back({name, layer, Exact<float>(shape.hidden_size)});
        random.fill(norms_.back().weight, 0.5f, 1.5f);
    };
    add("embed_tokens", -1, shape.vocab_size, shape.hidden_size);
    if (!is_tied) add("lm_head", -1, shape.vocab_size, shape.hidden_size);
    add_norm("norm", -1);
    for (int layer = 0; layer < shape.num_layers; ++layer) {
        add("q_proj", layer, shape.query_size(), shape.hidden_size);
        add("k_proj", layer, shape.kv_size(), shape.hidden_size);
        add("v_proj", layer, shape.kv_size(), shape.hidden_size);
        add("o_proj", layer, shape.hidden_size, shape.query_size());
        add("gate_proj", layer, shape.intermediate_size, shape.hidden_size);
        add("up_proj", layer, shape.intermediate_size, shape.hidden_size);
        add("down_proj", layer, shape.hidden_size, shape.intermediate_size);
        add_norm("input_layernorm", layer);
        add_norm("post_attention_layernorm", layer);
    }
}

std::unique_ptr<Decoder> Model::decoder(const Setting& setting) const {
    const Kernels* kernels = kernel_by_name(setting.kernel);
    CHECK(kernels, setting.kernel);
    const Cache cache{setting.num_blocks, setting.block_tokens, setting.cache_type};
    auto decoder = std::make_unique<Decoder>(shape_, cache, *kernels, setting.num_threads);
    for (const Weights& m : matrices_) {
        if (setting.is_file) files_.push_back(mapped_copy(m.data));
        const uint8_t* data = setting.is_file ? files_.back().get() : m.data.data();
        decoder->add_matrix(m.name, m.layer, *m.type, data, m.rows, m.columns, setting.is_file);
    }
    if (!setting.is_file) decoder->pack();
    for (const Norm& n : norms_) decoder->set_norm(n.name, n.layer, {n.weight.data(), n.weight.size()});
    return decoder;
}

void Rows::add(const std::vector<int32_t>& ids, int sequence, int position, int count) {
    for (int i = 0; i < count; ++i) {
        output_rows.push_back(static_cast<int32_t>(tokens.size()));
        tokens.push_back(ids[position + i]);
        positions.push_back(position + i);
        sequences.push_back(sequence);
    }
}

std::vector<int32_t> some_ids(const Shape& shape, int count, uint64_t seed) {
    Random random(seed);
    std::vector<int32_t> ids(count);
    for (int32_t& id : ids) id = random.below(shape.vocab_size);
    return ids;
}

std::vector<float> run(Decoder& decoder, const Rows& rows, bool wants_logits, bool (*is_interrupted)()) {
    const Shape& shape = decoder.shape();
    int32_t num_sequences = 1;
    for (const int32_t sequence : rows.sequences) num_sequences = std::max(num_sequences, sequence + 1);
    std::vector<int32_t> tables(size_t(num_sequences) * kMaxBlocks);
    for (size_t i = 0; i < tables.size(); ++i) tables[i] = static_cast<int32_t>(i);
    std::vector<float> frequencies(shape.head_dim / 2);
    for (size_t i = 0; i < frequencies.size(); ++i) {
        frequencies[i] = std::pow(10000.0f, -static_cast<float>(i) / static_cast<float>(frequencies.size()));
    }
    const Step step{rows.tokens, rows.positions,   rows.sequences, tables,        kMaxBlocks,
                    frequencies, rows.output_rows, wants_logits,   is_interrupted};
    const size_t width = wants_logits ? shape.vocab_size : shape.hidden_size;
    Exact<float> out(rows.output_rows.size() * width);
    decoder.step(step, out.data());
    return {out.data(), out.data() + out.size()};
}

std::vector<float> run_whole(Decoder& decoder, const std::vector<int32_t>& ids) {
    Rows rows;
    rows.add(ids, 0, 0, static_cast<int>(ids.size()));
    return run(decoder, rows);
}

double difference(const std::vector<float>& values, const std::vector<float>& truth) {
    CHECK(values.size() == truth.size(), std::to_string(values.size()));
    double squares = 0.0, all = 0.0;
    for (size_t i = 0; i < values.size(); ++i) {
        squares += (double{values[i]} - truth[i]) * (double{values[i]} - truth[i]);
        all += double{truth[i]} * truth[i];
    }
    return std::sqrt(squares / all);
}

}  // namespace minicpm::tests
