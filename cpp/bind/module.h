// SPDX-License-Identifier: Apache-2.0
// What NB_MODULE does, but once in a process: a C++ type belongs to one module of one interpreter. A sub-interpreter
// that filled a module of its own would take the types from the main one, so it is refused. Another import in the main
// interpreter, after sys.modules has lost the first module, gets the contents of the first.
#pragma once
#include <nanobind/nanobind.h>

namespace hisac::bind {

namespace nb = nanobind;

template <void (*fill)(nb::module_&)>
int fill_once(PyObject* self) noexcept {
  PyInterpreterState* const interpreter = PyInterpreterState_Get();
  if (interpreter != PyInterpreterState_Main()) {
    PyErr_SetString(PyExc_ImportError, "hisac: expected the main interpreter, got a sub-interpreter");
    return -1;
  }
  PyObject *const kept = PyInterpreterState_GetDict(interpreter), *const name = PyModule_GetNameObject(self);
  if (!kept || !name) return -1;
  if (PyObject* const first = PyDict_GetItemWithError(kept, name))
    return PyDict_Merge(PyModule_GetDict(self), PyModule_GetDict(first), 0);
  try {
    nb::module_ m = nb::borrow<nb::module_>(self);
    if (!nb::register_module(m)) return -1;
    fill(m);
    return PyDict_SetItem(kept, name, self);
  } catch (nb::python_error& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
  }
  return -1;
}

}  // namespace hisac::bind
