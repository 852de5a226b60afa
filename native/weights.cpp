// The decoder's weights: packed into memory of their own, or read from the file until there is time for that.
//
// New memory can be dear: a virtual machine may take seconds for what the file's pages, which are there already, give
// at once. So a matrix of a file can be used before it is packed: whoever multiplies with it packs each tile into a
// scratch tile first. The bits are the same.
#include <algorithm>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "decoder.h"

namespace minicpm {

namespace {

using Clock = std::chrono::steady_clock;

// Bytes of a file that one task packs before it gives their pages back.
constexpr size_t kPackedAtOnce = size_t{1} << 20;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

// This thread's room for one tile.
uint8_t* scratch_tile(size_t bytes) {
    thread_local Buffer<uint8_t> memory;
    return memory.reserve(bytes);
}

}  // namespace

// Packs a tile into memory that is zero so far, where there is padding.
void Decoder::Source::pack(int tile, uint8_t* out) const {
    const int first = tile * kTileRows, count = std::min(kTileRows, matrix->rows - first);
    if (!interleaved_width) {
        type->pack_rows(data + first * row_bytes(), row_bytes(), count, *matrix, out);
        return;
    }
    // Half a head is whole tiles, and the rows of one are every other row of the file.
    const int half = interleaved_width / 2, inside = first % interleaved_width;
    const int row = first - inside + 2 * (inside % half) + inside / half;
    type->pack_rows(data + row * row_bytes(), 2 * row_bytes(), count, *matrix, out);
}

// One tile alone, as a matrix of up to 16 rows that holds until this thread asks for the next one.
Matrix Decoder::Source::scratch(int tile) const {
    Matrix alone = *matrix;
    alone.rows = std::min(kTileRows, matrix->rows - tile * kTileRows);
    alone.data = scratch_tile(matrix->tile_bytes());
    const bool is_padded = alone.rows < kTileRows || matrix->inputs % kBlockInputs;
    if (is_padded) std::fill_n(alone.data, matrix->tile_bytes(), uint8_t{0});
    pack(tile, alone.data);
    return alone;
}

Matrix& Decoder::find_matrix(const std::string& name, int layer) {
    static constexpr std::pair<std::string_view, Matrix Layer::*> kOfLayers[] = {
        {"q_proj", &Layer::query},   {"k_proj", &Layer::key}, {"v_proj", &Layer::value},   {"o_proj", &Layer::output},
        {"gate_proj", &Layer::gate}, {"up_proj", &Layer::up}, {"down_proj", &Layer::down},
    };
    if (name == "embed_tokens") return embedding_;
    if (name == "lm_head") return head_ ? *head_ : head_.emplace();
    for (const auto& [known, matrix] : kOfLayers) {
        if (name == known) return layers_.at(layer).*matrix;
    }
    refuse("there is no matrix called " + name);
}

void Decoder::add_matrix(const std::string& name, int layer, const BlockType& type, const uint8_t* data, int rows,
                         int columns, bool is_file, int interleaved_width) {
    const std::lock_guard lock(mutex_);
    if (columns % type.inputs) refuse("a row of " + std::to_string(columns) + " weights is no whole number of blocks");
    if (interleaved_width && (interleaved_width % (2 * kTileRows) || rows % interleaved_width)) {
        refuse("interleaved rows make heads of a multiple of 32 rows");
    }
    Matrix& matrix = find_matrix(name, layer);
    matrix = {type.packing, rows, columns, nullptr};
    // Copies first: they are packed at once.
    const auto first_file = std::find_if(sources_.begin(), sources_.end(), [](const Source& s) { return s.is_file; });
    sources_.insert(is_file ? sources_.end() : first_file, {&type, data, &matrix, is_file, interleaved_width});
}

// Sets room aside for all in one piece.
void Decoder::reserve_weights() {
    size_t bytes = 0;
    for (const Source& source : sources_) bytes += round_up(source.matrix->bytes(), 64);
    arena_.reserve(bytes);
}

void Decoder::pack_until_called() {
    const std::lock_guard lock(mutex_);
    reserve_weights();
    auto next = sources_.begin();
    for (; next != sources_.end() && !is_called_.load(); ++next) pack(*next, true);
    sources_.erase(sources_.begin(), next);
}

bool Decoder::pack(double seconds) {
    const std::lock_guard lock(mutex_);
    const Clock::time_point begin = Clock::now();
    reserve_weights();
    const auto is_over = [&] { return std::chrono::duration<double>(Clock::now() - begin).count() >= seconds; };
    auto next = sources_.begin();
    for (bool is_file_packed = false; next != sources_.end(); ++next) {
        if (next->is_file && (seconds <= 0.0 || (is_file_packed && is_over()))) break;
        pack(*next, false);
        is_file_packed = next->is_file;
    }
    sources_.erase(sources_.begin(), next);
    return sources_.empty();
}

void Decoder::pack(const Source& source, bool is_alone) {
    Matrix matrix = *source.matrix;
    matrix.data = arena_.take(matrix.bytes());
    const size_t row_bytes = source.row_bytes();
    const int tiles = matrix.num_tiles();
    const int most = std::max(1, tiles / (num_threads() * 2));
    const int share = std::clamp(static_cast<int>(kPackedAtOnce / (row_bytes * kTileRows)), 1, most);
    const int tasks = (tiles + share - 1) / share;
    const auto task = [&](int index) {
        const int begin = index * share, end = std::min(tiles, begin + share);
        for (int tile = begin; tile < end; ++tile) source.pack(tile, matrix.data + tile * matrix.tile_bytes());
        if (!source.is_file || source.interleaved_width) return;
        const size_t first = size_t(begin) * kTileRows, last = std::min(matrix.rows, end * kTileRows);
        release_file_pages(source.data + first * row_bytes, (last - first) * row_bytes);
    };
    if (is_alone) {
        for (int index = 0; index < tasks; ++index) task(index);
    } else {
        pool_.run(tasks, task);
    }
    // Interleaved rows of many tasks share pages; elsewhere reading near a seam brings pages of the neighbour back.
    if (source.is_file) release_file_pages(source.data, matrix.rows * row_bytes);
    *source.matrix = matrix;
}

const Decoder::Source& Decoder::source_of(const Matrix& matrix) const {
    return *std::find_if(sources_.begin(), sources_.end(), [&](const Source& s) { return s.matrix == &matrix; });
}

void Decoder::multiply_tiles(const Matrix& matrix, int begin, int end, const Prepared& x, const Output& y) const {
    if (matrix.data) {
        kernels_.multiply(matrix, begin, end, x, y);
        return;
    }
    const Source& source = source_of(matrix);
    for (int tile = begin; tile < end; ++tile) {
        kernels_.multiply(source.scratch(tile), 0, 1, x, {y.data + tile * kTileRows, y.stride, y.scale, y.accumulate});
    }
}

void Decoder::read_row(const Matrix& matrix, int row, float* out) const {
    if (matrix.data) {
        unpack_row(matrix, row, out);
    } else {
        unpack_row(source_of(matrix).scratch(row / kTileRows), row % kTileRows, out);
    }
}

}  // namespace minicpm
