#include "dispatch.h"

#if LTAT_MULTIVERSION
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define LTAT_ISA avx512
#include "kernels.h"
#endif
