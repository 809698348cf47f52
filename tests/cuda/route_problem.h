// SPDX-License-Identifier: Apache-2.0
// Random problems for `route` and `leaf_sums`, hostile ones among them, and the same as tables, ids and codes.
#pragma once
#include <algorithm>
#include <memory>

#include "simt_test.h"

namespace test {

using namespace hisac;

struct Problem {
  std::vector<int64_t> starts, ends;
  int64_t rows = 0, agents = 0, width = 0, values = 0;  // values 0: no v
  DType x_type = DType::float32, v_type = DType::float32;
  RouteParams params;
  std::vector<float> x, v, prototypes, bias, temperature;
  std::vector<float> spread, scale;
  std::vector<int64_t> x_ids, v_ids;
  VoteWeights weights;
  std::vector<int32_t> count, codes, own, lists;  // own, lists: of agents, for sparse routing
  std::shared_ptr<Codebook> book;
  bool narrow = false;  // int32 offsets and ids
  bool codes_only = false;
  bool with_tokens = true, with_mean_x = false;  // wanted; tokens only of a v
  float reach = 0;                               // an upper bound of (|x| + |p|)^2 / tau

  bool gathered() const { return codes_only || !x_ids.empty() || !v_ids.empty() || x_type == DType::int8; }
};

// Of a mean, relative to its largest row, on either side: 64 float32 sums and what joins them, 2 ulp of a weight and
// the rounding of its exponent, whose share |bias - top| e^(bias - top) is below 1.
constexpr float kSkew = 2 * 128 * 0x1p-24f;

struct Result {
  std::vector<float> tokens, lse, mean_x;
  bool operator==(const Result& o) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * 4) == 0);
    };
    return same(tokens, o.tokens) && same(lse, o.lse) && same(mean_x, o.mean_x);
  }
};

/// Rows of a table.
inline int64_t table(const std::vector<float>& x, int64_t width) {
  return x.empty() ? 0 : static_cast<int64_t>(x.size()) / width;
}
inline int64_t count(const std::vector<int64_t>& a) { return static_cast<int64_t>(a.size()); }
/// Rows of x and codes.
inline int64_t items(const Problem& p) { return p.x_ids.empty() ? p.rows : std::min(1 + p.rows / 2, p.rows); }
inline int64_t users(const Problem& p) { return static_cast<int64_t>(p.starts.size()); }

/// The largest modulus below a limit.
inline float largest(const std::vector<float>& a, float limit) {
  float y = 0;
  for (float x : a)
    if (std::fabs(x) < limit) y = std::max(y, std::fabs(x));
  return y;
}
/// At least that of an element of present rows of x.
inline float largest_x(const Problem& p) {
  return p.codes_only ? 1.4f : largest(p.x, 1e6f) * (p.scale.empty() ? 1 : largest(p.scale, INFINITY));
}

inline Problem random_problem(uint64_t seed) {
  Random r(seed);
  Problem p;
  const int64_t kind = r.below(8);
  const int64_t b = kind == 0 ? 1 : 1 + r.below(5);
  const int64_t longest = kind == 0 ? 4500 : kind < 4 ? 200 : 70;
  p.rows = 0;
  for (int64_t i = 0; i < b; ++i) {
    const int64_t n = r.below(4) == 0 ? 0 : 1 + r.below(longest);
    p.starts.push_back(p.rows);
    p.rows += n;
    p.ends.push_back(p.rows);
  }
  if (r.below(3) == 0)  // histories that overlap, and offsets that lie outside
    for (int64_t i = 0; i < b; ++i) {
      p.starts[size(i)] = r.below(p.rows + 1);
      p.ends[size(i)] = r.below(8) == 0 ? p.rows + 5 : r.below(p.rows + 1);
    }
  const int64_t wide[] = {1, 7, 16, 24, 32, 40, 128, 136, 300};
  p.width = kind == 0 ? 8 + r.below(9) : wide[r.below(9)];
  const int64_t deep[] = {1, 5, 8, 16, 24, 64, 72, 130};
  p.values = kind == 0 ? 8 : deep[r.below(8)];
  p.agents = kind == 0 ? 1 + r.below(20) : r.below(5) == 0 ? 100 + r.below(80) : r.below(50);
  const DType types[] = {DType::float32, DType::bfloat16, DType::float16};
  p.x_type = types[r.below(3)];
  p.v_type = r.below(2) ? p.x_type : types[r.below(3)];
  if (r.below(4) == 0) p.params.precision = Precision::bfloat16;
  p.params.normalize = r.below(2) ? Normalize::agents : Normalize::history;
  p.with_mean_x = r.below(2);
  if (r.below(6) == 0) p.values = 0;
  p.with_tokens = p.values && Random(seed + 4000).below(8);
  p.narrow = r.below(2);
  p.x = rounded(uniform(r, p.rows * p.width), p.x_type);
  p.v = rounded(uniform(r, p.rows * p.values), p.v_type);
  p.prototypes = uniform(r, b * p.agents * p.width);
  const float tau = 0.05f * static_cast<float>(p.width);
  p.temperature.assign(r.below(2) ? size(p.agents) : 1, tau);
  for (float& t : p.temperature) t *= 1 + 0.5f * r.uniform();
  if (p.temperature.empty()) p.temperature = {tau};
  if (r.below(3) == 0) p.temperature[size(r.below(static_cast<int64_t>(p.temperature.size())))] = r.below(2) ? NAN : 0;
  p.reach = static_cast<float>(p.width) * 4 * (1 / 3.f) * 2 / (tau / 2);
  if (r.below(2)) {
    p.bias = uniform(r, p.rows, 3);
    for (float& y : p.bias)
      if (r.below(9) == 0) y = r.below(2) ? NAN : -INFINITY;
  }
  if (r.below(2))
    for (int64_t i = 0; i < b; ++i) p.count.push_back(static_cast<int32_t>(r.below(p.agents + 4) - 1));
  if (r.below(2)) {
    p.book = std::make_shared<Codebook>(codebook(r, {7, 5}, p.width));
    for (int64_t i = 0; i < p.rows; ++i)
      for (int64_t c : {7, 5}) p.codes.push_back(static_cast<int32_t>(r.below(12) ? r.below(c) : r.below(2) ? -1 : c));
  }
  for (int64_t i = 0; i < p.rows && p.width; ++i)  // rows to be selected away
    if (r.below(11) == 0) {
      if (p.values && r.below(3) == 0) p.v[size(i * p.values + r.below(p.values))] = r.below(2) ? NAN : -INFINITY;
      p.x[size(i * p.width + r.below(p.width))] = p.x_type == DType::float16 ? NAN : r.below(2) ? INFINITY : 2e15f;
    }
  return p;
}

/// The table becomes shorter; ids of its rows, some of them of none.
inline std::vector<int64_t> shuffle_rows(Random& r, const Problem& p, int64_t width, std::vector<float>* table) {
  const int64_t rows = std::min(1 + p.rows / 2, p.rows),
                none[] = {-1, rows, p.narrow ? 0x7fffffff : INT64_MAX, p.narrow ? -0x80000000ll : int64_t{5} << 32};
  table->resize(size(rows * width));
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < p.rows; ++i) ids.push_back(r.below(9) ? r.below(rows) : none[r.below(4)]);
  return ids;
}

/// Ids of x and codes, which become shorter.
inline void shuffle_items(Random& r, Problem& p) {
  std::vector<float> none;
  p.x_ids = shuffle_rows(r, p, p.width, p.codes_only ? &none : &p.x);
  if (p.book) p.codes.resize(size(items(p) * p.book->levels()));
}

/// The same behaviours as a service keeps them: tables and ids, int8, codes alone, spreads.
inline void gather(uint64_t seed, Problem& p) {
  Random r(seed + 1000);
  if (r.below(3) == 0) {
    p.spread = uniform(r, p.rows);
    for (float& y : p.spread) y = r.below(12) ? std::fabs(y) : r.below(3) ? -y - 0.01f : r.below(2) ? NAN : INFINITY;
    p.reach += 1 / (0.025f * static_cast<float>(p.width));
  }
  p.codes_only = !p.codes.empty() && r.below(2);
  if (p.codes_only) {
    p.x.clear();
    p.x_type = DType::float32;
    if (r.below(2)) shuffle_items(r, p);
  } else {
    if (r.below(2)) shuffle_items(r, p);
    if (r.below(3) == 0) {
      p.x_type = DType::int8;
      for (float& y : p.x) y = std::isfinite(y) ? std::nearbyint(std::max(std::min(127 * y, 127.f), -128.f)) : -128.f;
      if (const int64_t kind = r.below(3)) p.scale = uniform(r, kind == 1 ? 1 : table(p.x, p.width));
      for (float& y : p.scale) y = p.scale.size() > 1 && r.below(12) == 0 ? NAN : (1 + 0.5f * y) / 127;
      if (p.scale.empty()) {  // far apart, and as warm
        for (float& y : p.prototypes) y *= 127;
        for (float& y : p.temperature) y *= 127 * 127;
        for (float& y : p.spread) y *= 127 * 127;
      }
      p.reach *= 3;
    }
  }
  if (p.values && r.below(2)) p.v_ids = shuffle_rows(r, p, p.values, &p.v);
}

/// Codes for those problems that have none, of few leaves now and then: some of so many rows that a block sums them.
inline void add_codes(uint64_t seed, Problem& p) {
  Random r(seed + 2000);
  const std::vector<std::vector<int64_t>> sizes = {{7, 5}, {2, 2}, {1}, {300, 300, 300}};
  const std::vector<int64_t>& levels = sizes[size(r.below(4))];
  p.book = std::make_shared<Codebook>(codebook(r, levels, p.width));
  p.codes.clear();
  for (int64_t i = 0; i < items(p); ++i)
    for (int64_t c : levels)
      p.codes.push_back(static_cast<int32_t>(r.below(15)
                                                 ? r.below(std::min<int64_t>(c, 9)) * (c / std::min<int64_t>(c, 9))
                                             : r.below(2) ? -1
                                                          : c));
  p.weights = random_weights(r, p.rows);
}

/// The same with every row where its behaviour is, as float32 or its own type.
inline Problem copied(const Problem& p) {
  Problem q = p;
  q.x.clear();
  q.v.clear();
  q.x_ids.clear();
  q.v_ids.clear();
  q.scale.clear();
  q.codes.clear();
  q.codes_only = false;
  if (p.x_type == DType::int8) q.x_type = DType::float32;
  q.bias.resize(size(p.rows));
  const int64_t levels = p.book ? p.book->levels() : 0, v_rows = table(p.v, p.values);
  for (int64_t i = 0; i < p.rows; ++i) {
    const int64_t x = p.x_ids.empty() ? i : p.x_ids[size(i)], v = p.v_ids.empty() ? i : p.v_ids[size(i)];
    const bool has_x = x >= 0 && x < items(p), has_v = !p.values || (v >= 0 && v < v_rows);
    if (!has_x || !has_v) q.bias[size(i)] = NAN;
    for (int64_t d = 0; d < p.values; ++d) q.v.push_back(has_v ? p.v[size(v * p.values + d)] : NAN);
    std::vector<float> row(size(p.width));
    for (int64_t l = 0; l < levels; ++l) q.codes.push_back(has_x ? p.codes[size(x * levels + l)] : -1);
    if (p.codes_only) p.book->prototype(q.codes.data() + i * levels, row.data());
    const float scale = p.scale.empty() || !has_x ? 1 : p.scale[p.scale.size() == 1 ? 0 : size(x)];
    for (int64_t d = 0; d < p.width; ++d)
      q.x.push_back(p.codes_only ? row[size(d)] : has_x ? p.x[size(x * p.width + d)] * scale : 0);
  }
  return q;
}

inline double norm_of(const float* p, int64_t n) {
  double sum = 0;
  for (int64_t d = 0; d < n; ++d) sum += double(p[d]) * p[d];
  return sum;
}

/// Whether a behaviour is present, of a problem whose rows are where their behaviours are.
inline bool is_present(const Problem& p, int64_t i) {
  const double spread = p.spread.empty() ? 0 : double(p.spread[size(i)]);
  bool here = norm_of(&p.x[size(i * p.width)], p.width) < 0x1p100 && spread >= 0 && std::isfinite(spread) &&
              (p.bias.empty() || std::isfinite(p.bias[size(i)]));
  for (int l = 0, levels = p.codes.empty() ? 0 : p.book->levels(); l < levels; ++l) {
    const int32_t code = p.codes[size(i * levels + l)];
    here = here && code >= 0 && code < p.book->size(l);
  }
  return here;
}

/// A problem's arrays, of their exact sizes; histories that do not overlap as ragged offsets.
class Held {
 public:
  Held(const Problem& p, bool clamp)
      : starts_(offsets(p, clamp, false)),
        ends_(offsets(p, clamp, true)),
        x_(encoded(p.x, p.x_type)),
        v_(encoded(p.v, p.v_type)),
        starts(starts_),
        ends(ends_),
        x_ids(p.x_ids),
        v_ids(p.v_ids),
        narrow_starts(narrowed(starts_)),
        narrow_ends(narrowed(ends_)),
        narrow_x_ids(narrowed(p.x_ids)),
        narrow_v_ids(narrowed(p.v_ids)) {
    const DType type = p.narrow ? DType::int32 : DType::int64;
    const auto array = [&](Guarded<int64_t>& wide, Guarded<int32_t>& narrow, int64_t offset) {
      return p.narrow ? static_cast<void*>(narrow.data() + offset) : static_cast<void*>(wide.data() + offset);
    };
    in.x = {p.codes_only ? nullptr : x_.data(), p.x_type, table(p.x, p.width), p.width};
    if (p.values) in.v = {v_.data(), p.v_type, table(p.v, p.values), p.values};
    in.offsets = {array(starts, narrow_starts, 0),
                  ends_.empty() ? array(starts, narrow_starts, 1) : array(ends, narrow_ends, 0), type, users(p)};
    agents.prototypes = {p.prototypes.data(), {users(p), p.agents, p.width}};
    if (!p.scale.empty()) in.x_scale = {p.scale.data(), {static_cast<int64_t>(p.scale.size())}};
    if (!p.spread.empty()) in.spread = {p.spread.data(), {p.rows}};
    if (!p.count.empty()) agents.count = {p.count.data(), {users(p)}};
    if (!p.bias.empty()) in.bias = {p.bias.data(), {p.rows}};
    if (!p.x_ids.empty()) in.x_ids = {array(x_ids, narrow_x_ids, 0), type, p.rows};
    if (!p.v_ids.empty()) in.v_ids = {array(v_ids, narrow_v_ids, 0), type, p.rows};
    if (!p.own.empty()) agents.codes = {p.own.data(), {users(p), p.agents, 2}};
    if (!p.book) return;
    const int64_t lists = users(p) * p.book->size(0);
    if (!p.lists.empty())
      agents.lists = {p.lists.data(), {users(p), p.book->size(0), static_cast<int64_t>(p.lists.size()) / lists}};
    in.codes = {p.codes.data(), {items(p), p.book->levels()}};
    in.weights = p.weights.array();
    book = p.book.get();
  }

  const Codebook* book = nullptr;
  Histories in;
  RouteAgents agents;

 private:
  static std::vector<int32_t> narrowed(const std::vector<int64_t>& a) { return {a.begin(), a.end()}; }
  /// starts; or ends, none of ragged ones. Clamped, for the CPU, which refuses others.
  static std::vector<int64_t> offsets(const Problem& p, bool clamp, bool ends) {
    std::vector<int64_t> starts = p.starts, limits = p.ends;
    bool ragged = true;
    for (size_t i = 0; i < starts.size(); ++i) {
      if (clamp) limits[i] = std::min(std::max(starts[i], limits[i]), p.rows);
      ragged = ragged && (i == 0 || starts[i] == limits[i - 1]);
    }
    if (ragged && !limits.empty()) starts.push_back(limits.back());
    if (ragged) limits.clear();
    return ends ? limits : starts;
  }

  std::vector<int64_t> starts_, ends_;
  Guarded<std::byte> x_, v_;
  Guarded<int64_t> starts, ends, x_ids, v_ids;
  Guarded<int32_t> narrow_starts, narrow_ends, narrow_x_ids, narrow_v_ids;
};

/// verb(held, params, out); every result of its exact size.
template <class Verb>
Result run(const Problem& p, bool clamp, Verb verb) {
  const int64_t m = p.agents, b = users(p);
  Held held(p, clamp);
  Guarded<std::byte> tokens(p.with_tokens ? b * m * p.values * bytes_of(p.v_type) : 0);
  Guarded<float> lse(b * m), mean_x(p.with_mean_x ? b * m * p.width : 0), temperature(p.temperature);
  RouteParams params = p.params;
  params.temperature = {temperature.data(), {temperature.count()}};
  Tokens out{{}, {lse.data(), {b, m}}};
  if (p.with_tokens) out.tokens = {tokens.data(), p.v_type, b * m, p.values};
  if (p.with_mean_x) out.mean_x = {mean_x.data(), {b, m, p.width}};
  const Status status = verb(held, params, out);
  if (!status.ok()) fail("%s", status.what());
  if (!tokens.intact() || !lse.intact() || !mean_x.intact()) fail("a result's end was overwritten");
  return {decoded(tokens.values(), p.v_type), lse.values(), mean_x.values()};
}

/// The longest history, as it is clamped.
/// Behaviours of all histories; one that several have counts for each.
inline int64_t all_rows(const Problem& p) {
  int64_t n = 0;
  for (size_t i = 0; i < p.starts.size(); ++i) n += std::max<int64_t>(0, std::min(p.ends[i], p.rows) - p.starts[i]);
  return n;
}

/// The gradient of a table, of `listed` rows or all, from that of each behaviour's row; without ids as it is.
template <class T>
std::vector<T> in_table(const std::vector<T>& rows, const std::vector<int64_t>& ids, int64_t table, int64_t width,
                        const std::vector<int64_t>& listed) {
  if (ids.empty() || rows.empty()) return rows;
  std::vector<T> found;
  const int64_t n = listed.empty() ? table : static_cast<int64_t>(listed.size());
  for (int64_t r = 0; r < n; ++r)
    for (int64_t d = 0; d < width; ++d) {
      const int64_t row = listed.empty() ? r : listed[size(r)];
      double sum = 0;
      for (size_t i = 0; i < ids.size() && row >= 0 && row < table; ++i)
        if (ids[i] == row) sum += double(rows[i * size(width) + size(d)]);
      found.push_back(static_cast<T>(sum));
    }
  return found;
}

/// Rows of a table of so many: none, so that all are wanted, or some of them and of none.
inline std::vector<int64_t> some_rows(Random& r, int64_t table) {
  std::vector<int64_t> rows;
  for (int64_t n = r.below(2) ? 0 : 1 + r.below(20); n > 0; --n) rows.push_back(r.below(table + 3) - 1);
  return rows;
}

inline int64_t longest(const Problem& p) {
  int64_t n = 0;
  for (size_t i = 0; i < p.starts.size(); ++i) n = std::max(n, std::min(p.ends[i], p.rows) - p.starts[i]);
  return n;
}

inline size_t image_bytes(const Problem& p) { return static_cast<size_t>(p.book->image().shape[0]); }
/// Those of the codebook's image, where it is needed.
inline size_t image_size(const Problem& p) {
  return p.codes_only || (p.params.sparse && p.lists.empty()) ? image_bytes(p) : 0;
}

inline Context context_of(const Problem& p, Workspace& workspace, Workspace& image) {
  Context context{workspace.array(), nullptr, Device::cuda};
  const Array<std::byte, 1> bytes = image.array();
  if (bytes.shape[0] == 0) return context;
  std::memcpy(bytes.data, p.book->image().data, image_bytes(p));
  context.codebook_image = {bytes, p.book->fingerprint()};
  return context;
}

inline Result on_cpu(const Problem& p) {
  return run(p, true, [](const Held& h, const RouteParams& params, const Tokens& out) {
    Workspace workspace(route_workspace(test::sizing(1), h.book, params, h.in, h.agents, out));
    return hisac::route({workspace.array(), nullptr}, h.book, params, h.in, h.agents, out);
  });
}

inline Result on_cuda(const Problem& p) {
  return run(p, false, [&](const Held& h, const RouteParams& params, const Tokens& out) {
    Workspace workspace(cuda::route_workspace({}, h.book, params, h.in, h.agents, out));
    Workspace image(image_size(p));
    const Context context = context_of(p, workspace, image);
    const Status status = cuda::route(context, h.book, params, h.in, h.agents, out);
    if (!workspace.intact()) fail("the workspace's end was overwritten");
    return status;
  });
}

/// The same bits as `sound` for another order of threads and number of processors; and for rows copied, where some
/// are gathered.
template <class P, class R, class Run>
void check_bits(const P& p, const R& sound, Run run_on_cuda) {
  const simt::Options kept = simt::options;
  simt::options.order = simt::Order::random;
  simt::options.seed += 17;
  simt::options.machine.processors = 5;  // other cuts of the histories
  if (!(run_on_cuda(p) == sound)) fail("other bits for another order of threads and number of processors");
  simt::options.machine.shared = 512 << 10;  // as many agents a block, whatever the type of x
  if (p.gathered() && !(run_on_cuda(p) == run_on_cuda(copied(p)))) fail("other bits for rows copied");
  simt::options = kept;
}

inline void compare(const Problem& p, const Result& cpu, const Result& cuda) {
  // of a logit: split products, the norms' rounding, exp2; and of a sum: split weights and values, float32 sums
  const float part = p.params.precision == Precision::bfloat16 ? 0x1p-8f : 0x1p-16f;
  const float e = p.reach * (2 * part + static_cast<float>(p.width) * 0x1p-22f) + 3 * 0x1p-20f;
  const float type = p.v_type == DType::bfloat16 ? 0x1p-7f : p.v_type == DType::float16 ? 0x1p-10f : 0;
  const float mean = 2 * (std::exp(4 * e) - 1) + 4 * part + 1e-5f, lse = 2 * e + 1e-5f;
  const auto within = [](const char* what, const std::vector<float>& a, const std::vector<float>& b, float bound,
                         float share) {
    for (size_t i = 0; i < a.size(); ++i)
      // an infinite v of a present row: what is left depends on the parts of both
      if (!(a[i] == b[i] || std::fabs(a[i] - b[i]) <= bound + std::fabs(a[i]) * share ||
            (!(std::fabs(a[i]) < 1e20f) && !std::isfinite(b[i]) && std::strcmp(what, "token") == 0)))
        fail("%s %zu: %g, expected %g within %g", what, i, double(b[i]), double(a[i]), double(bound));
  };
  within("lse", cpu.lse, cuda.lse, lse, 1e-5f);
  within("token", cpu.tokens, cuda.tokens, mean + type, 0);
  within("mean x", cpu.mean_x, cuda.mean_x, mean * largest_x(p), 0);
}

}  // namespace test
