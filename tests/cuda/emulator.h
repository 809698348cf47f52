// SPDX-License-Identifier: Apache-2.0
// cpp/src/cuda/simt.h without a GPU: a kernel's threads are fibers of one CPU thread. What follows is adversarial where
// CUDA leaves freedom: blocks and threads run in any order, an asynchronous copy spoils its destination at once and
// lands as late as it may, shared memory begins as NaN. Deadlocks, barriers met at different places and lanes that miss
// a warp's operation stop the program by name. ThreadSanitizer sees every thread: block barriers and sync_warp order
// memory, shuffles and the order of blocks do not. AddressSanitizer sees the exact size of shared memory.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#define SIMT_DEVICE inline
#define SIMT_BOTH inline
#define SIMT_KERNEL(...) void
#define SIMT_CONSTANT const
#define SIMT_EACH(i, n) for (int i = 0; i < (n); ++i)
#define SIMT_ROLLED
#define SIMT_UNLESS_PLANTED(n, ...) \
  do {                              \
    if (simt::planted != (n)) {     \
      __VA_ARGS__;                  \
    }                               \
  } while (0)

namespace simt {

using Stream = void*;
struct alignas(16) Quad {
  uint32_t word[4];
};

enum class Order { forward, reverse, random };
struct Machine {
  int processors = 2;
  size_t shared = 227 << 10;
};
struct Options {
  Order order = Order::forward;
  uint64_t seed = 1;
  Machine machine;
};
extern Options options;
extern int planted;  // the fault in force, 0: none

struct Counts {
  int64_t launches = 0, multiply_adds = 0;
};
extern Counts counts;

struct Copy {
  void* to;
  const void* from;
  int bytes;  // 4 or 16
  bool valid;
};

/// What a kernel can see of itself.
struct Thread {
  int thread, threads, lane, warp, block, blocks;
  std::byte* shared;
};
extern Thread* current;

[[noreturn]] void stop(const char* what, const char* file, int line);

#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline int thread() { return current->thread; }
inline int fresh_thread() { return current->thread; }
inline int threads() { return current->threads; }
inline int lane() { return current->lane; }
inline int warp() { return current->warp; }
inline int block() { return current->block; }
inline int blocks() { return current->blocks; }
inline std::byte* shared() { return current->shared; }

void sync(SIMT_HERE);
void sync_warp(SIMT_HERE);

/// A warp's rendezvous: every lane gives up to three words, then reads any lane's by `given`.
void meet(uint64_t a, uint64_t b, uint64_t c, const char* file, int line);
uint64_t given(int lane, int word);

template <class T>
T shuffle(T value, int source, SIMT_HERE) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  meet(bits, 0, 0, file, line);
  bits = given(source & 31, 0);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
T shuffle_xor(T value, int mask, SIMT_HERE) {
  return shuffle(value, current->lane ^ mask, file, line);
}
inline uint32_t ballot(bool flag, SIMT_HERE) {
  meet(flag, 0, 0, file, line);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(given(i, 0)) << i;
  return bits;
}
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }
template <class T>
T atomic_add(T* p, T value) {
  static_assert(std::is_integral_v<T>, "no float atomics");
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
inline void atomic_or(uint32_t* p, uint32_t bits) { __atomic_fetch_or(p, bits, __ATOMIC_RELAXED); }
inline int32_t atomic_max(int32_t* p, int32_t value) {
  int32_t old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(p, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
inline uint64_t atomic_claim(uint64_t* p, uint64_t value) {
  uint64_t old = 0;
  __atomic_compare_exchange_n(p, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return old;
}

void copy16(void* to, const void* from, bool valid);
void copy4(void* to, const void* from, bool valid);
void commit();
void land(int open);
void issue(const Copy& copy);
bool landed(int open, Copy* copy);  // takes one that is not in the last groups, if there is one
template <int kOpen>
void wait() {
  land(kOpen);
}
void load_matrices(uint32_t (&r)[4], const void* row, SIMT_HERE);
void load_matrices_transposed(uint32_t (&r)[4], const void* row, SIMT_HERE);
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_HERE);
/// As coarse as tensor cores may be: subnormal factors are zero, each k16 is cut to 24 bits below its largest term.
void multiply_add_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_HERE);

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline uint64_t bits_of(double x) {
  uint64_t u;
  std::memcpy(&u, &x, 8);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline uint32_t round_to_bfloat16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t u = bits_of(x);
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline uint32_t pack(float low, float high) { return round_to_bfloat16(low) | round_to_bfloat16(high) << 16; }
inline float from_half(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}
inline uint16_t to_half(float x) {
  const uint16_t sign = static_cast<uint16_t>(bits_of(x) >> 16 & 0x8000);
  const float a = std::fabs(x);
  if (a != a) return 0x7fff;
  if (a >= 65520.f) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(a, &exponent);
  const int unit = a == 0 ? -24 : std::max(exponent - 11, -24);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(a, -unit)));  // nearest even
  return static_cast<uint16_t>(sign | ((unit + 24) * 1024 + steps));
}
inline uint32_t pack_half(float low, float high) { return to_half(low) | static_cast<uint32_t>(to_half(high)) << 16; }
inline float exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.f : y;
}
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
template <class T>
T least(T a, T b) {  // a NaN loses; -0 is below 0
  return a == b ? (std::signbit(a) ? a : b) : std::fmin(a, b);
}
inline float smaller(float a, float b) { return least(a, b); }
inline float larger(float a, float b) { return -least(-a, -b); }
inline float log2(float x) { return std::log2(x); }
inline float root(float x) { return std::sqrt(x); }
inline double plain_sum(double a, double b) { return a + b; }
inline double plain_product(double a, double b) { return a * b; }

// ---- host

inline int machine(Machine* out) {
  *out = options.machine;
  return 0;
}
inline int use_device(int) noexcept { return 0; }
void run(int blocks, int threads, size_t shared_bytes, void (*body)(void*), void* argument);
struct Launch {
  const void* kernel;
  int blocks, threads;
  size_t shared_bytes;
  void (*body)(void*);
  void* argument;
  const void* const* parameters;
  const size_t* sizes;  // of each
  size_t count;
};
extern void (*instead)(const Launch&);  // where set, runs what is launched: ptx.h
template <class Kernel, class... Arguments>
int launch(Kernel kernel, int blocks, int threads, size_t shared_bytes, Stream, Arguments... arguments) {
  if (shared_bytes > options.machine.shared) return 1;
  auto body = [&] { kernel(arguments...); };
  const auto call = [](void* p) { (*static_cast<decltype(body)*>(p))(); };
  const void* const parameters[] = {&arguments..., nullptr};
  const size_t sizes[] = {sizeof arguments..., 0};
  if (instead)
    instead({reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes, call, &body, parameters, sizes,
             sizeof...(arguments)});
  else
    run(blocks, threads, shared_bytes, call, &body);
  return 0;
}
inline const char* describe(int) { return "more shared memory than the machine has"; }

}  // namespace simt
