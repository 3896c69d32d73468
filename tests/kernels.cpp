// Steps every rule in every storage format over fixed data and writes the results, as hexadecimal words, to stdout.
// Two instruction sets agree where their outputs do; `make neon` compares arm64 under qemu with this machine.
// Build with -DFUSEDOPT_ISA=<instruction set> and the matching csrc/cpu/<instruction set>.cpp.
#include <cstdio>
#include <vector>

#include "../csrc/step.h"

#define FUSEDOPT_JOIN(A, B) A##B
#define FUSEDOPT_TABLE(ISA) FUSEDOPT_JOIN(ISA, _kernels)

namespace fusedopt {
extern const Kernels FUSEDOPT_TABLE(FUSEDOPT_ISA);
}

using namespace fusedopt;

namespace {

constexpr int64_t numel = 1203;

uint64_t random_state = 0x9e3779b97f4a7c15u;
uint32_t random_bits() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(random_state >> 33);
}

// Mostly moderate values, some of any exponent, and the special ones.
double random_value(int64_t i, bool is_unsigned) {
  const float special[] = {0.0f, -0.0f, 1e-40f, 3e38f, 65519.0f, 65520.0f, 6e-8f, INFINITY, NAN};
  float value = float(int32_t(random_bits()) - (1 << 30)) / float(1 << 28);
  if (i % 7 == 0) value = float_of(random_bits() << 1);
  if (i % 41 == 0) value = special[i / 41 % 9];
  return is_unsigned ? __builtin_fabsf(value) : value;
}

struct Stored {
  std::vector<char> bytes;
  Operand operand;

  Stored(Storage storage, bool is_unsigned) : bytes(size_t(numel * element_size(storage))) {
    std::vector<double> values(numel);
    for (int64_t i = 0; i < numel; ++i) values[size_t(i)] = random_value(i, is_unsigned);
    encode(storage, values.data(), bytes.data(), numel);
    operand = {bytes.data(), storage, nullptr};
  }

  // Zero's sign and a NaN's payload are free.
  void print() const {
    std::vector<double> values(numel);
    decode(operand.storage, bytes.data(), values.data(), numel);
    for (double value : values) {
      uint64_t word;
      value = value != value ? 12345.678 : value + 0.0;
      std::memcpy(&word, &value, sizeof word);
      std::printf("%llx\n", static_cast<unsigned long long>(word));
    }
  }
};

template <class Rule>
void run(int rule) {
  const Kernels& kernels = FUSEDOPT_TABLE(FUSEDOPT_ISA);
  const Storage formats[] = {Storage::float32, Storage::bfloat16, Storage::float16, Storage::float64};
  for (Storage param : formats)
    for (Storage state : formats) {
      std::vector<double> scalar;
      for (int k = 0; k < Rule::scalars; ++k) scalar.push_back(0.9 / (k + 1));
      Stored p(param, false), g(param, false);
      std::vector<Stored> states;
      for (int k = 0; k < Rule::states; ++k) states.emplace_back(state, true);
      Update update;
      update.numel = numel;
      update.param = p.operand;
      update.grad = g.operand;
      for (int k = 0; k < Rule::states; ++k) update.state[k] = states[size_t(k)].operand;
      update.grad_scale = state == Storage::float32 ? 1 : -0.3;
      update.scalar = scalar.data();
      const auto* table = param == Storage::float64 ? kernels.in_float64 : kernels.in_float32;
      for (int step = 0; step < 3; ++step) table[rule](update, 0, numel);
      std::printf("%s %d %d\n", Rule::name, int(param), int(state));
      p.print();
      for (const Stored& stored : states) stored.print();
    }
}

}  // namespace

int main() {
  int rule = 0;
#define FUSEDOPT_RUN(RULE) run<RULE>(rule++);
  FUSEDOPT_RULES(FUSEDOPT_RUN)
}
