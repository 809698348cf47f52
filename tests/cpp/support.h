// SPDX-License-Identifier: Apache-2.0
// What the test programs share: memory that notices a byte too far, executors of several manners, small random data.
#pragma once
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "hisac/hisac.h"

#if defined(__SANITIZE_ADDRESS__)
#define HISAC_TEST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HISAC_TEST_ASAN 1
#endif
#endif
#ifdef HISAC_TEST_ASAN
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)0)
#endif

namespace test {

using hisac::Array;
using hisac::DType;

/// The same numbers everywhere (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  float uniform() { return static_cast<float>(bits() >> 40) * 0x1p-23f - 1.f; }  // [-1, 1)

 private:
  uint64_t state_;
};

inline size_t size(int64_t n) { return static_cast<size_t>(n); }

/// sum += terms, each element.
inline void add(std::vector<double>& sum, const std::vector<float>& terms) {
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += double(terms[i]);
}

/// Whether a is b but for rounding to float32: within 1e-6 of the largest of b, which is not all zero.
inline bool nearly(const std::vector<float>& a, const std::vector<double>& b) {
  double size = 0;
  for (double value : b) size = std::fmax(size, std::fabs(value));
  bool near = a.size() == b.size() && size > 0;
  for (size_t i = 0; near && i < b.size(); ++i) near = std::fabs(double(a[i]) - b[i]) <= 1e-6 * size;  // false for NaN
  return near;
}

inline std::vector<float> uniform(Random& random, int64_t n, float scale = 1) {
  std::vector<float> out(size(n));
  for (float& x : out) x = scale * random.uniform();
  return out;
}

/// Any float or half, by its bits; or an int8.
inline float decode(const std::byte* from, DType type) {
  uint32_t bits = 0;
  if (type == DType::int8) return static_cast<float>(static_cast<int8_t>(*from));
  std::memcpy(&bits, from, type == DType::float32 ? 4 : 2);
  if (type == DType::bfloat16) bits <<= 16;
  if (type == DType::float16) {
    const int exponent = static_cast<int>(bits >> 10 & 31), mantissa = static_cast<int>(bits & 1023);
    float x = std::ldexp(static_cast<float>(exponent ? mantissa + 1024 : mantissa), (exponent ? exponent : 1) - 25);
    if (exponent == 31) x = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
    return bits >> 15 ? -x : x;
  }
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

/// Whether n ranges, at most the executor's workers, were all begun before the first ended, 20 seconds at most: by n
/// workers, then. visit(worker) is called in each.
template <class Visit>
bool all_come(const hisac::Executor& executor, int64_t n, Visit visit) {
  struct Meeting {
    const int64_t wanted;
    Visit& visit;
    std::atomic<int64_t> here{0};
    std::atomic<bool> missed{false};
  } meeting{n, visit};
  executor.parallel_for(
      executor.ctx, n,
      [](void* arg, int64_t, int64_t, int worker) {
        Meeting& m = *static_cast<Meeting*>(arg);
        m.visit(worker);
        ++m.here;  // once for all that a worker does by itself
        const auto late = std::chrono::steady_clock::now() + std::chrono::seconds(20);
        while (m.here < m.wanted && std::chrono::steady_clock::now() < late) std::this_thread::yield();
        if (m.here < m.wanted) m.missed = true;
      },
      &meeting);
  return !meeting.missed;
}

inline bool all_come(const hisac::Executor& executor, int64_t n) {
  return all_come(executor, n, [](int) {});
}

inline void (*on_guarded)(const void* data, size_t bytes) = nullptr;  // told of each below, and of its end with 0

/// n of T at a multiple of 64, between 64 guard bytes that must survive; under ASan reading them is caught too.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t n, unsigned char fill = 0x5a) : n_(n), bytes_(size(n) * sizeof(T)) {
    base_ = static_cast<unsigned char*>(std::aligned_alloc(64, (bytes_ + 2 * kGuard + 63) / 64 * 64));
    std::memset(base_, kMark, kGuard);
    std::memset(base_ + kGuard, fill, bytes_);
    std::memset(base_ + kGuard + bytes_, kMark, kGuard);
    ASAN_POISON_MEMORY_REGION(base_, kGuard);
    ASAN_POISON_MEMORY_REGION(base_ + kGuard + bytes_, kGuard);
    if (on_guarded && bytes_) on_guarded(base_ + kGuard, bytes_);
  }
  explicit Guarded(const std::vector<T>& values) : Guarded(static_cast<int64_t>(values.size())) {
    if (!values.empty()) std::memcpy(base_ + kGuard, values.data(), bytes_);
  }
  ~Guarded() {
    if (on_guarded) on_guarded(base_ + kGuard, 0);
    ASAN_UNPOISON_MEMORY_REGION(base_, bytes_ + 2 * kGuard);
    std::free(base_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return reinterpret_cast<T*>(base_ + kGuard); }
  int64_t count() const { return n_; }
  std::vector<T> values() { return std::vector<T>(data(), data() + n_); }
  bool holds(unsigned char fill) {
    for (size_t i = 0; i < bytes_; ++i)
      if (base_[kGuard + i] != fill) return false;
    return true;
  }
  bool intact() {
    ASAN_UNPOISON_MEMORY_REGION(base_, bytes_ + 2 * kGuard);
    bool ok = true;
    for (size_t i = 0; i < kGuard; ++i) ok &= base_[i] == kMark && base_[kGuard + bytes_ + i] == kMark;
    ASAN_POISON_MEMORY_REGION(base_, kGuard);
    ASAN_POISON_MEMORY_REGION(base_ + kGuard + bytes_, kGuard);
    return ok;
  }

 private:
  static constexpr size_t kGuard = 64;
  static constexpr unsigned char kMark = 0xa7;
  int64_t n_;
  size_t bytes_;
  unsigned char* base_;
};

/// Workspace of exactly the bytes asked for.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : memory_(static_cast<int64_t>(bytes)) {}
  Array<std::byte, 1> array() { return {memory_.data(), {memory_.count()}}; }
  bool intact() { return memory_.intact(); }
  bool untouched() { return memory_.holds(0x5a); }

 private:
  Guarded<std::byte> memory_;
};

// ---- executors

using RangeFunction = void (*)(void* arg, int64_t begin, int64_t end, int worker);

/// Ranges of `step`, the last first, on worker ids that go round backwards.
struct Backwards {
  int workers;
  int64_t step;
  static void run(void* self, int64_t n, RangeFunction fn, void* arg) {
    const Backwards& me = *static_cast<Backwards*>(self);
    for (int64_t i = (n + me.step - 1) / me.step; i-- > 0;)
      fn(arg, i * me.step, i * me.step + me.step < n ? i * me.step + me.step : n,
         static_cast<int>((me.workers - 1) - i % me.workers));
  }
  hisac::Executor executor() { return {this, workers, run}; }
};

/// Everything on one worker id, the last of several, in uneven ranges with empty ones between.
struct OneSeat {
  int workers;
  static void run(void* self, int64_t n, RangeFunction fn, void* arg) {
    const int seat = static_cast<OneSeat*>(self)->workers - 1;
    for (int64_t begin = 0, step = 1; begin < n; begin += step, step = step * 2 + 1) {
      fn(arg, begin, begin, seat);
      fn(arg, begin, begin + step < n ? begin + step : n, seat);
    }
  }
  hisac::Executor executor() { return {this, workers, run}; }
};

/// A service's own threads: one std::thread a worker, each with an equal share.
struct Threads {
  int workers;
  static void run(void* self, int64_t n, RangeFunction fn, void* arg) {
    const int64_t workers = static_cast<Threads*>(self)->workers;
    std::vector<std::thread> threads;
    for (int64_t w = 0; w < workers; ++w)
      threads.emplace_back([=] { fn(arg, n * w / workers, n * (w + 1) / workers, static_cast<int>(w)); });
    for (std::thread& t : threads) t.join();
  }
  hisac::Executor executor() { return {this, workers, run}; }
};

/// A context of so many workers, for workspace functions alone.
inline hisac::Context sizing(int workers) {
  static const std::array<hisac::Executor, 65> executors = [] {
    std::array<hisac::Executor, 65> all;
    for (int w = 0; w < 65; ++w) all[size(w)] = {nullptr, w, Backwards::run};
    return all;
  }();
  return {{}, &executors.at(size(workers))};
}

/// Runs a verb in a workspace of exactly `bytes`; false where it failed or wrote past the end.
template <class Verb>
bool exactly(size_t bytes, const hisac::Executor* executor, Verb verb) {
  Workspace workspace(bytes);
  return verb(hisac::Context{workspace.array(), executor}).ok() && workspace.intact();
}

inline Array<const float, 2> matrix(const std::vector<float>& values, int64_t rows, int64_t width) {
  return {values.data(), {rows, width}};
}

inline hisac::Rows rows(const std::vector<float>& values, int64_t width) {
  return {values.data(), DType::float32, static_cast<int64_t>(values.size()) / width, width};
}

inline hisac::Spans spans(const std::vector<int64_t>& offsets) {
  return {offsets.data(), offsets.data() + 1, DType::int64, static_cast<int64_t>(offsets.size()) - 1};
}

/// A copy of a codebook's image.
inline std::vector<std::byte> image_of(const hisac::Codebook& book) {
  const auto image = book.image();
  return std::vector<std::byte>(image.data, image.data + image.shape[0]);
}

/// A codebook of random centers, finer from level to level.
inline hisac::Codebook codebook(Random& random, const std::vector<int64_t>& sizes, int64_t width) {
  std::vector<std::vector<float>> centers;
  std::vector<Array<const float, 2>> arrays;
  float scale = 1;
  for (int64_t c : sizes) {
    centers.push_back(uniform(random, c * width, scale));
    arrays.push_back({centers.back().data(), {c, width}});
    scale /= 3;
  }
  hisac::Codebook book;
  if (!hisac::Codebook::build(arrays.data(), static_cast<int>(arrays.size()), &book).ok()) std::abort();
  return book;
}

}  // namespace test
