// SPDX-License-Identifier: Apache-2.0
// Takes scratch from the caller's workspace, or only counts bytes. The same code does both, so the size that a verb
// names is the size that it uses.
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>

#include "hisac/context.h"
#include "hisac/status.h"

namespace hisac {

class Arena {
 public:
  Arena() noexcept = default;  // only counts bytes
  explicit Arena(Array<std::byte, 1> memory) noexcept
      : base_(memory.data), capacity_(memory.data && aligned() ? static_cast<size_t>(memory.shape[0]) : 0) {}

  /// More than any workspace has: what a verb names for sizes that no call may have.
  static constexpr size_t kLimit = std::numeric_limits<size_t>::max() / 2;

  /// rows * columns elements of T, aligned to 64 bytes; null when counting, or once the workspace is exhausted.
  template <class T>
  T* take(int64_t rows, int64_t columns = 1) noexcept {
    const size_t r = rows > 0 ? static_cast<size_t>(rows) : 0, c = columns > 0 ? static_cast<size_t>(columns) : 0;
    size_t count;
    if (__builtin_mul_overflow(r, c, &count) || count > (kLimit - used_) / sizeof(T)) {
      used_ = kLimit;
      return nullptr;
    }
    const size_t offset = used_;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return base_ && used_ <= capacity_ ? reinterpret_cast<T*>(base_ + offset) : nullptr;
  }

  /// n elements of T, then what carve(one) takes for each of them. Null where `take` is; `carve` is called all the
  /// same, so that its bytes are counted.
  template <class T, class Carve>
  T* take_each(int64_t n, Carve carve) noexcept {
    T* const all = take<T>(n);
    for (int64_t i = 0; i < n; ++i) {
      T one;
      carve(one);
      if (all) all[i] = one;
    }
    return all;
  }

  /// The same for several arrays of n elements: take_into(n, a, b) is a = take(n), then b = take(n).
  template <class... T>
  void take_into(int64_t n, T*&... arrays) noexcept {
    ((arrays = take<T>(n)), ...);
  }

  size_t used() const noexcept { return used_; }

  Status check(const char* verb) const noexcept {
    if (!aligned())
      return Status::error(Code::invalid_argument, "%s: workspace expected aligned to 64 bytes, got address %p", verb,
                           static_cast<void*>(base_));
    if (used_ > capacity_)
      return Status::error(Code::invalid_argument, "%s: workspace expected at least %zu bytes, got %zu", verb, used_,
                           capacity_);
    return {};
  }

 private:
  bool aligned() const noexcept { return reinterpret_cast<uintptr_t>(base_) % 64 == 0; }  // nothing is taken otherwise
  std::byte* base_ = nullptr;
  size_t used_ = 0, capacity_ = 0;
};

}  // namespace hisac
