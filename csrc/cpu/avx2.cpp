#include "dispatch.h"

#if LTAT_MULTIVERSION
#pragma GCC target("avx2,fma")
#define LTAT_ISA avx2
#include "kernels.h"
#endif
