// SPDX-License-Identifier: Apache-2.0
// What hisac.reference says of seeded problems (vectors.py wrote it): cases by name, their inputs, and what to expect.
#pragma once
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <string>

#include "support.h"

namespace vectors {

using hisac::DType;
using test::size;

/// Bytes of the file, from left to right.
struct Reader {
  const unsigned char *at, *end;
  template <class T>
  T take() {
    T out;
    REQUIRE(static_cast<size_t>(end - at) >= sizeof(T));
    std::memcpy(&out, at, sizeof(T));
    at += sizeof(T);
    return out;
  }
  template <class T>
  std::vector<T> take(int64_t n) {
    std::vector<T> out(size(n));
    for (T& value : out) value = take<T>();
    return out;
  }
};

inline float bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

/// One array of a case; which of the vectors holds it depends on its kind.
struct Record {
  char kind = 0;
  std::vector<int64_t> shape;
  std::vector<float> floats;                 // f; u: drawn; e: expected
  std::vector<int32_t> ints;                 // i; n: drawn
  std::vector<int64_t> longs;                // l; w: drawn
  std::vector<uint16_t> halves;              // h: float16, H: bfloat16
  std::vector<int8_t> bytes;                 // b
  uint64_t digest = 0;                       // d: of integers
  int64_t stride = 1;                        // e: of the rows that are expected
  std::vector<uint16_t> bound, bound_amx{};  // e: bfloat16

  int64_t count() const {
    int64_t n = 1;
    for (int64_t s : shape) n *= s;
    return n;
  }
  int64_t width() const { return shape.size() > 1 ? shape.back() : 1; }
  const void* data() const {
    if (kind == 'h' || kind == 'H') return halves.data();
    if (kind == 'l' || kind == 'w') return longs.data();
    return kind == 'b' ? static_cast<const void*>(bytes.data()) : floats.data();
  }
  DType dtype() const {
    if (kind == 'l' || kind == 'w') return DType::int64;
    return kind == 'h' ? DType::float16 : kind == 'H' ? DType::bfloat16 : kind == 'b' ? DType::int8 : DType::float32;
  }
  hisac::Rows rows() const { return {data(), dtype(), count() / width(), width()}; }
};

inline void draw(Reader& in, Record* out) {
  const uint64_t seed = in.take<uint64_t>();
  const int64_t n = out->count(), patches = in.take<uint32_t>();
  test::Random random(seed);
  if (out->kind == 'u') {
    std::map<uint32_t, float> patch;
    for (int64_t i = 0; i < patches; ++i) {
      const uint32_t at = in.take<uint32_t>();
      patch[at] = in.take<float>();
    }
    const float scale = in.take<float>();
    const bool rounded = in.take<uint8_t>();
    out->floats = test::uniform(random, n, scale);
    for (float& x : out->floats) {
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      bits += 0x7fff + (bits >> 16 & 1);
      if (rounded) x = bfloat16(static_cast<uint16_t>(bits >> 16));
    }
    for (const auto& [at, value] : patch) out->floats.at(at) = value;
    return;
  }
  if (out->kind == 'w') {
    std::map<uint32_t, int64_t> patch;
    for (int64_t i = 0; i < patches; ++i) {
      const uint32_t at = in.take<uint32_t>();
      patch[at] = in.take<int64_t>();
    }
    const uint64_t digits = in.take<uint8_t>();
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t first = random.bits(), second = random.bits(), magnitude = first >> (63 - second % digits);
      out->longs.push_back(second >> 61 ? static_cast<int64_t>(magnitude) : -static_cast<int64_t>(magnitude));
    }
    for (const auto& [at, value] : patch) out->longs.at(at) = value;
    return;
  }
  std::map<uint32_t, int32_t> patch;
  for (int64_t i = 0; i < patches; ++i) {
    const uint32_t at = in.take<uint32_t>();
    patch[at] = in.take<int32_t>();
  }
  const int64_t levels = out->shape.at(1);
  std::vector<std::pair<uint32_t, uint8_t>> columns;
  for (int64_t l = 0; l < levels; ++l) {
    const uint32_t c = in.take<uint32_t>();
    columns.emplace_back(c, in.take<uint8_t>());
  }
  for (int64_t i = 0; i < n; ++i) {
    const auto [c, manner] = columns[size(i % levels)];
    const uint64_t first = random.bits(), second = random.bits(), skewed = second % (1 + first % c);
    uint64_t zeros = 0;
    while (zeros < 64 && !(first >> zeros & 1)) ++zeros;
    const bool heavy = i % levels != 0 && out->ints[size(i - i % levels)] < 6;
    const uint64_t drawn[] = {second % c, skewed, std::min<uint64_t>(zeros, c - 1), c / 2, heavy ? c / 2 : skewed};
    out->ints.push_back(static_cast<int32_t>(drawn[manner]));
  }
  for (const auto& [at, value] : patch) out->ints.at(at) = value;
}

inline Record parse(char kind, Reader in) {
  Record out;
  out.kind = kind;
  for (int64_t rank = in.take<uint8_t>(); rank > 0; --rank) out.shape.push_back(in.take<uint32_t>());
  const int64_t n = out.count();
  if (kind == 'f') out.floats = in.take<float>(n);
  if (kind == 'i') out.ints = in.take<int32_t>(n);
  if (kind == 'l') out.longs = in.take<int64_t>(n);
  if (kind == 'h' || kind == 'H') out.halves = in.take<uint16_t>(n);
  if (kind == 'b') out.bytes = in.take<int8_t>(n);
  if (kind == 'd') out.digest = in.take<uint64_t>();
  if (kind == 'u' || kind == 'n' || kind == 'w') draw(in, &out);
  if (kind == 'e') {
    out.stride = in.take<uint32_t>();
    const int64_t kept = (n / out.width() + out.stride - 1) / out.stride * out.width();
    out.floats = in.take<float>(kept);
    out.bound = in.take<uint16_t>(kept);
    out.bound_amx = in.at == in.end ? out.bound : in.take<uint16_t>(kept);
  }
  return out;
}

/// A problem and what the reference says of it.
class Case {
 public:
  explicit Case(std::string name) : name_(std::move(name)) {}
  const std::string& name() const { return name_; }
  void add(const std::string& name, Record record) { records_[name] = std::move(record); }
  bool has(const std::string& name) const { return records_.count(name) != 0; }
  const Record& operator[](const std::string& name) const { return records_.at(name); }

  /// Exactly the integers expected.
  template <class T>
  void check_integers(const std::string& name, const std::vector<T>& got) const {
    CAPTURE(name_);
    CAPTURE(name);
    const Record& wanted = (*this)[name];
    REQUIRE(static_cast<int64_t>(got.size()) == wanted.count());
    if (wanted.kind == 'i') CHECK(std::equal(got.begin(), got.end(), wanted.ints.begin()));
    if (wanted.kind == 'l') CHECK(std::equal(got.begin(), got.end(), wanted.longs.begin()));
    if (wanted.kind != 'd') return;
    uint64_t sum = 0, place = 0;
    for (T value : got) {
      place += 0x9e3779b97f4a7c15u;
      sum += test::Random(static_cast<uint64_t>(static_cast<int64_t>(value)) + place - 0x9e3779b97f4a7c15u).bits();
    }
    CHECK(sum == wanted.digest);
  }

  /// Floats within their bounds: equal infinities are, and where the bound is NaN nothing is asked.
  void check_floats(const std::string& name, const std::vector<float>& got) const {
    CAPTURE(name_);
    CAPTURE(name);
    const Record& wanted = (*this)[name];
    const bool amx = std::string(hisac::active_isa()).rfind("amx", 0) == 0;
    size_t i = 0, wrong = 0;
    each(name, got, [&](float a, float b) {
      const double bound = double(bfloat16(amx ? wanted.bound_amx[i] : wanted.bound[i]));
      const bool ok = a == b || std::isnan(bound) || std::fabs(double(a) - double(b)) <= bound;
      if (!ok && wrong++ == 0) MESSAGE("number ", i, ": expected ", b, " within ", bound, ", got ", a);
      ++i;
    });
    CHECK(wrong == 0);
  }

  /// visit(got, expected) for every float that is expected.
  template <class Visit>
  void each(const std::string& name, const std::vector<float>& got, Visit visit) const {
    const Record& wanted = (*this)[name];
    REQUIRE(static_cast<int64_t>(got.size()) == wanted.count());
    const size_t width = size(wanted.width()), stride = size(wanted.stride);
    for (size_t i = 0; i < wanted.floats.size(); ++i)
      visit(got[i / width * stride * width + i % width], wanted.floats[i]);
  }

 private:
  std::string name_;
  std::map<std::string, Record> records_;
};

/// The cases of a verb, "route" for those named "route/..".
inline std::vector<Case> cases(const std::string& verb) {
  std::vector<unsigned char> file;
  std::FILE* const from = std::fopen(HISAC_VECTORS, "rb");
  REQUIRE_MESSAGE(from != nullptr, "cannot read " HISAC_VECTORS);
  for (int c; (c = std::fgetc(from)) != EOF;) file.push_back(static_cast<unsigned char>(c));
  std::fclose(from);
  const std::string head = "hisac vectors 1\n";
  REQUIRE(file.size() > head.size());
  REQUIRE(std::equal(head.begin(), head.end(), file.begin()));
  Reader in{file.data() + head.size(), file.data() + file.size()};
  std::vector<Case> out;
  std::vector<std::pair<char, Reader>> written;
  bool mine = false;
  while (in.at < in.end) {
    char kind = static_cast<char>(in.take<uint8_t>());
    const std::vector<char> letters = in.take<char>(in.take<uint8_t>());
    const std::string name(letters.begin(), letters.end());
    const int64_t bytes = in.take<uint32_t>();
    REQUIRE(in.end - in.at >= bytes);
    Reader content{in.at, in.at + bytes};
    in.at += bytes;
    if (kind == 'c') {
      mine = name.rfind(verb + "/", 0) == 0;
      if (mine) out.emplace_back(name);
      continue;
    }
    if (kind == '=')
      std::tie(kind, content) = written.at(content.take<uint32_t>());
    else
      written.emplace_back(kind, content);
    if (mine) out.back().add(name, parse(kind, content));
  }
  REQUIRE(!out.empty());
  return out;
}

/// The codebook of a case: level l has the seed's numbers, l later, at 4^-l.
inline hisac::Codebook book(const Case& c) {
  const std::vector<int64_t>& of = c["book"].longs;
  std::vector<std::vector<float>> centers;
  std::vector<hisac::Array<const float, 2>> arrays;
  float scale = 1;
  for (size_t l = 2; l < of.size(); ++l, scale /= 4) {
    test::Random random(static_cast<uint64_t>(of[0]) + l - 2);
    centers.push_back(test::uniform(random, of[l] * of[1], scale));
    arrays.push_back({centers.back().data(), {of[l], of[1]}});
  }
  hisac::Codebook out;
  REQUIRE(hisac::Codebook::build(arrays.data(), static_cast<int>(arrays.size()), &out).ok());
  return out;
}

/// The users of a case and the longest of their histories.
inline hisac::Spans spans(const Case& c) {
  const std::vector<int64_t>&starts = c["starts"].longs, &ends = c["ends"].longs;
  return {starts.data(), ends.data(), DType::int64, static_cast<int64_t>(starts.size())};
}
inline int64_t longest(const Case& c) {
  int64_t out = 0;
  for (size_t b = 0; b < c["starts"].longs.size(); ++b) out = std::max(out, c["ends"].longs[b] - c["starts"].longs[b]);
  return out;
}

inline hisac::Array<const float, 1> vector(const Case& c, const std::string& name) {
  if (!c.has(name)) return {};
  return {c[name].floats.data(), {c[name].count()}};
}

inline hisac::Array<const float, 2> matrix(const Case& c, const std::string& name) {
  if (!c.has(name)) return {};
  const Record& r = c[name];
  return {r.floats.data(), {r.shape[0], r.shape[1]}};
}

inline hisac::Array<const float, 3> cube(const Case& c, const std::string& name) {
  if (!c.has(name)) return {};
  const Record& r = c[name];
  return {r.floats.data(), {r.shape[0], r.shape[1], r.shape[2]}};
}

/// The histories of a case, with the fields that it names.
inline hisac::Histories histories(const Case& c) {
  hisac::Histories out;
  if (c.has("x")) out.x = c["x"].rows();
  if (c.has("v")) out.v = c["v"].rows();
  out.offsets = spans(c);
  if (c.has("codes")) out.codes = {c["codes"].ints.data(), {c["codes"].shape[0], c["codes"].shape[1]}};
  if (c.has("x_ids")) out.x_ids = {c["x_ids"].longs.data(), DType::int64, c["x_ids"].count()};
  if (c.has("v_ids")) out.v_ids = {c["v_ids"].ints.data(), DType::int32, c["v_ids"].count()};
  out.x_scale = vector(c, "x_scale");
  out.bias = vector(c, "bias");
  out.spread = vector(c, "spread");
  if (c.has("weights")) out.weights = {c["weights"].data(), c["weights"].dtype(), c["weights"].count()};
  return out;
}

/// The inputs of route, missing, leaf_sums and their gradients.
struct Routing {
  explicit Routing(const Case& c) : in(histories(c)) {
    if (c.has("options")) {
      const std::vector<int64_t>& o = c["options"].longs;
      params.normalize = static_cast<hisac::Normalize>(o[0]);
      params.precision = static_cast<hisac::Precision>(o[1]);
    }
    params.temperature = vector(c, "temperature");
    agents.prototypes = cube(c, "prototypes");
    if (c.has("count")) agents.count = {c["count"].ints.data(), {c["count"].count()}};
    if (in.codes) codebook = std::make_unique<hisac::Codebook>(book(c));
    if (c.has("sparse")) {
      params.sparse = c["sparse"].longs[0];
      const std::vector<int64_t>& shape = c["agent_codes"].shape;
      agents.codes = {c["agent_codes"].ints.data(), {shape[0], shape[1], shape[2]}};
    }
    users = in.offsets.users;
    seats = agents.prototypes.shape[1];
  }
  std::unique_ptr<hisac::Codebook> codebook;  // null: none
  hisac::RouteParams params;
  hisac::Histories in;
  hisac::RouteAgents agents;
  int64_t users = 0, seats = 0;  // seats: M of a user
};

/// The inputs of attend and its gradients.
struct Attention {
  explicit Attention(const Case& c) : pairs(c["q"].shape[0]) {
    const std::vector<int64_t>& keys = c["keys"].shape;
    in = {c["q"].rows(),
          c["keys"].rows(),
          c["values"].rows(),
          keys[1],
          keys[2],
          spans(c),
          {c["bias"].floats.data(), {keys[0], keys[1]}},
          c["scale"].floats[0]};
  }
  int64_t pairs;
  hisac::AttendInputs in;
};

}  // namespace vectors
