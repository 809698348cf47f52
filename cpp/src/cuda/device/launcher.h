// SPDX-License-Identifier: Apache-2.0
// What a verb does on the host: it cuts shared memory, then launches kernels one after another on its stream, until one
// fails.
#pragma once
#include "base/checks.h"
#include "cuda/device/elements.h"

namespace hisac::cuda {

/// Cuts a block's shared memory: offsets in bytes, multiples of 16, which fit in an int whatever is asked for.
class SharedLayout {
 public:
  explicit SharedLayout(int64_t first = 0) noexcept : bytes_(first) {}
  int take(int64_t bytes) noexcept {
    const int64_t offset = bytes_;
    bytes_ += (bytes + 15) / 16 * 16;
    return least(offset, 1 << 30);
  }
  int64_t bytes() const noexcept { return bytes_; }

 private:
  int64_t bytes_;
};

class Launcher {
 public:
  /// Asks for the current device's facts; after an error nothing is launched.
  Launcher(const char* verb, const Context& context) noexcept
      : verb_(verb), stream_(static_cast<simt::Stream>(context.stream)), error_(simt::machine(&machine)) {}

  template <class Kernel, class... Arguments>
  void operator()(Kernel kernel, int blocks, int threads, size_t shared_bytes, const Arguments&... arguments) {
    if (error_ == Error{}) error_ = simt::launch(kernel, blocks, threads, shared_bytes, stream_, arguments...);
  }
  Status status() const noexcept {
    if (error_ == Error{}) return {};
    return Status::error(Code::io_error, "%s: cuda: %s", verb_, simt::describe(error_));
  }

  simt::Machine machine;

 private:
  using Error = decltype(simt::machine(nullptr));
  const char* verb_;
  simt::Stream stream_;
  Error error_;
};

}  // namespace hisac::cuda
