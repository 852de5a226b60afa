// Tiny random models, through the same headers as the Python module.
#pragma once

#include <memory>

#include "check.h"
#include "decoder.h"

namespace minicpm::tests {

// All sizes differ and no factor is neutral. `block_inputs` makes widths whole blocks of a block type.
Shape tiny_shape(int block_inputs = 32);

struct Setting {
    const char* kernel = "";
    int num_threads = 2;
    CacheType cache_type = CacheType::kF32;
    int num_blocks = 48;
    int block_tokens = 32;
    bool is_file = false;  // weights as in a mapped file, none of them packed
};

// Weights of a model, from which any number of decoders can be made.
class Model {
  public:
    // Matrices take the types in turn.
    Model(const Shape& shape, const std::vector<std::string>& types, bool is_tied = true, uint64_t seed = 1);
    std::unique_ptr<Decoder> decoder(const Setting& setting) const;
    const Shape& shape() const { return shape_; }

  private:
    struct Weights {
        std::string name;
        int layer, rows, columns;
        const BlockType* type;
        Exact<uint8_t> data;
    };
    struct Norm {
        std::string name;
        int layer;
        Exact<float> weight;
    };
    Shape shape_;
    std::vector<Weights> matrices_;
    std::vector<Norm> norms_;
    mutable std::vector<std::shared_ptr<uint8_t>> files_;
};

// Rows of a step, whose arrays end where they should.
struct Rows {
    std::vector<int32_t> tokens, positions, sequences, output_rows;

    // `count` rows of sequence `sequence` from `position` on; every one is an output row.
    void add(const std::vector<int32_t>& ids, int sequence, int position, int count);
};

std::vector<int32_t> some_ids(const Shape& shape, int count, uint64_t seed = 3);

constexpr int kMaxBlocks = 12;

// Results (M, vocab_size or hidden_size) of one step; sequence s has the blocks s * kMaxBlocks and on.
std::vector<float> run(Decoder& decoder, const Rows& rows, bool wants_logits = true,
                       bool (*is_interrupted)() = nullptr);
// Logits (N, vocab_size) after each of `ids`.
std::vector<float> run_whole(Decoder& decoder, const std::vector<int32_t>& ids);

// The root of the mean square of the differences, as a part of that of `truth`.
double difference(const std::vector<float>& values, const std::vector<float>& truth);

}  // namespace minicpm::tests
