// SPDX-License-Identifier: Apache-2.0
// What Python lends the core: a pool of threads, scratch per thread, exceptions for Status.
#pragma once
#include <cstdlib>
#include <mutex>
#include <stdexcept>

#include "dlpack.h"
#include "hisac/hisac.h"

namespace hisac::bind {

/// Becomes hisac.CorruptFileError.
struct CorruptFile : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void raise(const Status& status) {
  switch (status.code()) {
    case Code::ok:
      return;
    case Code::invalid_argument:
      throw nb::value_error(status.what());
    case Code::wrong_type:
      throw nb::type_error(status.what());
    case Code::not_implemented:
      PyErr_SetString(PyExc_NotImplementedError, status.what());
      break;
    case Code::corrupt_file:
      throw CorruptFile(status.what());
    case Code::io_error:
      PyErr_SetString(PyExc_OSError, status.what());
      break;
    case Code::out_of_memory:
      PyErr_SetString(PyExc_MemoryError, status.what());
      break;
    case Code::cancelled:
      if (!PyErr_Occurred()) PyErr_SetString(PyExc_KeyboardInterrupt, status.what());
      break;
  }
  throw nb::python_error();
}

/// The process's pool. It outlives Python's objects: threads of a service may still run at exit.
class Pool {
 public:
  static Pool& get() {
    static Pool* const pool = new Pool;
    return *pool;
  }
  void resize(int workers) {
    std::lock_guard<std::mutex> lock(mutex_);
    raise(pool_.resize(workers));
  }
  int workers() {
    std::lock_guard<std::mutex> lock(mutex_);
    return pool_.workers();
  }
  Executor executor() {
    std::lock_guard<std::mutex> lock(mutex_);
    return pool_.executor();
  }

 private:
  std::mutex mutex_;
  ThreadPool pool_;
};

/// Scratch that a thread keeps from call to call, unless it is large.
class Scratch {
 public:
  Array<std::byte, 1> take(size_t bytes) {
    if (bytes > size_) {
      release();
      data_ = static_cast<std::byte*>(std::aligned_alloc(64, (bytes + 4095) / 4096 * 4096));
      if (!data_) {
        PyErr_SetString(PyExc_MemoryError, "hisac: out of memory for the workspace");
        throw nb::python_error();
      }
      size_ = (bytes + 4095) / 4096 * 4096;
    }
    return {data_, {static_cast<int64_t>(size_)}};
  }
  void trim() noexcept {
    if (size_ > kKeep) release();
  }
  ~Scratch() { release(); }

 private:
  static constexpr size_t kKeep = size_t{64} << 20;
  void release() noexcept {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

/// Runs verb(context) without the GIL, with workspace(workers) bytes of scratch.
template <class Workspace, class Verb>
void run(Workspace workspace, Verb verb) {
  static thread_local Scratch scratch;
  const Executor executor = Pool::get().executor();
  const Context context{scratch.take(workspace(executor.workers)), &executor};
  Status status;
  {
    nb::gil_scoped_release release;
    status = verb(context);
  }
  scratch.trim();
  raise(status);
}

}  // namespace hisac::bind
