#include "kernels.h"

FUSEDOPT_KERNELS(neon)
