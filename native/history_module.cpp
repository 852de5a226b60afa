// What Python sees of the history's codec. Sizes are checked here, bytes where they are read.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <span>
#include <stdexcept>
#include <vector>

#include "history/codec.h"
#include "modules.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace minicpm::history {

namespace {

template <class T>
using In = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

std::span<const uint8_t> span_of(const nb::bytes& bytes) {
    return {static_cast<const uint8_t*>(bytes.data()), bytes.size()};
}

nb::bytes bytes_of(const std::vector<uint8_t>& data) { return nb::bytes(data.data(), data.size()); }

template <class Bits>
Matrix<Bits> matrix_of(size_t num_cells, const Bits* cells, const std::optional<In<Bits>>& before, int64_t columns) {
    if (columns < 1) throw std::invalid_argument("num_columns must be at least 1");
    if (before && before->size() != num_cells) throw std::invalid_argument("before has another size");
    return {cells, before ? before->data() : nullptr, static_cast<int64_t>(num_cells), columns};
}

std::span<const Row> rows_of(const Rows& rows, int64_t count) {
    if (rows.shape(1) != sizeof(Row) || rows.shape(0) != static_cast<size_t>(count)) {
        throw std::invalid_argument("rows does not have three bytes for each row");
    }
    return {reinterpret_cast<const Row*>(rows.data()), rows.shape(0)};
}

Knots knots_of(const In<uint16_t>& within) {
    if (within.size() != kNumKnots) throw std::invalid_argument("within does not have one entry for each knot");
    Knots knots;
    std::copy_n(within.data(), kNumKnots, knots.begin());
    return knots;
}

template <class T>
nb::ndarray<nb::numpy, T> array_of(std::vector<T> values, std::initializer_list<size_t> shape) {
    auto* kept = new std::vector<T>(std::move(values));
    return nb::ndarray<nb::numpy, T>(
        kept->data(), shape, nb::capsule(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); }));
}

template <class Bits>
nb::tuple fit_cells(const In<Bits>& cells, const std::optional<In<Bits>>& before, int64_t num_columns,
                    double base_error, double coarseness) {
    const Matrix<Bits> matrix = matrix_of(cells.size(), cells.data(), before, num_columns);
    Plan plan;
    {
        const nb::gil_scoped_release released;
        plan = fit(matrix, base_error, coarseness);
    }
    const auto* rows = reinterpret_cast<const uint8_t*>(plan.rows.data());
    const size_t num_rows = plan.rows.size();
    return nb::make_tuple(array_of(std::vector<uint8_t>(rows, rows + num_rows * sizeof(Row)), {num_rows, sizeof(Row)}),
                          array_of(std::move(plan.columns), {static_cast<size_t>(num_columns)}),
                          array_of(std::vector<uint16_t>(plan.within.begin(), plan.within.end()), {kNumKnots}));
}

template <class Bits>
nb::tuple encode_cells(const In<Bits>& cells, const std::optional<In<Bits>>& before, const Rows& rows,
                       const In<int8_t>& columns, const In<uint16_t>& within, const Out<Bits>& base) {
    const Matrix<Bits> matrix = matrix_of(cells.size(), cells.data(), before, static_cast<int64_t>(columns.size()));
    if (base.size() != cells.size()) throw std::invalid_argument("base has another size than cells");
    const auto row_span = rows_of(rows, matrix.num_rows());
    const Knots knots = knots_of(within);
    Layers layers;
    {
        const nb::gil_scoped_release released;
        layers = encode(matrix, row_span, {columns.data(), columns.size()}, knots, base.data());
    }
    return nb::make_tuple(bytes_of(layers.base), bytes_of(layers.refinement));
}

template <class Bits>
void decode_cells(const nb::bytes& base_layer, const std::optional<nb::bytes>& refinement,
                  const std::optional<In<Bits>>& before, const Rows& rows, const In<int8_t>& columns,
                  const In<uint16_t>& within, const Out<Bits>& base, const std::optional<Out<Bits>>& exact) {
    const Matrix<Bits> matrix = matrix_of<Bits>(base.size(), nullptr, before, static_cast<int64_t>(columns.size()));
    if (refinement.has_value() != exact.has_value() || (exact && exact->size() != base.size())) {
        throw std::invalid_argument("exact comes with a refinement and has the size of base");
    }
    const auto row_span = rows_of(rows, matrix.num_rows());
    const Knots knots = knots_of(within);
    const auto coded = span_of(base_layer);
    const auto open = refinement ? span_of(*refinement) : std::span<const uint8_t>();
    const nb::gil_scoped_release released;
    decode(matrix, row_span, {columns.data(), columns.size()}, knots, coded, open, base.data(),
           exact ? exact->data() : nullptr);
}

template <class Bits>
void add_functions(nb::module_& m) {
    m.def("fit_cells", &fit_cells<Bits>, "cells"_a, "before"_a.none(), "num_columns"_a, "base_error"_a, "coarseness"_a);
    m.def("encode_cells", &encode_cells<Bits>, "cells"_a, "before"_a.none(), "rows"_a, "columns"_a, "within"_a,
          "base"_a);
    m.def("decode_cells", &decode_cells<Bits>, "base_layer"_a, "refinement"_a.none(), "before"_a.none(), "rows"_a,
          "columns"_a, "within"_a, "base"_a, "exact"_a.none());
}

}  // namespace

void add_to(nb::module_& m) {
    add_functions<uint16_t>(m);
    add_functions<uint32_t>(m);
}

}  // namespace minicpm::history
