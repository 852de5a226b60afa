// Products of every kernel and block type, held to sums in double precision.
#include <algorithm>
#include <limits>

#include "random_rows.h"

namespace minicpm::tests {

namespace {

struct Size {
    int rows, inputs;
};

// Rows of one tile less or more, inputs of one block less or more, and no block at all.
std::vector<Size> sizes_for(const BlockType& type) {
    if (type.inputs == 256) return {{1, 256}, {17, 512}};
    if (type.inputs == 32) return {{1, 32}, {15, 64}, {33, 96}, {16, 320}};
    return {{1, 1}, {7, 31}, {16, 64}, {33, 90}};
}

Exact<uint8_t> prepare_rows(const Kernels& kernels, Form form, const Exact<float>& x, int rows, int inputs) {
    const size_t stride = prepared_bytes(form, inputs);
    Exact<uint8_t> out(rows * stride);
    for (int row = 0; row < rows; ++row) {
        // A row of its own, so that reading beyond its end is seen.
        Exact<float> one(inputs);
        std::copy_n(x.data() + size_t(row) * inputs, inputs, one.data());
        kernels.prepare(form, one.data(), inputs, out.data() + row * stride);
    }
    return out;
}

Exact<float> multiply(const Kernels& kernels, const Matrix& w, const Exact<float>& x, int rows) {
    const Form form = kernels.form(w.packing);
    const Exact<uint8_t> prepared = prepare_rows(kernels, form, x, rows, w.inputs);
    Exact<float> y(size_t(rows) * w.rows);
    kernels.multiply(w, 0, w.num_tiles(), {prepared.data(), prepared_bytes(form, w.inputs), rows},
                     {y.data(), size_t(w.rows), 1.0f, false});
    return y;
}

// The largest difference to exact sums, as a part of the product of the two vectors' lengths.
double largest_error(const Matrix& w, const Exact<float>& x, int rows, const Exact<float>& y) {
    std::vector<float> weights(w.inputs);
    double worst = 0.0;
    for (int output = 0; output < w.rows; ++output) {
        unpack_row(w, output, weights.data());
        for (int row = 0; row < rows; ++row) {
            double sum = 0.0, w2 = 0.0, x2 = 0.0;
            for (int k = 0; k < w.inputs; ++k) {
                const double a = weights[k], b = x[size_t(row) * w.inputs + k];
                sum += a * b;
                w2 += a * a;
                x2 += b * b;
            }
            const double difference = std::abs(y[size_t(row) * w.rows + output] - sum);
            const double part = difference / (std::sqrt(w2 * x2) + 1e-30);
            if (!(part <= worst)) worst = part;  // NaN stays
        }
    }
    return worst;
}

// Rounding activations to 16 bits costs a 65,000th of the largest in a group (measured: up to 7.2e-6); other sums only
// float32's rounding (6.1e-8).
double allowed_error(const Kernels& kernels, Packing packing) {
    return kernels.form(packing) == Form::kFloat ? 3e-7 : 2e-5;
}

void check_size(const Kernels& kernels, const BlockType& type, Size size, Random& random) {
    const std::string where = std::string(kernels.name) + " " + std::string(type.name) + " " +
                              std::to_string(size.rows) + " × " + std::to_string(size.inputs);
    const Exact<uint8_t> source = random_rows(type, size.rows, size.inputs, random);
    const Packed w = packed(type, source, size.rows, size.inputs);
    constexpr int kMost = 19;  // more than two rounds of any kernel's rows at once, and a rest
    Exact<float> x(size_t(kMost) * size.inputs);
    random.fill(x, -3.0f, 3.0f);
    const Exact<float> all = multiply(kernels, w.matrix, x, kMost);
    const double error = largest_error(w.matrix, x, kMost, all);
    CHECK(error < allowed_error(kernels, type.packing), where + ": error " + std::to_string(error * 1e6) + "e-6");
    for (int rows = 1; rows < kMost; ++rows) {
        const Exact<float> some = multiply(kernels, w.matrix, x, rows);
        CHECK(same_bits(some.data(), all.data(), some.size()), where + ": rows depend on their number");
    }
}

}  // namespace

TEST(products_are_true) {
    Random random(1);
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
        for (const char* name : kTypeNames) {
            const BlockType& type = *find_block_type(name);
            for (const Size size : sizes_for(type)) check_size(**k, type, size, random);
        }
    }
}

// Of kernels that want the same form; what is not finite, very small or zero included.
TEST(prepared_rows_do_not_depend_on_the_kernel) {
    Random random(5);
    const Kernels* const* first = available_kernels();
    while (*first && (*first)->form(Packing::kU4Scale) != Form::kHalves) ++first;
    for (const Kernels* const* other = first; *other; ++other) {
        if ((*other)->form(Packing::kU4Scale) != Form::kHalves) continue;
        for (const int inputs : {1, 31, 64, 90, 128, 200, 576}) {
            Exact<float> x(size_t(5) * inputs);
            random.fill(x, -3.0f, 3.0f);
            for (int i = 0; i < inputs; ++i) x[inputs + i] *= 1e-31f;
            for (int i = 0; i < inputs; ++i) x[2 * inputs + i] *= 1e35f;
            for (int i = inputs / 2; i < inputs; ++i) x[3 * inputs + i] = 0.0f;
            x[5 * inputs - 1] = -std::numeric_limits<float>::infinity();
            const Exact<uint8_t> a = prepare_rows(**first, Form::kHalves, x, 5, inputs);
            const Exact<uint8_t> b = prepare_rows(**other, Form::kHalves, x, 5, inputs);
            const bool is_same = std::memcmp(a.data(), b.data(), a.size()) == 0;
            CHECK(is_same, std::string((*other)->name) + ", " + std::to_string(inputs) + " inputs");
        }
    }
}

TEST(products_of_kernels_that_share_integers_are_equal) {
    const Kernels *one = kernel_by_name("neon-dotprod"), *other = kernel_by_name("neon-i8mm");
    if (!one || !other) return;
    Random random(2);
    for (const char* name : kTypeNames) {
        const BlockType& type = *find_block_type(name);
        const Packed w = packed(type, random_rows(type, 40, 512, random), 40, 512);
        for (const int rows : {1, 2, 3, 4, 9}) {
            Exact<float> x(size_t(rows) * 512);
            random.fill(x, -1.0f, 1.0f);
            const Exact<float> a = multiply(*one, w.matrix, x, rows), b = multiply(*other, w.matrix, x, rows);
            CHECK(same_bits(a.data(), b.data(), a.size()), name);
        }
    }
}

TEST(products_write_only_the_outputs_of_their_tiles) {
    Random random(3);
    constexpr int kOutputs = 45, kInputs = 64, kRows = 5;
    constexpr size_t kStride = kOutputs + 7;
    const BlockType& type = *find_block_type("Q4_0");
    const Packed w = packed(type, random_rows(type, kOutputs, kInputs, random), kOutputs, kInputs);
    Exact<float> x(size_t(kRows) * kInputs);
    random.fill(x, -1.0f, 1.0f);
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
        const Exact<float> whole = multiply(**k, w.matrix, x, kRows);
        const Form form = (*k)->form(type.packing);
        const Exact<uint8_t> prepared = prepare_rows(**k, form, x, kRows, kInputs);
        Exact<float> y((kRows - 1) * kStride + kOutputs);
        std::fill_n(y.data(), y.size(), 100.0f);
        (*k)->multiply(w.matrix, 1, 3, {prepared.data(), prepared_bytes(form, kInputs), kRows},
                       {y.data(), kStride, 0.5f, true});
        for (size_t i = 0; i < y.size(); ++i) {
            const size_t row = i / kStride, output = i % kStride;
            const bool is_written = output >= 16 && output < kOutputs;
            const float expected = is_written ? 100.0f + 0.5f * whole[row * kOutputs + output] : 100.0f;
            CHECK(std::abs(y[i] - expected) <= (is_written ? 1e-4f : 0.0f), std::string((*k)->name));
        }
    }
}

TEST(products_decode_every_half) {
    constexpr int kOutputs = 65536;
    for (const char* name : {"F16", "BF16"}) {
        const BlockType& type = *find_block_type(name);
        Exact<uint8_t> source(kOutputs * 2);
        for (int i = 0; i < kOutputs; ++i) {
            const uint16_t half = static_cast<uint16_t>(i);
            std::memcpy(source.data() + 2 * i, &half, 2);
        }
        const Packed w = packed(type, source, kOutputs, 1);
        Exact<float> one(1);
        one[0] = 1.0f;
        for (const Kernels* const* k = available_kernels(); *k; ++k) {
            const Exact<float> y = multiply(**k, w.matrix, one, 1);
            for (int i = 0; i < kOutputs; ++i) {
                float expected;
                unpack_row(w.matrix, i, &expected);
                CHECK(y[i] == expected || (std::isnan(y[i]) && std::isnan(expected)),
                      std::string((*k)->name) + " " + name + " " + std::to_string(i));
            }
        }
    }
}

TEST(products_of_zero_are_zero_and_what_is_not_finite_shows) {
    Random random(4);
    constexpr int kInputs = 256, kOutputs = 17;
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
        for (const char* name : kTypeNames) {
            const BlockType& type = *find_block_type(name);
            const Packed w = packed(type, random_rows(type, kOutputs, kInputs, random), kOutputs, kInputs);
            const std::string where = std::string((*k)->name) + " " + name;
            for (const float size : {0.0f, 1e-40f}) {
                Exact<float> x(kInputs);
                std::fill_n(x.data(), kInputs, size);
                const Exact<float> y = multiply(**k, w.matrix, x, 1);
                for (size_t i = 0; i < y.size(); ++i) CHECK(std::abs(y[i]) < 1e-36f, where);
            }
            for (const float bad : {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
                Exact<float> x(kInputs);
                random.fill(x, -1.0f, 1.0f);
                // Several of them in one group, and one alone in another.
                for (const int at : {0, 1, 2, 31, 100}) x[at] = bad;
                const Exact<float> y = multiply(**k, w.matrix, x, 1);
                for (size_t i = 0; i < y.size(); ++i) CHECK(!std::isfinite(y[i]), where);
            }
        }
    }
}

}  // namespace minicpm::tests
