// The decoder graph: embeddings, layers of attention and gated feed-forward, head. One graph for MiniCPM, Llama and
// Granite, which differ in four factors. `step` is the only way in; it works on rows of many sequences at once.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels/kernel.h"
#include "memory.h"
#include "packing.h"
#include "threads.h"

namespace minicpm {

constexpr int kLargestHeadWidth = 512;

struct Shape {
    int hidden_size;
    int intermediate_size;
    int num_layers;
    int num_heads;
    int num_kv_heads;
    int head_dim;
    int vocab_size;
    float rms_norm_eps;
    float scale_emb;
    float residual_scale;
    float logit_divisor;
    float attention_scale;

    int query_size() const { return num_heads * head_dim; }
    int kv_size() const { return num_kv_heads * head_dim; }
    int head_width() const { return static_cast<int>(round_up(head_dim, 16)); }
};

struct Cache {
    int num_blocks;
    int block_tokens;
    CacheType type;
};

struct Layer {
    Matrix query, key, value, output, gate, up, down;
    std::vector<float> input_norm, post_norm;
};

// N rows; a row is one token of one sequence. Rows of one sequence stand together, at consecutive positions.
struct Step {
    std::span<const int32_t> tokens, positions, sequences;  // (N)
    std::span<const int32_t> block_tables;                  // (num_sequences, max_blocks)
    int max_blocks;
    std::span<const float> frequencies;    // (num_sequences, head_dim / 2), or (head_dim / 2) for all
    std::span<const int32_t> output_rows;  // (M)
    bool wants_logits;                     // else the hidden state after the last norm
    bool (*is_interrupted)();              // asked now and then, between layers
};

struct Interrupted {};

class Decoder {
  public:
    Decoder(const Shape& shape, const Cache& cache, const Kernels& kernels, int num_threads);

    // `name` is the last part of the HF name, such as "q_proj", "embed_tokens" or "lm_head"; `layer` is -1 outside
    // layers. `data` must stay where it is until it is packed; if it is a file's, mapped to be read only, `pack` gives
    // its pages back as it goes. Unless `interleaved_width` is 0, rows 2j and 2j + 1 of each head of that width, a
    // multiple of 32, are to become its rows j and j + width / 2.
    void add_matrix(const std::string& name, int layer, const BlockType& type, const uint8_t* data, int rows,
                    int columns, bool is_file = false, int interleaved_width = 0);
    // Packs what was added and is not a file's, and files' matrices for about `seconds`, at least one unless that is 0;
    // returns whether all are packed. Steps run with the others, too, but slower.
    bool pack(double seconds = std::numeric_limits<double>::infinity());
    // Packs on the calling thread only, until all are packed or another thread has called `call`, once for all.
    void pack_until_called();
    void call() { is_called_.store(true); }
    void set_norm(const std::string& name, int layer, std::span<const float> weight);

    // Writes (M, vocab_size) or (M, hidden_size). Throws std::invalid_argument before any work for an index that is out
    // of range, and Interrupted; a step that was interrupted may be run again.
    void step(const Step& step, float* out);

    const Shape& shape() const { return shape_; }
    const Kernels& kernels() const { return kernels_; }
    int num_threads() const { return pool_.num_threads(); }
    size_t weight_bytes() const { return arena_.used_bytes(); }
    size_t cache_bytes() const { return cache_memory_.bytes(); }

    // The keys and values of whole cache blocks, for each block layer after layer: what files of prompts hold.
    size_t block_bytes() const { return size_t(shape_.num_layers) * 2 * cache_of(0).part_bytes(); }
    void read_blocks(std::span<const int32_t> blocks, uint8_t* out);
    void write_blocks(std::span<const int32_t> blocks, const uint8_t* data);

  private:
    // Consecutive rows of one sequence.
    struct Run {
        int first_row, num_rows, sequence, position;
    };
    // Queries of `num_rows` rows of a run that share a kv head. Where chunks are attended to in parallel, each has its
    // own partial results from `partial` on, else `partial` is -1.
    struct Tile {
        int first_row, num_rows, sequence, limit, partial;
    };
    struct Task {
        int tile, chunk;  // chunk -1: all of them
    };
    struct Product {
        const Matrix* matrix;
        Output output;
    };

    struct Source {
        const BlockType* type;
        const uint8_t* data;
        Matrix* matrix;
        bool is_file;
        int interleaved_width;

        size_t row_bytes() const { return size_t(matrix->inputs) / type->inputs * type->bytes; }
        void pack(int tile, uint8_t* out) const;
        Matrix scratch(int tile) const;
    };

    void check(const Step& step);
    void plan(const Step& step);
    void reserve(const Step& step);
    void embed(const Step& step);
    void attention(const Step& step, int index);
    void spread_heads(float* rows, int num_rows, int num_heads);
    void rotate_and_store(const Step& step, int index);
    static const int32_t* table_of(const Step& step, const Tile& tile);
    Ahead ahead_of(const Step& step, int layer, int index) const;
    Ahead ahead_of(const Step& step, int layer, const Tile& tile, int chunk, int head) const;
    void attend(const Step& step, int layer, int index);
    void join_chunks(const Tile& tile, int head);
    void write_attended(int row, int query_head, const Partial& partial);
    void keep_output_rows(const Step& step);
    void feed_forward(const Layer& layer, int rows);
    void write_outputs(const Step& step, float* out);

    template <class Body>
    void each_row(int rows, const Body& body);
    // Prepares rows of x, through a norm if there is one, in every form that the matrices want.
    void prepare(const float* x, int inputs, int rows, const std::vector<float>* norm,
                 std::initializer_list<const Matrix*> matrices);
    void multiply(std::initializer_list<Product> products, int rows);
    Prepared prepared(const Matrix& matrix, int rows) const;
    LayerCache cache_of(int layer) const;
    template <class Copy>
    void each_block_layer(std::span<const int32_t> blocks, const Copy& copy);
    Matrix& find_matrix(const std::string& name, int layer);
    void reserve_weights();
    void pack(const Source& source, bool is_alone);
    const Source& source_of(const Matrix& matrix) const;
    // As the kernel's `multiply` and as `unpack_row`, for matrices that are not packed, too.
    void multiply_tiles(const Matrix& matrix, int begin, int end, const Prepared& x, const Output& y) const;
    void read_row(const Matrix& matrix, int row, float* out) const;

    const Shape shape_;
    const Cache cache_;
    const Kernels& kernels_;
    ThreadPool pool_;
    std::mutex mutex_;
    Arena arena_;
    Region cache_memory_;
    Matrix embedding_;
    std::optional<Matrix> head_;  // none: tied to the embedding
    std::vector<float> final_norm_;
    std::vector<Layer> layers_;
    std::vector<Source> sources_;  // not packed yet
    std::atomic<bool> is_called_{false};

    // The plan of the step that runs.
    std::vector<bool> seen_;
    std::vector<Run> runs_;
    std::vector<Tile> tiles_;
    std::vector<Task> tasks_;
    int num_partials_ = 0;

    // Grown to the largest step so far.
    Buffer<float> hidden_, kept_, normed_, queries_, keys_, values_, attended_, gate_, up_, angles_;
    Buffer<float> partial_values_, partial_sums_;
    Buffer<uint8_t> prepared_[3];
};

}  // namespace minicpm
