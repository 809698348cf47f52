// SPDX-License-Identifier: Apache-2.0
// CUDA's own words that test_ptx.cu uses: under nvcc intrinsics and instructions, elsewhere their meaning in C++.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cuda/device/simt.h"

namespace words {

enum Way { kNearest, kZero, kDown, kUp };

#ifdef __CUDACC__
#define CALLED __device__ __noinline__
#define TABLE __constant__
#define WAY(f, x) (way == kNearest ? f##_rn x : way == kZero ? f##_rz x : way == kDown ? f##_rd x : f##_ru x)

template <class T, Way way>
SIMT_DEVICE T whole(float x) {
  constexpr bool kSigned = T(-1) < T(0);
  if (sizeof(T) == 8) return kSigned ? T(WAY(__float2ll, (x))) : T(WAY(__float2ull, (x)));
  return kSigned ? T(WAY(__float2int, (x))) : T(WAY(__float2uint, (x)));
}
template <class T, Way way>
SIMT_DEVICE T whole(double x) {
  constexpr bool kSigned = T(-1) < T(0);
  if (sizeof(T) == 8) return kSigned ? T(WAY(__double2ll, (x))) : T(WAY(__double2ull, (x)));
  return kSigned ? T(WAY(__double2int, (x))) : T(WAY(__double2uint, (x)));
}
template <Way way>
SIMT_DEVICE float narrow(double x) {
  return WAY(__double2float, (x));
}
template <Way way>
SIMT_DEVICE float narrow(int32_t x) {
  return WAY(__int2float, (x));
}
template <Way way>
SIMT_DEVICE float narrow(uint32_t x) {
  return WAY(__uint2float, (x));
}
template <Way way>
SIMT_DEVICE float narrow(int64_t x) {
  return WAY(__ll2float, (x));
}
template <Way way>
SIMT_DEVICE float narrow(uint64_t x) {
  return WAY(__ull2float, (x));
}
template <Way way>
SIMT_DEVICE double exact(int64_t x) {
  return WAY(__ll2double, (x));
}
template <Way way>
SIMT_DEVICE double exact(uint64_t x) {
  return WAY(__ull2double, (x));
}
template <Way way>
SIMT_DEVICE float times(float x, float y) {
  return WAY(__fmul, (x, y));
}
SIMT_DEVICE float unit(float x) { return __saturatef(x); }
template <class T>
SIMT_DEVICE T lesser(T a, T b) {
  return ::fmin(a, b);
}
template <class T>
SIMT_DEVICE T greater(T a, T b) {
  return ::fmax(a, b);
}
SIMT_DEVICE float inverse_root(float x) {
  float y;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SIMT_DEVICE int32_t clamped(int32_t x) {  // to int8
  asm("cvt.sat.s8.s32 %0, %0;" : "+r"(x));
  return x;
}

SIMT_DEVICE int zeros(uint32_t x) { return __clz(static_cast<int>(x)); }
SIMT_DEVICE int zeros(uint64_t x) { return __clzll(static_cast<long long>(x)); }
SIMT_DEVICE int ones(uint32_t x) { return __popc(x); }
SIMT_DEVICE int ones(uint64_t x) { return __popcll(x); }
SIMT_DEVICE uint32_t turned(uint32_t x) { return __brev(x); }
SIMT_DEVICE uint64_t turned(uint64_t x) { return __brevll(x); }
SIMT_DEVICE int32_t high(int32_t a, int32_t b) { return __mulhi(a, b); }
SIMT_DEVICE uint32_t high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
SIMT_DEVICE int64_t high(int64_t a, int64_t b) { return __mul64hi(a, b); }
SIMT_DEVICE uint64_t high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }

#define BITS(T, type, letter)                                                                 \
  SIMT_DEVICE int top_bit(T x) {                                                              \
    int y;                                                                                    \
    asm("bfind." type " %0, %1;" : "=r"(y) : letter(x));                                      \
    return y;                                                                                 \
  }                                                                                           \
  SIMT_DEVICE int free_bits(T x) {                                                            \
    int y;                                                                                    \
    asm("bfind.shiftamt." type " %0, %1;" : "=r"(y) : letter(x));                             \
    return y;                                                                                 \
  }                                                                                           \
  SIMT_DEVICE T field(T x, uint32_t place, uint32_t length) {                                 \
    T y;                                                                                      \
    asm("bfe." type " %0, %1, %2, %3;" : "=" letter(y) : letter(x), "r"(place), "r"(length)); \
    return y;                                                                                 \
  }
#define INSERT(T, type, letter)                                                                                 \
  SIMT_DEVICE T insert(T x, T into, uint32_t place, uint32_t length) {                                          \
    T y;                                                                                                        \
    asm("bfi." type " %0, %1, %2, %3, %4;" : "=" letter(y) : letter(x), letter(into), "r"(place), "r"(length)); \
    return y;                                                                                                   \
  }
BITS(uint32_t, "u32", "r")
BITS(int32_t, "s32", "r")
BITS(uint64_t, "u64", "l")
BITS(int64_t, "s64", "l")
INSERT(uint32_t, "b32", "r")
INSERT(uint64_t, "b64", "l")
SIMT_DEVICE uint32_t chosen_bytes(uint32_t a, uint32_t b, uint32_t choice) {
  uint32_t y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(choice));
  return y;
}
template <bool kRight, bool kClamp>
SIMT_DEVICE uint32_t funnel(uint32_t a, uint32_t b, uint32_t n) {
  return kRight ? (kClamp ? __funnelshift_rc(a, b, n) : __funnelshift_r(a, b, n))
                : (kClamp ? __funnelshift_lc(a, b, n) : __funnelshift_l(a, b, n));
}
SIMT_DEVICE uint32_t majority(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xe8;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}

SIMT_DEVICE uint32_t from_above(uint32_t x, int n) { return __shfl_down_sync(~0u, x, n); }
SIMT_DEVICE uint32_t from_below(uint32_t x, int n) { return __shfl_up_sync(~0u, x, n); }
SIMT_DEVICE uint32_t from_eighth(uint32_t x, int n) { return __shfl_sync(~0u, x, n, 8); }
SIMT_DEVICE bool somebody(bool x) { return __any_sync(~0u, x); }
SIMT_DEVICE bool everybody(bool x) { return __all_sync(~0u, x); }
template <class T>
SIMT_DEVICE uint32_t alike(T x) {
  return __match_any_sync(~0u, x);
}
SIMT_DEVICE uint32_t all_alike(uint32_t x) {
  int all;
  const uint32_t lanes = __match_all_sync(~0u, x, &all);
  return lanes + static_cast<uint32_t>(all);
}
SIMT_DEVICE uint32_t lane_sum(uint32_t x) { return __reduce_add_sync(~0u, x); }
SIMT_DEVICE int32_t lane_max(int32_t x) { return __reduce_max_sync(~0u, x); }

template <class T>
SIMT_DEVICE auto* word(T* p) {  // as CUDA's atomics name 64 bits
  using Wide = std::conditional_t<std::is_signed_v<T>, long long, unsigned long long>;
  return reinterpret_cast<std::conditional_t<sizeof(T) == 8, Wide, T>*>(p);
}
#define ATOMIC(name, function)                   \
  template <class T>                             \
  SIMT_DEVICE T name(T* p, T x) {                \
    return static_cast<T>(function(word(p), x)); \
  }
ATOMIC(raise_by, atomicAdd)
ATOMIC(raise_to, atomicMax)
ATOMIC(lower_to, atomicMin)
ATOMIC(set_bits, atomicOr)
ATOMIC(keep_bits, atomicAnd)
ATOMIC(flip_bits, atomicXor)
ATOMIC(put_there, atomicExch)
ATOMIC(count_round, atomicInc)
template <class T>
SIMT_DEVICE T put_where(T* p, T old, T x) {
  return static_cast<T>(atomicCAS(word(p), old, x));
}
#else
#define CALLED inline
#define TABLE static

/// The number of type T in a direction from x; what no T holds goes to the nearest one, NaN to 0.
template <class T, Way way, class F>
T whole(F x) {
  using Limits = std::numeric_limits<T>;
  const F floor = std::floor(x), gap = x - floor;
  const F y = way == kDown                                                     ? floor
              : way == kUp                                                     ? std::ceil(x)
              : way == kZero                                                   ? (x < 0 ? std::ceil(x) : floor)
              : gap > F(0.5) || (gap == F(0.5) && std::fmod(floor, F(2)) != 0) ? floor + 1
                                                                               : floor;
  if (y != y) return 0;
  if (y < static_cast<F>(Limits::min())) return Limits::min();
  return y >= std::ldexp(F(1), Limits::digits) ? Limits::max() : static_cast<T>(y);
}
/// x in a direction; long double holds every x exactly.
template <class To, Way way>
To directed(long double x) {
  const To y = static_cast<To>(x), infinity = std::numeric_limits<To>::infinity();
  if (x != x || std::isinf(x)) return y;
  const bool down = way == kDown || (way == kZero && x > 0), up = way == kUp || (way == kZero && x < 0);
  return down && y > x ? std::nextafter(y, -infinity) : up && y < x ? std::nextafter(y, infinity) : y;
}
template <Way way, class T>
float narrow(T x) {
  return directed<float, way>(x);
}
template <Way way, class T>
double exact(T x) {
  return directed<double, way>(x);
}
template <Way way>
float times(float x, float y) {
  return directed<float, way>(static_cast<long double>(x) * y);
}
inline float unit(float x) { return x > 0 ? std::min(x, 1.f) : 0; }
template <class T>
T lesser(T a, T b) {
  return a != a || (a == 0 && b == 0 ? std::signbit(b) : b < a) ? b : a;
}
template <class T>
T greater(T a, T b) {
  return a != a || (a == 0 && b == 0 ? !std::signbit(b) : b > a) ? b : a;
}
inline float inverse_root(float x) { return 1 / std::sqrt(x); }
inline int32_t clamped(int32_t x) { return std::min(std::max(x, -128), 127); }

template <class U>
constexpr int kBits = 8 * sizeof(U);
template <class U>
int zeros(U x) {
  int n = 0;
  while (n < kBits<U> && !(x >> (kBits<U> - 1 - n) & 1)) ++n;
  return n;
}
template <class U>
int ones(U x) {
  int n = 0;
  for (; x; x &= x - 1) ++n;
  return n;
}
template <class U>
U turned(U x) {
  U y = 0;
  for (int i = 0; i < kBits<U>; ++i, x >>= 1) y = static_cast<U>(y << 1 | (x & 1));
  return y;
}
template <class T>
T high(T a, T b) {
  return static_cast<T>(std::is_signed_v<T> ? static_cast<__int128>(a) * b >> kBits<T>
                                            : static_cast<__int128>(static_cast<unsigned __int128>(a) * b >> kBits<T>));
}
template <class T>
int top_bit(T x) {  // the highest bit that is not the sign's
  using U = std::make_unsigned_t<T>;
  return kBits<U> - 1 - zeros(static_cast<U>(x < 0 ? ~x : x));
}
template <class T>
int free_bits(T x) {
  return top_bit(x) < 0 ? -1 : kBits<T> - 1 - top_bit(x);
}
template <class T>
T field(T x, uint32_t place, uint32_t length) {  // bit by bit; beyond its end and the number's it goes on as its sign
  uint64_t y = 0;
  const uint32_t last = std::min<uint32_t>(place + length, kBits<T>);
  for (uint32_t i = 0; i < kBits<T>; ++i) {
    const bool inside = i < length && place + i < kBits<T>;
    const uint32_t bit = inside ? place + i : last - 1;
    if ((inside || (std::is_signed_v<T> && length)) && static_cast<uint64_t>(x) >> bit & 1) y |= uint64_t{1} << i;
  }
  return static_cast<T>(y);
}
template <class U>
U insert(U x, U into, uint32_t place, uint32_t length) {
  for (uint32_t i = 0; i < length && place + i < kBits<U>; ++i) {
    const U bit = U(1) << (place + i);
    into = (x >> i & 1) ? into | bit : into & ~bit;
  }
  return into;
}
inline uint32_t chosen_bytes(uint32_t a, uint32_t b, uint32_t choice) {
  unsigned char from[8], to[4];
  std::memcpy(from, &a, 4);
  std::memcpy(from + 4, &b, 4);
  for (int i = 0; i < 4; ++i, choice >>= 4) {
    const unsigned char byte = from[choice & 7];
    to[i] = choice & 8 ? static_cast<unsigned char>(byte < 128 ? 0 : 255) : byte;
  }
  std::memcpy(&a, to, 4);
  return a;
}
template <bool kRight, bool kClamp>
uint32_t funnel(uint32_t low, uint32_t high, uint32_t n) {
  n = kClamp ? std::min(n, 32u) : n % 32;
  if (n == 0) return kRight ? low : high;
  if (n == 32) return kRight ? high : low;
  return kRight ? low >> n | high << (32 - n) : high << n | low >> (32 - n);
}
inline uint32_t majority(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | (a & c) | (b & c); }

inline uint32_t from_above(uint32_t x, int n) {
  return simt::shuffle(x, simt::lane() + n < 32 ? simt::lane() + n : simt::lane());
}
inline uint32_t from_below(uint32_t x, int n) {
  return simt::shuffle(x, simt::lane() >= n ? simt::lane() - n : simt::lane());
}
inline uint32_t from_eighth(uint32_t x, int n) { return simt::shuffle(x, simt::lane() / 8 * 8 + n % 8); }
inline bool somebody(bool x) { return simt::ballot(x) != 0; }
inline bool everybody(bool x) { return simt::ballot(x) == ~0u; }
template <class T>
uint32_t alike(T x) {
  uint32_t lanes = 0;
  for (int i = 0; i < 32; ++i) lanes |= static_cast<uint32_t>(simt::shuffle(x, i) == x) << i;
  return lanes;
}
inline uint32_t all_alike(uint32_t x) { return alike(x) == ~0u ? ~0u + 1 : 0; }
inline uint32_t lane_sum(uint32_t x) {
  for (int m = 16; m; m /= 2) x += simt::shuffle_xor(x, m);
  return x;
}
inline int32_t lane_max(int32_t x) {
  for (int m = 16; m; m /= 2) x = std::max(x, simt::shuffle_xor(x, m));
  return x;
}

#define ATOMIC(name, value)     \
  template <class T>            \
  T name(T* p, T x) {           \
    const T old = *p;           \
    *p = static_cast<T>(value); \
    return old;                 \
  }
ATOMIC(raise_by, old + x)
ATOMIC(raise_to, old < x ? x : old)
ATOMIC(lower_to, x < old ? x : old)
ATOMIC(set_bits, old | x)
ATOMIC(keep_bits, old& x)
ATOMIC(flip_bits, old ^ x)
ATOMIC(put_there, x)
ATOMIC(count_round, old >= x ? 0 : old + 1)
template <class T>
T put_where(T* p, T expected, T x) {
  const T old = *p;
  if (old == expected) *p = x;
  return old;
}
#endif

}  // namespace words
