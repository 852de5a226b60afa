// What Python sees: `Decoder`, `features`, `find_merges`, `read_bandwidth`, `trim_heap`. Checks of types and shapes are
// here, of values in Decoder.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <stdexcept>
#include <utility>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "bandwidth.h"
#include "decoder.h"
#include "merges.h"
#include "modules.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace minicpm {

namespace {

using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutBytes = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <class Array>
auto span_of(const Array& array) {
    return std::span(array.data(), array.size());
}

const Kernels& find_kernels(const std::string& name) {
    const Kernels* found = kernel_by_name(name.c_str());
    if (!found) {
        std::string known;
        for (const Kernels* const* k = available_kernels(); *k; ++k)
            known += (known.empty() ? "" : ", ") + std::string((*k)->name);
        throw std::invalid_argument("kernel '" + name + "' does not run on this machine; those that do: " + known);
    }
    return *found;
}

CacheType find_cache_type(const std::string& name) {
    if (name == "f16") return CacheType::kF16;
    if (name == "bf16") return CacheType::kBF16;
    if (name == "f32") return CacheType::kF32;
    if (name == "q8") return CacheType::kQ8;
    throw std::invalid_argument("kv_type '" + name + "' is unknown; known: f16, bf16, f32, q8");
}

Shape shape_from(const nb::dict& fields) {
    const auto whole = [&](const char* name) { return nb::cast<int>(fields[name]); };
    const auto real = [&](const char* name) { return nb::cast<float>(fields[name]); };
    const Shape shape{whole("hidden_size"),         whole("intermediate_size"),   whole("num_hidden_layers"),
                      whole("num_attention_heads"), whole("num_key_value_heads"), whole("head_dim"),
                      whole("vocab_size"),          real("rms_norm_eps"),         real("scale_emb"),
                      real("residual_scale"),       real("logit_divisor"),        real("attention_scale")};
    if (shape.head_width() > kLargestHeadWidth) {
        throw std::invalid_argument("head_dim " + std::to_string(shape.head_dim) + " is above the engine's " +
                                    std::to_string(kLargestHeadWidth));
    }
    return shape;
}

Decoder* make_decoder(void* memory, const nb::dict& shape, const std::string& kernel, int num_threads, int num_blocks,
                      int block_tokens, const std::string& cache_type) {
    if (num_threads < 1 || num_threads > 1024) throw std::invalid_argument("num_threads must be 1 to 1024");
    if (num_blocks < 1) throw std::invalid_argument("num_blocks must be at least 1");
    if (block_tokens < kLeastBlockTokens || block_tokens % kLeastBlockTokens)
        throw std::invalid_argument("block_tokens must be a multiple of 32");
    return new (memory) Decoder(shape_from(shape), {num_blocks, block_tokens, find_cache_type(cache_type)},
                                find_kernels(kernel), num_threads);
}

void add_matrix(Decoder& decoder, const std::string& name, int layer, const std::string& block_type, const Bytes& data,
                int columns, bool is_file, int interleaved_width) {
    const BlockType* type = find_block_type(block_type);
    if (!type) throw std::invalid_argument("the engine does not run block type " + block_type);
    if (columns % type->inputs || data.shape(1) != size_t(columns) / type->inputs * type->bytes) {
        throw std::invalid_argument("data does not have the row size of its block type");
    }
    decoder.add_matrix(name, layer, *type, data.data(), static_cast<int>(data.shape(0)), columns, is_file,
                       interleaved_width);
}

bool is_interrupted() {
    const nb::gil_scoped_acquire held;
    return PyErr_CheckSignals() != 0;
}

void run_step(Decoder& decoder, const Ints& tokens, const Ints& positions, const Ints& sequences, const Table& tables,
              const FloatRows& frequencies, const Ints& output_rows, bool wants_logits, const OutRows& out) {
    const Shape& shape = decoder.shape();
    const size_t width = wants_logits ? shape.vocab_size : shape.hidden_size;
    if (out.shape(0) != output_rows.size() || out.shape(1) != width) {
        throw std::invalid_argument("out does not have one row of the right width per output row");
    }
    const Step step{span_of(tokens),      span_of(positions),   span_of(sequences),
                    span_of(tables),      int(tables.shape(1)), span_of(frequencies),
                    span_of(output_rows), wants_logits,         is_interrupted};
    bool interrupted = false;
    {
        const nb::gil_scoped_release released;
        try {
            decoder.step(step, out.data());
        } catch (const Interrupted&) {
            interrupted = true;
        }
    }
    if (interrupted) throw nb::python_error();
}

void check_blocks(const Decoder& decoder, const Ints& blocks, size_t rows, size_t bytes) {
    if (rows != blocks.size() || bytes != decoder.block_bytes()) {
        throw std::invalid_argument("data does not have one row of block_bytes per block");
    }
}

void read_blocks(Decoder& decoder, const Ints& blocks, const OutBytes& out) {
    check_blocks(decoder, blocks, out.shape(0), out.shape(1));
    const nb::gil_scoped_release released;
    decoder.read_blocks(span_of(blocks), out.data());
}

void write_blocks(Decoder& decoder, const Ints& blocks, const Bytes& data) {
    check_blocks(decoder, blocks, data.shape(0), data.shape(1));
    const nb::gil_scoped_release released;
    decoder.write_blocks(span_of(blocks), data.data());
}

nb::dict features() {
    nb::dict result;
    nb::list kernels;
    for (const Kernels* const* k = available_kernels(); *k; ++k) kernels.append((*k)->name);
    result["kernels"] = kernels;
    nb::list sets;
#if defined(__x86_64__)
    __builtin_cpu_init();
#define MINICPM_ASK(name) \
    if (__builtin_cpu_supports(name)) sets.append(name)
    MINICPM_ASK("avx");
    MINICPM_ASK("avx2");
    MINICPM_ASK("fma");
    MINICPM_ASK("f16c");
    MINICPM_ASK("avx512f");
    MINICPM_ASK("avx512bw");
    MINICPM_ASK("avx512vl");
    MINICPM_ASK("avx512vnni");
    MINICPM_ASK("avx512bf16");
#undef MINICPM_ASK
#elif defined(__aarch64__)
    sets.append("neon");
#endif
    result["instruction_sets"] = sets;
    return result;
}

// The code points of every text, one after another, and where each lies.
struct Texts {
    explicit Texts(const nb::list& list) {
        size_t total = 0;
        for (const nb::handle item : list) {
            if (!PyUnicode_Check(item.ptr())) throw nb::type_error("pieces must be texts");
            total += static_cast<size_t>(PyUnicode_GET_LENGTH(item.ptr()));
        }
        points.reserve(total);  // views stay valid
        views.reserve(list.size());
        for (const nb::handle item : list) {
            const size_t begin = points.size();
            const auto length = static_cast<size_t>(PyUnicode_GET_LENGTH(item.ptr()));
            const auto kind = PyUnicode_KIND(item.ptr());
            const void* data = PyUnicode_DATA(item.ptr());
            for (size_t i = 0; i < length; ++i) points.push_back(PyUnicode_READ(kind, data, i));
            views.emplace_back(points.data() + begin, length);
        }
    }

    std::vector<char32_t> points;
    std::vector<std::u32string_view> views;
};

nb::list list_merges(const nb::list& pieces, const std::vector<int32_t>& order, const nb::bytes& is_part) {
    const Texts texts(pieces);
    const size_t count = texts.views.size();
    if (is_part.size() != count) throw std::invalid_argument("is_part must have one byte for each piece");
    for (const int32_t id : order) {
        if (id < 0 || size_t(id) >= count) throw std::invalid_argument("order names a piece that does not exist");
    }
    std::vector<std::pair<int32_t, int32_t>> merges;
    {
        const std::span parts(reinterpret_cast<const uint8_t*>(is_part.c_str()), count);
        const nb::gil_scoped_release released;
        merges = find_merges(texts.views, order, parts);
    }
    nb::list result;
    for (const auto& [left, right] : merges) result.append(nb::make_tuple(pieces[left], pieces[right]));
    return result;
}

// Building a tokenizer leaves tens of megabytes of freed memory that the C library would keep.
void trim_heap() {
#ifdef __GLIBC__
    const nb::gil_scoped_release released;
    malloc_trim(0);
#endif
}

double measure_bandwidth(size_t bytes, int num_threads, int rounds) {
    if (bytes < 1 || num_threads < 1 || rounds < 1) throw std::invalid_argument("all arguments must be at least 1");
    const nb::gil_scoped_release released;
    return read_bandwidth(bytes, num_threads, rounds);
}

}  // namespace

}  // namespace minicpm

NB_MODULE(_native, m) {
    using namespace minicpm;
    m.doc() = "Compiled kernels and the decoder graph of minicpm.";
    m.def("features", &features);
    m.def("find_merges", &list_merges, "pieces"_a, "order"_a, "is_part"_a);
    m.def("trim_heap", &trim_heap);
    m.def("read_bandwidth", &measure_bandwidth, "num_bytes"_a, "num_threads"_a, "rounds"_a = 3);
    history::add_to(m);
    nb::class_<Decoder>(m, "Decoder")
        .def(
            "__init__",
            [](Decoder* memory, const nb::dict& shape, const std::string& kernel, int num_threads, int num_blocks,
               int block_tokens, const std::string& cache_type) {
                make_decoder(memory, shape, kernel, num_threads, num_blocks, block_tokens, cache_type);
            },
            "shape"_a, "kernel"_a, "num_threads"_a, "num_blocks"_a, "block_tokens"_a, "cache_type"_a)
        .def("add_matrix", &add_matrix, "name"_a, "layer"_a, "block_type"_a, "data"_a, "columns"_a, "is_file"_a,
             "interleaved_width"_a)
        .def("pack", nb::overload_cast<double>(&Decoder::pack), "seconds"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("pack_until_called", &Decoder::pack_until_called, nb::call_guard<nb::gil_scoped_release>())
        .def("call", &Decoder::call)
        .def(
            "set_norm",
            [](Decoder& decoder, const std::string& name, int layer, const Floats& weight) {
                decoder.set_norm(name, layer, span_of(weight));
            },
            "name"_a, "layer"_a, "weight"_a)
        .def("step", &run_step, "tokens"_a, "positions"_a, "sequences"_a, "block_tables"_a, "frequencies"_a,
             "output_rows"_a, "wants_logits"_a, "out"_a)
        .def("read_blocks", &read_blocks, "blocks"_a, "out"_a)
        .def("write_blocks", &write_blocks, "blocks"_a, "data"_a)
        .def_prop_ro("block_bytes", &Decoder::block_bytes)
        .def_prop_ro("kernel", [](const Decoder& decoder) { return decoder.kernels().name; })
        .def_prop_ro("num_threads", &Decoder::num_threads)
        .def_prop_ro("weight_bytes", &Decoder::weight_bytes)
        .def_prop_ro("cache_bytes", &Decoder::cache_bytes);
}
