// The elementary functions of csrc/elementary.h over an array, for tests/test_glu.py.
#include "../csrc/elementary.h"

using namespace fusedopt;

extern "C" __attribute__((visibility("default"))) void evaluate(int function, const float* x, float* y, int64_t n) {
  for_each_value<Lanes>(n, [&](int64_t i, int64_t count) {
    const Lanes value = load<Lanes>(x + i, count);
    switch (function) {
      case 0: store(exp_of_negative(-fusedopt::abs(value)), y + i, count); break;
      case 1: store(sigmoid(value).value, y + i, count); break;
      case 2: store(sigmoid(value).rest, y + i, count); break;
      default: store(erf(value), y + i, count);
    }
  });
}
