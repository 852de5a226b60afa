// ARMv8.2 with dot products: nearly every 64-bit ARM processor since 2018.
#include <arm_neon.h>
#include <asm/hwcap.h>
#include <string.h>
#include <sys/auxv.h>

#include "kernels/kernel.h"

namespace minicpm {
extern const Kernels kNeonKernels;
namespace {

#include "kernels/neon.h"
// After the vector class, which they use.
#include "kernels/body.h"
// After the body, which it uses.
#include "kernels/attention.h"

bool runs_here() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }

}  // namespace

const Kernels kNeonKernels = make_kernels<Neon>("neon-dotprod", runs_here);

}  // namespace minicpm
