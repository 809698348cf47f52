// SPDX-License-Identifier: Apache-2.0
// What the fuzzing of verbs shares: codes, users and ids drawn from the input's bytes.
#pragma once
#include <cmath>

#include "fuzz.h"
#include "fuzz_outputs.h"

namespace fuzz {

using namespace hisac;
using test::Guarded;

constexpr DType kTypes[] = {DType::float32, DType::bfloat16, DType::float16};

inline double largest(const std::vector<float>& values) {
  double out = 0;
  for (float x : values) out = std::max(out, std::fabs(double(x)));
  return out;
}

/// The length of the longest row.
inline double longest_of(const float* values, int64_t rows, int64_t width) {
  double out = 0;
  for (int64_t i = 0; i < rows; ++i) {
    double square = 0;
    for (int64_t d = 0; d < width; ++d) square += double(values[i * width + d]) * double(values[i * width + d]);
    out = std::max(out, square);
  }
  return std::sqrt(out);
}

struct Codes {
  Codebook book;
  int64_t rows, levels;
  std::vector<float> x;
  std::vector<int32_t> codes;
};

struct Users {
  std::vector<int64_t> starts, ends;
  int64_t longest() const {
    int64_t most = 0;
    for (size_t b = 0; b < starts.size(); ++b) most = std::max(most, ends[b] - starts[b]);
    return most;
  }
  int64_t rows() const {
    int64_t all = 0;
    for (size_t b = 0; b < starts.size(); ++b) all += ends[b] - starts[b];
    return all;
  }
  Spans spans() const { return {starts.data(), ends.data(), DType::int64, static_cast<int64_t>(starts.size())}; }
};

/// Ids [T] into a table of so many rows, some of them outside, in exact-size memory.
struct SomeIds {
  Guarded<int32_t> narrow;
  Guarded<int64_t> wide;
  bool is_wide;

  SomeIds(Bytes& in, int64_t count, int64_t size) : narrow(count), wide(count), is_wide(in.flag()) {
    const int64_t step = in.between(1, 7), start = in.byte();
    const int64_t odd[] = {-1, size, INT64_MIN, INT64_MAX, int64_t{1} << 32, -(int64_t{1} << 31)};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t id = i % 16 == start % 16 ? odd[i % 6] : size ? (start + i * step) % size : 0;
      wide.data()[i] = id;
      narrow.data()[i] = static_cast<int32_t>(id);
    }
  }
  Ids ids() {
    if (is_wide) return {wide.data(), DType::int64, wide.count()};
    return {narrow.data(), DType::int32, narrow.count()};
  }
};

/// Rows of the gradient of x or v: one a behaviour, or of a table all, or those that are listed.
struct TableRows {
  Guarded<int64_t> some;
  Ids listed;
  int64_t count;
  double most = 1;  // behaviours of all histories that one row sums up, and the rounding of the sum

  TableRows(Bytes& in, const Histories& histories, const Ids& ids, int64_t table)
      : some(ids && in.flag() ? in.between(0, 9) : 0), count(ids ? table : histories.behaviours()) {
    if (ids) most = 2 * double(histories.behaviours()) + 1;
    if (!some.count()) return;
    for (int64_t i = 0; i < some.count(); ++i) some.data()[i] = in.byte() % 8 ? in.byte() % (table + 1) : INT64_MIN;
    listed = {some.data(), DType::int64, some.count()};
    count = some.count();
  }
};

/// Weights [T], float32, int64 or none, in exact-size memory.
struct SomeWeights {
  int64_t count;
  uint8_t kind;
  Guarded<float> floats;
  Guarded<int64_t> whole;

  SomeWeights(Bytes& in, int64_t n, bool hostile)
      : count(n),
        kind(in.byte() % 3),
        floats(kind == 1 ? in.values(n, hostile) : std::vector<float>{}),
        whole(kind == 2 ? in.integers(n, hostile) : std::vector<int64_t>{}) {}
  Weights weights() {
    if (kind == 0) return {};
    if (kind == 1) return {floats.data(), DType::float32, count};
    return {whole.data(), DType::int64, count};
  }
};

/// What vote says of histories, by one worker.
struct Voted {
  std::vector<int32_t> agents, count;
  std::vector<int64_t> votes;

  Voted(const Codebook& book, const VoteParams& params, const Histories& in) {
    const int64_t n = in.offsets.users, m = seats(params, book.levels()), levels = book.levels();
    Guarded<int32_t> to_agents(n * m * levels), to_count(n);
    Guarded<int64_t> to_votes(n * m);
    CHECK(test::exactly(vote_workspace(test::sizing(1), book, params, in), nullptr, [&](const Context& context) {
      return vote(context, book, params, in,
                  {{to_agents.data(), {n, m, levels}}, {to_votes.data(), {n, m}}, {to_count.data(), {n}}});
    }));
    CHECK(to_agents.intact() && to_count.intact() && to_votes.intact());
    agents = to_agents.values();
    count = to_count.values();
    votes = to_votes.values();
  }
  bool operator==(const Voted& o) const { return agents == o.agents && count == o.count && votes == o.votes; }
};

/// leaf_sums, missing, route, their backwards.
void route_some(Bytes& in, const Codes& c, const Users& u, bool hostile);

/// match and its backward.
void match_some(Bytes& in, bool hostile);

}  // namespace fuzz
