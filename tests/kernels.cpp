// Runs the kernels of one instruction set over fixed data and writes the results, as hexadecimal words, to stdout.
// Two instruction sets agree where their outputs do; `make neon` compares arm64 under qemu with this machine.
// Build with -DFUSEDOPT_ISA=<instruction set> and the matching csrc/cpu/<instruction set>.cpp.
#include <cstdio>
#include <vector>

#include "../csrc/glu.h"
#include "../csrc/matmul.h"
#include "../csrc/norm.h"
#include "../csrc/rms_norm.h"

#define FUSEDOPT_JOIN(A, B) A##B
#define FUSEDOPT_TABLE(ISA) FUSEDOPT_JOIN(ISA, _kernels)

namespace fusedopt {
extern const Kernels FUSEDOPT_TABLE(FUSEDOPT_ISA);
}

using namespace fusedopt;

namespace {

const Kernels& kernels = FUSEDOPT_TABLE(FUSEDOPT_ISA);

constexpr int64_t numel = 1203;

uint64_t random_state = 0x9e3779b97f4a7c15u;
uint32_t random_bits() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(random_state >> 33);
}

float moderate_value() { return float(int32_t(random_bits()) - (1 << 30)) / float(1 << 28); }

// Mostly moderate values, some of any exponent, and the special ones.
float any_value(int64_t i) {
  const float special[] = {0.0f, -0.0f, 1e-40f, 3e38f, 65519.0f, 65520.0f, 6e-8f, INFINITY, NAN};
  if (i % 41 == 0) return special[i / 41 % 9];
  return i % 7 == 0 ? float_of(random_bits() << 1) : moderate_value();
}

// Where those are: one that is not finite takes a whole block of codes, a row or a sum with it.
enum class Wild { everywhere, in_one_block, nowhere };

// Zero's sign and a NaN's payload are free.
void print(const double* values, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const double value = values[i] != values[i] ? 12345.678 : values[i] + 0.0;
    uint64_t word;
    std::memcpy(&word, &value, sizeof word);
    std::printf("%llx\n", static_cast<unsigned long long>(word));
  }
}

void print(const std::vector<float>& values) {
  const std::vector<double> wide(values.begin(), values.end());
  print(wide.data(), wide.size());
}

bool is_quantized(Storage storage) { return storage == Storage::int8_signed || storage == Storage::int8_unsigned; }
bool is_low(Storage storage) { return storage == Storage::low16 || storage == Storage::low8; }

// A tensor in one piece.
struct Stored {
  std::vector<char> bytes;
  std::vector<float> scales = std::vector<float>((numel + int8_block - 1) / int8_block);
  Storage storage;

  Stored(Storage storage, Wild wild, bool is_unsigned = false)
      : bytes(size_t(numel * element_size(storage))), storage(storage) {
    if (is_low(storage)) return;
    std::vector<float> values(numel);
    for (int64_t i = 0; i < numel; ++i) {
      const bool is_wild = wild == Wild::everywhere || (wild == Wild::in_one_block && i / int8_block == 2);
      const float value = is_wild ? any_value(i) : moderate_value();
      values[size_t(i)] = is_unsigned ? __builtin_fabsf(value) : value;
    }
    for (int64_t at = 0; at < numel; at += block_size)
      encode(storage, values.data() + at, bytes.data() + at * element_size(storage), scales.data() + at / int8_block,
             std::min(block_size, numel - at));
  }

  Operand operand() { return {bytes.data(), storage, nullptr, scales.data()}; }
  Rows rows(int64_t columns) {
    Rows rows;
    rows.data = bytes.data();
    rows.storage = storage;
    rows.size[0] = numel / columns;
    rows.stride[0] = columns;
    return rows;
  }

  void print() {
    if (is_low(storage)) {
      for (char byte : bytes) std::printf("%x\n", unsigned(uint8_t(byte)));
      return;
    }
    std::vector<double> values(numel);
    for (int64_t at = 0; at < numel; at += block_size)
      decode(storage, bytes.data() + at * element_size(storage), scales.data() + at / int8_block, values.data() + at,
             std::min(block_size, numel - at));
    ::print(values.data(), values.size());
  }
};

struct Format {
  Storage param, state;
  bool has_master;
  Storage master;
  bool stochastic;
};

template <class Rule>
void run(int rule, const Format& format) {
  std::vector<double> scalar;
  for (int k = 0; k < Rule::scalars; ++k) scalar.push_back(0.9 / (k + 1));
  const Wild wild = is_quantized(format.state) ? Wild::in_one_block : Wild::everywhere;
  Stored p(format.param, wild), g(format.param, wild), master(format.master, wild);
  std::vector<Stored> states;
  for (int k = 0; k < Rule::states; ++k) {
    // A first state in codes of the signed map, others of the unsigned one, which stores what is below 0 as 0.
    const Storage storage = is_quantized(format.state) && k > 0 ? Storage::int8_unsigned : format.state;
    states.emplace_back(storage, wild, true);
  }
  Update update;
  update.numel = numel;
  update.param = p.operand();
  update.grad = g.operand();
  for (int k = 0; k < Rule::states; ++k) update.state[k] = states[size_t(k)].operand();
  if (format.has_master) update.master = master.operand();
  update.stochastic = format.stochastic;
  update.key = rounding_key(1, 2, 3);
  update.grad_scale = format.state == Storage::float32 ? 1 : -0.3;
  update.zero_grad = format.state == Storage::float16;
  update.scalar = scalar.data();
  const auto* table = format.param == Storage::float64 ? kernels.in_float64 : kernels.in_float32;
  for (int step = 0; step < 3; ++step) table[rule](update, 0, numel);
  std::printf("%s %d %d %d %d %d\n", Rule::name, int(format.param), int(format.state), format.has_master,
              int(format.master), format.stochastic);
  p.print();
  g.print();
  if (format.has_master) master.print();
  for (Stored& stored : states) stored.print();
}

template <class Rule>
void run_formats(int rule) {
  const Storage floating[] = {Storage::float32, Storage::bfloat16, Storage::float16, Storage::float64};
  for (Storage param : floating)
    for (Storage state : floating) run<Rule>(rule, {param, state, false, Storage::float32, false});
  for (Storage param : {Storage::float32, Storage::bfloat16, Storage::float16})
    run<Rule>(rule, {param, Storage::int8_signed, false, Storage::float32, param != Storage::float32});
  for (bool stochastic : {false, true}) {
    run<Rule>(rule, {Storage::bfloat16, Storage::float32, true, Storage::low8, stochastic});
    run<Rule>(rule, {Storage::bfloat16, Storage::float32, false, Storage::float32, stochastic});
  }
  run<Rule>(rule, {Storage::bfloat16, Storage::float32, true, Storage::low16, false});
  run<Rule>(rule, {Storage::float16, Storage::float32, true, Storage::float32, false});
}

void run_norm(Storage storage, Wild wild) {
  Stored grad(storage, wild);
  Squares squares;
  squares.grad = grad.operand();
  squares.numel = numel;
  squares.scale = 0.3f;
  std::vector<float> sums(size_t(squares.trees()));
  kernels.square_sums(squares, 0, squares.trees(), sums.data());
  std::printf("square_sums %d\n", int(storage));
  print(sums);
}

template <class T>
void run_rows(const RowKernels<T>& of, Storage storage, Wild wild) {
  constexpr int64_t columns = numel / 3;
  std::vector<T> weight(columns), rstd(3), weight_sum(columns);
  for (T& value : weight) value = T(moderate_value());
  Stored x(storage, wild), residual(storage, wild), total(storage, wild), y(storage, wild);
  Stored grad_y(storage, wild), grad_total(storage, wild), grad_x(storage, wild);
  for (bool rounds : {false, true}) {
    RmsNorm norm;
    norm.columns = columns;
    norm.x = x.rows(columns);
    norm.residual = residual.rows(columns);
    norm.total = total.rows(columns);
    norm.y = y.rows(columns);
    norm.weight = weight.data();
    norm.rstd = rstd.data();
    norm.eps = 1e-5;
    norm.normalized = rounds ? storage : native_storage<T>;
    norm.product = storage;
    norm.rounds_statistics = rounds;
    of.rms_norm_forward(norm, 0, 3);
    norm.x = total.rows(columns);
    norm.grad_y = grad_y.rows(columns);
    norm.grad_total = grad_total.rows(columns);
    norm.grad_x = grad_x.rows(columns);
    of.rms_norm_backward(norm, 0, 3, weight_sum.data());
    std::printf("rms_norm %d %d\n", int(storage), rounds);
    for (Stored* each : {&total, &y, &grad_x}) each->print();
    print(std::vector<float>(weight_sum.begin(), weight_sum.end()));
  }
}

void run_glu(int activation, Storage storage) {
  constexpr int64_t columns = numel / 3;
  Stored gate(storage, Wild::everywhere), up(storage, Wild::everywhere), y(storage, Wild::everywhere);
  Stored grad_y(storage, Wild::everywhere), grad_gate(storage, Wild::everywhere), grad_up(storage, Wild::everywhere);
  Glu glu;
  glu.columns = columns;
  glu.gate = gate.rows(columns);
  glu.up = up.rows(columns);
  glu.y = y.rows(columns);
  glu.grad_y = grad_y.rows(columns);
  glu.grad_gate = grad_gate.rows(columns);
  glu.grad_up = grad_up.rows(columns);
  glu.limit = 2.5;
  kernels.rows_in_float32.glu_forward[activation](glu, 0, 3);
  kernels.rows_in_float32.glu_backward[activation](glu, 0, 3);
  std::printf("glu %d %d\n", activation, int(storage));
  for (Stored* each : {&y, &grad_gate, &grad_up}) each->print();
}

// Of small whole numbers, whose sums are exact: elsewhere instruction sets differ, as some fuse multiply and add.
void run_matmul(bool symmetric) {
  constexpr int64_t rows = 61, inner = 403;
  std::vector<float> a(rows * inner), out(rows * rows);
  for (float& value : a) value = float(random_bits() % 15) - 7;
  alignas(64) static float workspace[matmul_workspace];
  const Matrices left = {a.data(), 0, inner, 1}, right = {a.data(), 0, 1, inner}, none = {nullptr, 0, 0, 0};
  const Matmul product = {1, rows, rows, inner, left, right, none, out.data(), 0, rows, 0, 0.5f, symmetric};
  kernels.matmul(product, 0, {0, rows, 0, rows}, workspace);
  std::printf("matmul %d\n", symmetric);
  print(out);
}

}  // namespace

int main() {
  int rule = 0;
#define FUSEDOPT_RUN(RULE) run_formats<RULE>(rule++);
  FUSEDOPT_RULES(FUSEDOPT_RUN)
  for (Wild wild : {Wild::in_one_block, Wild::nowhere}) {
    for (Storage storage : {Storage::float32, Storage::bfloat16, Storage::float16}) {
      run_norm(storage, wild);
      run_rows(kernels.rows_in_float32, storage, wild);
    }
    run_rows(kernels.rows_in_float64, Storage::float64, wild);
  }
  // Of float64 they call the mathematics library, which differs between machines.
  for (Storage storage : {Storage::float32, Storage::bfloat16, Storage::float16})
    for (int activation = 0; activation < 6; ++activation) run_glu(activation, storage);
  run_matmul(false);
  run_matmul(true);
}
