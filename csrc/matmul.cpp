#include "matmul.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/threads.h"
#include "plan.h"
#include "registry.h"
#include "tensor.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// Multiplications below which waking another thread, or letting other Python threads run, costs more than it saves.
constexpr double products_per_thread = 1 << 20, products_with_lock = 1 << 19;

// Where there are fewer tiles for each thread, one that other work delays is waited for longer.
constexpr int64_t tiles_per_thread = 4, least_tile = 64;

// --- arguments ---

[[noreturn]] void refuse(const char* name, const std::string& what) {
  throw py::value_error("matmul: " + std::string(name) + what);
}

std::string shape_text(const int64_t* shape) {
  return "(" + std::to_string(shape[0]) + ", " + std::to_string(shape[1]) + ", " + std::to_string(shape[2]) + ")";
}

// The addresses between which a tensor's elements lie.
struct Extent {
  const float *begin = nullptr, *end = nullptr;
  bool meets(const Extent& other) const { return begin < other.end && other.begin < end; }
};

struct Argument {
  const char* name;
  int64_t shape[3] = {}, stride[3] = {};
  float* data = nullptr;

  Argument(const char* as, py::handle tensor) : name(as) {
    View view;
    if (!describe(tensor.ptr(), view)) throw PythonError{};
    constexpr int code_float = 2;
    if (view.dtype.code != code_float || view.dtype.bits != 32)
      throw py::type_error(std::string("matmul: ") + name + " is not float32");
    if (view.device != on_cpu) refuse(name, " is not on the CPU");
    if (view.ndim != 3)
      refuse(name, " has " + std::to_string(view.ndim) + " dimensions; give it three, the first for the batch");
    data = reinterpret_cast<float*>(view.data);
    std::copy_n(view.shape, 3, shape);
    // A stride that is never used is whatever suits.
    for (int d = 0; d < 3; ++d) stride[d] = shape[d] > 1 ? view.strides[d] : d == 0 ? 0 : 1;
  }

  void expect(int64_t batches, int64_t rows, int64_t columns) const {
    const int64_t wanted[] = {batches, rows, columns};
    if (!std::equal(wanted, wanted + 3, shape))
      refuse(name, " is " + shape_text(shape) + " where a and b make it " + shape_text(wanted));
  }
  void expect_unit_stride() const {
    if (stride[1] != 1 && stride[2] != 1)
      refuse(name, " has strides " + shape_text(stride) +
                       "; one of the last two must be 1: give a contiguous tensor or its transpose");
  }
  bool empty() const { return shape[0] == 0 || shape[1] == 0 || shape[2] == 0; }
  Extent extent() const {
    if (empty()) return {};
    Extent found{data, data + 1};
    for (int d = 0; d < 3; ++d) (stride[d] < 0 ? found.begin : found.end) += (shape[d] - 1) * stride[d];
    return found;
  }
  bool lies_like(const Argument& other) const {
    return data == other.data && std::equal(stride, stride + 3, other.stride);
  }
  // Whether no two elements share memory, as far as their strides tell easily.
  bool is_dense() const {
    int order[] = {0, 1, 2};
    std::sort(order, order + 3, [&](int a, int b) { return stride[a] < stride[b]; });
    int64_t covered = 1;
    for (const int d : order) {
      if (shape[d] == 1) continue;
      if (stride[d] < covered) return false;
      covered = stride[d] * (shape[d] - 1) + covered;
    }
    return true;
  }
  Matrices matrices() const { return {data, stride[0], stride[1], stride[2]}; }
};

Matrices transposed(const Matrices& x) { return {x.data, x.batch_stride, x.column_stride, x.row_stride}; }

// --- tiles ---

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles of one matrix, the most work first: what is left for the end is small.
std::vector<MatmulTile> tiles_of(const Matmul& of, int64_t height, int64_t width) {
  std::vector<MatmulTile> tiles;
  for (int64_t column = 0; column < of.columns; column += width)
    for (int64_t row = 0; row < of.rows; row += height) {
      const int64_t end = std::min(column + width, of.columns);
      if (of.symmetric && end <= row) break;
      const int64_t start = of.symmetric ? std::max(column, row) : column;
      tiles.push_back({row, std::min(height, of.rows - row), start, end - start});
    }
  const auto work = [&of](const MatmulTile& tile) {
    const int64_t below = of.symmetric ? std::max<int64_t>(tile.row + tile.rows - tile.column, 0) : 0;
    return 2 * tile.rows * tile.columns - below * below;
  };
  std::stable_sort(tiles.begin(), tiles.end(), [&](const auto& a, const auto& b) { return work(a) > work(b); });
  return tiles;
}

// Large, so that what is packed is used often, but enough of them for the threads. The result does not depend on it.
std::vector<MatmulTile> cut(const Matmul& of, int threads) {
  constexpr int64_t step = 32;
  const auto even = [](int64_t size, int64_t most) {
    return divided(divided(size, divided(size, most)), step) * step;
  };
  int64_t height = even(of.rows, matmul_columns), width = even(of.columns, matmul_columns);
  const int64_t wanted = threads > 1 ? threads * tiles_per_thread : 1;
  for (;;) {
    std::vector<MatmulTile> tiles = tiles_of(of, height, width);
    if (int64_t(tiles.size()) * of.batches >= wanted || std::max(height, width) <= least_tile) return tiles;
    int64_t& larger = height >= width ? height : width;
    larger = divided(larger / 2, step) * step;
  }
}

// --- work ---

// A thread's own, and so is that of the threads it starts: memory fresh from the system is slow.
float* workspace_of(int threads) {
  constexpr size_t line = 64;
  thread_local std::unique_ptr<char[]> memory;
  thread_local int room = 0;
  if (room < threads) {
    room = 0;
    memory.reset(new char[size_t(threads) * matmul_workspace * sizeof(float) + line]);
    room = threads;
  }
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.get()) + line - 1) / line * line);
}

void multiply(const Matmul& of, MatmulKernel kernel, int threads) {
  const double products = double(of.batches) * double(of.rows) * double(of.columns) * double(of.inner);
  threads = int(std::clamp(products / products_per_thread, 1.0, double(std::max(threads, 1))));
  std::optional<py::gil_scoped_release> released;
  if (products >= products_with_lock) released.emplace();
  const std::vector<MatmulTile> tiles = cut(of, threads);
  struct Context {
    const Matmul& of;
    MatmulKernel kernel;
    const std::vector<MatmulTile>& tiles;
    float* workspace;
    std::atomic<int64_t> next{0};
  } context{of, kernel, tiles, workspace_of(threads)};
  const auto run = [](void* data, int share, int) {
    auto& all = *static_cast<Context*>(data);
    const int64_t count = int64_t(all.tiles.size()) * all.of.batches;
    for (int64_t i; (i = all.next.fetch_add(1)) < count;)
      all.kernel(all.of, i % all.of.batches, all.tiles[size_t(i / all.of.batches)],
                 all.workspace + share * matmul_workspace);
  };
  parallel(threads, threads, run, &context);
}

void matmul(py::handle a_tensor, py::handle b_tensor, py::handle c_tensor, py::handle out_tensor, float alpha,
            float beta, bool symmetric, bool bfloat16, int threads) {
  const MatmulKernel kernel = bfloat16 ? bfloat16_matmul() : kernels()->matmul;
  if (!kernel) throw py::value_error("matmul: this machine has no AVX512-BF16; pass bfloat16=False");
  const Argument a("a", a_tensor), b("b", b_tensor), out("out", out_tensor);
  const int64_t batches = a.shape[0], rows = a.shape[1], inner = a.shape[2], columns = b.shape[2];
  b.expect(batches, inner, columns);
  out.expect(batches, rows, columns);
  if (symmetric && rows != columns) refuse("out", " is " + shape_text(out.shape) + ", which cannot be symmetric");
  for (const Argument* of : {&a, &b, &out}) of->expect_unit_stride();
  if (out.empty()) return;
  if (!out.is_dense()) refuse("out", " has elements that share memory");
  for (const Argument* of : {&a, &b})
    if (out.extent().meets(of->extent()))
      refuse("out", std::string(" shares memory with ") + of->name + ", which is read while it is written");

  Matmul of{batches, rows, columns, inner, a.matrices(), b.matrices(), {}, out.data, out.stride[0], out.stride[1],
            alpha, beta, symmetric};
  if (!c_tensor.is_none()) {
    const Argument c("c", c_tensor);
    c.expect(batches, rows, columns);
    c.expect_unit_stride();
    if (!c.lies_like(out) && out.extent().meets(c.extent()))
      refuse("c", " shares memory with out without being the same view");
    if (alpha != 0) of.c = c.matrices();
  }
  if (out.stride[2] != 1) {
    of.out_row_stride = out.stride[2];
    // A symmetric result is its own transpose. Its upper triangle is computed, and so is that of c read.
    if (!symmetric) {
      std::swap(of.rows, of.columns);
      of.a = transposed(b.matrices());
      of.b = transposed(a.matrices());
      of.c = transposed(of.c);
    }
  }
  multiply(of, kernel, threads);
}

}  // namespace

void bind_matmul(py::module_& module) {
  module.def("matmul", &matmul, py::arg("a"), py::arg("b"), py::arg("c"), py::arg("out"), py::arg("alpha"),
             py::arg("beta"), py::arg("symmetric"), py::arg("bfloat16"), py::arg("threads"),
             "Writes alpha c + beta a b, of float32 matrices in batches. Of a result that the caller says is symmetric "
             "only the upper triangle is computed. With `bfloat16` a and b are rounded to that first.");
  module.attr("has_bfloat16_matmul") = bfloat16_matmul() != nullptr;
}

}  // namespace fusedopt
