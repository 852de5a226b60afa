// Norms, gates and rotations of every kernel, held to double precision.
#include <algorithm>

#include "check.h"
#include "kernels/kernel.h"

namespace minicpm::tests {

namespace {

// Around the widths of vectors.
constexpr int kWidths[] = {1, 7, 8, 9, 16, 23, 40, 96};

bool is_near(float value, double truth, double bound) {
    return std::abs(value - truth) <= bound * (1 + std::abs(truth));
}

std::string at(const Kernels& kernels, int width, int i) {
    return std::string(kernels.name) + " width " + std::to_string(width) + " index " + std::to_string(i);
}

}  // namespace

TEST(norms_are_true) {
    Random random(5);
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
        for (const int n : kWidths) {
            Exact<float> x(n), weight(n), out(n);
            random.fill(x, -4.0f, 4.0f);
            random.fill(weight, 0.1f, 2.0f);
            double squares = 0.0;
            for (int i = 0; i < n; ++i) squares += double{x[i]} * x[i];
            (*k)->rms_norm(x.data(), weight.data(), n, 1e-5f, out.data());
            for (int i = 0; i < n; ++i) {
                const double truth = x[i] / std::sqrt(squares / n + 1e-5f) * weight[i];
                CHECK(is_near(out[i], truth, 1e-6), at(**k, n, i));
            }
        }
    }
}

TEST(gates_are_true) {
    Random random(6);
    constexpr int kRows = 3;
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
        for (const int n : kWidths) {
            const size_t gate_stride = n + 2, up_stride = n + 5;
            Exact<float> gate((kRows - 1) * gate_stride + n), up((kRows - 1) * up_stride + n), out(up.size());
            random.fill(gate, -20.0f, 20.0f);
            random.fill(up, -2.0f, 2.0f);
            gate[0] = -200.0f;  // beyond the range of the exponential
            gate[n - 1] = 200.0f;
            std::copy_n(up.data(), up.size(), out.data());
            (*k)->swiglu(gate.data(), gate_stride, out.data(), up_stride, kRows, n);
            for (size_t i = 0; i < up.size(); ++i) {
                const size_t row = i / up_stride, column = i % up_stride;
                double truth = up[i];  // between rows nothing is written
                if (column < size_t(n)) {
                    const double g = gate[row * gate_stride + column];
                    truth = g / (1.0 + std::exp(-g)) * up[i];
                }
                CHECK(is_near(out[i], truth, 1e-6), at(**k, n, static_cast<int>(i)));
            }
        }
    }
}

TEST(rotations_are_true) {
    Random random(7);
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
        for (const int head_dim : {2, 10, 16, 64, 80, 128}) {
            const int half = head_dim / 2;
            Exact<float> head(head_dim), cosines(half), sines(half), out(head_dim);
            random.fill(head, -2.0f, 2.0f);
            for (int i = 0; i < half; ++i) {
                const float angle = random.between(0.0f, 6.0f);
                cosines[i] = std::cos(angle);
                sines[i] = std::sin(angle);
            }
            std::copy_n(head.data(), head_dim, out.data());
            (*k)->rotate(out.data(), cosines.data(), sines.data(), head_dim, 0.3f);
            for (int i = 0; i < half; ++i) {
                const double a = head[i], b = head[half + i], c = cosines[i], s = sines[i];
                CHECK(is_near(out[i], 0.3f * (a * c - b * s), 1e-6), at(**k, head_dim, i));
                CHECK(is_near(out[half + i], 0.3f * (b * c + a * s), 1e-6), at(**k, head_dim, half + i));
            }
        }
    }
}

}  // namespace minicpm::tests
