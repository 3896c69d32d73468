// Reads torch tensors without torch's headers.
#pragma once

#include <Python.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "step.h"

namespace fusedopt {

// The public DLPack ABI (github.com/dmlc/dlpack), as far as it is used here.
struct DLDevice {
  int32_t type;
  int32_t id;
};
struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  bool operator==(const DLDataType& other) const { return code == other.code && bits == other.bits; }
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// An owned reference.
struct Release {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Object = std::unique_ptr<PyObject, Release>;

constexpr int on_cpu = -1, elsewhere = -2;

// A tensor as it is now: valid until Python code runs. Not copied, for it may point into itself.
struct View {
  View() = default;
  View(const View&) = delete;
  char* data;
  int ndim;
  DLDataType dtype;
  int device;  // the number of a GPU, or one of the two below
  const int64_t *shape, *strides;
  int64_t own[2 * max_dims];  // shape and strides, where torch does not lend its own
};

// Fills `view`; false with a Python exception set where `tensor` is not a strided tensor of a known dtype.
bool describe(PyObject* tensor, View& view);

// torch's `__dlpack_c_exchange_api__` capsule, or None to read tensors by their Python methods.
bool use_exchange_api(PyObject* capsule);

// The form of a tensor in a plan: what must not change from step to step. Its address may.
class Form {
 public:
  // `order` are the dimensions in walking order, outermost first.
  Form(const View& view, const std::vector<int>& order);

  // Whether `view` is of this dtype, shape and strides.
  bool fits(const View& view) const;

  // Whether elements lie in the same order of addresses.
  bool lies_like(const Form& other) const;
  Storage storage() const { return storage_; }
  const Layout* layout() const { return layout_.get(); }
  int device() const { return device_; }
  bool is_complex() const { return complex_; }
  const std::vector<int64_t>& shape() const { return shape_; }
  const std::vector<int64_t>& strides() const { return strides_; }

 private:
  Storage storage_;
  DLDataType dtype_;
  int device_;
  bool complex_;
  std::vector<int64_t> shape_, strides_;
  std::unique_ptr<Layout> layout_;  // none where the tensor is contiguous in walking order
};

// Dimensions by decreasing stride: the order in which a dense tensor lies contiguously.
std::vector<int> walking_order(const View& view);
std::vector<int> row_major_order(const View& view);

// Elements of real type: a complex element counts as two.
int64_t numel(const View& view);

bool is_complex(const View& view);

// Whether its elements are numbers of 16 bits or more that need no scale; complex ones too.
bool is_floating(const View& view);

}  // namespace fusedopt
