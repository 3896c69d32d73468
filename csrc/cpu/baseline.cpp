#include "kernels.h"

FUSEDOPT_KERNELS(baseline)
