#include "kernels.h"

#define LTAT_ISA baseline
#include "table.h"
