#include "decoder.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace minicpm {

namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

// Rows of a prefill that share the keys of a chunk while these are in the first-level cache.
constexpr int kTileQueries = 32;
// Up to this many rows, a tile's chunks are spread over the threads.
constexpr int kRowsOfDecode = 2;

}  // namespace

Decoder::Decoder(const Shape& shape, const Cache& cache, const Kernels& kernels, int num_threads)
    : shape_(shape), cache_(cache), kernels_(kernels), pool_(num_threads), layers_(shape.num_layers) {
    cache_memory_ = Region(size_t(cache.num_blocks) * shape.num_layers * 2 * cache_of(0).part_bytes());
}

LayerCache Decoder::cache_of(int layer) const {
    LayerCache cache{nullptr,          cache_.type, cache_.block_tokens, shape_.num_kv_heads, shape_.head_width(),
                     shape_.num_layers};
    cache.data = cache_memory_.data() + layer * 2 * cache.part_bytes();
    return cache;
}

void Decoder::set_norm(const std::string& name, int layer, std::span<const float> weight) {
    const std::lock_guard lock(mutex_);
    if (weight.size() != size_t(shape_.hidden_size)) refuse("a norm has hidden_size weights");
    std::vector<float> values(weight.begin(), weight.end());
    if (name == "norm") {
        final_norm_ = std::move(values);
    } else if (name == "input_layernorm") {
        layers_.at(layer).input_norm = std::move(values);
    } else if (name == "post_attention_layernorm") {
        layers_.at(layer).post_norm = std::move(values);
    } else {
        refuse("there is no norm called " + name);
    }
}

void Decoder::check(const Step& step) {
    const size_t rows = step.tokens.size();
    const size_t half = shape_.head_dim / 2;
    const size_t num_sequences = step.max_blocks ? step.block_tables.size() / step.max_blocks : 0;
    if (step.positions.size() != rows || step.sequences.size() != rows) {
        refuse("tokens, positions and sequences need the same length");
    }
    if (step.frequencies.size() != half && step.frequencies.size() != half * num_sequences) {
        refuse("frequencies need one row, or one per sequence");
    }
    seen_.assign(num_sequences, false);
    for (size_t i = 0; i < rows; ++i) {
        const int sequence = step.sequences[i], position = step.positions[i];
        const std::string row = "row " + std::to_string(i) + ": ";
        if (step.tokens[i] < 0 || step.tokens[i] >= shape_.vocab_size) {
            refuse(row + "token " + std::to_string(step.tokens[i]) + " is outside the vocabulary of " +
                   std::to_string(shape_.vocab_size));
        }
        if (sequence < 0 || size_t(sequence) >= num_sequences) {
            refuse(row + "sequence " + std::to_string(sequence) + " has no block table");
        }
        const size_t block = size_t(position) / cache_.block_tokens;
        if (position < 0 || block >= size_t(step.max_blocks)) {
            refuse(row + "position " + std::to_string(position) + " is beyond the block table");
        }
        const bool continues = i && step.sequences[i - 1] == sequence;
        if (continues ? step.positions[i - 1] + 1 != position : seen_[sequence]) {
            refuse(row + "rows of one sequence must stand together at consecutive positions");
        }
        seen_[sequence] = true;
        const size_t first = continues ? block : 0;
        for (size_t b = first; b <= block; ++b) {
            const int id = step.block_tables[sequence * size_t(step.max_blocks) + b];
            if (id < 0 || id >= cache_.num_blocks) {
                refuse(row + "cache block " + std::to_string(id) + " is none of " + std::to_string(cache_.num_blocks));
            }
        }
    }
    for (const int row : step.output_rows) {
        if (row < 0 || size_t(row) >= rows) refuse("output row " + std::to_string(row) + " is no row of this step");
    }
}

void Decoder::plan(const Step& step) {
    runs_.clear();
    tiles_.clear();
    tasks_.clear();
    num_partials_ = 0;
    for (int i = 0; i < static_cast<int>(step.tokens.size()); ++i) {
        if (i && step.sequences[i - 1] == step.sequences[i]) {
            ++runs_.back().num_rows;
        } else {
            runs_.push_back({i, 1, step.sequences[i], step.positions[i]});
        }
    }
    const int group = shape_.num_heads / shape_.num_kv_heads;
    const int tile_rows = group >= kTileQueries ? 1 : kTileQueries / group;
    for (const Run& run : runs_) {
        for (int row = 0; row < run.num_rows; row += tile_rows) {
            const int rows = std::min(tile_rows, run.num_rows - row);
            const int limit = run.position + row + rows;
            const int chunks = (limit + kChunkPositions - 1) / kChunkPositions;
            const bool is_split = run.num_rows <= kRowsOfDecode && chunks > 1;
            const int tile = static_cast<int>(tiles_.size());
            tiles_.push_back({run.first_row + row, rows, run.sequence, limit, is_split ? num_partials_ : -1});
            if (is_split) {
                num_partials_ += chunks * rows * shape_.num_heads;
                for (int chunk = 0; chunk < chunks; ++chunk) tasks_.push_back({tile, chunk});
            } else {
                tasks_.push_back({tile, -1});
            }
        }
    }
}

void Decoder::reserve(const Step& step) {
    // Output rows may repeat.
    const size_t rows = std::max(step.tokens.size(), step.output_rows.size());
    const size_t padded = round_up(std::max({shape_.hidden_size, shape_.intermediate_size, shape_.query_size()}), 64);
    hidden_.reserve(rows * shape_.hidden_size);
    kept_.reserve(step.output_rows.size() * (shape_.hidden_size + shape_.query_size()));
    normed_.reserve(rows * shape_.hidden_size);
    queries_.reserve(rows * shape_.num_heads * shape_.head_width());
    keys_.reserve(rows * shape_.num_kv_heads * shape_.head_width());
    values_.reserve(rows * shape_.num_kv_heads * shape_.head_width());
    attended_.reserve(rows * shape_.query_size());
    gate_.reserve(rows * shape_.intermediate_size);
    up_.reserve(rows * shape_.intermediate_size);
    angles_.reserve(rows * shape_.head_dim);
    partial_values_.reserve(size_t(num_partials_) * shape_.head_width());
    partial_sums_.reserve(size_t(num_partials_) * 2);
    for (const Form form : {Form::kFloat, Form::kHalves, Form::kWords}) {
        prepared_[static_cast<int>(form)].reserve(rows * prepared_bytes(form, static_cast<int>(padded)));
    }
}

}  // namespace minicpm
