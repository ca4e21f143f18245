// One instruction set's build of every CPU kernel. The including file sets LTAT_ISA and, by pragma, the target; it must
// include kernels.h first: an inline function of the standard library compiled for AVX-512 could be the copy that the
// linker keeps for everyone. The anonymous namespace keeps our own apart.
namespace ltat::LTAT_ISA {
namespace {
#include "math.h"

#include "balanced_softmax_kl.h"
#include "igdm.h"
#include "pgd.h"
}  // namespace

#define LTAT_STRING_(name) #name
#define LTAT_STRING(name) LTAT_STRING_(name)
const Kernels table = {LTAT_STRING(LTAT_ISA), pgd_step,    pgd_init, balanced_softmax_kl_forward,
                       balanced_softmax_kl_backward, igdm_forward, igdm_backward};
}  // namespace ltat::LTAT_ISA
