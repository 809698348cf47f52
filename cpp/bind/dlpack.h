// SPDX-License-Identifier: Apache-2.0
// Arrays from Python, borrowed without a copy: contiguous ndarrays by their heads (5 ns an array instead of 150),
// through DLPack's C exchange API where the type has one (torch 2.10 and later; 50 ns instead of 2 us), else through
// nanobind (anything with __dlpack__).
//
// This caster only borrows; it never converts, copies or judges: inside a torch operator tensors still say
// requires_grad. What a tensor may be is asked before, by `plain` (arrays.h) and, of what is not, hisac/arrays.py.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <atomic>
#include <climits>
#include <cstring>

namespace hisac::bind {

namespace nb = nanobind;

/// The head of DLPack's DLPackExchangeAPI, version 1.
struct ExchangeApi {
  struct {
    uint32_t major, minor;
  } version;
  const void* previous;
  int (*allocate)(void*, void**, void*, void (*)(void*, const char*, const char*));
  int (*managed_from_object)(void*, void**);
  int (*managed_to_object)(void*, void**);
  int (*tensor_from_object)(void* object, nb::dlpack::dltensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

/// The heads of NumPy's arrays and dtypes: part of its ABI, since its headers compile them into whatever is built on
/// it.
struct NumpyDtype {
  PyObject_HEAD PyTypeObject* scalar;
  char kind, letter, order, unused;
  int number;
};
struct NumpyArray {
  PyObject_HEAD char* data;
  int ndim;
  Py_ssize_t *shape, *strides;
  PyObject* base;
  NumpyDtype* dtype;
  int flags;
};

/// The type of a NumPy type number; of no bits where DLPack names none.
inline nb::dlpack::dtype numpy_type(int number) noexcept {
  constexpr char kCodes[] = "6010101010122.55.......2";  // bool, int8, uint8, .. complex128; float16
  constexpr uint8_t kLong = 8 * sizeof(long);
  constexpr uint8_t kBits[] = {8,  8, 8,  16,  16, 32, 32, kLong, kLong, 64, 64, 32,
                               64, 0, 64, 128, 0,  0,  0,  0,     0,     0,  0,  16};
  if (number < 0 || number >= static_cast<int>(sizeof kBits) || !kBits[number]) return {};
  return {static_cast<uint8_t>(kCodes[number] - '0'), kBits[number], 1};
}

/// That of a NumPy dtype. A user's type has a number drawn at run time; of those, ml_dtypes' bfloat16 is known.
inline nb::dlpack::dtype numpy_type(const NumpyDtype& d) noexcept {
  if (d.number < 256) return numpy_type(d.number);
  return std::strcmp(d.scalar->tp_name, "ml_dtypes.bfloat16") ? nb::dlpack::dtype{} : nb::dlpack::dtype{4, 16, 1};
}

/// A contiguous, aligned ndarray of a native type that DLPack names; false for any other.
inline bool see_numpy(PyObject* source, nb::dlpack::dltensor* out, bool* writable) noexcept {
  constexpr int kContiguous = 0x1, kAligned = 0x100, kWritable = 0x400, kWarnsOfWrites = INT_MIN;
  const auto* const a = reinterpret_cast<const NumpyArray*>(source);
  const auto type = numpy_type(*a->dtype);
  *writable = a->flags & kWritable;
  *out = {a->data, {1, 0}, a->ndim, type, reinterpret_cast<int64_t*>(a->shape), nullptr, 0};
  return (a->flags & (kContiguous | kAligned | kWarnsOfWrites)) == (kContiguous | kAligned) && type.bits &&
         (a->dtype->order == '=' || a->dtype->order == '|');
}

/// Whether a type is numpy.ndarray, laid out as declared here.
inline bool is_numpy(nb::handle type) {
  if (std::strcmp(reinterpret_cast<PyTypeObject*>(type.ptr())->tp_name, "numpy.ndarray") || sizeof(Py_ssize_t) != 8)
    return false;
  const nb::object numpy = nb::module_::import_("numpy"), one = numpy.attr("zeros")(1, "int16"),
                   dtype = one.attr("dtype");
  const auto* const a = reinterpret_cast<const NumpyArray*>(one.ptr());
  return numpy.attr("ndarray").is(type) && reinterpret_cast<PyObject*>(a->dtype) == dtype.ptr() &&
         a->dtype->number == nb::cast<int>(dtype.attr("num")) && a->dtype->order == '=' &&
         a->flags == nb::cast<int>(one.attr("flags").attr("num")) && a->ndim == 1 && *a->shape == 1 &&
         reinterpret_cast<uintptr_t>(a->data) == nb::cast<uintptr_t>(one.attr("__array_interface__")["data"][0]);
}

/// What is known of a type of arrays.
struct Kind {
  PyTypeObject* type;
  bool numpy;              // exactly numpy.ndarray
  const ExchangeApi* api;  // null: it has none
  PyObject* forward_ad;    // torch's module, for torch.Tensor and Parameter themselves
  Kind* next;
};

inline Kind look_at(PyTypeObject* type) noexcept {
  const nb::handle self(reinterpret_cast<PyObject*>(type));
  Kind kind{type, false, nullptr, nullptr, nullptr};
  try {
    kind.numpy = is_numpy(self);
    const nb::object capsule = nb::getattr(self, "__dlpack_c_exchange_api__", nb::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return kind;
    const auto* const api = static_cast<ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api->version.major != 1 || !api->tensor_from_object) return kind;
    kind.api = api;
    const nb::object torch = nb::module_::import_("sys").attr("modules")["torch"];
    if (torch.attr("Tensor").is(self) || torch.attr("nn").attr("Parameter").is(self))
      kind.forward_ad = nb::object(torch.attr("autograd").attr("forward_ad")).release().ptr();
  } catch (...) {
  }
  return kind;
}

/// Kinds are kept of the first few types, and of those that matter; the list only grows, so reading it needs no lock on
/// a Python without the GIL.
inline Kind kind_of(PyTypeObject* type) noexcept {
  static std::atomic<Kind*> known{nullptr};
  static std::atomic<int> count{0};
  for (Kind* k = known.load(std::memory_order_acquire); k; k = k->next)
    if (k->type == type) return *k;
  Kind kind = look_at(type);
  if (kind.numpy || kind.forward_ad || count.fetch_add(1) < 16) {
    Py_INCREF(reinterpret_cast<PyObject*>(type));  // kept for good: its address must not be used again
    kind.next = known.load(std::memory_order_relaxed);
    Kind* const fresh = new Kind(kind);
    while (!known.compare_exchange_weak(fresh->next, fresh, std::memory_order_release, std::memory_order_relaxed)) {
    }
  }
  return kind;
}

/// The product of n lengths; -1 where int64 cannot hold it.
inline int64_t product(const int64_t* lengths, int n) noexcept {
  int64_t size = 1;
  bool over = false;
  for (int i = 0; i < n; ++i) {
    if (!lengths[i]) return 0;
    over |= __builtin_mul_overflow(size, lengths[i], &size);
  }
  return over ? -1 : size;
}

/// Row-major without gaps, as an array without elements is; its size.
inline bool contiguous(const nb::dlpack::dltensor& t, int64_t* size) noexcept {
  *size = product(t.shape, t.ndim);
  bool yes = *size >= 0;
  int64_t step = 1;
  for (int i = t.strides && *size > 0 ? t.ndim - 1 : -1; i >= 0; --i) {
    yes = yes && (t.shape[i] == 1 || t.strides[i] == step);
    step *= t.shape[i];
  }
  return yes;
}

/// A borrowed array; `none` where Python passed None.
struct View {
  nb::dlpack::dltensor tensor{};
  nb::ndarray<nb::ro> hold;  // keeps a fallback's buffer alive
  bool none = false, writable = true;
  PyTypeObject* unreadable = nullptr;  // of an object whose memory DLPack does not lend: no array, or a wrapper
};

using Lent = const View&;

}  // namespace hisac::bind

namespace nanobind::detail {

template <>
struct type_caster<hisac::bind::View> {
  NB_TYPE_CASTER(hisac::bind::View, const_name("typing.Any"))

  bool from_python(handle source, uint32_t flags, cleanup_list* cleanup) noexcept {
    if (source.is_none()) return value.none = true;
    const hisac::bind::Kind kind = hisac::bind::kind_of(Py_TYPE(source.ptr()));
    if (kind.numpy && hisac::bind::see_numpy(source.ptr(), &value.tensor, &value.writable)) return true;
    if (kind.api ? !kind.api->tensor_from_object(source.ptr(), &value.tensor) : hold(source, flags, cleanup))
      return true;
    PyErr_Clear();
    value.unreadable = Py_TYPE(source.ptr());
    return true;
  }

  /// Whether nanobind lends the memory.
  bool hold(handle source, uint32_t flags, cleanup_list* cleanup) noexcept {
    flags &= ~static_cast<uint32_t>(cast_flags::convert);
    make_caster<ndarray<>> writable;
    make_caster<ndarray<ro>> readable;
    value.writable = writable.from_python(source, flags, cleanup);
    PyErr_Clear();
    if (!value.writable && !readable.from_python(source, flags, cleanup)) return false;
    const auto& a = value.hold = value.writable ? ndarray<ro>(writable.value.handle()) : readable.value;
    value.tensor = {const_cast<void*>(static_cast<const void*>(a.data())),
                    {a.device_type(), a.device_id()},
                    static_cast<int32_t>(a.ndim()),
                    a.dtype(),
                    const_cast<int64_t*>(a.shape_ptr()),
                    const_cast<int64_t*>(a.stride_ptr()),
                    0};
    return true;
  }

  static handle from_cpp(const hisac::bind::View&, rv_policy, cleanup_list*) noexcept { return handle(); }
};

}  // namespace nanobind::detail
