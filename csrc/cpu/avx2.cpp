#include "kernels.h"

FUSEDOPT_KERNELS(avx2)
