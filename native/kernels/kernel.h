// The kernel interface: everything that differs between instruction sets, as one table of function pointers.
//
// How the native part is laid out, from the bottom:
//   kernels/kernel.h    this file: `Matrix` (weights in tiles), `Kernels` (the table), `kernel_by_name`
//   kernels/body.h      every kernel written once over a small vector class `V`
//   kernels/avx2.cpp …  one translation unit per instruction set: defines `V`, compiles the body with its own flags
//   kernels/select.cpp  which tables exist in this build, and which of them this processor can run
//   packing.h           block types of files  ->  tiles; one row of tiles -> floats (the embedding)
//   threads.h memory.h  the thread pool; zeroed memory in huge pages
//   decoder.h           the graph: one step over rows of many sequences (step.cpp); its weights (weights.cpp)
//   module.cpp          what Python sees
//
// To add an instruction set: write kernels/NAME.cpp with a class like those of avx2.cpp, list it in CMakeLists.txt and
// in select.cpp. Every test of the engine then runs it (the variable MINICPM_KERNEL forces a table by name).
//
// The layout of weights is the same for all of them. A matrix is cut into tiles of 16 output rows, a tile into blocks
// of 64 inputs, and inside a block the 16 rows are interleaved so that a 32-bit lane of a vector belongs to one row:
// sums over inputs need no horizontal additions, and a tile serves one activation row or many alike.
//   * 4-bit codes: per 8 inputs 64 bytes; lane r holds inputs 0..3 of row r in the low nibbles, 4..7 in the high ones.
//   * 8-bit codes (signed): per 4 inputs 64 bytes; lane r holds the 4 inputs of row r.
//   * floats: per input 16 values.
// Scales stand in front of a block's codes; `block_header_bytes` says how many bytes they take.
//
// Arithmetic is faithful: activations are rounded to 16-bit integers per group of 32 inputs (or stay float32), products
// are summed exactly in 32-bit integers, and everything else is float32. The order of all additions is fixed, so that a
// row's result depends neither on the number of threads nor on the rows beside it.
#pragma once

#include <cstddef>
#include <cstdint>

// Functions of this header are compiled with different flags in different files; inlined always, none of them can be
// linked into code for another instruction set.
#define MINICPM_INLINE [[gnu::always_inline]] inline

namespace minicpm {

constexpr int kTileRows = 16;
constexpr int kBlockInputs = 64;
constexpr int kGroupInputs = 32;
// Positions of a chunk of attention: softmax is taken per chunk, and chunks are joined in order.
constexpr int kChunkPositions = 128;
constexpr int kLeastBlockTokens = 32;

// How a tile stores its weights; w is a weight, q its code.
enum class Packing : uint8_t {
    kF32,
    kF16,
    kBF16,
    kU4Scale,     // w = (q - 8) s          s fp16 per 32           (Q4_0)
    kU4ScaleMin,  // w = q s + m            s, m fp16 per 32        (Q4_1)
    kU4Super,     // w = q d a - e b        d, e fp16 per 256, a, b 6 bits per 32  (Q4_K)
    kS8Scale,     // w = q s                                        (Q8_0, Q5_0)
    kS8ScaleMin,  // w = q s + m                                    (Q5_1)
    kS8Super,     // w = q d a - e b                                (Q5_K)
    kS8Super16,   // w = q d a              a signed 8 bits per 16  (Q6_K)
};

MINICPM_INLINE constexpr bool is_float(Packing p) { return p <= Packing::kBF16; }
MINICPM_INLINE constexpr bool is_four_bit(Packing p) { return p >= Packing::kU4Scale && p <= Packing::kU4Super; }

MINICPM_INLINE constexpr size_t block_header_bytes(Packing p) {
    if (is_float(p)) return 0;
    return p == Packing::kU4Scale || p == Packing::kS8Scale ? 64 : 128;
}

MINICPM_INLINE constexpr size_t block_bytes(Packing p) {
    if (p == Packing::kF32) return size_t{kBlockInputs} * kTileRows * 4;
    if (is_float(p)) return size_t{kBlockInputs} * kTileRows * 2;
    return block_header_bytes(p) + size_t{kBlockInputs} * kTileRows / (is_four_bit(p) ? 2 : 1);
}

// Weights (rows, inputs) in tiles; rows are padded to tiles and inputs to blocks with zeros.
struct Matrix {
    Packing packing = Packing::kF32;
    int rows = 0;
    int inputs = 0;
    uint8_t* data = nullptr;

    MINICPM_INLINE int num_tiles() const { return (rows + kTileRows - 1) / kTileRows; }
    MINICPM_INLINE int num_blocks() const { return (inputs + kBlockInputs - 1) / kBlockInputs; }
    MINICPM_INLINE size_t tile_bytes() const { return num_blocks() * block_bytes(packing); }
    MINICPM_INLINE size_t bytes() const { return num_tiles() * tile_bytes(); }
    MINICPM_INLINE const uint8_t* tile(int i) const { return data + i * tile_bytes(); }
};

// How one activation row is prepared for a product.
//   kFloat   float32, padded with zeros to whole blocks
//   kHalves  per group of 32: 32 high bytes, 32 low bytes (both signed) of 16-bit integers; then one GroupMeta per
//   group kWords   per group of 32: the integers as words in the order 0 2 1 3, 4 6 5 7, …; then one GroupMeta per
//   group
enum class Form : uint8_t { kFloat, kHalves, kWords };

struct GroupMeta {
    float scale;          // the real value of integer 1
    float sum;            // the sum of the group's real values, as rounded
    int32_t offset;       // -128 × the sum of the group's integers: undoes the bias of unsigned 8-bit codes
    int32_t offset16[2];  // the same for either half of the group
    int32_t offset4;      // -8 × the sum, the zero of 4-bit codes without a minimum
    int32_t padding[2];
};
static_assert(sizeof(GroupMeta) == 32);

// Bytes of one prepared row, a multiple of 64.
MINICPM_INLINE constexpr size_t prepared_bytes(Form form, int inputs) {
    const size_t blocks = (inputs + kBlockInputs - 1) / kBlockInputs;
    return blocks * (form == Form::kFloat ? kBlockInputs * 4 : 2 * (64 + sizeof(GroupMeta)));
}

struct Prepared {
    const uint8_t* data;
    size_t stride;  // bytes from row to row
    int rows;
};

// Where a product goes: y[row * stride + output] = scale * result, added to what is there if `accumulate`.
struct Output {
    float* data;
    size_t stride;
    float scale;
    bool accumulate;
};

// How keys and values are kept. kQ8: signed bytes and one float32 scale for each position and head.
enum class CacheType : uint8_t { kF16, kBF16, kF32, kQ8 };
MINICPM_INLINE constexpr size_t cache_value_bytes(CacheType t) {
    if (t == CacheType::kQ8) return 1;
    return t == CacheType::kF32 ? 4 : 2;
}

// One layer's keys and values. A block holds `block_tokens` positions of every kv head: first keys, for each head
// (head_width, block_tokens) so that a vector holds positions; then values, for each head (block_tokens, head_width).
// head_width is head_dim padded with zeros to 16. With kQ8 the scales of a head's block_tokens positions follow its
// codes.
struct LayerCache {
    uint8_t* data;
    CacheType type;
    int block_tokens;  // a multiple of kLeastBlockTokens
    int num_kv_heads;
    int head_width;
    int num_layers = 1;  // their blocks of one number lie side by side, so that few blocks in use are few pages

    MINICPM_INLINE size_t code_bytes() const { return size_t(head_width) * block_tokens * cache_value_bytes(type); }
    MINICPM_INLINE size_t head_bytes() const {
        return code_bytes() + (type == CacheType::kQ8 ? block_tokens * sizeof(float) : 0);
    }
    MINICPM_INLINE size_t part_bytes() const { return num_kv_heads * head_bytes(); }
    MINICPM_INLINE uint8_t* keys(int block, int head) const {
        return data + block * num_layers * 2 * part_bytes() + head * head_bytes();
    }
    MINICPM_INLINE uint8_t* values(int block, int head) const { return keys(block, head) + part_bytes(); }
    // The scales of what `keys` or `values` returned.
    MINICPM_INLINE float* scales(uint8_t* codes) const { return reinterpret_cast<float*>(codes + code_bytes()); }
};

// What the next call of `attend` will read: pieces of one length, asked for while the call before it works, so that the
// memory is never idle. A hint: it changes no result.
struct Ahead {
    const uint8_t* pieces[2 * kChunkPositions / kLeastBlockTokens];
    int num_pieces = 0;
    size_t piece_bytes = 0;

    // Keys and values of one kv head at positions [begin, end) of a chunk.
    MINICPM_INLINE static Ahead of(const LayerCache& cache, const int32_t* block_table, int head, int begin, int end) {
        Ahead ahead;
        ahead.piece_bytes = cache.head_bytes();
        const int first = begin / cache.block_tokens, last = (end - 1) / cache.block_tokens;
        for (int b = first; b <= last; ++b) ahead.pieces[ahead.num_pieces++] = cache.keys(block_table[b], head);
        for (int b = first; b <= last; ++b) ahead.pieces[ahead.num_pieces++] = cache.values(block_table[b], head);
        return ahead;
    }
};

// Softmax over one chunk for one query: exp-weighted sum of values, its normaliser and the largest score.
struct Partial {
    float* values;  // (head_width)
    float largest;
    float total;
};

// One kernel's functions. All of them run on the calling thread and touch only what they are given.
struct Kernels {
    const char* name;
    bool (*runs_here)();
    Form (*form)(Packing);
    // Rounds x (inputs) into `out`, prepared_bytes(form, inputs).
    void (*prepare)(Form form, const float* x, int inputs, uint8_t* out);
    // Multiplies tiles [tile_begin, tile_end) of `w` with every prepared row.
    void (*multiply)(const Matrix& w, int tile_begin, int tile_end, const Prepared& x, const Output& y);
    // out = x / sqrt(mean(x²) + epsilon) * weight
    void (*rms_norm)(const float* x, const float* weight, int n, float epsilon, float* out);
    // up = silu(gate) * up over `columns` of each row
    void (*swiglu)(const float* gate, size_t gate_stride, float* up, size_t up_stride, int rows, int columns);
    // Rotates the halves of a head (head_dim) in place by the angles whose cosines and sines are given, then scales it.
    void (*rotate)(float* head, const float* cosines, const float* sines, int head_dim, float scale);
    // Writes the key and value of one head at `offset` of a cache block; both are head_width wide.
    void (*store)(const LayerCache& cache, int block, int head, int offset, const float* key, const float* value);
    // Attends with `count` queries (each head_width wide) to positions [begin, min(end, limit of the query)) of one kv
    // head, begin a multiple of kChunkPositions, end - begin <= kChunkPositions; a query that sees none of them gets
    // total 0.
    void (*attend)(const LayerCache& cache, const int32_t* block_table, int head, int begin, int end,
                   const float* const* queries, const int* limits, int count, const Ahead& ahead, Partial* out);
    // Joins the partial `next` to `sum`.
    void (*join)(Partial& sum, const Partial& next, int head_width);
};

// Tables of this build that this processor can run, best first, ended by nullptr.
const Kernels* const* available_kernels();
// The table called `name`, or the best one for an empty name; nullptr if there is none that runs here.
const Kernels* kernel_by_name(const char* name);

}  // namespace minicpm
