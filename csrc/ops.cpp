#include "ops.h"

#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>

#include "cpu/threads.h"
#include "glu.h"
#include "plan.h"
#include "registry.h"
#include "rms_norm.h"
#include "tensor.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// Elements below which waking other threads, or letting other Python threads run, costs more than it saves.
constexpr int64_t elements_per_thread = 16384, elements_with_lock = 65536;

// More shares than threads, so that a thread which other work delays leaves its rest to the others.
constexpr int shares_per_thread = 4;

Storage storage_of(const View& view) {
  constexpr int code_float = 2, code_bfloat = 4;
  if (view.dtype.code == code_bfloat) return Storage::bfloat16;
  if (view.dtype.code == code_float && view.dtype.bits == 16) return Storage::float16;
  if (view.dtype.code == code_float && view.dtype.bits == 32) return Storage::float32;
  if (view.dtype.code == code_float && view.dtype.bits == 64) return Storage::float64;
  throw py::type_error("the native operations take float32, float64, bfloat16 and float16");
}

// The shape that every operand must have.
struct Shape {
  int64_t rows = 1, columns = 1;
  int dims = 0;
  int64_t size[max_dims];

  explicit Shape(py::handle tensor) {
    View view;
    if (!describe(tensor.ptr(), view)) throw PythonError{};
    if (view.ndim < 1 || view.ndim > max_dims) throw py::value_error("a tensor of 1 to 64 dimensions is wanted");
    dims = view.ndim;
    std::copy(view.shape, view.shape + dims, size);
    columns = size[dims - 1];
    for (int d = 0; d + 1 < dims; ++d) rows *= size[d];
  }
};

void read_rows(py::handle tensor, const Shape& shape, Rows& rows) {
  View view;
  if (!describe(tensor.ptr(), view)) throw PythonError{};
  if (view.device != on_cpu) throw py::value_error("a tensor is not on the CPU");
  if (view.ndim != shape.dims || !std::equal(shape.size, shape.size + shape.dims, view.shape))
    throw py::value_error("tensors differ in shape");
  rows.data = view.data;
  rows.storage = storage_of(view);
  rows.step = shape.columns == 1 ? 1 : view.strides[view.ndim - 1];
  rows.dims = 0;
  for (int d = 0; d + 1 < view.ndim; ++d) {
    const int64_t size = view.shape[d], stride = view.strides[d];
    if (size == 1) continue;
    if (rows.dims > 0 && rows.stride[rows.dims - 1] == size * stride) {
      rows.size[rows.dims - 1] *= size;
      rows.stride[rows.dims - 1] = stride;
    } else {
      rows.size[rows.dims] = size;
      rows.stride[rows.dims++] = stride;
    }
  }
  if (rows.dims == 0) {
    rows.size[0] = 1;
    rows.stride[0] = 0;
    rows.dims = 1;
  }
}

void read_rows_if_any(py::handle tensor, const Shape& shape, Rows& rows) {
  if (!tensor.is_none()) read_rows(tensor, shape, rows);
}

// A fresh result of many megabytes is not in memory yet, and is faulted in page by page as it is written: in pages of
// 2 MiB that takes a fraction of the time, where the system gives them to those who ask.
void read_result(py::handle tensor, const Shape& shape, Rows& rows) {
  read_rows(tensor, shape, rows);
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t large = uintptr_t(1) << 21, worthwhile = 4 * large;
  if (shape.rows * shape.columns == 0) return;
  int64_t last = (shape.columns - 1) * rows.step;
  for (int d = 0; d < rows.dims; ++d) last += (rows.size[d] - 1) * rows.stride[d];
  const auto begin = reinterpret_cast<uintptr_t>(rows.data);
  const auto end = reinterpret_cast<uintptr_t>(rows.at(rows.data, last));
  const uintptr_t from = (begin + large - 1) / large * large, to = end / large * large;
  if (to >= from + worthwhile) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

// Runs work(begin, end) over [0, count), in pieces for the threads that `elements` are worth.
template <class Work>
void split(int64_t count, int64_t elements, int threads, const Work& work) {
  threads = int(std::min<int64_t>({threads, elements / elements_per_thread, count}));
  struct Context {
    const Work& work;
    int64_t count;
  } context{work, count};
  const auto run = [](void* data, int share, int shares) {
    const auto& all = *static_cast<Context*>(data);
    all.work(all.count * share / shares, all.count * (share + 1) / shares);
  };
  std::optional<py::gil_scoped_release> released;
  if (elements >= elements_with_lock) released.emplace();
  parallel(threads, threads > 1 ? int(std::min<int64_t>(count, threads * shares_per_thread)) : 1, run, &context);
}

template <class T>
const RowKernels<T>& row_kernels() {
  if constexpr (sizeof(T) == sizeof(float))
    return kernels()->rows_in_float32;
  else
    return kernels()->rows_in_float64;
}

// --- rms_norm ---

enum class Casting { llama, gemma, none };  // in the order of fusedopt/_rms_norm.py's CASTINGS

// Memory that is written before it is read.
template <class T>
std::unique_ptr<T[]> uninitialized(int64_t n) {
  return std::unique_ptr<T[]>(new T[size_t(n)]);
}

bool is_float64(py::handle tensor) {
  if (tensor.is_none()) return false;
  View view;
  if (!describe(tensor.ptr(), view)) throw PythonError{};
  return storage_of(view) == Storage::float64;
}

// torch's promotion.
Storage promoted(Storage a, Storage b) {
  if (a == b) return a;
  return a == Storage::float64 || b == Storage::float64 ? Storage::float64 : Storage::float32;
}

// offset + weight in the arithmetic type: the tensor's own memory where that is it, else kept in `memory`.
template <class T>
const T* with_offset(py::handle weight, int64_t columns, double offset, Casting casting, std::unique_ptr<T[]>& memory,
                     Rows& rows) {
  if (!weight.is_none()) {
    const Shape shape(weight);
    if (shape.dims != 1 || shape.columns != columns) throw py::value_error("the weight differs in shape");
    read_rows(weight, shape, rows);
    if (rows.storage == native_storage<T> && rows.step == 1 && offset == 0)
      return reinterpret_cast<const T*>(rows.data);
  }
  memory = uninitialized<T>(columns);
  RowBlock<T> block;
  for (int64_t at = 0; at < columns; at += block_size) {
    const int64_t n = std::min(columns - at, block_size);
    const T* values = rows.data ? block.read(rows, rows.data, at, n) : nullptr;
    for (int64_t i = 0; i < n; ++i) memory[at + i] = values ? T(offset) + values[i] : T(1);
    if (rows.data && offset != 0 && casting != Casting::gemma) round_to(rows.storage, memory.get() + at, n);
  }
  return memory.get();
}

template <class T>
void* row_statistics(py::handle tensor, const Shape& shape) {
  View view;
  if (!describe(tensor.ptr(), view)) throw PythonError{};
  if (storage_of(view) != native_storage<T> || numel(view) != shape.rows)
    throw py::value_error("rstd differs in dtype or shape");
  return view.data;
}

template <class T>
void forward_of(const Shape& shape, RmsNorm& norm, py::handle weight, py::handle rstd, double offset, Casting casting,
                int threads) {
  if (!rstd.is_none()) norm.rstd = row_statistics<T>(rstd, shape);
  std::unique_ptr<T[]> memory;
  Rows rows;
  norm.weight = with_offset<T>(weight, norm.columns, offset, casting, memory, rows);
  norm.normalized = casting == Casting::gemma ? Storage::float64 : norm.x.storage;
  norm.product = casting == Casting::gemma || !rows.data ? norm.x.storage : promoted(norm.x.storage, rows.storage);
  split(shape.rows, shape.rows * shape.columns, threads,
        [&](int64_t begin, int64_t end) { row_kernels<T>().rms_norm_forward(norm, begin, end); });
}

void rms_norm_forward_of(py::handle x, py::handle weight, py::handle residual, py::handle y, py::handle total,
                         py::handle rstd, double eps, double offset, int casting, int threads) {
  const Shape shape(x);
  RmsNorm norm;
  read_rows(x, shape, norm.x);
  read_result(y, shape, norm.y);
  read_rows_if_any(residual, shape, norm.residual);
  if (!total.is_none()) read_result(total, shape, norm.total);
  norm.columns = shape.columns;
  norm.eps = eps;
  norm.rounds_statistics = Casting(casting) == Casting::none;
  const auto run = is_float64(x) || is_float64(weight) ? forward_of<double> : forward_of<float>;
  run(shape, norm, weight, rstd, offset, Casting(casting), threads);
}

// Rows whose weight gradients are summed one after another, before the sums are: about the root of their number, so
// that neither sum is long. It depends on their number alone, or the result would depend on the threads.
int64_t rows_together(int64_t rows) {
  int64_t together = 16;
  while (together * together < rows) together *= 2;
  return together;
}

template <class T>
void backward_of(const Shape& shape, RmsNorm& norm, py::handle weight, py::handle rstd, py::handle grad_weight,
                 double offset, Casting casting, int threads) {
  norm.rstd = row_statistics<T>(rstd, shape);
  std::unique_ptr<T[]> memory;
  Rows rows;
  norm.weight = with_offset<T>(weight, norm.columns, offset, casting, memory, rows);
  const auto kernel = row_kernels<T>().rms_norm_backward;
  const int64_t columns = shape.columns, elements = shape.rows * columns;
  if (grad_weight.is_none()) {
    split(shape.rows, elements, threads, [&](int64_t begin, int64_t end) { kernel(norm, begin, end, nullptr); });
    return;
  }
  Rows out;
  read_rows(grad_weight, Shape(weight), out);
  const int64_t together = rows_together(shape.rows), sums = (shape.rows + together - 1) / together;
  const auto partial = uninitialized<T>(std::max<int64_t>(sums, 1) * columns);
  if (sums == 0) std::fill_n(partial.get(), columns, T(0));
  split(sums, elements, threads, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      T* sum = partial.get() + k * columns;
      std::fill_n(sum, columns, T(0));
      kernel(norm, k * together, std::min((k + 1) * together, shape.rows), sum);
    }
  });
  RowBlock<T> block;
  for (int64_t at = 0; at < columns; at += block_size) {
    const int64_t n = std::min(columns - at, block_size);
    T* total = block.place(out, out.data, at);
    std::copy_n(partial.get() + at, n, total);
    for (int64_t k = 1; k < sums; ++k)
      for (int64_t i = 0; i < n; ++i) total[i] += partial[k * columns + at + i];
    block.write(out, out.data, at, n);
  }
}

void rms_norm_backward_of(py::handle grad_y, py::handle grad_total, py::handle x, py::handle weight, py::handle rstd,
                          py::handle grad_x, py::handle grad_weight, double offset, int casting, int threads) {
  const Shape shape(x);
  RmsNorm norm;
  read_rows(x, shape, norm.x);
  read_rows(grad_y, shape, norm.grad_y);
  read_result(grad_x, shape, norm.grad_x);
  read_rows_if_any(grad_total, shape, norm.grad_total);
  norm.columns = shape.columns;
  const auto run = is_float64(x) || is_float64(weight) ? backward_of<double> : backward_of<float>;
  run(shape, norm, weight, rstd, grad_weight, offset, Casting(casting), threads);
}

// --- gated linear units ---

// Whether all rows are one long one.
bool lies_evenly(const Rows& rows, const Shape& shape) {
  return !rows.data || shape.rows == 1 || (rows.dims == 1 && rows.stride[0] == rows.step * shape.columns);
}

void run_glu(Shape& shape, Glu& glu, bool backward, int kind, int threads) {
  bool is_double = false, evenly = true;
  for (const Rows* rows : {&glu.gate, &glu.up, &glu.y, &glu.grad_y, &glu.grad_gate, &glu.grad_up}) {
    evenly = evenly && lies_evenly(*rows, shape);
    is_double = is_double || rows->storage == Storage::float64;
  }
  const int64_t elements = shape.rows * shape.columns;
  glu.columns = evenly ? elements : shape.columns;
  const int64_t rows = evenly ? int64_t(elements > 0) : shape.rows;
  const Kernels& all = *kernels();
  const auto find = [&](const auto& of) { return (backward ? of.glu_backward : of.glu_forward)[kind]; };
  const auto kernel = is_double ? find(all.rows_in_float64) : find(all.rows_in_float32);
  split(rows * ((glu.columns + block_size - 1) / block_size), elements, threads,
        [&](int64_t begin, int64_t end) { kernel(glu, begin, end); });
}

void glu_forward_of(py::handle gate, py::handle up, py::handle y, int kind, double limit, int threads) {
  Shape shape(gate);
  Glu glu;
  read_rows(gate, shape, glu.gate);
  read_rows_if_any(up, shape, glu.up);
  read_result(y, shape, glu.y);
  glu.limit = limit;
  run_glu(shape, glu, false, kind, threads);
}

void glu_backward_of(py::handle grad_y, py::handle gate, py::handle up, py::handle grad_gate, py::handle grad_up,
                     int kind, double limit, int threads) {
  Shape shape(gate);
  Glu glu;
  read_rows(grad_y, shape, glu.grad_y);
  read_rows(gate, shape, glu.gate);
  read_rows_if_any(up, shape, glu.up);
  read_result(grad_gate, shape, glu.grad_gate);
  if (!grad_up.is_none()) read_result(grad_up, shape, glu.grad_up);
  glu.limit = limit;
  run_glu(shape, glu, true, kind, threads);
}

}  // namespace

void bind_ops(py::module_& module) {
  module.def("rms_norm_forward", &rms_norm_forward_of, py::arg("x"), py::arg("weight"), py::arg("residual"),
             py::arg("y"), py::arg("total"), py::arg("rstd"), py::arg("eps"), py::arg("offset"), py::arg("casting"),
             py::arg("threads"), "Writes y, and total and rstd unless None.");
  module.def("rms_norm_backward", &rms_norm_backward_of, py::arg("grad_y"), py::arg("grad_total"), py::arg("x"),
             py::arg("weight"), py::arg("rstd"), py::arg("grad_x"), py::arg("grad_weight"), py::arg("offset"),
             py::arg("casting"), py::arg("threads"), "Writes grad_x, and grad_weight unless None.");
  module.def("glu_forward", &glu_forward_of, py::arg("gate"), py::arg("up"), py::arg("y"), py::arg("kind"),
             py::arg("limit"), py::arg("threads"), "Writes y.");
  module.def("glu_backward", &glu_backward_of, py::arg("grad_y"), py::arg("gate"), py::arg("up"), py::arg("grad_gate"),
             py::arg("grad_up"), py::arg("kind"), py::arg("limit"), py::arg("threads"),
             "Writes grad_gate, and grad_up unless None.");
}

}  // namespace fusedopt
