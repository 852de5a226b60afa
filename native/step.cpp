// One step through the graph. Every parallel region hands out whole output rows or whole attention heads, so that no
// sum depends on which thread took which task.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "decoder.h"

namespace minicpm {

namespace {

using Clock = std::chrono::steady_clock;

// Asking takes the interpreter's lock, so it is done rarely; a step that is shorter is never held up.
constexpr std::chrono::milliseconds kInterruptInterval{50};
// Fewer rows than this are cheaper done by the caller than handed out.
constexpr int kRowsWorthSharing = 8;
// Tasks per thread of a product: enough that a slow core takes fewer, few enough that claiming them costs nothing.
constexpr int kTasksPerThread = 16;

}  // namespace

template <class Body>
void Decoder::each_row(int rows, const Body& body) {
    if (rows >= kRowsWorthSharing) {
        pool_.run(rows, body);
    } else {
        for (int row = 0; row < rows; ++row) body(row);
    }
}

void Decoder::prepare(const float* x, int inputs, int rows, const std::vector<float>* norm,
                      std::initializer_list<const Matrix*> matrices) {
    bool wanted[3] = {};
    for (const Matrix* matrix : matrices) wanted[static_cast<int>(kernels_.form(matrix->packing))] = true;
    each_row(rows, [&](int row) {
        const float* from = x + size_t(row) * inputs;
        if (norm) {
            float* to = normed_.data() + size_t(row) * inputs;
            kernels_.rms_norm(from, norm->data(), inputs, shape_.rms_norm_eps, to);
            from = to;
        }
        for (const Form form : {Form::kFloat, Form::kHalves, Form::kWords}) {
            const int i = static_cast<int>(form);
            if (wanted[i]) {
                kernels_.prepare(form, from, inputs, prepared_[i].data() + row * prepared_bytes(form, inputs));
            }
        }
    });
}

Prepared Decoder::prepared(const Matrix& matrix, int rows) const {
    const Form form = kernels_.form(matrix.packing);
    return {prepared_[static_cast<int>(form)].data(), prepared_bytes(form, matrix.inputs), rows};
}

void Decoder::multiply(std::initializer_list<Product> products, int rows) {
    int total = 0;
    for (const Product& product : products) total += product.matrix->num_tiles();
    const int share = std::max(1, total / (num_threads() * kTasksPerThread));
    pool_.run((total + share - 1) / share, [&](int task) {
        int begin = task * share, end = std::min(total, begin + share);
        for (const Product& product : products) {
            const int tiles = product.matrix->num_tiles();
            if (begin < tiles && end > 0) {
                multiply_tiles(*product.matrix, std::max(begin, 0), std::min(end, tiles),
                               prepared(*product.matrix, rows), product.output);
            }
            begin -= tiles;
            end -= tiles;
        }
    });
}

void Decoder::embed(const Step& step) {
    const size_t half = shape_.head_dim / 2;
    const bool is_shared = step.frequencies.size() == half;
    each_row(static_cast<int>(step.tokens.size()), [&](int row) {
        float* hidden = hidden_.data() + size_t(row) * shape_.hidden_size;
        read_row(embedding_, step.tokens[row], hidden);
        for (int i = 0; i < shape_.hidden_size; ++i) hidden[i] *= shape_.scale_emb;
        float* cosines = angles_.data() + size_t(row) * shape_.head_dim;
        const float* frequencies = step.frequencies.data() + (is_shared ? 0 : step.sequences[row] * half);
        for (size_t i = 0; i < half; ++i) {
            // The angle is rounded to float32 as everywhere else; its cosine is not.
            const double angle = static_cast<float>(step.positions[row]) * frequencies[i];
            cosines[i] = static_cast<float>(std::cos(angle));
            cosines[half + i] = static_cast<float>(std::sin(angle));
        }
    });
}

const int32_t* Decoder::table_of(const Step& step, const Tile& tile) {
    return step.block_tables.data() + size_t(tile.sequence) * step.max_blocks;
}

void Decoder::write_attended(int row, int query_head, const Partial& partial) {
    float* out = attended_.data() + size_t(row) * shape_.query_size() + size_t(query_head) * shape_.head_dim;
    const float factor = 1.0f / partial.total;
    for (int i = 0; i < shape_.head_dim; ++i) out[i] = partial.values[i] * factor;
}

// What task `index` of `attention` reads first; nothing, if there is no such task.
Ahead Decoder::ahead_of(const Step& step, int layer, int index) const {
    const int heads = shape_.num_kv_heads;
    if (index >= static_cast<int>(tasks_.size()) * heads) return {};
    const Task& task = tasks_[index / heads];
    return ahead_of(step, layer, tiles_[task.tile], std::max(task.chunk, 0), index % heads);
}

Ahead Decoder::ahead_of(const Step& step, int layer, const Tile& tile, int chunk, int head) const {
    const int begin = chunk * kChunkPositions, end = std::min(tile.limit, begin + kChunkPositions);
    return Ahead::of(cache_of(layer), table_of(step, tile), head, begin, end);
}

// Task `index`: attends with the queries of one tile that share a kv head, to one chunk or to all, a few queries at a
// time. Heads are counted before chunks, which is how they follow each other in memory.
void Decoder::attend(const Step& step, int layer, int index) {
    constexpr int kBatch = 8;
    const int head = index % shape_.num_kv_heads;
    const Task& task = tasks_[index / shape_.num_kv_heads];
    const Tile& tile = tiles_[task.tile];
    const int width = shape_.head_width(), group = shape_.num_heads / shape_.num_kv_heads;
    const LayerCache cache = cache_of(layer);
    const int32_t* table = table_of(step, tile);
    const int chunks = (tile.limit + kChunkPositions - 1) / kChunkPositions;
    const int count = tile.num_rows * group;
    alignas(64) float memory[2][kBatch][kLargestHeadWidth];
    for (int first = 0; first < count; first += kBatch) {
        const int n = std::min(kBatch, count - first);
        const float* queries[kBatch];
        int limits[kBatch];
        Partial sums[kBatch], nexts[kBatch];
        for (int i = 0; i < n; ++i) {
            const int row = (first + i) / group, query_head = head * group + (first + i) % group;
            queries[i] = queries_.data() + (size_t(tile.first_row + row) * shape_.num_heads + query_head) * width;
            limits[i] = tile.limit - tile.num_rows + row + 1;
            sums[i] = {memory[0][i], 0.0f, 0.0f};
            nexts[i] = {memory[1][i], 0.0f, 0.0f};
        }
        const auto attend_chunk = [&](int chunk, Partial* out) {
            const int begin = chunk * kChunkPositions, end = std::min(tile.limit, begin + kChunkPositions);
            const bool goes_on = task.chunk < 0 && chunk + 1 < chunks;
            Ahead ahead;  // the other queries of a tile find what the first ones asked for
            if (!first)
                ahead = goes_on ? ahead_of(step, layer, tile, chunk + 1, head) : ahead_of(step, layer, index + 1);
            kernels_.attend(cache, table, head, begin, end, queries, limits, n, ahead, out);
        };
        if (task.chunk >= 0) {
            const size_t slot = tile.partial + (size_t(head) * chunks + task.chunk) * count + first;
            for (int i = 0; i < n; ++i) nexts[i].values = partial_values_.data() + (slot + i) * width;
            attend_chunk(task.chunk, nexts);
            for (int i = 0; i < n; ++i) {
                partial_sums_.data()[2 * (slot + i)] = nexts[i].largest;
                partial_sums_.data()[2 * (slot + i) + 1] = nexts[i].total;
            }
            continue;
        }
        for (int chunk = 0; chunk < chunks; ++chunk) {
            attend_chunk(chunk, nexts);
            for (int i = 0; i < n; ++i) kernels_.join(sums[i], nexts[i], width);
        }
        for (int i = 0; i < n; ++i)
            write_attended(tile.first_row + (first + i) / group, head * group + (first + i) % group, sums[i]);
    }
}

void Decoder::join_chunks(const Tile& tile, int head) {
    const int width = shape_.head_width(), group = shape_.num_heads / shape_.num_kv_heads;
    const int chunks = (tile.limit + kChunkPositions - 1) / kChunkPositions;
    const int count = tile.num_rows * group;
    alignas(64) float memory[kLargestHeadWidth];
    for (int i = 0; i < count; ++i) {
        Partial sum{memory, 0.0f, 0.0f};
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const size_t slot = tile.partial + (size_t(head) * chunks + chunk) * count + i;
            const float* sums = partial_sums_.data() + 2 * slot;
            kernels_.join(sum, {partial_values_.data() + slot * width, sums[0], sums[1]}, width);
        }
        write_attended(tile.first_row + i / group, head * group + i % group, sum);
    }
}

// Rotates queries and keys in place, and puts keys and values into the cache.
void Decoder::rotate_and_store(const Step& step, int index) {
    const int width = shape_.head_width(), dim = shape_.head_dim, half = dim / 2;
    const LayerCache cache = cache_of(index);
    each_row(static_cast<int>(step.tokens.size()), [&](int row) {
        const float* cosines = angles_.data() + size_t(row) * dim;
        for (int head = 0; head < shape_.num_heads; ++head) {
            float* query = queries_.data() + (size_t(row) * shape_.num_heads + head) * width;
            kernels_.rotate(query, cosines, cosines + half, dim, shape_.attention_scale);
        }
        const int position = step.positions[row];
        const int32_t* table = step.block_tables.data() + size_t(step.sequences[row]) * step.max_blocks;
        const int block = table[position / cache.block_tokens], offset = position % cache.block_tokens;
        for (int head = 0; head < shape_.num_kv_heads; ++head) {
            const size_t at = (size_t(row) * shape_.num_kv_heads + head) * width;
            kernels_.rotate(keys_.data() + at, cosines, cosines + half, dim, 1.0f);
            kernels_.store(cache, block, head, offset, keys_.data() + at, values_.data() + at);
        }
    });
}

// Moves heads of head_dim that lie side by side to where each has head_width, padded with zeros.
void Decoder::spread_heads(float* rows, int num_rows, int num_heads) {
    const int dim = shape_.head_dim, width = shape_.head_width();
    if (dim == width) return;
    for (int64_t i = int64_t{num_rows} * num_heads - 1; i >= 0; --i) {
        std::memmove(rows + i * width, rows + i * dim, dim * sizeof(float));
        std::fill(rows + i * width + dim, rows + (i + 1) * width, 0.0f);
    }
}

void Decoder::attention(const Step& step, int index) {
    const Layer& layer = layers_[index];
    const int rows = static_cast<int>(step.tokens.size());
    prepare(hidden_.data(), shape_.hidden_size, rows, &layer.input_norm, {&layer.query, &layer.key, &layer.value});
    const size_t query = shape_.query_size(), kv = shape_.kv_size();
    multiply({{&layer.query, {queries_.data(), query, 1.0f, false}},
              {&layer.key, {keys_.data(), kv, 1.0f, false}},
              {&layer.value, {values_.data(), kv, 1.0f, false}}},
             rows);
    spread_heads(queries_.data(), rows, shape_.num_heads);
    spread_heads(keys_.data(), rows, shape_.num_kv_heads);
    spread_heads(values_.data(), rows, shape_.num_kv_heads);
    rotate_and_store(step, index);
    if (index == shape_.num_layers - 1 && step.output_rows.empty()) return;
    const int heads = shape_.num_kv_heads;
    pool_.run(static_cast<int>(tasks_.size()) * heads, [&](int i) { attend(step, index, i); });
    if (num_partials_) {
        pool_.run(static_cast<int>(tiles_.size()) * heads, [&](int i) {
            if (tiles_[i / heads].partial >= 0) join_chunks(tiles_[i / heads], i % heads);
        });
    }
}

// From here on only rows that someone asked for matter: their keys and values are stored.
void Decoder::keep_output_rows(const Step& step) {
    const size_t count = step.output_rows.size(), hidden = shape_.hidden_size, query = shape_.query_size();
    float* kept_hidden = kept_.data();
    float* kept_attended = kept_hidden + count * hidden;
    for (size_t i = 0; i < count; ++i) {
        const size_t row = step.output_rows[i];
        std::copy_n(hidden_.data() + row * hidden, hidden, kept_hidden + i * hidden);
        std::copy_n(attended_.data() + row * query, query, kept_attended + i * query);
    }
    // Output rows may repeat, so there may be more of them than rows of the step.
    std::copy_n(kept_hidden, count * hidden, hidden_.data());
    std::copy_n(kept_attended, count * query, attended_.data());
}

void Decoder::feed_forward(const Layer& layer, int rows) {
    const size_t hidden = shape_.hidden_size, inner = shape_.intermediate_size;
    prepare(attended_.data(), shape_.query_size(), rows, nullptr, {&layer.output});
    multiply({{&layer.output, {hidden_.data(), hidden, shape_.residual_scale, true}}}, rows);
    prepare(hidden_.data(), shape_.hidden_size, rows, &layer.post_norm, {&layer.gate, &layer.up});
    const int tiles = layer.gate.num_tiles();
    const int share = std::max(1, tiles / (num_threads() * kTasksPerThread));
    pool_.run((tiles + share - 1) / share, [&](int task) {
        const int begin = task * share, end = std::min(tiles, begin + share);
        multiply_tiles(layer.gate, begin, end, prepared(layer.gate, rows), {gate_.data(), inner, 1.0f, false});
        multiply_tiles(layer.up, begin, end, prepared(layer.up, rows), {up_.data(), inner, 1.0f, false});
        const int first = begin * kTileRows, last = std::min(shape_.intermediate_size, end * kTileRows);
        kernels_.swiglu(gate_.data() + first, inner, up_.data() + first, inner, rows, last - first);
    });
    prepare(up_.data(), shape_.intermediate_size, rows, nullptr, {&layer.down});
    multiply({{&layer.down, {hidden_.data(), hidden, shape_.residual_scale, true}}}, rows);
}

void Decoder::write_outputs(const Step& step, float* out) {
    const int rows = static_cast<int>(step.output_rows.size());
    if (!step.wants_logits) {
        each_row(rows, [&](int row) {
            const size_t at = size_t(row) * shape_.hidden_size;
            kernels_.rms_norm(hidden_.data() + at, final_norm_.data(), shape_.hidden_size, shape_.rms_norm_eps,
                              out + at);
        });
        return;
    }
    const Matrix& head = head_ ? *head_ : embedding_;
    prepare(hidden_.data(), shape_.hidden_size, rows, &final_norm_, {&head});
    multiply({{&head, {out, size_t(shape_.vocab_size), 1.0f / shape_.logit_divisor, false}}}, rows);
}

void Decoder::step(const Step& step, float* out) {
    const std::lock_guard lock(mutex_);
    check(step);
    if (step.tokens.empty()) return;
    plan(step);
    reserve(step);
    embed(step);
    Clock::time_point asked = Clock::now();
    for (int index = 0; index < shape_.num_layers; ++index) {
        attention(step, index);
        const bool is_last = index == shape_.num_layers - 1;
        if (is_last) keep_output_rows(step);
        const int rows = static_cast<int>(is_last ? step.output_rows.size() : step.tokens.size());
        if (rows) feed_forward(layers_[index], rows);
        if (step.is_interrupted && Clock::now() - asked > kInterruptInterval) {
            if (step.is_interrupted()) throw Interrupted{};
            asked = Clock::now();
        }
    }
    if (!step.output_rows.empty()) write_outputs(step, out);
}

}  // namespace minicpm
