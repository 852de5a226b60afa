// AVX-512 with VNNI: servers since 2019, and many laptops.
#include <immintrin.h>
#include <string.h>

#include "kernels/kernel.h"

namespace minicpm {
extern const Kernels kAvx512Kernels;
namespace {

#include "kernels/avx512.h"
// After the vector class, which they use.
#include "kernels/body.h"
// After the body, which it uses.
#include "kernels/attention.h"

}  // namespace

const Kernels kAvx512Kernels = make_kernels<Avx512>("avx512vnni", has_avx512);

}  // namespace minicpm
