// SPDX-License-Identifier: Apache-2.0
// What the wrappers of cuda/simt.h do, on a GPU beside the emulator: one source, two programs. Built by nvcc it writes
// every result to a file; as C++ (conform.cpp) it makes the same results by emulation and compares.
//   conform_gpu FILE && conform_simt FILE
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/device/elements.h"
#include "cuda/device/simt.h"

namespace {

constexpr int kThreads = 64, kRounds = 64;

/// How two words compare: as bits, as floats within so many ulp, or within a share of a sum's moduli beside them.
enum class Kind { bits, ulp2, product };
struct Section {
  const char* name;
  int words;  // a thread and round
  Kind kind;
};
constexpr Section kSections[] = {
    {"thread, lane, warp, block", 6, Kind::bits},
    {"shuffle, shuffle_xor, ballot, count_bits", 4, Kind::bits},
    {"copy16, copy4, wait, sync", 5, Kind::bits},
    {"load_matrices", 4, Kind::bits},
    {"load_matrices_transposed", 4, Kind::bits},
    {"pack, from_half, to_half", 4, Kind::bits},
    {"fused, smaller, larger, plain", 5, Kind::bits},
    {"exp2", 1, Kind::ulp2},
    {"log2", 1, Kind::ulp2},
    {"multiply_add", 4, Kind::product},
    {"its moduli", 4, Kind::ulp2},
    {"atomic_add, atomic_claim", 3, Kind::bits},
};
constexpr int words() {
  int n = 0;
  for (const Section& s : kSections) n += s.words;
  return n;
}
constexpr int kWords = words();

SIMT_DEVICE uint32_t mix(uint32_t h) {
  h ^= h >> 16;
  h *= 0x85ebca6bu;
  h ^= h >> 13;
  h *= 0xc2b2ae35u;
  return h ^ h >> 16;
}

struct Shared {
  uint32_t copied[kThreads][4];
  uint16_t matrix[2][16][24];  // 16-byte rows at an odd pitch
  uint64_t claimed[kThreads];
};

struct Task {
  const uint32_t* in;    // [kThreads * 4]
  uint32_t *out, *sums;  // [blocks, kWords, kThreads], [blocks]
};

/// A float of moderate size from bits: exact in bfloat16 or not.
SIMT_DEVICE float moderate(uint32_t h) { return simt::float_of((h & 0x807fffffu) | (120u + (h >> 24 & 15u)) << 23); }

SIMT_KERNEL(kThreads) exercise(SIMT_CONSTANT Task t) {
  Shared& s = *reinterpret_cast<Shared*>(simt::shared());
  const int thread = simt::thread(), lane = simt::lane();
  const uint32_t seed = mix(static_cast<uint32_t>(simt::block() * kThreads + thread));
  uint32_t* out = t.out + int64_t{simt::block()} * kWords * kThreads + thread;
  const auto put = [&](uint32_t word) {
    *out = word;
    out += kThreads;
  };
  const auto put_float = [&](float x) { put(simt::bits_of(x)); };
  const int positions[] = {thread, lane, simt::warp(), simt::block(), simt::threads(), simt::blocks()};
  for (int n : positions) put(static_cast<uint32_t>(n));

  put(simt::shuffle(seed, static_cast<int>(mix(static_cast<uint32_t>(simt::block())) & 31u)));
  put(simt::shuffle_xor(seed, 5));
  put(static_cast<uint32_t>(simt::shuffle_xor(static_cast<int64_t>(seed) << 20, 8) >> 20));
  put(static_cast<uint32_t>(simt::count_bits(simt::ballot((seed & 3) == 0))));

  const int other = (thread + 17) % kThreads;
  simt::copy16(s.copied[thread], t.in + 4 * ((thread * 7) % kThreads), (seed & 8) == 0);
  simt::commit();
  simt::template wait<0>();
  simt::sync();
  SIMT_EACH (i, 4) put(s.copied[other][i]);
  simt::sync();
  simt::copy4(&s.copied[thread][1], t.in + thread, (seed & 16) == 0);
  simt::commit();
  simt::template wait<0>();
  simt::sync();
  put(s.copied[other][1]);

  SIMT_EACH (m, 2) {
    for (int i = thread; i < 16 * 24; i += kThreads)
      s.matrix[m][i / 24][i % 24] = static_cast<uint16_t>(
          simt::pack(moderate(mix(static_cast<uint32_t>(simt::block() * 977 + m * 31 + i))), 0.f));
  }
  simt::sync();
  uint32_t a[4], b[4];
  simt::load_matrices(a, &s.matrix[0][lane & 15][lane >> 4 << 3]);
  simt::load_matrices_transposed(b, &s.matrix[1][lane & 15][lane >> 4 << 3]);
  SIMT_EACH (i, 4) put(a[i]);
  SIMT_EACH (i, 4) put(b[i]);

  const float x = moderate(seed), y = moderate(mix(seed + 1));
  put(simt::pack(x, y));
  put(simt::pack(simt::float_of(seed), x));  // any bits: NaN, infinities, subnormals
  put_float(simt::from_half(static_cast<uint16_t>(seed)));
  put(simt::to_half((seed & 1 ? 0x1p-14f : 1000.f) * x));

  put_float(simt::fused(x, y, -x));
  put_float(simt::smaller(x, seed & 1 ? y : simt::float_of(0x7fc00000u)));
  put_float(simt::larger(x, seed & 1 ? y : simt::float_of(0x7fc00000u)));
  put_float(static_cast<float>(simt::plain_sum(x, 1e-9 * y)));
  put_float(static_cast<float>(simt::plain_product(x, y)));

  put_float(simt::exp2(-20.f * (x < 0 ? -x : x)));
  put_float(simt::log2(1.f + (x < 0 ? -x : x)));

  float d[4], moduli[4];
  SIMT_EACH (i, 4) {
    d[i] = moderate(mix(seed + 7u + static_cast<uint32_t>(i)));
    moduli[i] = d[i] < 0 ? -d[i] : d[i];
  }
  simt::multiply_add(d, a, b[0], b[1]);
  uint32_t unsigned_a[4];
  SIMT_EACH (i, 4) unsigned_a[i] = a[i] & 0x7fff7fffu;
  simt::multiply_add(moduli, unsigned_a, b[0] & 0x7fff7fffu, b[1] & 0x7fff7fffu);
  SIMT_EACH (i, 4) put_float(d[i]);
  SIMT_EACH (i, 4) put_float(moduli[i]);

  simt::atomic_add(t.sums + simt::block(), seed);
  simt::sync();
  put(thread == 0 ? t.sums[simt::block()] : 0u);
  s.claimed[thread] = seed & 1 ? uint64_t{seed} << 32 : 0;
  simt::sync();
  put(static_cast<uint32_t>(simt::atomic_claim(&s.claimed[other], uint64_t{seed} << 16) >> 32));
  simt::sync();
  put(static_cast<uint32_t>(s.claimed[thread] >> 16));
}

#ifdef __CUDACC__
template <class T>
struct Buffer {  // on the device
  T* data = nullptr;
  size_t bytes;
  explicit Buffer(const std::vector<T>& from) : bytes(from.size() * sizeof(T)) {
    cudaMalloc(&data, bytes);
    cudaMemcpy(data, from.data(), bytes, cudaMemcpyHostToDevice);
  }
  void read(std::vector<T>* to) const { cudaMemcpy(to->data(), data, bytes, cudaMemcpyDeviceToHost); }
};
#else
template <class T>
struct Buffer {
  T* data;
  explicit Buffer(std::vector<T>& from) : data(from.data()) {}
  void read(std::vector<T>*) const {}
};
#endif

std::vector<uint32_t> results() {
  std::vector<uint32_t> in(kThreads * 4), out(static_cast<size_t>(kRounds) * kWords * kThreads), sums(kRounds);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint32_t>(i * 2654435761u);
  Buffer<uint32_t> on_in(in), on_out(out), on_sums(sums);
  const auto e = simt::launch(exercise, kRounds, kThreads, sizeof(Shared), simt::Stream{},
                              Task{on_in.data, on_out.data, on_sums.data});
  if (e != decltype(e){}) std::fprintf(stderr, "conform: %s\n", simt::describe(e)), out.clear();
  on_out.read(&out);
  return out;
}

#ifndef __CUDACC__
float as_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

bool agree(Kind kind, uint32_t a, uint32_t b, float moduli) {
  if (a == b) return true;
  const float x = as_float(a), y = as_float(b);
  if (x != x && y != y) return true;
  const float size = std::fmax(std::fabs(x), std::fabs(y));
  if (kind == Kind::ulp2) return std::fabs(x - y) <= size * 0x1p-21f || size < 0x1p-125f;
  return kind == Kind::product && std::fabs(x - y) <= moduli * 0x1p-21f;  // a tensor core may cut what it adds
}

int compare(const std::vector<uint32_t>& here, const std::vector<uint32_t>& expected) {
  int faults = 0;
  for (int round = 0; round < kRounds; ++round) {
    size_t first = static_cast<size_t>(round) * kWords * kThreads;
    for (const Section& s : kSections) {
      const size_t n = static_cast<size_t>(s.words) * kThreads;
      for (size_t i = first; i < first + n; ++i)
        if (!agree(s.kind, here[i], expected[i], s.kind == Kind::product ? as_float(expected[i + n]) : 0) &&
            ++faults < 20)
          std::fprintf(stderr, "conform: %s: block %d, word %zu, thread %zu: %08x, on the GPU %08x\n", s.name, round,
                       (i - first) / kThreads, i % kThreads, here[i], expected[i]);
      first += n;
    }
  }
  std::printf("conform: %zu words of %zu wrappers' results, %d differ\n", here.size(), std::size(kSections), faults);
  return faults != 0;
}

#endif

}  // namespace

int write(const char* path, const std::vector<uint32_t>& words) {
  std::FILE* const file = std::fopen(path, "wb");
  if (!file || std::fwrite(words.data(), 4, words.size(), file) != words.size()) return 2;
  return std::fclose(file);
}

int main(int argc, char** argv) {
  const std::vector<uint32_t> here = results();
  if (argc < 2 || here.empty()) return 2;
#ifdef __CUDACC__
  return write(argv[1], here);
#else
  if (argc > 2) return write(argv[1], here);  // for a test of the comparison
  std::vector<uint32_t> expected(here.size());
  std::FILE* const file = std::fopen(argv[1], "rb");
  if (!file || std::fread(expected.data(), 4, expected.size(), file) != expected.size()) return 2;
  std::fclose(file);
  return compare(here, expected);
#endif
}
