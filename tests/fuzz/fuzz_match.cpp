// SPDX-License-Identifier: Apache-2.0
// match and its backward. Sums come sorted, or in any order, with codes of any kind and leaves that come twice: no
// crash, the same bits for every crew; nothing that is not finite from tame inputs, in whatever order; and where sums
// are sorted, the law: whether a candidate has sums on a level, and the mass and the mean of those that it has.
#include "fuzz_verbs.h"
#include "tolerance.h"

namespace fuzz {
namespace {

struct Sums {
  std::vector<int32_t> codes;
  std::vector<int64_t> offsets{0};
};

Sums sums_of(Bytes& in, const Codebook& book, int64_t users, bool sorted) {
  const int64_t levels = book.levels();
  Sums out;
  for (int64_t b = 0; b < users; ++b) {
    std::vector<std::vector<int32_t>> rows(test::size(in.flag() ? in.between(0, 8) : in.between(0, 200)));
    for (auto& row : rows)
      for (int l = 0; l < levels; ++l)
        row.push_back(in.byte() == 255 ? static_cast<int32_t>(in.byte()) * 0x00800001 - 3
                                       : static_cast<int32_t>(in.byte() % book.size(l)));
    if (sorted) std::sort(rows.begin(), rows.end());
    for (const auto& row : rows) out.codes.insert(out.codes.end(), row.begin(), row.end());
    out.offsets.push_back(static_cast<int64_t>(out.codes.size()) / levels);
  }
  return out;
}

/// The mass and the mean of the first column of v of the sums below the first codes of a candidate, in float64.
struct Node {
  double mass = 0, mean = 0, largest = -INFINITY;

  Node(const Codebook& book, const MatchInputs& in, const std::vector<float>& v, int64_t b, int64_t n, int64_t level) {
    const int64_t row = in.ids ? in.ids[n] : n, levels = book.levels(), width = in.sums.v.width;
    if (row < 0 || row >= in.codes.shape[0] || !book.valid(in.codes.data + row * levels)) return;
    const int32_t* const code = in.codes.data + row * levels;
    for (bool first : {true, false})
      for (int64_t s = in.sums.offsets.start(b); s < in.sums.offsets.end(b); ++s) {
        const int32_t* const own = in.sums.codes.data + s * levels;
        const float bias = in.sums.bias ? in.sums.bias.data[s] : 0.f;
        if (!book.valid(own) || !std::isfinite(bias) || !std::equal(code, code + level + 1, own)) continue;
        if (first) {
          largest = std::fmax(largest, double(bias));
          continue;
        }
        const double w = std::exp(double(bias) - largest);
        mass += w;
        mean += w * double(v[test::size(s * width)]);
      }
    mean /= mass;
  }
};

}  // namespace

void match_some(Bytes& in, bool hostile) {
  const int64_t levels = in.between(1, 4), width = in.flag() ? in.between(1, 5) : in.between(1, 70);
  std::vector<std::vector<float>> centers;
  std::vector<Array<const float, 2>> arrays;
  for (int64_t l = 0; l < levels; ++l) {
    centers.emplace_back(test::size(in.flag() ? in.between(1, 3) : in.between(1, 200)), 1.f);
    arrays.push_back({centers.back().data(), {static_cast<int64_t>(centers.back().size()), 1}});
  }
  Codebook book;
  CHECK(Codebook::build(arrays.data(), static_cast<int>(levels), &book).ok());
  const bool sorted = in.byte() % 4 != 0, by_id = in.flag();
  const Sums sums = sums_of(in, book, in.between(0, 4), sorted);
  const int64_t users = static_cast<int64_t>(sums.offsets.size()) - 1, rows = sums.offsets.back();
  std::vector<int64_t> spans{in.between(0, 2)};
  for (int64_t b = 0; b < users; ++b) spans.push_back(spans.back() + in.between(0, 20));
  const int64_t n = spans.back() + in.between(0, 2), items = by_id ? in.between(0, 20) : n;
  std::vector<int32_t> asked(test::size(items * levels));
  for (size_t i = 0; i < asked.size(); ++i)  // of a sum, or of anything
    asked[i] = rows && in.flag() ? sums.codes[i % test::size(rows * levels)] : static_cast<int32_t>(in.byte()) - 2;
  const DType type = kTypes[in.byte() % 3];
  Typed v(in.values(rows * width, hostile), type, width), d_v(in.values(n * levels * width, hostile), type, width);
  Guarded<float> bias(in.values(rows, hostile)), d_lse(in.values(n * levels, hostile));
  Guarded<int32_t> codes(sums.codes), candidates(asked);
  SomeIds some(in, by_id ? n : 0, items);
  MatchInputs inputs;
  inputs.sums.v = v.rows();
  inputs.sums.offsets = {sums.offsets.data(), sums.offsets.data() + 1, DType::int64, users};
  inputs.sums.codes = {codes.data(), {rows, levels}};
  if (in.flag()) inputs.sums.bias = {bias.data(), {rows}};
  inputs.codes = {candidates.data(), {items, levels}};
  if (by_id) inputs.ids = some.ids();
  inputs.candidates = {spans.data(), spans.data() + 1, DType::int64, users};
  const tolerance::Match bound{double(rows), double(width), double(n), 8, 8, 8, 8, type};
  Output<std::byte> out(n * levels * width * bytes_of(type), type);
  Output<float> lse(n * levels), dv(rows * width), dbias(rows);
  each_crew([&](int workers) { return match_workspace(test::sizing(workers), book, inputs); },
            [&](const Context& context, int crew) {
              return match(context, book, inputs, {{out[crew], type, n * levels, width}, {lse[crew], {n, levels}}});
            });
  out.agree(!hostile, bound.v_out());
  lse.agree(!hostile, bound.lse());
  each_crew([&](int workers) { return match_backward_workspace(test::sizing(workers), book, inputs); },
            [&](const Context& context, int crew) {
              return match_backward(context, book, inputs, {d_v.rows(), {d_lse.data(), {n, levels}}},
                                    {{dv[crew], {rows, width}}, {dbias[crew], {rows}}});
            });
  dv.agree(!hostile, bound.d_v_out());
  dbias.agree(!hostile, bound.d_bias());
  if (!sorted || hostile || !ledger.first()) return;
  const std::vector<float> given = v.values();
  for (int64_t b = 0; b < users; ++b)
    for (int64_t i = spans[test::size(b)] * levels; i < spans[test::size(b + 1)] * levels; ++i) {
      const Node node(book, inputs, given, b, i / levels, i % levels);
      const float mass = lse[0][i], mean = decode(out[0] + i * width * bytes_of(type), type);
      CHECK(std::isinf(mass) == !(node.mass > 0));
      if (!(node.mass > 0)) {
        CHECK((mass < 0 && mean == 0));
        continue;
      }
      CHECK(std::fabs(double(mass) - (node.largest + std::log(node.mass))) <= bound.lse());
      CHECK(std::fabs(double(mean) - node.mean) <= bound.v_out());
    }
}

}  // namespace fuzz
