// The CPU kernels of every op, for one instruction set. The including file sets LTAT_ISA and the target (by a pragma).
// It includes dispatch.h before the pragma: otherwise the linker could choose the AVX-512 build of an inline function
// of the standard library for all callers.
#include "balanced_softmax_kl.h"
#include "igdm.h"
#include "pgd.h"
