// SPDX-License-Identifier: Apache-2.0
// A context on CUDA: refused before enable_cuda and by `fit`, shapes checked first, then the limits that
// hisac/cuda.h names, then on the device's kernels: by `code_prototypes` and `compress`, whose own test this is; the
// other verbs come this way in tests/cuda/test_cuda.py.
#include "hisac/compress.h"
#include "hisac/cuda.h"
#include "simt_test.h"

namespace {

using namespace hisac;
using test::Random;

const Context on_device{{}, nullptr, Device::cuda, nullptr, {}};

void expect(const Status& status, Code code, const char* text) {
  if (status.code() != code || std::string(status.what()) != text)
    test::fail("got %s, expected %s", status.what(), text);
}

template <class Call>
void reaches_the_device(const char* verb, Call call) {
  test::name("%s", verb);
  const int64_t before = simt::counts.launches;
  const Status status = call();
  if (!status.ok()) test::fail("%s", status.what());
  if (simt::counts.launches == before) test::fail("no kernel ran");
}

/// Everything that a verb on CUDA refuses before it looks at an array.
void expect_limits() {
  constexpr int64_t kMany = (int64_t{1} << 30) + 1, kLong = int64_t{1} << 31;
  float number[1] = {1};
  int64_t offsets[2] = {0, 3};
  int32_t code[1] = {};
  Random r(0);
  const Codebook book = test::codebook(r, {1}, 4);
  const Array<const int32_t, 2> codes{code, {3, 1}};
  RouteParams params;
  params.temperature = {number, {1}};
  Histories in;  // B 1, T 3, D 4, V 5
  in.x = {number, DType::float32, 3, 4};
  in.v = {number, DType::float32, 3, 5};
  in.offsets = {offsets, offsets + 1, DType::int64, 1};
  const RouteAgents agents{{number, {1, 2, 4}}, {}};  // M 2
  const auto forward = [&](const Codebook* used, const Histories& h, const RouteAgents& to) {
    const int64_t users = h.offsets.users, m = to.prototypes.shape[1];
    return route(on_device, used, params, h, to,
                 {{nullptr, DType::float32, users * m, h.v.width}, {nullptr, {users, m}}, {}});
  };

  test::name("limits of route");
  Histories wide = in;
  RouteAgents wide_agents = agents;
  wide.x.width = wide_agents.prototypes.shape[2] = 4097;
  expect(forward(nullptr, wide, wide_agents), Code::not_implemented, "route: expected D up to 4096 on CUDA, got 4097");
  Histories many = in;
  many.offsets.users = kMany;
  expect(forward(nullptr, many, {{number, {kMany, 0, 4}}, {}}), Code::not_implemented,
         "route: expected B up to 2^30 and T below 2^31 on CUDA, got 1073741825 and 3");
  Histories long_one = in;
  long_one.x.rows = long_one.v.rows = kLong;
  expect(forward(nullptr, long_one, agents), Code::not_implemented,
         "route: expected B up to 2^30 and T below 2^31 on CUDA, got 1 and 2147483648");
  Histories by_code = in;
  by_code.x = {};
  by_code.codes = codes;
  expect(forward(&book, by_code, agents), Code::invalid_argument,
         "route: context.codebook_image expected [1920] on CUDA, got [0]");
  Histories coded = in;
  coded.codes = codes;
  const RouteAgents coded_agents{agents.prototypes, {}, {code, {1, 2, 1}}};
  params.sparse = 1;
  expect(forward(&book, coded, coded_agents), Code::invalid_argument,
         "route: context.codebook_image expected [1920] on CUDA, got [0]");
  params.sparse = 0;
  expect(agent_lists(on_device, book, agents, {code, {1, 1, 1}}), Code::invalid_argument,
         "agent_lists: context.codebook_image expected [1920] on CUDA, got [0]");

  test::name("limits of route_backward and missing");
  const auto backward = [&](const Histories& h, const RouteAgents& to) {
    const int64_t users = h.offsets.users, m = to.prototypes.shape[1];
    const Rows rows{nullptr, DType::float32, users * m, h.v.width};
    return route_backward(on_device, nullptr, params, h, to, {rows, {nullptr, {users, m}}, {}, rows, {}, {}}, {});
  };
  expect(backward(wide, wide_agents), Code::not_implemented, "route_backward: expected D up to 4096 on CUDA, got 4097");
  wide = in;
  wide.v.width = 4097;
  expect(backward(wide, agents), Code::not_implemented, "route_backward: expected V up to 4096 on CUDA, got 4097");
  expect(backward(long_one, agents), Code::not_implemented,
         "route_backward: expected B up to 2^30 and T below 2^31 on CUDA, got 1 and 2147483648");
  expect(missing(on_device, nullptr, long_one, {number, {kLong}}), Code::not_implemented,
         "missing: expected B up to 2^30 and T below 2^31 on CUDA, got 1 and 2147483648");

  test::name("limits of leaf_sums, vote, encode and prototypes");
  long_one.codes = {code, {kLong, 1}};
  int64_t spans[2];
  const LeafSums sums{{nullptr, {0, 4}}, {nullptr, {0, 5}}, {spans, spans + 1, 1}, {nullptr, {0, 1}}, {}, {}, {}};
  expect(leaf_sums(on_device, book, long_one, sums), Code::not_implemented,
         "leaf_sums: expected B up to 2^30 and T below 2^31 on CUDA, got 1 and 2147483648");
  expect(leaf_sums_backward(on_device, book, long_one, {sums.histories(), {}, {}, {}, {}}, {}), Code::not_implemented,
         "leaf_sums_backward: expected B up to 2^30 and T below 2^31 on CUDA, got 1 and 2147483648");
  VoteParams budget;
  budget.budget = 1;
  many.codes = codes;
  expect(vote(on_device, book, budget, many, {{nullptr, {kMany, 1, 1}}, {nullptr, {kMany, 1}}, {nullptr, {kMany}}}),
         Code::not_implemented, "vote: expected B up to 2^30 on CUDA, got 1073741825");
  expect(encode(on_device, book, in.x, {code, {3, 1}}), Code::invalid_argument,
         "encode: context.codebook_image expected [1920] on CUDA, got [0]");
  expect(code_prototypes(on_device, book, codes, {number, {3, 4}}), Code::invalid_argument,
         "prototypes: context.codebook_image expected [1920] on CUDA, got [0]");

  test::name("offsets that lie on the device are not read by the host");
  const int64_t* const elsewhere = reinterpret_cast<const int64_t*>(uintptr_t{4096});
  AttendInputs two{{number, DType::float32, 3, 4},
                   {number, DType::float32, 4, 4},
                   {number, DType::float32, 4, 4},
                   2,
                   1,
                   {elsewhere, elsewhere + 1, DType::int64, 2},
                   {}};
  if (!std::strstr(attend(on_device, two, {{nullptr, DType::float32, 3, 4}, {nullptr, {3, 1}}}).what(),
                   "workspace expected at least"))
    test::fail("attend did not get as far as its workspace");

  test::name("limits of match");
  MatchInputs matching;
  matching.sums.v = in.v;
  matching.sums.codes = codes;
  matching.sums.offsets = in.offsets;
  matching.codes = {code, {3, 1}};
  matching.candidates = hisac::offsets(elsewhere, 1);
  const auto matched = [&](const MatchInputs& m) {
    return match(on_device, book, m, {{nullptr, DType::float32, m.size(), 5}, {nullptr, {m.size(), 1}}});
  };
  if (!std::strstr(matched(matching).what(), "workspace expected at least"))
    test::fail("match did not get as far as its workspace");
  MatchInputs crowd = matching;
  crowd.codes.shape[0] = kMany;
  expect(matched(crowd), Code::not_implemented,
         "match: expected B up to 2^30, S below 2^31 and N L up to 2^30 on CUDA, got 1, 3 and 1073741825");
  crowd = matching;
  crowd.sums.v.rows = crowd.sums.codes.shape[0] = kLong;
  expect(match_backward(on_device, book, crowd, {}, {}), Code::not_implemented,
         "match_backward: expected B up to 2^30, S below 2^31 and N L up to 2^30 on CUDA, got 1, 2147483648 and 3");

  test::name("limits of attend");
  simt::options.machine.shared = size_t{227} << 10;  // an H100's
  const auto refused = [&](int64_t rows, int64_t d, int64_t v, DType type, bool back) {
    const AttendInputs attention{{number, type, rows, d},
                                 {number, type, 2, d},
                                 {number, type, 2, v},
                                 2,
                                 1,
                                 {offsets, offsets + 1, DType::int64, 1},
                                 {}};
    const Rows out{nullptr, type, rows, v};
    if (!back) return attend(on_device, attention, {{nullptr, type, rows, v}, {nullptr, {rows, 1}}});
    return attend_backward(on_device, attention, {out, {}, out, {nullptr, {rows, 1}}},
                           {{nullptr, {rows, 1, d}}, {nullptr, {1, 2, 1, d}}, {nullptr, {1, 2, 1, v}}, {}});
  };
  expect(refused(kMany, 4, 4, DType::float32, false), Code::not_implemented,
         "attend: expected N, B, M, R, H, d and V up to 2^30 on CUDA, got one of 1073741825");
  const auto takes = [&](int64_t d, int64_t v, DType type, bool back) {  // as far as to ask for a workspace
    return std::strstr(refused(3, d, v, type, back).what(), "workspace expected at least") != nullptr;
  };
  const auto ends = [&](int64_t d, DType type, bool back) {
    return takes(d, 128, type, back) && !takes(d + 1, 128, type, back);
  };
  if (!ends(3072, DType::float32, false) || !ends(3072, DType::float16, false) || !ends(6688, DType::bfloat16, false) ||
      !ends(3056 - 128, DType::float32, true) || !ends(6688 - 128, DType::bfloat16, true))
    test::fail("other limits of d and V");
  expect(
      refused(3, 3073, 128, DType::float32, false), Code::not_implemented,
      "attend: expected d and V that need at most 232448 bytes of shared memory a block on this device, got 3073 and "
      "128, which need 233392");
}

/// `compress` there and on the CPU, with a temperature or with the codebook's, which the device reads in the image: the
/// same agents, tokens and shares near each other.
void expect_compress(Method method, Normalize normalize, bool given, int sparse) {
  test::name("compress %d, %d, %d, %d", static_cast<int>(method), static_cast<int>(normalize), given, sparse);
  constexpr int64_t kRows = 290, kWidth = 8, kValues = 5, kSeats = 6, kUsers = 3;
  Random r(5);
  Codebook book;
  const float tau = 0.5f;
  {
    const Codebook plain = test::codebook(r, {4, 3}, kWidth);
    const Array<const float, 2> centers[] = {array(plain.centers(0), 4, kWidth), array(plain.centers(1), 3, kWidth)};
    if (!Codebook::build(centers, 2, &book, nullptr, given ? 0 : tau).ok()) test::fail("no codebook");
  }
  const std::vector<float> x = test::uniform(r, kRows * kWidth), v = test::uniform(r, kRows * kValues);
  const int64_t bounds[] = {0, 200, 200, 290};
  Histories in;
  in.x = rows(x.data(), kRows, kWidth);
  in.v = rows(v.data(), kRows, kValues);
  in.offsets = offsets(bounds, kUsers);
  CompressParams params;
  params.vote.budget = kSeats;
  if (given) params.route.temperature = array(&tau, 1);
  params.method = method;
  params.route.normalize = normalize;
  params.route.sparse = sparse;
  test::Guarded<std::byte> image(test::image_of(book));
  std::vector<float> tokens[2], shares[2];
  std::vector<int32_t> codes[2];
  for (const Device device : {Device::cpu, Device::cuda}) {
    const size_t at = device == Device::cuda;
    test::Guarded<float> token(kUsers * kSeats * kValues), lse(kUsers * kSeats), share(kUsers * kSeats);
    test::Guarded<int32_t> code(kUsers * kSeats * 2);
    Compressed out;
    out.tokens = {{token.data(), DType::float32, kUsers * kSeats, kValues}, array(lse.data(), kUsers, kSeats), {}};
    out.log_share = array(share.data(), kUsers, kSeats);
    out.agents.codes = array(code.data(), kUsers, kSeats, 2);
    Context context{{}, nullptr, device, nullptr, {{image.data(), {image.count()}}, book.fingerprint()}};
    test::Workspace workspace(compress_workspace(context, book, params, in, out));
    context.workspace = workspace.array();
    const Status status = compress(context, book, params, in, out);
    if (!status.ok()) test::fail("%s", status.what());
    if (!workspace.intact() || !token.intact() || !lse.intact() || !share.intact() || !code.intact())
      test::fail("the end of an array was overwritten");
    tokens[at] = token.values();
    shares[at] = share.values();
    codes[at] = code.values();
  }
  if (codes[0] != codes[1]) test::fail("other agents");
  for (size_t i = 0; i < tokens[0].size(); ++i)
    if (!(std::fabs(tokens[0][i] - tokens[1][i]) <= 1e-3f)) test::fail("token %zu is far from the CPU's", i);
  for (size_t i = 0; i < shares[0].size(); ++i)
    if (shares[0][i] != shares[1][i] && !(std::fabs(shares[0][i] - shares[1][i]) <= 1e-4f))
      test::fail("log_share %zu is far from the CPU's", i);
}

}  // namespace

int main(int argc, char** argv) {
  test::options(argc, argv);
  test::name("before enable_cuda");
  Random r(5);
  const Codebook book = test::codebook(r, {3, 2}, 4);
  const int32_t codes[] = {2, 0, 1, 1, -1, 0};
  const auto made = [&](const Context& context, std::vector<float>& to) {
    return code_prototypes(context, book, array(codes, 3, 2), array(to.data(), to.size() / 4, 4));
  };
  std::vector<float> cpu(12, 1.f), cuda(12, 2.f), few(8);
  expect(made(on_device, cuda), Code::not_implemented, "prototypes: expected enable_cuda() before a call on CUDA");
  if (const Status status = enable_cuda(); !status.ok()) test::fail("%s", status.what());
  expect(fit(on_device, {}, {}, nullptr, nullptr), Code::not_implemented,
         "fit: expected a context on the CPU, got one on CUDA");
  expect(made(on_device, few), Code::invalid_argument, "prototypes: out expected [3, 4], got [2, 4]");
  expect_limits();
  for (const Method method : {Method::exact, Method::leaf})
    for (const Normalize normalize : {Normalize::history, Normalize::agents})
      for (const bool given : {true, false})
        for (const int sparse : {0, 1}) expect_compress(method, normalize, given, sparse);
  test::Guarded<std::byte> image(test::image_of(book));
  Context context = on_device;
  context.codebook_image = {{image.data(), {image.count()}}, book.fingerprint()};
  reaches_the_device("code_prototypes", [&] { return made(context, cuda); });
  if (!made({}, cpu).ok() || cpu != cuda) test::fail("prototypes: other bits than the CPU's");
  return test::done();
}
