// AMX: tiles of bytes for 16 rows and more, all else as in avx512.cpp. Servers since 2023.
//
// The operating system lends the tiles on request, to the whole process; and before they are trusted, they have to give
// the bits of the vector kernel.
#include <cpuid.h>
#include <immintrin.h>
#include <string.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels/kernel.h"

namespace minicpm {
extern const Kernels kAmxKernels;
namespace {

#include "kernels/avx512.h"
// After the vector class, which they use.
#include "kernels/body.h"
// After the body, which they use.
#include "kernels/amx.h"
#include "kernels/attention.h"

// In assembly, since gcc's intrinsics take no tile's number from a template, and gcc 12's for the configuration says
// that it reads 8 of its 64 bytes: the stores that fill the rest may then be left out.
struct AmxTiles {
    static void configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
    static void release() { asm volatile("tilerelease"); }
    template <int kTile>
    MINICPM_INLINE static void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
    }
    template <int kTile>
    MINICPM_INLINE static void load(const void* from, size_t stride) {
        asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
    }
    template <int kTile>
    MINICPM_INLINE static void store(void* to, size_t stride) {
        asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
    }
    template <int kSums, int kInputs, int kCodes>
    MINICPM_INLINE static void add_products() {
        asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kInputs), "i"(kCodes));
    }
};

bool has_tiles() {
#ifdef __linux__
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
    if ((d & kTile) == 0 || (d & kInt8) == 0) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

// Whether tiles give the bits of the vector kernel for a few random weights of this packing.
template <Packing P>
bool is_true() {
    constexpr int kRows = 16, kInputs = 2 * kBlockInputs;
    alignas(64) uint8_t weights[2 * block_bytes(P)], rows[kRows * prepared_bytes(Form::kHalves, kInputs)];
    alignas(64) float expected[kRows][kTileRows], found[kRows][kTileRows], x[kInputs];
    uint32_t state = 1;
    const auto random = [&] { return (state = state * 1664525u + 1013904223u) >> 16; };
    for (uint8_t& byte : weights) byte = static_cast<uint8_t>(random());
    for (int i = 0; i < 2; ++i) {
        // The halves among the scales: 1 and a little more.
        for (size_t at = 0; at < 64; at += 2) {
            const uint16_t half = static_cast<uint16_t>(0x3C00 | (random() & 255));
            memcpy(weights + i * block_bytes(P) + at, &half, 2);
        }
    }
    for (int row = 0; row < kRows; ++row) {
        for (float& value : x) value = static_cast<float>(static_cast<int>(random() & 0xFFFF) - 32768);
        Body<Avx512>::prepare(Form::kHalves, x, kInputs, rows + row * prepared_bytes(Form::kHalves, kInputs));
    }
    const Matrix w{P, kTileRows, kInputs, weights};
    const Prepared prepared{rows, prepared_bytes(Form::kHalves, kInputs), kRows};
    Body<Avx512>::multiply(w, 0, 1, prepared, {expected[0], kTileRows, 1.0f, false});
    TileProducts<AmxTiles>::multiply(w, 0, 1, prepared, {found[0], kTileRows, 1.0f, false});
    return memcmp(expected, found, sizeof found) == 0;
}

bool runs_here() {
    return has_tiles() && is_true<Packing::kU4Scale>() && is_true<Packing::kS8Scale>() &&
           is_true<Packing::kS8Super16>();
}

constexpr Kernels with_multiply(Kernels kernels, decltype(Kernels::multiply) multiply) {
    kernels.multiply = multiply;
    return kernels;
}

}  // namespace

const Kernels kAmxKernels = with_multiply(make_kernels<Avx512>("amx", runs_here), TileProducts<AmxTiles>::multiply);

}  // namespace minicpm
