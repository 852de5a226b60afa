// AVX2 with FMA and F16C: 8 rows of a tile at a time. 4-bit codes meet the two byte halves of the activations in
// vpmaddubsw, whose 16-bit sums hold a whole group (8 × 2 × 15 × 128 = 30720); 8-bit codes are widened to words.
#include <immintrin.h>
#include <string.h>

#include "kernels/kernel.h"

namespace minicpm {
extern const Kernels kAvx2Kernels;
namespace {

struct Avx2 {
    static constexpr int kLanes = 8;
    static constexpr bool kIntegers = true;
    static constexpr bool kSideBySide = false;
    static constexpr Form kCodes8Form = Form::kWords;
    static constexpr int kRows = 4;
    static constexpr int kQueries = 4;
    static constexpr int kAccumulators = 8;
    using F = __m256;
    using I = __m256i;

    MINICPM_INLINE static F zero() { return _mm256_setzero_ps(); }
    MINICPM_INLINE static F set1(float x) { return _mm256_set1_ps(x); }
    MINICPM_INLINE static F broadcast(const float* p) { return _mm256_broadcast_ss(p); }
    MINICPM_INLINE static F load(const float* p) { return _mm256_loadu_ps(p); }
    MINICPM_INLINE static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    MINICPM_INLINE static I mask(int n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    MINICPM_INLINE static F load_first(const float* p, int n) {
        return n >= kLanes ? load(p) : _mm256_maskload_ps(p, mask(n));
    }
    MINICPM_INLINE static void store_first(float* p, F x, int n) {
        if (n >= kLanes) {
            store(p, x);
        } else {
            _mm256_maskstore_ps(p, mask(n), x);
        }
    }
    MINICPM_INLINE static __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
    MINICPM_INLINE static __m128i load64(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
    MINICPM_INLINE static F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(load128(p)); }
    MINICPM_INLINE static F load_bf16(const uint16_t* p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
    }
    MINICPM_INLINE static void store_f16(uint16_t* p, F x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    MINICPM_INLINE static void store_bf16(uint16_t* p, F x) {
        const I bits = _mm256_castps_si256(x);
        const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const I up = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7FFF));
        const I nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const I quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const I high = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
        const I words = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(words));
    }
    MINICPM_INLINE static void store_rounded(int32_t* p, F x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvtps_epi32(x));
    }
    MINICPM_INLINE static F load_bytes(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load64(p))); }
    MINICPM_INLINE static F load_signed_bytes(const uint8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load64(p)));
    }

    MINICPM_INLINE static F add(F a, F b) { return _mm256_add_ps(a, b); }
    MINICPM_INLINE static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    MINICPM_INLINE static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    MINICPM_INLINE static F div(F a, F b) { return _mm256_div_ps(a, b); }
    MINICPM_INLINE static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    MINICPM_INLINE static F max(F a, F b) { return _mm256_max_ps(a, b); }
    MINICPM_INLINE static F min(F a, F b) { return _mm256_min_ps(a, b); }
    MINICPM_INLINE static F abs(F x) { return _mm256_andnot_ps(set1(-0.0f), x); }
    MINICPM_INLINE static F scale_by_power(F x, F shifted) {
        const I power = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), power));
    }
    MINICPM_INLINE static float first(F x) { return _mm256_cvtss_f32(x); }
    MINICPM_INLINE static float sum(F x) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
    MINICPM_INLINE static float largest(F x) {
        __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        s = _mm_max_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
    }

    MINICPM_INLINE static F to_float(I x) { return _mm256_cvtepi32_ps(x); }
    MINICPM_INLINE static I load256(const uint8_t* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    MINICPM_INLINE static I broadcast4(const uint8_t* p) {
        int32_t bits;
        memcpy(&bits, p, sizeof bits);
        return _mm256_set1_epi32(bits);
    }

    struct Codes4 {
        I inputs[8];  // 4 inputs of 8 rows each
    };
    MINICPM_INLINE static Codes4 load4(const uint8_t* codes) {
        Codes4 out;
        const I low = _mm256_set1_epi8(15);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const I pair = load256(codes + 64 * i);
            out.inputs[2 * i] = _mm256_and_si256(pair, low);
            out.inputs[2 * i + 1] = _mm256_and_si256(_mm256_srli_epi16(pair, 4), low);
        }
        return out;
    }
    template <bool kHasOffset>
    MINICPM_INLINE static I dot4(const Codes4& codes, const uint8_t* x, const int32_t* offset) {
        I high = _mm256_maddubs_epi16(codes.inputs[0], broadcast4(x));
        I low = _mm256_maddubs_epi16(codes.inputs[0], broadcast4(x + 32));
#pragma GCC unroll 8
        for (int i = 1; i < 8; ++i) {
            high = _mm256_add_epi16(high, _mm256_maddubs_epi16(codes.inputs[i], broadcast4(x + 4 * i)));
            low = _mm256_add_epi16(low, _mm256_maddubs_epi16(codes.inputs[i], broadcast4(x + 32 + 4 * i)));
        }
        const I ones = _mm256_set1_epi16(1);
        const I sum =
            _mm256_add_epi32(_mm256_slli_epi32(_mm256_madd_epi16(high, ones), 8), _mm256_madd_epi16(low, ones));
        return kHasOffset ? _mm256_add_epi32(sum, _mm256_set1_epi32(*offset)) : sum;
    }

    struct Codes8 {
        I inputs[8];
    };
    MINICPM_INLINE static Codes8 load8(const uint8_t* codes) {
        Codes8 out;
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) out.inputs[i] = load256(codes + 64 * i);
        return out;
    }
    template <int kBegin, int kEnd>
    MINICPM_INLINE static I dot8(const Codes8& codes, const uint8_t* x, const int32_t*) {
        I sum = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int i = kBegin; i < kEnd; ++i) {
            const I even = _mm256_srai_epi16(_mm256_slli_epi16(codes.inputs[i], 8), 8);
            const I odd = _mm256_srai_epi16(codes.inputs[i], 8);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, broadcast4(x + 8 * i)));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(odd, broadcast4(x + 8 * i + 4)));
        }
        return sum;
    }
};

#include "kernels/body.h"
// After the body, which it uses.
#include "kernels/attention.h"

bool runs_here() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace

const Kernels kAvx2Kernels = make_kernels<Avx2>("avx2", runs_here);

}  // namespace minicpm
