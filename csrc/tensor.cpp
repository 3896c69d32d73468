#include "tensor.h"

#include <algorithm>
#include <numeric>
#include <string>

namespace fusedopt {
namespace {

// Kinds of devices (ROCm counts as CUDA in torch) and of numbers in DLPack.
constexpr int kind_cpu = 1, kind_cuda = 2, kind_rocm = 10;
constexpr int code_int = 0, code_uint = 1, code_float = 2, code_bfloat = 4, code_complex = 5;

struct ExchangeApi {
  uint32_t major, minor;
  void* previous;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*describe)(void* object, DLTensor* out);
  void* stream;
};

const ExchangeApi* exchange_api = nullptr;

bool describe_by_exchange(PyObject* tensor, View& view) {
  DLTensor raw;
  if (exchange_api->describe(tensor, &raw)) return false;
  view.data = static_cast<char*>(raw.data) + raw.byte_offset;
  view.ndim = raw.ndim;
  view.dtype = raw.dtype;
  const bool on_gpu = raw.device.type == kind_cuda || raw.device.type == kind_rocm;
  view.device = raw.device.type == kind_cpu ? on_cpu : on_gpu ? raw.device.id : elsewhere;
  view.shape = raw.shape;
  view.strides = raw.strides;
  return true;
}

struct NamedType {
  const char* name;
  DLDataType dtype;
};

constexpr NamedType named_types[] = {
    {"torch.float32", {code_float, 32, 1}},     {"torch.float64", {code_float, 64, 1}},
    {"torch.bfloat16", {code_bfloat, 16, 1}},   {"torch.float16", {code_float, 16, 1}},
    {"torch.complex64", {code_complex, 64, 1}}, {"torch.complex128", {code_complex, 128, 1}},
    {"torch.uint8", {code_uint, 8, 1}},         {"torch.int16", {code_int, 16, 1}},
    {"torch.int8", {code_int, 8, 1}},           {"torch.int64", {code_int, 64, 1}},
};

bool read_sizes(PyObject* tuple, int ndim, int64_t* out) {
  for (int d = 0; d < ndim; ++d) out[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, d));
  return !PyErr_Occurred();
}

// For torch without the exchange API; about three times as slow.
bool describe_by_methods(PyObject* tensor, View& view) {
  const Object address(PyObject_CallMethod(tensor, "data_ptr", nullptr));
  const Object shape(PyObject_GetAttrString(tensor, "shape"));
  const Object strides(PyObject_CallMethod(tensor, "stride", nullptr));
  const Object dtype(PyObject_GetAttrString(tensor, "dtype"));
  const Object is_cpu(PyObject_GetAttrString(tensor, "is_cpu"));
  const Object is_cuda(PyObject_GetAttrString(tensor, "is_cuda"));
  const Object number(PyObject_CallMethod(tensor, "get_device", nullptr));
  if (!address || !shape || !strides || !dtype || !is_cpu || !is_cuda || !number) return false;
  const Object name(PyObject_Str(dtype.get()));
  const char* text = name ? PyUnicode_AsUTF8(name.get()) : nullptr;
  if (!text) return false;
  view.dtype = {};
  for (const NamedType& type : named_types)
    if (std::string(text) == type.name) view.dtype = type.dtype;
  if (!view.dtype.bits) {
    PyErr_Format(PyExc_TypeError, "%s is not supported by the native backend", text);
    return false;
  }
  view.data = static_cast<char*>(PyLong_AsVoidPtr(address.get()));
  view.ndim = int(PyTuple_GET_SIZE(shape.get()));
  const bool on_gpu = is_cuda.get() == Py_True;
  view.device = is_cpu.get() == Py_True ? on_cpu : on_gpu ? int(PyLong_AsLong(number.get())) : elsewhere;
  if (view.ndim > max_dims) {
    PyErr_Format(PyExc_ValueError, "a tensor of %d dimensions; the native backend takes up to %d", view.ndim, max_dims);
    return false;
  }
  view.shape = view.own;
  view.strides = view.own + max_dims;
  return read_sizes(shape.get(), view.ndim, view.own) && read_sizes(strides.get(), view.ndim, view.own + max_dims);
}

Storage storage_of(DLDataType dtype) {
  if (dtype.code == code_bfloat) return Storage::bfloat16;
  if (dtype.code == code_uint) return Storage::int8_signed;  // or unsigned, as the plan knows
  if (dtype.code == code_int) return dtype.bits == 8 ? Storage::low8 : Storage::low16;
  const int bits = dtype.code == code_complex ? dtype.bits / 2 : dtype.bits;
  return bits == 64 ? Storage::float64 : bits == 32 ? Storage::float32 : Storage::float16;
}

}  // namespace

bool use_exchange_api(PyObject* capsule) {
  exchange_api = nullptr;
  if (capsule == Py_None) return true;
  auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!api) return false;
  if (api->major == 1 && api->describe) exchange_api = api;
  return true;
}

bool describe(PyObject* tensor, View& view) {
  return exchange_api ? describe_by_exchange(tensor, view) : describe_by_methods(tensor, view);
}

bool is_complex(const View& view) { return view.dtype.code == code_complex; }

bool is_floating(const View& view) {
  const uint8_t code = view.dtype.code;
  return view.dtype.bits >= 16 && (code == code_float || code == code_bfloat || code == code_complex);
}

int64_t numel(const View& view) {
  return std::accumulate(view.shape, view.shape + view.ndim, int64_t(is_complex(view) ? 2 : 1), std::multiplies<>());
}

std::vector<int> row_major_order(const View& view) {
  std::vector<int> order(size_t(view.ndim));
  std::iota(order.begin(), order.end(), 0);
  return order;
}

std::vector<int> walking_order(const View& view) {
  std::vector<int> order = row_major_order(view);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return view.strides[a] > view.strides[b]; });
  return order;
}

Form::Form(const View& view, const std::vector<int>& order)
    : storage_(storage_of(view.dtype)),
      dtype_(view.dtype),
      device_(view.device),
      complex_(fusedopt::is_complex(view)),
      shape_(view.shape, view.shape + view.ndim),
      strides_(view.strides, view.strides + view.ndim) {
  const int64_t parts = complex_ ? 2 : 1;
  auto layout = std::make_unique<Layout>();
  const auto append = [&layout](int64_t size, int64_t stride) {
    if (size == 1) return;
    const int last = layout->dims - 1;
    if (last >= 0 && layout->stride[last] == size * stride) {
      layout->size[last] *= size;
      layout->stride[last] = stride;
    } else {
      layout->size[layout->dims] = size;
      layout->stride[layout->dims++] = stride;
    }
  };
  for (int d : order) append(view.shape[d], view.strides[d] * parts);
  append(parts, 1);
  const bool contiguous = layout->dims == 0 || (layout->dims == 1 && layout->stride[0] == 1);
  if (!contiguous) layout_ = std::move(layout);
}

bool Form::lies_like(const Form& other) const {
  if (!layout_ || !other.layout_) return layout_ == other.layout_;
  const int dims = layout_->dims;
  return dims == other.layout_->dims && std::equal(layout_->size, layout_->size + dims, other.layout_->size) &&
         std::equal(layout_->stride, layout_->stride + dims, other.layout_->stride);
}

bool Form::fits(const View& view) const {
  return view.device == device_ && view.dtype == dtype_ && size_t(view.ndim) == shape_.size() &&
         std::equal(shape_.begin(), shape_.end(), view.shape) &&
         std::equal(strides_.begin(), strides_.end(), view.strides);
}

}  // namespace fusedopt
