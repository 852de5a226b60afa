#include <string.h>

#include "kernels/kernel.h"

namespace minicpm {

extern const Kernels kPortableKernels;
#ifdef MINICPM_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAmxKernels;
#endif
#ifdef MINICPM_ARM64
extern const Kernels kNeonKernels;
extern const Kernels kI8mmKernels;
#endif

namespace {

struct Available {
    const Kernels* tables[8] = {};

    Available() {
        int n = 0;
#ifdef MINICPM_X86
        if (kAmxKernels.runs_here()) tables[n++] = &kAmxKernels;
        if (kAvx512Kernels.runs_here()) tables[n++] = &kAvx512Kernels;
        if (kAvx2Kernels.runs_here()) tables[n++] = &kAvx2Kernels;
#endif
#ifdef MINICPM_ARM64
        if (kI8mmKernels.runs_here()) tables[n++] = &kI8mmKernels;
        if (kNeonKernels.runs_here()) tables[n++] = &kNeonKernels;
#endif
        tables[n] = &kPortableKernels;
    }
};

}  // namespace

const Kernels* const* available_kernels() {
    static const Available available;
    return available.tables;
}

const Kernels* kernel_by_name(const char* name) {
    for (const Kernels* const* table = available_kernels(); *table; ++table) {
        if (!*name || strcmp(name, (*table)->name) == 0) return *table;
    }
    return nullptr;
}

}  // namespace minicpm
