// The vector class of AVX-512 with VNNI: a whole tile at a time. avx512.cpp and amx.cpp include this inside their
// anonymous namespaces.
//
// Codes are unsigned bytes in vpdpbusd, signed ones biased by 128, against the two signed byte halves of the
// activations.

struct Avx512 {
    static constexpr int kLanes = 16;
    static constexpr bool kIntegers = true;
    static constexpr bool kSideBySide = true;
    static constexpr Form kCodes8Form = Form::kHalves;
    static constexpr int kRows = 8;
    static constexpr int kQueries = 8;
    static constexpr int kAccumulators = 16;
    using F = __m512;
    using I = __m512i;

    MINICPM_INLINE static F zero() { return _mm512_setzero_ps(); }
    MINICPM_INLINE static F set1(float x) { return _mm512_set1_ps(x); }
    MINICPM_INLINE static F broadcast(const float* p) { return _mm512_set1_ps(*p); }
    MINICPM_INLINE static F load(const float* p) { return _mm512_loadu_ps(p); }
    MINICPM_INLINE static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    MINICPM_INLINE static __mmask16 mask(int n) {
        return n >= kLanes ? 0xFFFF : static_cast<__mmask16>(n > 0 ? (1u << n) - 1 : 0);
    }
    MINICPM_INLINE static F load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
    MINICPM_INLINE static void store_first(float* p, F x, int n) { _mm512_mask_storeu_ps(p, mask(n), x); }
    MINICPM_INLINE static __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    MINICPM_INLINE static __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
    MINICPM_INLINE static F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(load256(p)); }
    MINICPM_INLINE static F load_bf16(const uint16_t* p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(p)), 16));
    }
    MINICPM_INLINE static void store_f16(uint16_t* p, F x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    MINICPM_INLINE static void store_bf16(uint16_t* p, F x) {
        const I bits = _mm512_castps_si512(x);
        const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const I up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const I rounded = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
    MINICPM_INLINE static void store_rounded(int32_t* p, F x) { _mm512_storeu_si512(p, _mm512_cvtps_epi32(x)); }
    MINICPM_INLINE static F load_bytes(const uint8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load128(p)));
    }
    MINICPM_INLINE static F load_signed_bytes(const uint8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load128(p)));
    }

    MINICPM_INLINE static F add(F a, F b) { return _mm512_add_ps(a, b); }
    MINICPM_INLINE static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    MINICPM_INLINE static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    MINICPM_INLINE static F div(F a, F b) { return _mm512_div_ps(a, b); }
    MINICPM_INLINE static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    MINICPM_INLINE static F max(F a, F b) { return _mm512_max_ps(a, b); }
    MINICPM_INLINE static F min(F a, F b) { return _mm512_min_ps(a, b); }
    MINICPM_INLINE static F abs(F x) { return _mm512_abs_ps(x); }
    MINICPM_INLINE static F scale_by_power(F x, F shifted) {
        const I power = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), power));
    }
    MINICPM_INLINE static float first(F x) { return _mm512_cvtss_f32(x); }
    MINICPM_INLINE static float sum(F x) { return _mm512_reduce_add_ps(x); }
    MINICPM_INLINE static float largest(F x) { return _mm512_reduce_max_ps(x); }

    MINICPM_INLINE static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
    MINICPM_INLINE static I integer_zero() { return _mm512_setzero_si512(); }
    MINICPM_INLINE static I broadcast4(const void* p) {
        int32_t bits;
        memcpy(&bits, p, sizeof bits);
        return _mm512_set1_epi32(bits);
    }

    // Prepares four groups as halves, of which `count` are written; `left` inputs from x on are there, the others are
    // zeros. False, and nothing, if one is not finite.
    MINICPM_INLINE static bool prepare_halves(const float* x, int left, int count, uint8_t* codes, GroupMeta* meta) {
        constexpr float kLargest = 32512.0f;
        F v[8];
        I tops[4];
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
            v[2 * g] = load_first(x + 32 * g, left - 32 * g);
            v[2 * g + 1] = load_first(x + 32 * g + 16, left - 32 * g - 16);
            // As integers, what is not finite is the largest.
            tops[g] = _mm512_max_epi32(_mm512_castps_si512(abs(v[2 * g])), _mm512_castps_si512(abs(v[2 * g + 1])));
        }
        const I pairs = larger(_mm512_unpacklo_epi32(tops[0], tops[1]), _mm512_unpackhi_epi32(tops[0], tops[1]));
        const I others = larger(_mm512_unpacklo_epi32(tops[2], tops[3]), _mm512_unpackhi_epi32(tops[2], tops[3]));
        I most = larger(_mm512_unpacklo_epi64(pairs, others), _mm512_unpackhi_epi64(pairs, others));
        most = larger(most, _mm512_shuffle_i32x4(most, most, 0x4E));
        most = larger(most, _mm512_shuffle_i32x4(most, most, 0xB1));  // those of the four groups, four times
        const __m128i bits = _mm512_castsi512_si128(most);
        if (_mm_movemask_epi8(_mm_cmpgt_epi32(bits, _mm_set1_epi32(0x7F7FFFFF)))) return false;
        const __m128 amax = _mm_castsi128_ps(bits);
        const __m128 is_some = _mm_cmp_ps(amax, _mm_set1_ps(1e-30f), _CMP_GT_OQ);
        const F inverse = _mm512_broadcast_f32x4(_mm_and_ps(is_some, _mm_div_ps(_mm_set1_ps(kLargest), amax)));
        const F inverses[4] = {_mm512_permute_ps(inverse, 0x00), _mm512_permute_ps(inverse, 0x55),
                               _mm512_permute_ps(inverse, 0xAA), _mm512_permute_ps(inverse, 0xFF)};
        // Of a group's 4 × 4 dwords of bytes, after packing, columns are what is wanted side by side.
        const I columns = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        I sums[4];
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
            const I first = _mm512_cvtps_epi32(mul(v[2 * g], inverses[g]));
            const I second = _mm512_cvtps_epi32(mul(v[2 * g + 1], inverses[g]));
            const I words = _mm512_packs_epi32(first, second);
            const I high = _mm512_srai_epi16(_mm512_add_epi16(words, _mm512_set1_epi16(128)), 8);
            const I low = _mm512_srai_epi16(_mm512_slli_epi16(words, 8), 8);
            if (g < count) {
                const I bytes = _mm512_permutexvar_epi32(columns, _mm512_packs_epi16(high, low));
                _mm512_storeu_si512(codes + 64 * g, bytes);
            }
            sums[g] = _mm512_madd_epi16(words, _mm512_set1_epi16(1));
        }
        const I left_sums = joined_pairs(sums[0], sums[1]), right_sums = joined_pairs(sums[2], sums[3]);
        I totals = _mm512_add_epi32(_mm512_shuffle_i32x4(left_sums, right_sums, 0x88),
                                    _mm512_shuffle_i32x4(left_sums, right_sums, 0xDD));
        totals = _mm512_add_epi32(totals, _mm512_shuffle_i32x4(totals, totals, 0xB1));
        alignas(64) int32_t halves[16];
        alignas(16) float scales[4];
        _mm512_store_si512(halves, totals);
        _mm_store_ps(scales, _mm_div_ps(amax, _mm_set1_ps(kLargest)));
        for (int g = 0; g < count; ++g) {
            const int32_t* half = halves + g / 2 * 8 + g % 2 * 2;
            const int32_t sum = half[0] + half[1];
            const float scale = scales[g];
            meta[g] = {scale, static_cast<float>(sum) * scale, -128 * sum, {-128 * half[0], -128 * half[1]}, -8 * sum,
                       {}};
        }
        return true;
    }
    MINICPM_INLINE static I larger(I a, I b) { return _mm512_max_epi32(a, b); }
    // Of each four integers of either, the sums of the two pairs.
    MINICPM_INLINE static I joined_pairs(I a, I b) {
        const F x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
        return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88)),
                                _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xDD)));
    }

    // Inputs 4i .. 4i + 3 of 16 rows, as unsigned bytes.
    MINICPM_INLINE static I codes4(const uint8_t* codes, int i) {
        const I pair = _mm512_load_si512(codes + i / 2 * 64);
        return _mm512_and_si512(i % 2 ? _mm512_srli_epi16(pair, 4) : pair, _mm512_set1_epi8(15));
    }
    MINICPM_INLINE static I codes8(const uint8_t* codes, int i) {
        return _mm512_xor_si512(_mm512_load_si512(codes + i * 64), _mm512_set1_epi8(-128));
    }
    MINICPM_INLINE static I dot(I sum, I codes, const uint8_t* x) {
        return _mm512_dpbusd_epi32(sum, codes, broadcast4(x));
    }
    MINICPM_INLINE static I joined(I high, I low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
};

inline bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
