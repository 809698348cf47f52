// SPDX-License-Identifier: Apache-2.0
// What Python lends the core: a pool of threads, scratch per thread, exceptions for Status.
#pragma once
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <utility>

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
  Array<std::byte, 1> take(size_t bytes) {
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
  bool worth_keeping() const noexcept { return size_ <= size_t{64} << 20; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

/// Runs verb(context) without the GIL, with workspace(workers) bytes of scratch.
template <class Workspace, class Verb>
void run(Workspace workspace, Verb verb) {
  static thread_local Scratch kept;
  Scratch scratch(std::move(kept));
  const Executor executor = Pool::get().executor();
  const Context context{scratch.take(workspace(executor.workers)), &executor};
  Status status;
  {
    nb::gil_scoped_release release;
    status = verb(context);
  }
  if (scratch.worth_keeping()) kept.swap(scratch);
  raise(status);
}

}  // namespace hisac::bind
