// The matrix product of operands rounded to bfloat16. Subnormal ones count as zero, as the instructions have it.
#include "../matmul_kernel.h"

namespace fusedopt {
namespace {

struct Bfloat16 {
  static constexpr int inner = 2;

  static FUSEDOPT_INLINE FloatVector join_along(const float* source) {
    return FloatVector(_mm512_cvtne2ps_pbh(__m512(load(source + lanes)), __m512(load(source))));
  }
  static FUSEDOPT_INLINE FloatVector join_across(const FloatVector* values) {
    const __m512i both = __m512i(_mm512_cvtne2ps_pbh(__m512(values[1]), __m512(values[0])));
    typedef short ShortVector __attribute__((vector_size(64)));
    const ShortVector order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return FloatVector(_mm512_permutexvar_epi16(__m512i(order), both));
  }
  static FUSEDOPT_INLINE FloatVector add_product(FloatVector a, FloatVector b, FloatVector sum) {
    return FloatVector(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
  }
};

}  // namespace

extern const MatmulKernel avx512_bf16_matmul;
const MatmulKernel avx512_bf16_matmul = matmul_tile<Bfloat16>;

}  // namespace fusedopt
