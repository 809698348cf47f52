// SPDX-License-Identifier: Apache-2.0
// Counts allocations of the whole process, in all threads, and makes them fail on demand. Without sanitizers it takes
// the place of glibc's malloc family (include in one file of a program); with them it hooks theirs.
#pragma once
#include <atomic>
#include <cerrno>
#include <cstddef>

#include "support.h"

#if defined(__SANITIZE_THREAD__)
#define HISAC_TEST_HOOKED 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define HISAC_TEST_HOOKED 1
#endif
#endif
#ifdef HISAC_TEST_ASAN
#define HISAC_TEST_HOOKED 1
#endif

namespace counting {

inline std::atomic<long> allocations{0};
inline std::atomic<bool> failing{false};  // has an effect without sanitizers only
inline std::atomic<long> spared{0};       // how many succeed before they fail
inline bool fails() { return failing && spared-- <= 0; }

#ifdef HISAC_TEST_HOOKED
constexpr bool kCanFail = false;
#else
constexpr bool kCanFail = true;
#endif

/// Allocations since it was made.
class Scope {
 public:
  Scope() : before_(allocations) {}
  long count() const { return allocations - before_; }

 private:
  long before_;
};

}  // namespace counting

#ifdef HISAC_TEST_HOOKED
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void*, size_t),
                                                         void (*)(const volatile void*));
namespace counting {
inline void on_malloc(const volatile void*, size_t) { ++allocations; }
inline void on_free(const volatile void*) {}
inline const int installed = __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free);
}  // namespace counting
#else
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);

void* malloc(size_t n) {
  ++counting::allocations;
  return counting::fails() ? nullptr : __libc_malloc(n);
}
void* calloc(size_t n, size_t each) {
  ++counting::allocations;
  return counting::fails() ? nullptr : __libc_calloc(n, each);
}
void* realloc(void* p, size_t n) {
  ++counting::allocations;
  return counting::fails() ? nullptr : __libc_realloc(p, n);
}
void* memalign(size_t alignment, size_t n) {
  ++counting::allocations;
  return counting::fails() ? nullptr : __libc_memalign(alignment, n);
}
void* aligned_alloc(size_t alignment, size_t n) { return memalign(alignment, n); }
int posix_memalign(void** out, size_t alignment, size_t n) {
  *out = memalign(alignment, n);
  return *out ? 0 : ENOMEM;
}
void free(void* p) { __libc_free(p); }
}
#endif
