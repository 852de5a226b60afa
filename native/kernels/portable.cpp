// Plain C++ for any processor: weights are decoded to float32 and activations stay float32. The most exact kernel, and
// the slowest. The vector extension of gcc and clang maps 16 floats to whatever the target has.
#include <string.h>

#include "kernels/kernel.h"

namespace minicpm {
extern const Kernels kPortableKernels;
namespace {

struct Portable {
    static constexpr int kLanes = 16;
    static constexpr bool kIntegers = false;
    static constexpr int kRows = 4;
    static constexpr int kQueries = 4;
    static constexpr int kAccumulators = 8;
    typedef float F __attribute__((vector_size(64)));
    typedef int32_t Ints __attribute__((vector_size(64)));

    MINICPM_INLINE static F zero() { return F{}; }
    MINICPM_INLINE static F set1(float x) { return F{} + x; }
    MINICPM_INLINE static F broadcast(const float* p) { return set1(*p); }
    MINICPM_INLINE static F load(const float* p) {
        F x;
        memcpy(&x, p, sizeof x);
        return x;
    }
    MINICPM_INLINE static void store(float* p, F x) { memcpy(p, &x, sizeof x); }
    MINICPM_INLINE static F load_first(const float* p, int n) {
        if (n >= kLanes) return load(p);
        F x = zero();
        for (int i = 0; i < n; ++i) x[i] = p[i];
        return x;
    }
    MINICPM_INLINE static void store_first(float* p, F x, int n) {
        for (int i = 0; i < (n < kLanes ? n : kLanes); ++i) p[i] = x[i];
    }

    MINICPM_INLINE static F from_bits(Ints bits) {
        F x;
        memcpy(&x, &bits, sizeof x);
        return x;
    }
    MINICPM_INLINE static Ints to_bits(F x) {
        Ints bits;
        memcpy(&bits, &x, sizeof x);
        return bits;
    }
    MINICPM_INLINE static Ints widen(const uint16_t* p) {
        Ints x;
        for (int i = 0; i < kLanes; ++i) x[i] = p[i];
        return x;
    }
    // Half to single: shifting the exponent and mantissa into place and multiplying by 2^112 also turns subnormals
    // right.
    MINICPM_INLINE static F load_f16(const uint16_t* p) {
        const Ints half = widen(p);
        const F magnitude = from_bits((half & 0x7FFF) << 13) * set1(0x1p112f);
        const Ints special = (half & 0x7C00) == 0x7C00;
        return from_bits(to_bits(magnitude) | (special & 0x7F800000) | ((half & 0x8000) << 16));
    }
    MINICPM_INLINE static F load_bf16(const uint16_t* p) { return from_bits(widen(p) << 16); }

    MINICPM_INLINE static uint16_t half_of(float x) {
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        const uint32_t sign = bits >> 16 & 0x8000;
        bits &= 0x7FFFFFFF;
        if (bits > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
        if (bits >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);
        if (bits < 0x38800000) {  // subnormal: adding 0.5 leaves units of 2^-24 in the low bits, rounded to even
            float magnitude;
            memcpy(&magnitude, &bits, sizeof bits);
            magnitude += 0.5f;
            memcpy(&bits, &magnitude, sizeof bits);
            return static_cast<uint16_t>(sign | (bits - 0x3F000000));
        }
        return static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13));
    }
    MINICPM_INLINE static void store_f16(uint16_t* p, F x) {
        for (int i = 0; i < kLanes; ++i) p[i] = half_of(x[i]);
    }
    MINICPM_INLINE static void store_bf16(uint16_t* p, F x) {
        const Ints bits = to_bits(x);
        for (int i = 0; i < kLanes; ++i) {
            const auto u = static_cast<uint32_t>(bits[i]);
            p[i] = static_cast<uint16_t>(x[i] != x[i] ? u >> 16 | 0x40 : (u + 0x7FFF + (u >> 16 & 1)) >> 16);
        }
    }

    MINICPM_INLINE static F add(F a, F b) { return a + b; }
    MINICPM_INLINE static F sub(F a, F b) { return a - b; }
    MINICPM_INLINE static F mul(F a, F b) { return a * b; }
    MINICPM_INLINE static F div(F a, F b) { return a / b; }
    MINICPM_INLINE static F fma(F a, F b, F c) { return a * b + c; }
    MINICPM_INLINE static F max(F a, F b) { return a > b ? a : b; }
    MINICPM_INLINE static F min(F a, F b) { return a < b ? a : b; }
    MINICPM_INLINE static F scale_by_power(F x, F shifted) { return from_bits(to_bits(x) + (to_bits(shifted) << 23)); }
    MINICPM_INLINE static float first(F x) { return x[0]; }
    MINICPM_INLINE static float sum(F x) {
        float total = 0.0f;
        for (int i = 0; i < kLanes; ++i) total += x[i];
        return total;
    }
    MINICPM_INLINE static float largest(F x) {
        float most = x[0];
        for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
        return most;
    }

    MINICPM_INLINE static F load_bytes(const uint8_t* p) {
        F x;
        for (int i = 0; i < kLanes; ++i) x[i] = p[i];
        return x;
    }
    MINICPM_INLINE static F load_signed_bytes(const uint8_t* p) {
        F x;
        for (int i = 0; i < kLanes; ++i) x[i] = static_cast<int8_t>(p[i]);
        return x;
    }
    MINICPM_INLINE static F nibbles(const uint8_t* p, int high) {
        F x;
        for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>(p[4 * i] >> 4 * high & 15);
        return x;
    }
    MINICPM_INLINE static F spread_bytes(const uint8_t* p) {
        F x;
        for (int i = 0; i < kLanes; ++i) x[i] = static_cast<int8_t>(p[4 * i]);
        return x;
    }
};

#include "kernels/body.h"
// After the body, which it uses.
#include "kernels/attention.h"

}  // namespace

const Kernels kPortableKernels = make_kernels<Portable>("portable", [] { return true; });

}  // namespace minicpm
