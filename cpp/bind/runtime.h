// SPDX-License-Identifier: Apache-2.0
// What Python lends the core: a pool of threads, scratch per thread, exceptions for Status.
#pragma once
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
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
  const auto error = [&](PyObject* type) {
    PyErr_SetObject(type, text.ptr());
    return nb::python_error();
  };
  switch (status.code()) {
    case Code::wrong_type:
      throw error(PyExc_TypeError);
    case Code::not_implemented:
      throw error(PyExc_NotImplementedError);
    case Code::out_of_memory:
      throw error(PyExc_MemoryError);
    case Code::corrupt_file:
      throw CorruptFile(nb::cast<std::string>(text));
    case Code::cancelled:
      throw error(PyExc_KeyboardInterrupt);
    case Code::io_error:  // (errno, text) makes FileNotFoundError and its like
      if (os_error) text = nb::make_tuple(os_error, text);
      throw error(PyExc_OSError);
    default:
      throw error(PyExc_ValueError);
  }
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

/// The process's threads. A call keeps the pool that it began with, so the number may change meanwhile; the object
/// outlives Python's, since threads of a service may still run at exit.
class Pool {
 public:
  static Pool& get() {
    static Pool* const pool = new Pool;
    return *pool;
  }
  void resize(int workers) {
    auto fresh = std::make_shared<ThreadPool>();
    raise(fresh->resize(workers));
    std::lock_guard<std::mutex> lock(mutex_);
    pool_.swap(fresh);
  }
  int workers() {
    std::lock_guard<std::mutex> lock(mutex_);
    return pool_->workers();
  }
  std::shared_ptr<ThreadPool> borrow(Executor* executor) {
    std::lock_guard<std::mutex> lock(mutex_);
    *executor = pool_->executor();
    return pool_;
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<ThreadPool> pool_ = std::make_shared<ThreadPool>();
};

/// Scratch for one call. A thread keeps it from call to call, unless it is large; a call takes it away, so that a verb
/// inside a callback of another has its own.
class Scratch {
 public:
  Scratch() noexcept = default;
  Scratch(Scratch&& other) noexcept { swap(other); }
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  void swap(Scratch& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  /// None where no machine has so many: the verb then names the argument that asks for them.
  Array<std::byte, 1> take(size_t bytes) {
    if (bytes > PTRDIFF_MAX - 4096) return {};
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<std::byte*>(std::aligned_alloc(64, size_));
      if (!data_) {
        size_ = 0;
        PyErr_SetString(PyExc_MemoryError, "hisac: out of memory for the workspace");
        throw nb::python_error();
      }
    }
    return {data_, {static_cast<int64_t>(size_)}};
  }
  bool worth_keeping() const noexcept { return size_ <= size_t{128} << 20; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
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
  context.codebook_image = {image_bytes.data, {image_bytes.shape[0]}};
  context.stream = reinterpret_cast<void*>(nb::cast<uintptr_t>(lent[2]));
  raise(verb(context));  // puts work on the stream, in whose order the scratch is freed
}

/// Runs verb(context) where the call's arrays lie, on a CPU without the GIL, with workspace(context) bytes of scratch.
template <class Workspace, class Verb>
void run(const Call& call, Workspace workspace, Verb verb, const Codebook* book = nullptr) {
  if (call.on_cuda()) return run_on_cuda(call.device.device_id, book, workspace, verb);
  static thread_local Scratch kept;
  Scratch scratch(std::move(kept));
  Executor executor;
  std::shared_ptr<ThreadPool> pool = Pool::get().borrow(&executor);
  Context context;
  context.executor = &executor;
  context.workspace = scratch.take(workspace(context));
  const Status status = without_gil([&] {
    const Status done = verb(context);
    pool.reset();  // the last call of a pool joins its threads
    return done;
  });
  if (scratch.worth_keeping()) kept.swap(scratch);
  raise(status);
}

}  // namespace hisac::bind
