#include "kernels.h"

#if LTAT_MULTIVERSION
#pragma GCC target("avx2,fma")
#define LTAT_ISA avx2
#include "table.h"
#endif
