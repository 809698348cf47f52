// SPDX-License-Identifier: Apache-2.0
// What the emulator's tests share: a verb of cuda/ beside the same verb of the CPU.
#pragma once
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <string>

#include "../cpp/support.h"
#include "cuda/verbs.h"
#include "emulator.h"
#include "verbs/histories.h"
#ifdef HISAC_TEST_PTX  // files of the kernels' PTX, to be run beside their C++
#include "ptx.h"
#endif

namespace test {

inline uint64_t first = 0, last = 40;  // the cases to run
inline int faults = 0;
inline std::string case_name;

__attribute__((format(printf, 1, 2))) inline void name(const char* format, ...) {
  char text[200];
  va_list list;
  va_start(list, format);
  std::vsnprintf(text, sizeof text, format, list);
  va_end(list);
  case_name = text;
}

__attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  std::fprintf(stderr, "%s: ", case_name.c_str());
  std::vfprintf(stderr, format, list);
  std::fprintf(stderr, "\n");
  va_end(list);
  if (++faults > 20) std::exit(1);
}

/// [order 0-2] [first case] [end] [planted fault]
inline void options(int argc, char** argv) {
  const auto number = [&](int i, int otherwise) { return argc > i ? std::atoi(argv[i]) : otherwise; };
  simt::options.order = static_cast<simt::Order>(number(1, 0));
  first = static_cast<uint64_t>(number(2, 0));
  last = static_cast<uint64_t>(number(3, 40));
  simt::planted = number(4, 0);
#ifdef HISAC_TEST_PTX
  ptx::load_ptx_files(HISAC_TEST_PTX);
#endif
}

inline int done() {
  std::printf("%lld launches, %lld tensor instructions, %d faults\n", static_cast<long long>(simt::counts.launches),
              static_cast<long long>(simt::counts.multiply_adds), faults);
  return faults != 0;
}

/// A batch that states its longest history, as the public verbs hand it to CUDA's; 0: T.
inline hisac::Histories stated(hisac::Histories in, int64_t longest) {
  in.longest = longest;
  return hisac::stated(in, hisac::Device::cuda);
}

/// Of voting: none, float32 or int64.
struct VoteWeights {
  std::vector<float> floats;
  std::vector<int64_t> integers;

  hisac::Weights array() const {
    if (!integers.empty()) return {integers.data(), DType::int64, static_cast<int64_t>(integers.size())};
    return {floats.empty() ? nullptr : floats.data(), DType::float32, static_cast<int64_t>(floats.size())};
  }
};

/// Weights of any scale, alike or not, hostile ones among them; or none.
inline VoteWeights random_weights(Random& r, int64_t rows) {
  VoteWeights w;
  const bool some = r.below(3), hostile = r.below(2), alike = r.below(2);
  const float scale = std::ldexp(1.f, static_cast<int>(r.below(3) ? 0 : r.below(250) - 125));
  if (some && r.below(2))
    for (int64_t i = 0; i < rows; ++i) {
      const float rare[] = {NAN,   INFINITY,         -INFINITY,        -1.f,      0.f, 0x1p-140f,
                            3e38f, 0x1p-25f * scale, 0x1p-24f * scale, 17 * scale};
      w.floats.push_back(hostile && r.below(6) == 0 ? rare[r.below(10)] : (alike ? 0.5f : 1 + r.uniform()) * scale);
    }
  else if (some)
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t rare[] = {0, -1, INT64_MIN, INT64_MAX, int64_t{1} << 39, (int64_t{1} << 39) - 1, int64_t{1} << 30};
      w.integers.push_back(hostile && r.below(6) == 0 ? rare[r.below(7)] : alike ? 3 : 1 + r.below(1000));
    }
  return w;
}

inline uint16_t narrow(float x, DType type) {
  return type == DType::bfloat16 ? static_cast<uint16_t>(simt::round_to_bfloat16(x)) : simt::to_half(x);
}
inline float widen(uint16_t x, DType type) {
  return type == DType::bfloat16 ? simt::float_of(static_cast<uint32_t>(x) << 16) : simt::from_half(x);
}

/// Floats as bytes of a type, back, and both.
inline std::vector<std::byte> encoded(const std::vector<float>& x, DType type) {
  const size_t bytes = static_cast<size_t>(hisac::bytes_of(type));
  std::vector<std::byte> out(x.size() * bytes);
  for (size_t i = 0; i < x.size(); ++i) {
    if (type == DType::int8) {
      out[i] = static_cast<std::byte>(static_cast<int8_t>(x[i]));
      continue;
    }
    const uint16_t h = type == DType::float32 ? uint16_t{0} : narrow(x[i], type);
    std::memcpy(out.data() + i * bytes, type == DType::float32 ? static_cast<const void*>(&x[i]) : &h, bytes);
  }
  return out;
}
inline std::vector<float> decoded(const std::vector<std::byte>& bytes, DType type) {
  std::vector<float> out(bytes.size() / (type == DType::float32 ? 4 : 2));
  for (size_t i = 0; i < out.size(); ++i) {
    if (type == DType::float32) {
      std::memcpy(&out[i], bytes.data() + i * 4, 4);
      continue;
    }
    uint16_t h;
    std::memcpy(&h, bytes.data() + i * 2, 2);
    out[i] = widen(h, type);
  }
  return out;
}
inline std::vector<float> rounded(const std::vector<float>& x, DType type) { return decoded(encoded(x, type), type); }

}  // namespace test
