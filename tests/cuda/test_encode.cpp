// SPDX-License-Identifier: Apache-2.0
// `encode` and `code_prototypes` of cuda/encode.cu, run by the emulator, beside the CPU's: every code and every bit of
// a prototype, whatever the values, for any order of threads and any machine.
#include "simt_test.h"

namespace {

using namespace hisac;
using test::Random;

struct Problem {
  int64_t rows = 0, width = 0;
  DType type = DType::float32;
  bool offset = false;  // rows that begin beside 16 bytes
  bool usual = false;   // values of which few survive the screen
  std::vector<float> x;
  Codebook book;
};

using Centers = std::vector<std::vector<float>>;  // [L][C, D]

Codebook build(const Centers& centers, int64_t width) {
  std::vector<Array<const float, 2>> arrays;
  for (const auto& c : centers) arrays.push_back({c.data(), {static_cast<int64_t>(c.size()) / width, width}});
  Codebook book;
  if (const Status s = Codebook::build(arrays.data(), static_cast<int>(arrays.size()), &book); !s.ok())
    test::fail("%s", s.what());
  return book;
}

/// Rows near sums of codewords, among them exact ones and ones half way between two.
std::vector<float> rows_around(Random& r, const Centers& centers, int64_t rows, int64_t width, float noise) {
  std::vector<float> x(test::size(rows * width));
  for (int64_t i = 0; i < rows; ++i) {
    const float far = r.below(4) ? noise : 0;
    float* const row = x.data() + i * width;
    for (const auto& c : centers) {
      const int64_t size = static_cast<int64_t>(c.size()) / width, a = r.below(size),
                    b = r.below(3) ? a : r.below(size);
      for (int64_t d = 0; d < width; ++d)
        row[d] += (c[test::size(a * width + d)] + c[test::size(b * width + d)]) / 2 + far * r.uniform();
    }
  }
  return x;
}

Problem random_problem(uint64_t seed) {
  Random r(seed);
  Problem p;
  const int64_t wide[] = {1, 2, 7, 16, 24, 40, 64, 130, 300}, many[] = {1, 3, 31, 33, 70, 150, 600};
  p.width = wide[r.below(9)];
  p.rows = r.below(8) == 0 ? 0 : 1 + r.below(p.width > 100 ? 70 : 250);
  const int64_t levels = 1 + r.below(3);
  const int64_t kind = static_cast<int64_t>(seed % 8);
  p.usual = kind < 2 && p.width >= 16;
  Centers centers;
  for (int64_t l = 0; l < levels; ++l)
    centers.push_back(test::uniform(r,
                                    many[r.below(p.width > 100  ? 5
                                                 : p.width > 20 ? 6
                                                                : 7)] *
                                        p.width,
                                    1.f / static_cast<float>(1 + l)));
  const float scale[] = {1, 3e38f, 1e19f, 1e-18f, 1e-36f, 1e-42f};
  const float size = kind == 2 ? scale[r.below(6)] : 1;
  for (auto& level : centers) {
    const int64_t codes = static_cast<int64_t>(level.size()) / p.width;
    for (int64_t c = 1; c < codes; ++c) {
      float* const center = level.data() + c * p.width;
      const bool copy = (kind == 3 && r.below(2)) || kind == 4;
      if (copy) std::copy_n(level.data() + (kind == 4 ? 0 : r.below(c)) * p.width, p.width, center);
      if (kind == 4 && r.below(3)) center[r.below(p.width)] *= 1 + 0x1p-23f;  // nearly all codes nearly tie
    }
    for (float& y : level) y = y * size + (kind == 5 ? 300 : 0);
    if (kind == 6) level[test::size(r.below(static_cast<int64_t>(level.size())))] = 1e6f;  // an outlier
  }
  p.x = rows_around(r, centers, p.rows, p.width, size * (kind == 4 ? 1e-3f : 0.5f));
  const DType types[] = {DType::float32, DType::bfloat16, DType::float16};
  p.type = kind == 2 ? DType::float32 : types[r.below(3)];
  p.offset = r.below(2);
  for (int64_t i = 0; i < p.rows; ++i) {
    float* const row = p.x.data() + i * p.width;
    if (r.below(13) == 0) row[r.below(p.width)] = r.below(2) ? NAN : r.below(2) ? INFINITY : -INFINITY;
    if (!p.usual && r.below(9) == 0)
      for (int64_t d = 0; d < p.width; ++d) row[d] *= r.below(2) ? 1e-30f : 1e4f;
    if (!p.usual && r.below(17) == 0) row[r.below(p.width)] = r.below(2) ? 3e38f : -3e38f;
  }
  p.x = test::rounded(p.x, p.type);
  p.book = build(centers, p.width);
  return p;
}

template <class Verb>
std::vector<int32_t> run(const Problem& p, Verb verb) {
  std::vector<std::byte> bytes = test::encoded(p.x, p.type);
  const size_t skipped = p.offset ? 4 : 0;
  bytes.insert(bytes.begin(), skipped, std::byte{0});
  test::Guarded<std::byte> x(bytes);
  test::Guarded<int32_t> codes(p.rows * p.book.levels());
  const Status status = verb(Rows{x.data() + skipped, p.type, p.rows, p.width},
                             Array<int32_t, 2>{codes.data(), {p.rows, p.book.levels()}});
  if (!status.ok()) test::fail("%s", status.what());
  if (!codes.intact()) test::fail("the codes' end was overwritten");
  return codes.values();
}

std::vector<int32_t> on_cuda(const Problem& p) {
  test::Guarded<std::byte> image(test::image_of(p.book));
  Context context;
  context.codebook_image = {{image.data(), {image.count()}}, p.book.fingerprint()};
  return run(p, [&](Rows x, Array<int32_t, 2> codes) { return cuda::encode(context, p.book, x, codes); });
}

std::vector<int32_t> on_cpu(const Problem& p) {
  test::Workspace workspace(encode_workspace(test::sizing(1), p.book));
  return run(p, [&](Rows x, Array<int32_t, 2> codes) { return hisac::encode({workspace.array()}, p.book, x, codes); });
}

void check_encode(const Problem& p) {
  const std::vector<int32_t> expected = on_cpu(p), got = on_cuda(p);
  for (size_t i = 0; i < got.size(); ++i)
    if (got[i] != expected[i]) test::fail("code %zu: %d, expected %d", i, got[i], expected[i]);
  const simt::Options kept = simt::options;
  simt::options.order = simt::Order::random;
  simt::options.seed += 17;
  simt::options.machine.processors = 5;
  if (on_cuda(p) != got) test::fail("other codes for another order of threads and number of processors");
  simt::options = kept;
  if (!p.usual || simt::planted) return;
  simt::planted = 26;  // what looks at all codes finds the first: it must not be needed
  if (on_cuda(p) != expected) test::fail("rows of usual values whose survivors were not kept");
  simt::planted = 0;
}

void check_prototypes(const Problem& p, uint64_t seed) {
  Random r(seed);
  const int64_t n = r.below(50), levels = p.book.levels();
  test::Guarded<int32_t> codes(n * levels);
  for (int64_t i = 0; i < n * levels; ++i) {
    const int64_t size = p.book.size(static_cast<int>(i % levels));
    codes.data()[i] = static_cast<int32_t>(r.below(15) ? r.below(size) : r.below(2) ? -1 : size);
  }
  test::Guarded<std::byte> image(test::image_of(p.book));
  test::Guarded<float> cpu(n * p.width), cuda(n * p.width);
  Context context;
  const Array<const int32_t, 2> in{codes.data(), {n, levels}};
  const Status one = hisac::code_prototypes(context, p.book, in, {cpu.data(), {n, p.width}});
  context.codebook_image = {{image.data(), {image.count()}}, p.book.fingerprint()};
  const Status two = cuda::code_prototypes(context, p.book, in, {cuda.data(), {n, p.width}});
  if (!one.ok() || !two.ok()) test::fail("%s%s", one.what(), two.what());
  if (!cuda.intact()) test::fail("the prototypes' end was overwritten");
  if (n && std::memcmp(cpu.data(), cuda.data(), test::size(n * p.width) * 4) != 0) test::fail("prototypes differ");
}

void check_refusals() {
  Random r(1);
  const Codebook book = test::codebook(r, {5}, 3);
  const auto refused = [](const Status& s, const char* what) {
    if (s.code() != Code::invalid_argument || !std::strstr(s.what(), what)) test::fail("%s: got %s", what, s.what());
  };
  const int64_t size = book.image().shape[0];
  Context context;
  refused(cuda::encode(context, book, {nullptr, DType::float32, 0, 3}, {}), "codebook_image expected");
  refused(cuda::code_prototypes(context, book, {}, {}), "codebook_image expected");
  alignas(64) static std::byte memory[4096];
  context.codebook_image = {{memory + 16, {size}}, book.fingerprint()};
  refused(cuda::encode(context, book, {nullptr, DType::float32, 0, 3}, {}), "aligned to 64");
  context.codebook_image = {{memory, {size}}, test::codebook(r, {5}, 3).fingerprint()};  // of the same sizes
  refused(cuda::encode(context, book, {nullptr, DType::float32, 0, 3}, {}), "codebook_image expected of codebook");
  refused(cuda::code_prototypes(context, book, {}, {}), "codebook_image expected of codebook");
}

}  // namespace

int main(int argc, char** argv) {
  test::options(argc, argv);
  check_refusals();
  for (uint64_t seed = test::first; seed < test::last; ++seed) {
    test::name("encode %llu", static_cast<unsigned long long>(seed));
    const size_t sizes[] = {size_t{99} << 10, size_t{163} << 10, size_t{227} << 10, size_t{40} << 10};
    simt::options.machine = {1 + static_cast<int>(seed / 4 % 2), sizes[seed % 4]};
    const Problem p = random_problem(seed);
    check_encode(p);
    check_prototypes(p, seed);
  }
  return test::done();
}
