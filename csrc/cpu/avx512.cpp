#include "kernels.h"

FUSEDOPT_KERNELS(avx512)
