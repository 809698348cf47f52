// SPDX-License-Identifier: Apache-2.0
// Arrays from Python, borrowed without a copy: through DLPack's C exchange API where the type has one (torch 2.10 and
// later; 50 ns an array instead of 2 us), else through nanobind (NumPy and anything with __dlpack__).
//
// This caster only borrows; it never converts, copies or judges. What a tensor may be (gradients, conjugates) is the
// Python layer's business: inside a torch operator tensors still say requires_grad.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <atomic>

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

/// The exchange API of a type, or null. Answers are kept for the first few types; the list only grows, so reading it
/// needs no lock on a Python without the GIL.
inline const ExchangeApi* exchange_api(PyTypeObject* type) noexcept {
  struct Known {
    PyTypeObject* type;
    const ExchangeApi* api;
    Known* next;
  };
  static std::atomic<Known*> known{nullptr};
  static std::atomic<int> count{0};
  for (Known* k = known.load(std::memory_order_acquire); k; k = k->next)
    if (k->type == type) return k->api;
  const ExchangeApi* api = nullptr;
  if (PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__")) {
    api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
  }
  if (!api) PyErr_Clear();
  if (api && (api->version.major != 1 || !api->tensor_from_object)) api = nullptr;
  if (count.fetch_add(1) < 16) {
    Py_INCREF(reinterpret_cast<PyObject*>(type));  // kept for good: its address must not be used again
    Known* const fresh = new Known{type, api, known.load(std::memory_order_relaxed)};
    while (!known.compare_exchange_weak(fresh->next, fresh, std::memory_order_release, std::memory_order_relaxed)) {
    }
  }
  return api;
}

/// A borrowed array; `none` where Python passed None.
struct View {
  nb::dlpack::dltensor tensor;
  nb::ndarray<nb::ro> hold;  // keeps a fallback's buffer alive
  bool none = false, writable = true;
  PyTypeObject* unreadable =
      nullptr;  // the type of an object whose memory DLPack does not lend: no array, or a wrapper
};

}  // namespace hisac::bind

namespace nanobind::detail {

template <>
struct type_caster<hisac::bind::View> {
  NB_TYPE_CASTER(hisac::bind::View, const_name("typing.Any"))

  bool from_python(handle source, uint32_t flags, cleanup_list* cleanup) noexcept {
    if (source.is_none()) return value.none = true;
    if (const auto* api = hisac::bind::exchange_api(Py_TYPE(source.ptr()))) {
      if (api->tensor_from_object(source.ptr(), &value.tensor) == 0) return true;
      PyErr_Clear();
      value.unreadable = Py_TYPE(source.ptr());
      return true;
    }
    flags &= ~static_cast<uint32_t>(cast_flags::convert);
    make_caster<ndarray<>> writable;
    if (writable.from_python(source, flags, cleanup)) {
      value.hold = ndarray<ro>(writable.value.handle());
    } else {
      PyErr_Clear();
      make_caster<ndarray<ro>> readable;
      if (!readable.from_python(source, flags, cleanup)) {
        PyErr_Clear();
        value.unreadable = Py_TYPE(source.ptr());
        return true;
      }
      value.hold = readable.value;
      value.writable = false;
    }
    const auto& a = value.hold;
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
