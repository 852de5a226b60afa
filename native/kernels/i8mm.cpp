// ARMv8.6 with 8-bit matrix products (SMMLA: 2 rows × 8 inputs times 8 inputs × 2 columns). The two columns are the
// high and the low bytes of one activation row, so that a register does twice the work of SDOT for any number of rows.
//
// Codes have to be put in pairs of four inputs first, which one row does not earn back: it runs as in neon.cpp. The
// integers are the same, and so are the results, to the last bit.
#include <arm_neon.h>
#include <asm/hwcap.h>
#include <string.h>
#include <sys/auxv.h>

#include "kernels/kernel.h"

namespace minicpm {
extern const Kernels kI8mmKernels;
namespace {

#include "kernels/neon.h"

struct I8mm : Neon {
    // Registers 2 i and 2 i + 1: inputs 8 i … 8 i + 7 of two rows each; `low` has rows 0 … 3 and `high` 4 … 7.
    struct Codes4 {
        int8x16_t low[8], high[8];
    };
    using Codes8 = Codes4;

    // Eight inputs of rows 0 and 1, then of rows 2 and 3.
    MINICPM_INLINE static void pair(int8x16_t first, int8x16_t second, int8x16_t* out) {
        const int32x4_t a = vreinterpretq_s32_s8(first), b = vreinterpretq_s32_s8(second);
        out[0] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
        out[1] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
    }
    MINICPM_INLINE static Codes4 paired(const Neon::Codes4& codes) {
        Codes4 out;
#pragma GCC unroll 4
        for (int i = 0; i < 8; i += 2) {
            pair(codes.low[i], codes.low[i + 1], out.low + i);
            pair(codes.high[i], codes.high[i + 1], out.high + i);
        }
        return out;
    }
    MINICPM_INLINE static Codes4 load4(const uint8_t* codes) { return paired(Neon::load4(codes)); }
    MINICPM_INLINE static Codes8 load8(const uint8_t* codes) { return paired(Neon::load8(codes)); }

    // From the sums {row 0 high, row 0 low, row 1 high, row 1 low} and those of rows 2 and 3: 256 × high + low.
    MINICPM_INLINE static int32x4_t joined(int32x4_t first, int32x4_t second) {
        const int32x4_t shift = vreinterpretq_s32_s64(vdupq_n_s64(8));
        return vpaddq_s32(vshlq_s32(first, shift), vshlq_s32(second, shift));
    }
    template <int kBegin, int kEnd>
    MINICPM_INLINE static I dot(const Codes4& codes, const uint8_t* x) {
        int32x4_t low[2] = {vdupq_n_s32(0), vdupq_n_s32(0)}, high[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
#pragma GCC unroll 2
        for (int i = kBegin; i < kEnd; i += 4) {
            const int64x2_t a = vreinterpretq_s64_s8(load_codes(x + 4 * i));
            const int64x2_t b = vreinterpretq_s64_s8(load_codes(x + 32 + 4 * i));
            const int8x16_t first = vreinterpretq_s8_s64(vzip1q_s64(a, b));
            const int8x16_t second = vreinterpretq_s8_s64(vzip2q_s64(a, b));
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                low[j] = vmmlaq_s32(low[j], codes.low[i + j], first);
                low[j] = vmmlaq_s32(low[j], codes.low[i + 2 + j], second);
                high[j] = vmmlaq_s32(high[j], codes.high[i + j], first);
                high[j] = vmmlaq_s32(high[j], codes.high[i + 2 + j], second);
            }
        }
        return {joined(low[0], low[1]), joined(high[0], high[1])};
    }
    template <bool kHasOffset>
    MINICPM_INLINE static I dot4(const Codes4& codes, const uint8_t* x, const int32_t* offset) {
        const I sum = dot<0, 8>(codes, x);
        if constexpr (!kHasOffset) return sum;
        const int32x4_t zero = vld1q_dup_s32(offset);
        return {vaddq_s32(sum.low, zero), vaddq_s32(sum.high, zero)};
    }
    template <int kBegin, int kEnd>
    MINICPM_INLINE static I dot8(const Codes8& codes, const uint8_t* x, const int32_t*) {
        return dot<kBegin, kEnd>(codes, x);
    }
};

// After the vector classes, which they use.
#include "kernels/body.h"
// After the body, which it uses.
#include "kernels/attention.h"

bool runs_here() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) && (getauxval(AT_HWCAP2) & HWCAP2_I8MM); }

void multiply(const Matrix& w, int tile_begin, int tile_end, const Prepared& x, const Output& y) {
    if (x.rows == 1) {
        Body<Neon>::multiply(w, tile_begin, tile_end, x, y);
    } else {
        Body<I8mm>::multiply(w, tile_begin, tile_end, x, y);
    }
}

constexpr Kernels with_multiply(Kernels kernels, decltype(Kernels::multiply) multiply) {
    kernels.multiply = multiply;
    return kernels;
}

}  // namespace

const Kernels kI8mmKernels = with_multiply(make_kernels<I8mm>("neon-i8mm", runs_here), multiply);

}  // namespace minicpm
