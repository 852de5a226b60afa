// The vector class of 64-bit ARM with the dot-product instructions of ARMv8.2: 8 rows of a tile at a time. neon.cpp and
// i8mm.cpp include this inside their anonymous namespaces, each compiled for its own instruction set.
//
// Codes meet the two signed byte halves of the activations in SDOT, four inputs of four rows at once, the four
// activations taken from one lane of a register.

struct Neon {
    static constexpr int kLanes = 8;
    static constexpr bool kIntegers = true;
    static constexpr bool kSideBySide = false;
    static constexpr Form kCodes8Form = Form::kHalves;
    static constexpr int kRows = 4;
    static constexpr int kQueries = 4;
    static constexpr int kAccumulators = 8;
    struct F {
        float32x4_t low, high;
    };
    struct I {
        int32x4_t low, high;
    };

    MINICPM_INLINE static F zero() { return set1(0.0f); }
    MINICPM_INLINE static F set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
    MINICPM_INLINE static F broadcast(const float* p) { return {vld1q_dup_f32(p), vld1q_dup_f32(p)}; }
    MINICPM_INLINE static F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
    MINICPM_INLINE static void store(float* p, F x) {
        vst1q_f32(p, x.low);
        vst1q_f32(p + 4, x.high);
    }
    MINICPM_INLINE static F load_first(const float* p, int n) {
        if (n >= kLanes) return load(p);
        float lanes[kLanes] = {};
        for (int i = 0; i < n; ++i) lanes[i] = p[i];
        return load(lanes);
    }
    MINICPM_INLINE static void store_first(float* p, F x, int n) {
        if (n >= kLanes) {
            store(p, x);
            return;
        }
        float lanes[kLanes];
        store(lanes, x);
        for (int i = 0; i < n; ++i) p[i] = lanes[i];
    }

    MINICPM_INLINE static F load_f16(const uint16_t* p) {
        const float16x8_t half = vreinterpretq_f16_u16(vld1q_u16(p));
        return {vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)};
    }
    MINICPM_INLINE static F load_bf16(const uint16_t* p) {
        const uint16x8_t half = vld1q_u16(p);
        return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(half), 16)),
                vreinterpretq_f32_u32(vshll_high_n_u16(half, 16))};
    }
    MINICPM_INLINE static void store_f16(uint16_t* p, F x) {
        vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.low), x.high)));
    }
    // The instruction for this is not part of every processor that has dot products.
    MINICPM_INLINE static uint32x4_t rounded_bf16(float32x4_t x) {
        const uint32x4_t bits = vreinterpretq_u32_f32(x);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t up = vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7FFF));
        const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
        return vbslq_u32(vceqq_f32(x, x), up, quiet);
    }
    MINICPM_INLINE static void store_bf16(uint16_t* p, F x) {
        vst1q_u16(p, vshrn_high_n_u32(vshrn_n_u32(rounded_bf16(x.low), 16), rounded_bf16(x.high), 16));
    }
    MINICPM_INLINE static void store_rounded(int32_t* p, F x) {
        vst1q_s32(p, vcvtnq_s32_f32(x.low));
        vst1q_s32(p + 4, vcvtnq_s32_f32(x.high));
    }
    MINICPM_INLINE static F load_bytes(const uint8_t* p) {
        const uint16x8_t words = vmovl_u8(vld1_u8(p));
        return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(words))), vcvtq_f32_u32(vmovl_high_u16(words))};
    }
    MINICPM_INLINE static F load_signed_bytes(const uint8_t* p) {
        const int16x8_t words = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p)));
        return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words))};
    }

    MINICPM_INLINE static F add(F a, F b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
    MINICPM_INLINE static F sub(F a, F b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
    MINICPM_INLINE static F mul(F a, F b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
    MINICPM_INLINE static F div(F a, F b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
    MINICPM_INLINE static F fma(F a, F b, F c) {
        return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
    }
    MINICPM_INLINE static F max(F a, F b) { return {vmaxq_f32(a.low, b.low), vmaxq_f32(a.high, b.high)}; }
    MINICPM_INLINE static F min(F a, F b) { return {vminq_f32(a.low, b.low), vminq_f32(a.high, b.high)}; }
    MINICPM_INLINE static F abs(F x) { return {vabsq_f32(x.low), vabsq_f32(x.high)}; }
    MINICPM_INLINE static float32x4_t scale_by_power(float32x4_t x, float32x4_t shifted) {
        const uint32x4_t power = vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23);
        return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(x), power));
    }
    MINICPM_INLINE static F scale_by_power(F x, F shifted) {
        return {scale_by_power(x.low, shifted.low), scale_by_power(x.high, shifted.high)};
    }
    MINICPM_INLINE static float first(F x) { return vgetq_lane_f32(x.low, 0); }
    MINICPM_INLINE static float sum(F x) { return vaddvq_f32(vaddq_f32(x.low, x.high)); }
    MINICPM_INLINE static float largest(F x) { return vmaxvq_f32(vmaxq_f32(x.low, x.high)); }

    MINICPM_INLINE static F to_float(I x) { return {vcvtq_f32_s32(x.low), vcvtq_f32_s32(x.high)}; }
    MINICPM_INLINE static int8x16_t load_codes(const uint8_t* p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }

    // Register i: inputs 4 i … 4 i + 3 of four rows; `low` has rows 0 … 3 and `high` 4 … 7.
    struct Codes4 {
        int8x16_t low[8], high[8];
    };
    using Codes8 = Codes4;
    MINICPM_INLINE static Codes4 load4(const uint8_t* codes) {
        Codes4 out;
        const uint8x16_t nibble = vdupq_n_u8(15);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const uint8x16_t low = vld1q_u8(codes + 64 * i), high = vld1q_u8(codes + 64 * i + 16);
            out.low[2 * i] = vreinterpretq_s8_u8(vandq_u8(low, nibble));
            out.high[2 * i] = vreinterpretq_s8_u8(vandq_u8(high, nibble));
            out.low[2 * i + 1] = vreinterpretq_s8_u8(vshrq_n_u8(low, 4));
            out.high[2 * i + 1] = vreinterpretq_s8_u8(vshrq_n_u8(high, 4));
        }
        return out;
    }
    MINICPM_INLINE static Codes8 load8(const uint8_t* codes) {
        Codes8 out;
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            out.low[i] = load_codes(codes + 64 * i);
            out.high[i] = load_codes(codes + 64 * i + 16);
        }
        return out;
    }

    template <int kLane>
    MINICPM_INLINE static void dot_lane(int8x16_t low, int8x16_t high, int8x16_t x, I& sum) {
        sum.low = vdotq_laneq_s32(sum.low, low, x, kLane);
        sum.high = vdotq_laneq_s32(sum.high, high, x, kLane);
    }
    // 16 inputs whose codes begin at `first`.
    MINICPM_INLINE static void dot_inputs(const Codes4& codes, int first, int8x16_t x, I& sum) {
        dot_lane<0>(codes.low[first], codes.high[first], x, sum);
        dot_lane<1>(codes.low[first + 1], codes.high[first + 1], x, sum);
        dot_lane<2>(codes.low[first + 2], codes.high[first + 2], x, sum);
        dot_lane<3>(codes.low[first + 3], codes.high[first + 3], x, sum);
    }
    template <int kBegin, int kEnd>
    MINICPM_INLINE static I dot(const Codes4& codes, const uint8_t* x, int32_t offset) {
        I high{vdupq_n_s32(0), vdupq_n_s32(0)}, low{vdupq_n_s32(offset), vdupq_n_s32(offset)};
#pragma GCC unroll 2
        for (int i = kBegin; i < kEnd; i += 4) {
            dot_inputs(codes, i, load_codes(x + 4 * i), high);
            dot_inputs(codes, i, load_codes(x + 32 + 4 * i), low);
        }
        return {vaddq_s32(vshlq_n_s32(high.low, 8), low.low), vaddq_s32(vshlq_n_s32(high.high, 8), low.high)};
    }
    template <bool kHasOffset>
    MINICPM_INLINE static I dot4(const Codes4& codes, const uint8_t* x, const int32_t* offset) {
        return dot<0, 8>(codes, x, kHasOffset ? *offset : 0);
    }
    // Signed codes have no bias to be undone.
    template <int kBegin, int kEnd>
    MINICPM_INLINE static I dot8(const Codes8& codes, const uint8_t* x, const int32_t*) {
        return dot<kBegin, kEnd>(codes, x, 0);
    }
};
