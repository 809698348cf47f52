// SPDX-License-Identifier: Apache-2.0
// Errors without exceptions and without allocation: every verb returns a Status by value.
#pragma once
#include <cstdint>

namespace hisac {

enum class Code : int32_t {
  ok = 0,
  invalid_argument,  // a shape, an order or a parameter out of range
  wrong_type,        // a dtype
  not_implemented,
  corrupt_file,  // the bytes are no codebook or state, or a damaged one
  io_error,      // the operating system, or CUDA at a launch, reported an error
  out_of_memory,
  cancelled,  // a progress callback said stop
};

/// The outcome of a call: a code and, unless ok, one line that says what was expected and what came. After an error the
/// outputs of a verb are unchanged, with two exceptions: a cancelled `fit` may have written centers and its report, as
/// its steps do, and on CUDA a launch that fails (io_error) may follow others that have written.
class [[nodiscard]] Status {
 public:
  Status() noexcept : code_(Code::ok) { what_[0] = 0; }
#if defined(__GNUC__)
  __attribute__((format(printf, 2, 3)))
#endif
  static Status error(Code code, const char* format, ...) noexcept;

  Code code() const noexcept { return code_; }
  const char* what() const noexcept { return what_; }
  bool ok() const noexcept { return code_ == Code::ok; }

 private:
  Code code_;
  char what_[252];
};

}  // namespace hisac
