// SPDX-License-Identifier: Apache-2.0
// `match` and `match_backward` of cuda/, run by the emulator, beside the CPU's and the definition in float64: every
// cell within the bound of its roundings; single rows copied; everything bit-identical for any order of threads and any
// machine, and for a user alone; the same features for candidates in another order. Sums in no order harm nobody.
#include <algorithm>

#include "simt_test.h"

namespace {

using namespace hisac;
using test::Guarded, test::Random, test::size;

struct Problem {
  std::vector<int64_t> sizes;                    // of the codebook
  std::vector<int64_t> starts, ends;             // of sums
  std::vector<int64_t> first, last;              // candidates, as given to CUDA
  std::vector<int64_t> clean_first, clean_last;  // as they count
  int64_t sums = 0, candidates = 0, width = 0;
  DType type = DType::float32;
  std::vector<float> v, bias, d_v, d_lse;  // d_v, d_lse: empty where they are not given
  std::vector<int32_t> codes, asked;
  std::vector<int64_t> ids;
  bool narrow = false;            // int32 offsets and ids
  bool dv = true, d_bias = true;  // wanted

  int64_t users() const { return static_cast<int64_t>(starts.size()); }
  int64_t levels() const { return static_cast<int64_t>(sizes.size()); }
  int64_t start(int64_t b) const { return std::clamp<int64_t>(starts[size(b)], 0, sums); }
  int64_t end(int64_t b) const { return std::max(start(b), std::min(ends[size(b)], sums)); }
  float bias_of(int64_t sum) const { return bias.empty() ? 0.f : bias[size(sum)]; }
  bool valid(const int32_t* c) const {
    for (int64_t code : sizes)
      if (*c < 0 || *c++ >= code) return false;
    return true;
  }
  bool present(int64_t sum) const { return valid(&codes[size(sum * levels())]) && std::isfinite(bias_of(sum)); }
  /// The codes of a candidate; null: none.
  const int32_t* codes_of(int64_t n) const {
    const int64_t row = ids.empty() ? n : ids[size(n)];
    if (row < 0 || row * levels() >= static_cast<int64_t>(asked.size())) return nullptr;
    const int32_t* const c = &asked[size(row * levels())];
    return valid(c) ? c : nullptr;
  }
};

void clean(Problem& p) {
  int64_t ended = 0;
  p.clean_first.clear(), p.clean_last.clear();
  for (size_t b = 0; b < p.first.size(); ++b) {
    const auto clamp = [&](int64_t x) { return std::clamp<int64_t>(x, 0, p.candidates); };
    const int64_t end = std::max(clamp(p.first[b]), clamp(p.last[b]));
    p.clean_first.push_back(std::max(clamp(p.first[b]), ended));
    ended = std::max(end, ended);
    p.clean_last.push_back(ended);
  }
}

/// So many leaves in order, some of them more than once.
void add_sums(Problem& p, Random& r, int64_t n) {
  std::vector<std::vector<int32_t>> leaves;
  for (int64_t i = 0; i < n; ++i) {
    std::vector<int32_t> leaf;
    for (int64_t c : p.sizes) leaf.push_back(static_cast<int32_t>(r.below(c)));
    leaves.push_back(leaf);
  }
  std::sort(leaves.begin(), leaves.end());
  if (r.below(3)) leaves.erase(std::unique(leaves.begin(), leaves.end()), leaves.end());
  for (const auto& leaf : leaves) p.codes.insert(p.codes.end(), leaf.begin(), leaf.end());
  p.sums += static_cast<int64_t>(leaves.size());
}

int32_t odd_code(Random& r, int64_t size) {
  const int32_t rare[] = {-1, INT32_MIN, static_cast<int32_t>(size), INT32_MAX};
  return rare[r.below(4)];
}

void fill(Problem& p, Random& r) {
  const int64_t cells = p.candidates * p.levels();
  p.v = test::rounded(test::uniform(r, p.sums * p.width), p.type);
  if (r.below(4)) p.d_v = test::rounded(test::uniform(r, cells * p.width), p.type);
  if (r.below(4)) p.d_lse = test::uniform(r, cells);
  if (p.d_v.empty() && p.d_lse.empty()) p.d_lse = test::uniform(r, cells);
  if (r.below(4)) p.bias = test::uniform(r, p.sums, r.below(2) ? 3 : 60);
  const int64_t items = p.ids.empty() ? p.candidates : 1 + p.candidates / 2;
  for (int64_t n = 0; n < items; ++n) {
    const bool known = p.sums > 0 && r.below(3);
    const int64_t sum = known ? r.below(p.sums) : 0;
    for (int64_t l = 0; l < p.levels(); ++l) {
      const int64_t c = p.sizes[size(l)];
      p.asked.push_back(r.below(40) == 0 ? odd_code(r, c)
                        : known          ? p.codes[size(sum * p.levels() + l)]
                                         : static_cast<int32_t>(r.below(c)));
    }
  }
  for (int64_t& id : p.ids) id = r.below(items + 2) - 1;
  clean(p);
}

Problem random_problem(uint64_t seed) {
  Random r(seed);
  Problem p;
  const int64_t codes[] = {1, 2, 5, 30}, wide[] = {1, 3, 16, 40, 64, 70, 130};
  for (int64_t l = 1 + r.below(seed % 5 == 0 ? 8 : 3); l > 0; --l) p.sizes.push_back(codes[r.below(4)]);
  p.width = wide[r.below(7)];
  const DType types[] = {DType::float32, DType::bfloat16, DType::float16};
  p.type = types[r.below(3)];
  p.narrow = r.below(2);
  const int64_t users = r.below(9) ? 1 + r.below(4) : 0;
  const bool shared = r.below(3) == 0;
  for (int64_t b = 0; b < users; ++b) {
    p.starts.push_back(p.sums);
    if (!shared || b == 0) add_sums(p, r, r.below(5) ? r.below(120) : 0);
    p.ends.push_back(p.sums);
    p.candidates += r.below(4) ? 0 : r.below(5);  // nobody's
    p.first.push_back(p.candidates);
    p.candidates += r.below(4) ? r.below(50) : 0;
    p.last.push_back(p.candidates);
  }
  p.candidates += r.below(2) ? 0 : r.below(9);
  for (int64_t b = 0; shared && b < users; ++b) {  // every range of sorted sums is sorted
    p.starts[size(b)] = r.below(p.sums + 1) - (r.below(5) ? 0 : 9);
    p.ends[size(b)] = p.starts[size(b)] + r.below(p.sums + 9);
  }
  if (users && r.below(4) == 0) {  // offsets in no order, and outside
    for (int64_t i = 0; i < users; ++i) p.first[size(r.below(users))] = r.below(p.candidates + 9) - 4;
    p.last[size(r.below(users))] = r.below(2) ? -7 : p.candidates + 100;
  }
  if (r.below(2)) p.ids.assign(size(p.candidates), 0);
  p.dv = r.below(5);
  p.d_bias = !p.dv || r.below(5);
  fill(p, r);
  if (r.below(2))  // absent where they stand
    for (int64_t s = 0; s < p.sums; ++s)
      if (r.below(6) == 0) {
        const int64_t l = r.below(p.levels());
        p.codes[size(s * p.levels() + l)] = odd_code(r, p.sizes[size(l)]);
      }
  const float rare[] = {NAN, INFINITY, -INFINITY};
  for (float& y : p.bias)
    if (r.below(8) == 0) y = rare[r.below(3)];
  for (int64_t s = 0; s < p.sums; ++s) {  // an absent sum may hold anything, and a column be spoilt
    const bool spoil = p.present(s) ? r.below(60) == 0 : r.below(2);
    if (spoil) p.v[size(s * p.width + r.below(p.width))] = rare[r.below(3)];
  }
  return p;
}

/// A node of more sums, and one of more candidates, than a warp takes; a user whose candidates another has.
Problem large() {
  Random r(1);
  Problem p;
  p.sizes = {3, 900};
  p.width = 70;
  add_sums(p, r, 1500);
  p.starts = {0, 0, 0};
  p.ends = {p.sums, p.sums, p.sums};
  p.first = {2, 30, 640};
  p.last = {640, 40, 650};
  p.candidates = 651;
  fill(p, r);
  p.bias = test::uniform(r, p.sums, 2);
  p.d_v = test::uniform(r, p.candidates * 2 * p.width);
  for (int64_t n = 10; n < 500; ++n) std::copy_n(p.asked.begin(), 2, p.asked.begin() + 2 * n);
  return p;
}

struct Result {
  std::vector<std::byte> bits;  // of v
  std::vector<float> v, lse, d_v, d_bias;
  bool operator==(const Result& o) const {
    const auto same = [](const auto& a, const auto& b) {
      return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0);
    };
    return same(bits, o.bits) && same(lse, o.lse) && same(d_v, o.d_v) && same(d_bias, o.d_bias);
  }
};

/// Offsets of the type of a problem, each of its exact size.
struct Offsets {
  Offsets(const std::vector<int64_t>& a, const std::vector<int64_t>& b, bool narrow)
      : starts(a), ends(b), few_starts({a.begin(), a.end()}), few_ends({b.begin(), b.end()}) {
    const int64_t n = static_cast<int64_t>(a.size());
    spans = narrow ? ranges(few_starts.data(), few_ends.data(), n) : ranges(starts.data(), ends.data(), n);
  }
  Guarded<int64_t> starts, ends;
  Guarded<int32_t> few_starts, few_ends;
  Spans spans;
};

Result run(const Problem& p, bool cuda) {
  Random r(7);
  const Codebook book = test::codebook(r, p.sizes, 1);
  Guarded<std::byte> v(test::encoded(p.v, p.type)), d_v(test::encoded(p.d_v, p.type));
  Guarded<float> bias(p.bias), d_lse(p.d_lse);
  Guarded<int32_t> codes(p.codes), asked(p.asked), few(std::vector<int32_t>(p.ids.begin(), p.ids.end()));
  Guarded<int64_t> many(p.ids);
  std::vector<int64_t> starts, ends;
  for (int64_t b = 0; b < p.users(); ++b) starts.push_back(p.start(b)), ends.push_back(p.end(b));
  Offsets sums(cuda ? p.starts : starts, cuda ? p.ends : ends, p.narrow);
  Offsets candidates(cuda ? p.first : p.clean_first, cuda ? p.last : p.clean_last, p.narrow);
  MatchInputs in;
  in.sums.v = {v.data(), p.type, p.sums, p.width};
  in.sums.offsets = sums.spans;
  in.sums.codes = {codes.data(), {p.sums, p.levels()}};
  if (!p.bias.empty()) in.sums.bias = {bias.data(), {p.sums}};
  in.codes = {asked.data(), {static_cast<int64_t>(p.asked.size()) / p.levels(), p.levels()}};
  if (!p.ids.empty()) in.ids = p.narrow ? ids(few.data(), p.candidates) : ids(many.data(), p.candidates);
  in.candidates = candidates.spans;
  const int64_t cells = p.candidates * p.levels(), bytes = p.type == DType::float32 ? 4 : 2;
  Guarded<std::byte> out(cells * p.width * bytes);
  Guarded<float> lse(cells), of_v(p.dv ? p.sums * p.width : 0), of_bias(p.d_bias ? p.sums : 0);
  const Match result{{out.data(), p.type, cells, p.width}, {lse.data(), {p.candidates, p.levels()}}};
  MatchForward forward;
  if (!p.d_v.empty()) forward.d_v = {d_v.data(), p.type, cells, p.width};
  if (!p.d_lse.empty()) forward.d_lse = {d_lse.data(), {p.candidates, p.levels()}};
  MatchGradients gradients;
  if (p.dv) gradients.v = {of_v.data(), {p.sums, p.width}};
  if (p.d_bias) gradients.bias = {of_bias.data(), {p.sums}};
  const auto call = [&](size_t room, auto verb) {
    test::Workspace workspace(room);
    const Status status = verb(Context{workspace.array()});
    if (!status.ok()) test::fail("%s", status.what());
    if (!workspace.intact()) test::fail("the workspace's end was overwritten");
  };
  if (cuda) {
    call(cuda::match_workspace({}, book, in), [&](Context c) { return cuda::match(c, book, in, result); });
    call(cuda::match_backward_workspace({}, book, in),
         [&](Context c) { return cuda::match_backward(c, book, in, forward, gradients); });
  } else {
    call(match_workspace({}, book, in), [&](Context c) { return match(c, book, in, result); });
    call(match_backward_workspace({}, book, in),
         [&](Context c) { return match_backward(c, book, in, forward, gradients); });
  }
  if (!out.intact() || !lse.intact() || !of_v.intact() || !of_bias.intact())
    test::fail("a result's end was overwritten");
  return {out.values(), test::decoded(out.values(), p.type), lse.values(), of_v.values(), of_bias.values()};
}

/// The definition in float64, and what may be wrong of each cell: weights and shares within a few units of the least
/// float32 and of the biases, all else in float64; then one rounding, or one for each user and level.
struct Expected {
  std::vector<double> v, v_bound, lse, lse_bound, d_v, d_v_bound, d_bias, d_bias_bound;
  std::vector<int64_t> row;  // of a cell of one sum; -1: of none or several
};

Expected expected_of(const Problem& p) {
  constexpr double kUnit = 0x1p-24;
  const double rounding = p.type == DType::float32 ? kUnit : p.type == DType::bfloat16 ? 0x1p-8 : 0x1p-11;
  const double least = p.type == DType::float16 ? 0x1p-24 : 0x1p-120;
  const int64_t cells = p.candidates * p.levels(), wide = p.width;
  const double nodes = static_cast<double>(p.users() * p.levels());
  Expected e;
  for (auto* a : {&e.v, &e.v_bound}) a->assign(size(cells * wide), 0);
  for (auto* a : {&e.d_v, &e.d_v_bound}) a->assign(size(p.sums * wide), 0);
  for (auto* a : {&e.d_bias, &e.d_bias_bound}) a->assign(size(p.sums), 0);
  e.lse.assign(size(cells), -INFINITY);
  e.lse_bound.assign(size(cells), 0);
  e.row.assign(size(cells), -1);
  const auto at = [](const std::vector<float>& a, int64_t i) { return a.empty() ? 0.0 : double(a[size(i)]); };
  for (int64_t b = 0; b < p.users(); ++b)
    for (int64_t n = p.clean_first[size(b)]; n < p.clean_last[size(b)]; ++n)
      for (int64_t l = 0; l < p.levels(); ++l) {
        const int32_t* const codes = p.codes_of(n);
        const int64_t cell = n * p.levels() + l;
        std::vector<int64_t> rows;
        for (int64_t s = p.start(b); codes && s < p.end(b); ++s)
          if (p.present(s) && std::equal(codes, codes + l + 1, &p.codes[size(s * p.levels())])) rows.push_back(s);
        if (rows.empty()) continue;
        if (rows.size() == 1) e.row[size(cell)] = rows[0];
        double largest = -INFINITY, total = 0, wrong = 0;
        for (int64_t s : rows) largest = std::max(largest, double(p.bias_of(s)));
        for (int64_t s : rows) total += std::exp(double(p.bias_of(s)) - largest);
        std::vector<double> share, off;
        for (int64_t s : rows) {
          const double gap = double(p.bias_of(s)) - largest;
          share.push_back(std::exp(gap) / total);
          off.push_back(share.back() * (4 * std::fabs(gap) + 8) * kUnit + 0x1p-125);
          wrong += off.back();
        }
        e.lse[size(cell)] = largest + std::log(total);
        e.lse_bound[size(cell)] = wrong + (8 + 4 * std::fabs(e.lse[size(cell)])) * kUnit;
        std::vector<double> dots(rows.size()), moduli(rows.size());
        double mean_dot = 0, mean_moduli = 0, mean_off = 0;
        for (int64_t c = 0; c < wide; ++c) {
          double mean = 0, bound = 0;
          const double d = at(p.d_v, cell * wide + c);
          for (size_t i = 0; i < rows.size(); ++i) {
            const double y = double(p.v[size(rows[i] * wide + c)]);
            mean += share[i] * y;
            bound += (off[i] + share[i] * wrong) * std::fabs(y);
            dots[i] += d * y;
            moduli[i] += std::fabs(d * y);
            const size_t to = size(rows[i] * wide + c);
            e.d_v[to] += share[i] * d;
            e.d_v_bound[to] += (off[i] + share[i] * (wrong + (nodes + 4) * kUnit)) * std::fabs(d);
          }
          e.v[size(cell * wide + c)] = mean;
          e.v_bound[size(cell * wide + c)] = bound + rounding * (std::fabs(mean) + bound) + least;
        }
        for (size_t i = 0; i < rows.size(); ++i) {
          mean_dot += share[i] * dots[i];
          mean_moduli += share[i] * moduli[i];
          mean_off += (off[i] + share[i] * wrong) * moduli[i];
        }
        for (size_t i = 0; i < rows.size(); ++i) {
          const double slope = at(p.d_lse, cell), all = std::fabs(slope) + moduli[i] + mean_moduli;
          e.d_bias[size(rows[i])] += share[i] * (slope + dots[i] - mean_dot);
          e.d_bias_bound[size(rows[i])] += (off[i] + share[i] * (wrong + 8 * kUnit)) * all + share[i] * mean_off;
        }
      }
  for (size_t i = 0; i < e.d_v.size(); ++i) e.d_v_bound[i] += std::fabs(e.d_v[i]) * kUnit + 0x1p-120;
  for (size_t i = 0; i < e.d_bias.size(); ++i) e.d_bias_bound[i] += std::fabs(e.d_bias[i]) * kUnit + 0x1p-120;
  return e;
}

/// The CPU adds in float32, in runs of 64. What is not finite may be NaN where its weight is below the least float32. A
/// gradient that is not finite may be anything.
void within(const char* what, const std::vector<float>& mine, const std::vector<double>& exact,
            const std::vector<double>& bound, bool cuda, bool gradient) {
  for (size_t i = 0; i < mine.size(); ++i) {
    const double y = double(mine[i]), most = bound[i] * (cuda ? 1 : 32);
    const bool fits =
        std::isfinite(exact[i]) ? std::fabs(y - exact[i]) <= most : y == exact[i] || gradient || std::isnan(y);
    if (!fits) test::fail("%s's %s %zu: %g, expected %g within %g", cuda ? "CUDA" : "CPU", what, i, y, exact[i], most);
  }
}

void compare(const Problem& p, const Expected& e, const Result& mine, bool cuda) {
  within("v", mine.v, e.v, e.v_bound, cuda, false);
  within("lse", mine.lse, e.lse, e.lse_bound, cuda, false);
  if (p.dv) within("d v", mine.d_v, e.d_v, e.d_v_bound, cuda, true);
  if (p.d_bias) within("d bias", mine.d_bias, e.d_bias, e.d_bias_bound, cuda, true);
}

/// Whether a cell's v and lse are the same in two results.
bool same_cell(const Problem& p, const Result& a, int64_t i, const Result& b, int64_t k) {
  const int64_t bytes = p.width * (p.type == DType::float32 ? 4 : 2);
  return std::memcmp(&a.bits[size(i * bytes)], &b.bits[size(k * bytes)], size(bytes)) == 0 &&
         std::memcmp(&a.lse[size(i)], &b.lse[size(k)], 4) == 0;
}

/// A user of a batch by itself, its candidates in reverse.
void check_alone(const Problem& p, int64_t b, const Result& whole) {
  const int64_t levels = p.levels(), from = p.clean_first[size(b)], n = p.clean_last[size(b)] - from;
  Problem o = p;
  o.starts = {p.starts[size(b)]}, o.ends = {p.ends[size(b)]};
  o.first = {0}, o.last = {n};
  o.candidates = n;
  o.asked.clear(), o.ids.clear(), o.d_v.clear();
  for (int64_t i = n; i-- > 0;)
    for (int64_t l = 0; l < levels; ++l) {
      const int32_t* const codes = p.codes_of(from + i);
      o.asked.push_back(codes ? codes[l] : -1);
    }
  o.d_lse.assign(size(n * levels), 1.f);
  clean(o);
  const Result mine = run(o, true);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t l = 0; l < levels; ++l)
      if (!same_cell(p, mine, i * levels + l, whole, (from + n - 1 - i) * levels + l))
        return test::fail("user %lld has other bits alone, in reverse", static_cast<long long>(b));
}

/// The gradients of a user whose sums nobody shares are those that it has alone.
void check_gradients_alone(const Problem& p, int64_t b, const Result& whole) {
  for (int64_t o = 0; o < p.users(); ++o)
    if (o != b && p.start(o) < p.end(b) && p.start(b) < p.end(o)) return;
  Problem o = p;
  for (int64_t u = 0; u < p.users(); ++u) {
    o.first[size(u)] = u < b ? 0 : u == b ? p.clean_first[size(b)] : p.clean_last[size(b)];
    o.last[size(u)] = u < b ? 0 : p.clean_last[size(b)];
  }
  clean(o);
  const Result mine = run(o, true);
  const auto same = [&](const std::vector<float>& x, const std::vector<float>& y, int64_t wide) {
    const size_t bytes = size((p.end(b) - p.start(b)) * wide) * 4;
    return x.empty() || bytes == 0 ||
           std::memcmp(x.data() + p.start(b) * wide, y.data() + p.start(b) * wide, bytes) == 0;
  };
  if (!same(mine.d_v, whole.d_v, p.width) || !same(mine.d_bias, whole.d_bias, 1))
    test::fail("user %lld has other gradients alone", static_cast<long long>(b));
}

void check(const Problem& p, uint64_t seed) {
  const Expected e = expected_of(p);
  const Result cpu = run(p, false), first = run(p, true);
  compare(p, e, cpu, false);
  compare(p, e, first, true);
  const int64_t bytes = p.width * (p.type == DType::float32 ? 4 : 2);
  const std::vector<std::byte> rows = test::encoded(p.v, p.type);
  for (size_t i = 0; i < e.row.size(); ++i) {
    if (e.row[i] < 0) continue;
    const bool copied = first.lse[i] == p.bias_of(e.row[i]);
    bool finite = true;  // a NaN may have got other bits beside absent rows
    for (int64_t c = 0; c < p.width; ++c) finite &= std::isfinite(p.v[size(e.row[i] * p.width + c)]);
    if (!copied || (finite && std::memcmp(&first.bits[i * size(bytes)], &rows[size(e.row[i] * bytes)], size(bytes))))
      test::fail("cell %zu is no copy of its row", i);
  }
  const simt::Options kept = simt::options;
  simt::options.order = simt::Order::random;
  simt::options.seed += 18;
  simt::options.machine.processors = 1;
  if (!(run(p, true) == first)) test::fail("other bits for another order of threads and another machine");
  simt::options = kept;
  if (p.users() > 0) {
    check_alone(p, static_cast<int64_t>(seed) % p.users(), first);
    check_gradients_alone(p, static_cast<int64_t>(seed) % p.users(), first);
  }
  Problem mixed = p;  // sums in no order
  Random r(seed + 99);
  for (int64_t i = p.sums; i-- > 1;)
    std::swap_ranges(mixed.codes.begin() + i * p.levels(), mixed.codes.begin() + (i + 1) * p.levels(),
                     mixed.codes.begin() + r.below(i) * p.levels());
  for (float& y : mixed.v) y = std::isfinite(y) ? y : 1;
  for (float& y : mixed.bias) y *= 50;
  const Result harmless = run(mixed, true);
  for (const std::vector<float>* a : {&harmless.v, &harmless.d_v, &harmless.d_bias})
    for (float y : *a)
      if (!std::isfinite(y)) return test::fail("sums in no order gave %g", double(y));
}

}  // namespace

int main(int argc, char** argv) {
  test::options(argc, argv);
  for (uint64_t seed = test::first; seed < test::last && !(simt::planted && test::faults); ++seed) {
    test::name("match %llu", static_cast<unsigned long long>(seed));
    simt::options.machine = {2, size_t{227} << 10};
    simt::options.seed = seed;
    check(seed ? random_problem(seed) : large(), seed);
  }
  return test::done();
}
