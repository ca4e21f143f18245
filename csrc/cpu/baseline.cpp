#include "dispatch.h"

#define LTAT_ISA baseline
#include "kernels.h"
