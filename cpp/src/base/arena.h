// SPDX-License-Identifier: Apache-2.0
// Takes scratch from the caller's workspace, or only counts bytes. The same code does both, so the size that a verb
// names is the size that it uses.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "base/checks.h"
#include "hisac/context.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HISAC_ASAN 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define HISAC_ASAN 1
#endif
#ifdef HISAC_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace hisac {

// Under AddressSanitizer a gap lies behind each array, so that a write beyond it is seen.
#ifdef HISAC_ASAN
constexpr size_t kGap = 64;
inline void forbid(void* p, size_t bytes) noexcept { __asan_poison_memory_region(p, bytes); }
inline void allow(void* p, size_t bytes) noexcept { __asan_unpoison_memory_region(p, bytes); }
#else
constexpr size_t kGap = 0;
inline void forbid(void*, size_t) noexcept {}
inline void allow(void*, size_t) noexcept {}
#endif

class Arena {
 public:
  Arena() noexcept = default;  // only counts bytes
  explicit Arena(Array<std::byte, 1> memory) noexcept
      : base_(memory.data), capacity_(memory.data && aligned() ? static_cast<size_t>(memory.shape[0]) : 0) {
    allow(base_, capacity_);
  }
  Arena(const Arena&) = delete;
  ~Arena() { allow(base_, capacity_); }

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
    const size_t offset = used_, bytes = count * sizeof(T);
    used_ += (bytes + 63) / 64 * 64 + kGap;
    if (!base_ || used_ > capacity_) return nullptr;
    forbid(base_ + offset + bytes, used_ - offset - bytes);
    return reinterpret_cast<T*>(base_ + offset);
  }

  /// All that is left, and at least so many bytes; *bytes is how many.
  std::byte* take_rest(int64_t least, int64_t* bytes) noexcept {
    const size_t left = capacity_ > used_ + kGap ? (capacity_ - used_ - kGap) / 64 * 64 : 0;
    *bytes = std::max(least, static_cast<int64_t>(left));
    return take<std::byte>(*bytes);
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
      return invalid("%s: workspace expected aligned to 64 bytes, got address %p", verb, static_cast<void*>(base_));
    if (used_ > capacity_) return invalid("%s: workspace expected at least %zu bytes, got %zu", verb, used_, capacity_);
    return {};
  }

 private:
  bool aligned() const noexcept { return reinterpret_cast<uintptr_t>(base_) % 64 == 0; }  // nothing is taken otherwise
  std::byte* base_ = nullptr;
  size_t used_ = 0, capacity_ = 0;
};

/// The bytes that a call takes: all of its scratch is what its `carve` takes.
template <class Call>
size_t workspace_of(Call call) noexcept {
  Arena arena;
  call.carve(arena);
  return arena.used();
}

/// Runs a call in the workspace that its caller lends.
template <class Call>
Status run_call(const char* verb, const Context& context, Call call) noexcept {
  Arena arena(context.workspace);
  call.carve(arena);
  HISAC_TRY(arena.check(verb));
  call.run();
  return {};
}

}  // namespace hisac
