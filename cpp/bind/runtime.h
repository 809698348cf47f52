// SPDX-License-Identifier: Apache-2.0
// What Python lends the core: a pool of threads, scratch per thread, exceptions for Status.
#pragma once
#include <unistd.h>

#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "arrays.h"

namespace hisac::bind {

/// Becomes hisac.CorruptFileError.
struct CorruptFile : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Status as an exception; os_error: the errno that goes with Code::io_error. Messages may quote bytes of a file or a
/// path, so they need not be UTF-8.
inline void raise(const Status& status, int os_error = 0) {
  if (status.ok()) return;
  if (status.code() == Code::cancelled && PyErr_Occurred()) throw nb::python_error();
  const char* const what = status.what();
  nb::object text = nb::steal(PyUnicode_DecodeUTF8(what, static_cast<Py_ssize_t>(std::strlen(what)), "replace"));
  if (status.code() == Code::corrupt_file) throw CorruptFile(nb::cast<std::string>(text));
  const std::pair<Code, PyObject*> types[] = {{Code::wrong_type, PyExc_TypeError},
                                              {Code::not_implemented, PyExc_NotImplementedError},
                                              {Code::out_of_memory, PyExc_MemoryError},
                                              {Code::cancelled, PyExc_KeyboardInterrupt},
                                              {Code::io_error, PyExc_OSError}};
  PyObject* type = PyExc_ValueError;
  for (const auto& [code, other] : types)
    if (code == status.code()) type = other;
  // OSError(errno, text) makes FileNotFoundError and its like
  if (type == PyExc_OSError && os_error) text = nb::make_tuple(os_error, text);
  PyErr_SetObject(type, text.ptr());
  throw nb::python_error();
}

/// f(), which waits for the GIL or runs Python's code, and leaves nothing to destroy. Python before 3.14 ends a daemon
/// thread that does so in an interpreter at its end by unwinding the stack; C++ frames above do not survive that, so
/// the thread sleeps here instead until the process ends, as it does in later Pythons.
template <class F>
auto survive(F f) noexcept {
  try {
    return f();
  } catch (...) {
    for (;;) pause();
  }
}

/// f() while other threads may have the GIL.
template <class F>
auto without_gil(F f) noexcept {
  PyThreadState* const state = PyEval_SaveThread();
  const auto result = f();
  survive([=] { PyEval_RestoreThread(state); });
  return result;
}

/// f() with the GIL, from code without.
template <class F>
bool with_gil(F f) noexcept {
  return survive([&] {
    const PyGILState_STATE state = PyGILState_Ensure();
    const bool result = f();
    PyGILState_Release(state);
    return result;
  });
}

/// The process's threads, to be loaded and exchanged atomically: a call keeps the pool that it began with. The object
/// outlives Python's, since threads of a service may still run at exit.
inline std::shared_ptr<ThreadPool>& pool() {
  static auto* const kept = new auto(std::make_shared<ThreadPool>());
  return *kept;
}

/// A fresh pool for the calls from now on.
inline void set_workers(int workers) {
  auto fresh = std::make_shared<ThreadPool>();
  raise(fresh->resize(workers));
  std::atomic_exchange(&pool(), fresh);
}

/// Scratch for one call. A thread keeps it from call to call, unless it is large; a call takes it away, so that a verb
/// inside a callback of another has its own.
struct Scratch {
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::unique_ptr<Line[]> lines;
  size_t size = 0;  // in bytes

  /// None where no machine has so many: the verb then names the argument that asks for them.
  Array<std::byte, 1> take(size_t bytes) {
    if (bytes > PTRDIFF_MAX - 4096) return {};
    if (bytes > size) {
      lines.reset();  // before the larger one
      size = (bytes + 4095) / 4096 * 4096;
      lines.reset(new (std::nothrow) Line[size / sizeof(Line)]);  // not filled
      if (!lines) {
        PyErr_SetString(PyExc_MemoryError, "hisac: out of memory for the workspace");
        throw nb::python_error();
      }
    }
    return {reinterpret_cast<std::byte*>(lines.get()), {static_cast<int64_t>(size)}};
  }
};

/// Runs verb(context) on a GPU's current stream; Python lends the scratch and, for a book, its image.
template <class Workspace, class Verb>
void run_on_cuda(int device, const Codebook* book, Workspace workspace, Verb verb) {
  struct OnDevice {
    int before;
    ~OnDevice() { cuda_backend()->use_device(before); }
  } const on_device{cuda_backend()->use_device(device)};
  nb::object given = book ? nb::cast(book, nb::rv_policy::reference) : nb::none();
  Context context;
  context.device = Device::cuda;
  const nb::object arrays = nb::module_::import_("hisac.arrays");
  const nb::object lent = nb::steal(survive([&] {
    return PyObject_CallMethod(arrays.ptr(), "lend", "KiO", static_cast<unsigned long long>(workspace(context)), device,
                               given.ptr());
  }));
  if (!lent.is_valid()) nb::raise_python_error();
  View scratch, image;
  const auto bytes = [](nb::handle array, View* view) -> Array<std::byte, 1> {
    if (array.is_none()) return {};
    *view = nb::cast<View>(array);
    return {static_cast<std::byte*>(view->tensor.data) + view->tensor.byte_offset, {view->tensor.shape[0]}};
  };
  context.workspace = bytes(lent[0], &scratch);
  const Array<std::byte, 1> image_bytes = bytes(lent[1], &image);
  context.codebook_image = {{image_bytes.data, {image_bytes.shape[0]}}, book ? book->fingerprint() : 0};
  context.stream = reinterpret_cast<void*>(nb::cast<uintptr_t>(lent[2]));
  raise(verb(context));  // puts work on the stream, in whose order the scratch is freed
}

/// f(context, arguments..) of a context that is not there yet.
template <class F, class... Arguments>
auto with(F f, const Arguments&... arguments) {
  return [&, f](const Context& context) { return f(context, arguments...); };
}

/// Runs verb(context) where the call's arrays lie, on a CPU without the GIL, with workspace(context) bytes of scratch.
template <class Workspace, class Verb>
void run(const Call& call, Workspace workspace, Verb verb, const Codebook* book = nullptr) {
  if (call.on_cuda()) return run_on_cuda(call.device.device_id, book, workspace, verb);
  static thread_local Scratch kept;
  Scratch scratch = std::exchange(kept, {});
  std::shared_ptr<ThreadPool> threads = std::atomic_load(&pool());
  Executor executor = threads->executor();
  Context context;
  context.executor = &executor;
  context.workspace = scratch.take(workspace(context));
  const Status status = without_gil([&] {
    const Status done = verb(context);
    threads.reset();  // the last call of a pool joins its threads
    return done;
  });
  if (scratch.size <= size_t{128} << 20) kept = std::move(scratch);
  raise(status);
}

}  // namespace hisac::bind
