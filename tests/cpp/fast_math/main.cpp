// SPDX-License-Identifier: Apache-2.0
// What verbs return for NaN, infinities, zeros of both signs, subnormals and ordinary numbers, in bits.
//
//   main write FILE     keeps them
//   main compare FILE   exits with 1 and names what differs
//
// Compiled with -ffast-math itself, so it compares no floats.
#include <cfenv>
#include <cstdio>
#include <string>

#include "support.h"

using namespace hisac;

namespace {

constexpr int64_t kRows = 3000, kWidth = 20, kUsers = 3, kBudget = 16, kValues = 12;

struct Results {
  std::vector<std::string> lines;
  template <class T>
  void add(const char* name, const Status& status, const std::vector<T>& values) {
    uint64_t hash = 0xcbf29ce484222325u;
    const auto* const bytes = reinterpret_cast<const unsigned char*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); ++i) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    lines.push_back(name + (" " + std::to_string(hash)) + (status.ok() ? "" : std::string(" ") + status.what()));
  }
};

void set(std::vector<float>& x, size_t i, uint32_t bits) { std::memcpy(&x[i], &bits, sizeof bits); }

template <class Verb>
Status call(size_t bytes, Verb verb) {
  test::Workspace workspace(static_cast<size_t>(bytes));
  return verb(Context{workspace.array()});
}

Results results() {
  Results out;
  test::Random random(22);
  const auto first = test::uniform(random, 16 * kWidth), second = test::uniform(random, 8 * kWidth);
  const Array<const float, 2> centers[] = {test::matrix(first, 16, kWidth), test::matrix(second, 8, kWidth)};
  Codebook book, none;
  out.add("build", Codebook::build(centers, 2, &book), std::vector<uint64_t>{book.fingerprint()});
  for (uint32_t bits : {0x7fc00000u, 0x7f800000u, 0xff800000u}) {
    auto bad = first;
    set(bad, 5, bits);
    const Array<const float, 2> array[] = {test::matrix(bad, 16, kWidth)};
    out.add("build of one not finite", Codebook::build(array, 1, &none), std::vector<int>{});
  }

  auto x = test::uniform(random, kRows * kWidth), v = test::uniform(random, kRows * kValues),
       bias = test::uniform(random, kRows);
  const uint32_t special[] = {0x7fc00000u, 0x7f800000u, 0xff800000u, 0x80000000u, 0x00000001u, 0x7f7fffffu};
  for (size_t i = 0; i < 6; ++i) set(x, (i * 400 + 7) * size_t{kWidth} + i, special[i]);
  for (size_t i = 0; i < 3; ++i) set(bias, i * 900 + 1, special[2 + i]);
  const std::vector<int64_t> offsets{0, 1000, 1000, kRows};
  std::vector<int32_t> codes(kRows * 2);
  out.add("encode",
          call(encode_workspace({}, book),
               [&](const Context& c) { return encode(c, book, test::rows(x, kWidth), {codes.data(), {kRows, 2}}); }),
          codes);

  VoteParams voting;
  voting.budget = kBudget;
  std::vector<int32_t> kept(kUsers * kBudget * 2), count(kUsers);
  std::vector<int64_t> votes(kUsers * kBudget);
  Histories in;
  in.x = test::rows(x, kWidth);
  in.v = test::rows(v, kValues);
  in.offsets = test::spans(offsets);
  in.codes = {codes.data(), {kRows, 2}};
  in.bias = {bias.data(), {kRows}};
  std::vector<float> shares(kRows);
  std::vector<int64_t> whole(kRows);
  for (size_t i = 0; i < kRows; ++i) {
    set(shares, i, static_cast<uint32_t>(random.bits() >> (i < 1000 ? 41 : 33)));  // the first user's are subnormal
    whole[i] = static_cast<int64_t>(random.bits()) >> random.below(64);
  }
  for (size_t i = 0; i < 6; ++i) set(shares, i * 200 + 1003, special[i]);
  const Weights weights[] = {{shares.data(), DType::float32, kRows}, {whole.data(), DType::int64, kRows}, {}};
  for (const Weights& of_rows : weights) {
    in.weights = of_rows;
    const Status voted = call(vote_workspace({}, book, voting, in), [&](const Context& c) {
      return vote(c, book, voting, in,
                  {{kept.data(), {kUsers, kBudget, 2}}, {votes.data(), {kUsers, kBudget}}, {count.data(), {kUsers}}});
    });
    out.add("vote", voted, kept);
    out.add("votes", {}, votes);
  }
  std::vector<float> prototypes(kUsers * kBudget * kWidth);
  out.add(
      "prototypes",
      code_prototypes({}, book, {kept.data(), {kUsers * kBudget, 2}}, {prototypes.data(), {kUsers * kBudget, kWidth}}),
      prototypes);

  std::vector<float> absent(kRows);
  out.add("missing",
          call(missing_workspace({}, &book, in),
               [&](const Context& c) { return missing(c, &book, in, {absent.data(), {kRows}}); }),
          absent);
  std::vector<float> sum_x(kRows * kWidth), sum_v(kRows * kValues), sum_bias(kRows), sum_spread(kRows),
      dv(kRows * kValues), dbias(kRows);
  std::vector<int64_t> sum_offsets(kUsers + 1), sum_votes(kRows);
  std::vector<int32_t> sum_codes(kRows * 2);
  const LeafSums sums{{sum_x.data(), {kRows, kWidth}},
                      {sum_v.data(), {kRows, kValues}},
                      {sum_offsets.data(), sum_offsets.data() + 1, kUsers},
                      {sum_codes.data(), {kRows, 2}},
                      {sum_bias.data(), {kRows}},
                      {sum_spread.data(), {kRows}},
                      {sum_votes.data(), {kRows}}};
  in.weights = weights[0];
  const Status summed =
      call(leaf_sums_workspace({}, book, in), [&](const Context& c) { return leaf_sums(c, book, in, sums); });
  out.add("leaf_sums", summed, sum_x);
  out.add("their spread", {}, sum_spread);
  out.add("their votes", {}, sum_votes);
  const LeafSumsForward forward{sums.histories(),
                                {sum_x.data(), {kRows, kWidth}},
                                {sum_v.data(), {kRows, kValues}},
                                {sum_bias.data(), {kRows}},
                                {sum_bias.data(), {kRows}}};
  const LeafSumsGradients back{{dv.data(), {kRows, kValues}}, {dbias.data(), {kRows}}};
  out.add("leaf_sums_backward",
          call(leaf_sums_backward_workspace({}, book, in, back),
               [&](const Context& c) { return leaf_sums_backward(c, book, in, forward, back); }),
          dbias);

  for (size_t i = 0; i < 3; ++i) set(x, (i * 400 + 7) * size_t{kWidth} + i, special[3]);  // route's x is finite
  for (Normalize normalize : {Normalize::history, Normalize::agents}) {
    const float temperature = 0.3f;
    RouteParams routing;
    routing.normalize = normalize;
    routing.temperature = {&temperature, {1}};
    const RouteAgents agents{{prototypes.data(), {kUsers, kBudget, kWidth}}, {count.data(), {kUsers}}};
    std::vector<float> tokens(kUsers * kBudget * kValues), lse(kUsers * kBudget), mean_x(kUsers * kBudget * kWidth),
        scored(kUsers * kValues), total(kUsers);
    const Tokens returned{{tokens.data(), DType::float32, kUsers * kBudget, kValues},
                          {lse.data(), {kUsers, kBudget}},
                          {mean_x.data(), {kUsers, kBudget, kWidth}}};
    out.add("route",
            call(route_workspace({}, nullptr, routing, in, agents, returned),
                 [&](const Context& c) { return route(c, nullptr, routing, in, agents, returned); }),
            tokens);
    out.add("lse", {}, lse);
    out.add("mean_x", {}, mean_x);
    const std::vector<int64_t> each{0, 1, 2, 3};
    const auto q = test::uniform(random, kUsers * kValues);
    AttendInputs to{test::rows(q, kValues),
                    test::rows(tokens, kValues),
                    test::rows(tokens, kValues),
                    kBudget,
                    1,
                    test::spans(each),
                    {},
                    0.5f};
    to.bias = {lse.data(), {kUsers, kBudget}};
    out.add("attend",
            call(attend_workspace({}, to),
                 [&](const Context& c) {
                   return attend(c, to,
                                 {{scored.data(), DType::float32, kUsers, kValues}, {total.data(), {kUsers, 1}}});
                 }),
            scored);
  }
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::fesetenv(
      FE_DFL_ENV);  // linked with -ffast-math, a program begins with subnormals as zero; that is its own choice
  std::string text;
  for (const std::string& line : results().lines) text += line + "\n";
  const bool compare = argv[1] == std::string("compare");
  std::FILE* const file = std::fopen(argv[2], compare ? "rb" : "wb");
  if (!file) return 2;
  bool ok = true;
  if (compare) {
    std::string kept(1 << 16, 0);
    kept.resize(std::fread(kept.data(), 1, kept.size(), file));
    ok = kept == text;
    if (!ok) std::printf("expected\n%sgot\n%s", kept.c_str(), text.c_str());
  } else {
    ok = std::fwrite(text.data(), 1, text.size(), file) == text.size();
  }
  return std::fclose(file) == 0 && ok ? 0 : 1;
}
