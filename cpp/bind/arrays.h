// SPDX-License-Identifier: Apache-2.0
// From borrowed Python arrays to the core's arrays, with one kind of message for everything that does not fit.
#pragma once
#include <iterator>
#include <string>

#include "backend.h"
#include "dlpack.h"
#include "hisac/hisac.h"

namespace hisac::bind {

/// DLPack's number for the devices of cuda_backend(): CUDA's; the CPU's when tests lend emulated kernels.
inline int32_t cuda_device_type = 2;

constexpr bool kOnlyCpu = true;  // of a verb that a GPU does not have

/// One call: its verb's name, for messages, and where its arrays lie: where the first one does.
struct Call {
  const char* verb;
  bool only_cpu;
  nb::dlpack::device device;
  struct Range {
    const char* name;
    uintptr_t begin, end;
    bool written;
  } range[32];  // the memory of the arrays so far
  int ranges = 0;

  explicit Call(const char* name, bool cpu = false) : verb(name), only_cpu(cpu), device{cpu ? 1 : 0, 0} {}
  operator const char*() const { return verb; }
  bool on_cuda() const { return !only_cpu && cuda_backend() && device.device_type == cuda_device_type; }
};

/// "the CPU"
inline std::string place(const nb::dlpack::device& d) {
  if (d.device_type == 1) return "the CPU";
  return (d.device_type == 2 ? "cuda:" : "device type " + std::to_string(d.device_type) + ", number ") +
         std::to_string(d.device_id);
}

/// "float32 [3, 4]"
inline std::string describe(const View& view) {
  if (view.none) return "None";
  const auto& t = view.tensor;
  const char* const kinds[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  std::string text = t.dtype.code < 7 ? kinds[t.dtype.code] : "type";
  if (t.dtype.code != 6) text += std::to_string(t.dtype.bits);
  text += " [";
  for (int i = 0; i < t.ndim; ++i) text += (i ? ", " : "") + std::to_string(t.shape[i]);
  return text + "]";
}

[[noreturn]] inline void wrong_type(const char* verb, const char* name, const std::string& expected,
                                    const std::string& got) {
  throw nb::type_error((std::string(verb) + ": " + name + " expected " + expected + ", got " + got).c_str());
}

[[noreturn]] inline void wrong_value(const char* verb, const char* name, const std::string& expected,
                                     const std::string& got) {
  throw nb::value_error((std::string(verb) + ": " + name + " expected " + expected + ", got " + got).c_str());
}

/// An array that its memory says all of: a native, aligned, contiguous ndarray, or a contiguous torch.Tensor that
/// nothing differentiates, conjugates or negates, where the verbs run; no subclass.
inline bool plain(nb::handle array, nb::dlpack::dltensor* t) noexcept {
  const Kind kind = kind_of(Py_TYPE(array.ptr()));
  bool writable;
  if (kind.numpy) return see_numpy(array.ptr(), t, &writable);
  if (!kind.forward_ad) return false;
  static PyObject* const kGrad = PyUnicode_InternFromString("requires_grad");
  static PyObject* const kNeg = PyUnicode_InternFromString("is_neg");
  static PyObject* const kLevel = PyUnicode_InternFromString("_current_level");
  const auto is_false = [](PyObject* got) { return nb::steal(got).ptr() == Py_False; };
  PyObject* const self = array.ptr();
  int64_t size;
  const bool yes = !kind.api->tensor_from_object(self, t) && t->dtype.code != 5 && contiguous(*t, &size) &&
                   (t->device.device_type == 1 || (t->device.device_type == 2 && cuda_backend())) &&
                   is_false(PyObject_GetAttr(self, kGrad)) &&
                   is_false(PyObject_VectorcallMethod(kNeg, &self, 1, nullptr)) &&
                   PyLong_AsLong(nb::steal(PyObject_GetAttr(kind.forward_ad, kLevel)).ptr()) < 0;
  return PyErr_Occurred() ? PyErr_Clear(), false : yes;
}

/// Refuses an array that is written and shares memory with another of the call.
inline void apart(Call& call, const char* name, uintptr_t begin, uintptr_t end, bool written) {
  for (const auto *r = call.range, *last = r + call.ranges; r < last; ++r)
    if ((written || r->written) && begin < r->end && r->begin < end)
      wrong_value(call, name, "memory of its own", std::string("that of ") + r->name);
  if (call.ranges < static_cast<int>(std::size(call.range))) call.range[call.ranges++] = {name, begin, end, written};
}

/// Checks place, rank, layout and overlap; returns the address of the first element, or any where there is none.
/// `expected` is the contract in words.
inline void* borrow(const View& view, Call& call, const char* name, int ndim, const char* expected, bool write) {
  const auto& t = view.tensor;
  if (view.none) wrong_type(call, name, expected, "None");
  if (view.unreadable) wrong_type(call, name, "an array with memory that DLPack lends", view.unreadable->tp_name);
  const auto device = t.device.device_type == 3 ? nb::dlpack::device{1, 0} : t.device;  // 3: pinned host memory
  const bool known = device.device_type == 1 || (device.device_type == 2 && cuda_backend());
  if (known && !call.device.device_type) call.device = device;
  if (call.device.device_type != device.device_type ||
      (device.device_type == 2 && call.device.device_id != device.device_id))
    wrong_type(call, name, "an array on " + place(call.device.device_type ? call.device : nb::dlpack::device{1, 0}),
               "one on " + place(device));
  if (t.ndim != ndim) wrong_value(call, name, expected, describe(view));
  int64_t size;
  if (!contiguous(t, &size))
    wrong_value(call, name, std::string(expected) + ", row-major and contiguous", "other strides");
  if (!t.data && size) wrong_type(call, name, "an array with data", "a fake tensor");
  if (write && !view.writable) wrong_type(call, name, "a writable array", "a read-only one");
  char* const data = static_cast<char*>(t.data) + t.byte_offset;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  if (size) apart(call, name, begin, begin + static_cast<uintptr_t>(size) * t.dtype.bits / 8, write);
  alignas(64) static char nothing[64];
  return data ? data : nothing;
}

/// T is const-qualified for inputs. None gives a null array where `optional`.
template <class T, int N>
Array<T, N> array(const View& view, Call& call, const char* name, const char* expected, bool optional = false) {
  Array<T, N> out;
  if (view.none && optional) return out;
  out.data = static_cast<T*>(borrow(view, call, name, N, expected, !std::is_const_v<T>));
  if (view.tensor.dtype != nb::dtype<std::remove_const_t<T>>()) wrong_type(call, name, expected, describe(view));
  for (int i = 0; i < N; ++i) out.shape[i] = view.tensor.shape[i];
  return out;
}

inline DType float_type(const View& view, const Call& call, const char* name, const char* expected) {
  const auto& d = view.tensor.dtype;
  if (d == nb::dlpack::dtype{2, 32, 1}) return DType::float32;
  if (d == nb::dlpack::dtype{2, 16, 1}) return DType::float16;
  if (d == nb::dlpack::dtype{4, 16, 1}) return DType::bfloat16;
  wrong_type(call, name, expected, describe(view));
}

/// An array of `ndim` dimensions as rows of its last one; `int8`: that type too.
template <class R = Rows>
R rows(const View& view, Call& call, const char* name, int ndim, const char* expected, bool int8 = false) {
  R out;
  out.data = borrow(view, call, name, ndim, expected, std::is_same_v<R, MutableRows>);
  const bool is_int8 = int8 && view.tensor.dtype == nb::dtype<int8_t>();
  out.dtype = is_int8 ? DType::int8 : float_type(view, call, name, expected);
  out.rows = product(view.tensor.shape, ndim - 1);
  out.width = view.tensor.shape[ndim - 1];
  if (out.rows < 0 || out.width > kMostWidth)
    wrong_value(call, name, std::string(expected) + ", fewer than 2^63 rows of at most 2^20 numbers", describe(view));
  return out;
}

/// int32 or int64 [n]; None gives null ids where `optional`.
inline Ids ids(const View& view, Call& call, const char* name, const char* expected, bool optional = false) {
  if (view.none && optional) return {};
  const void* const data = borrow(view, call, name, 1, expected, false);
  const bool wide = view.tensor.dtype == nb::dtype<int64_t>();
  if (!wide && view.tensor.dtype != nb::dtype<int32_t>()) wrong_type(call, name, expected, describe(view));
  return {data, wide ? DType::int64 : DType::int32, view.tensor.shape[0]};
}

}  // namespace hisac::bind
