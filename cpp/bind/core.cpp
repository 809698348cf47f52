// SPDX-License-Identifier: Apache-2.0
// hisac._core: the verbs over borrowed arrays. Python passes contiguous inputs and allocated outputs.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <string_view>

#include "arrays.h"
#include "codebook.h"
#include "fit.h"
#include "histories.h"
#include "module.h"
#include "runtime.h"

namespace hisac::bind {

void add_state(nb::module_& m);  // state.cpp

namespace {

constexpr const char* kTokens = "float32, bfloat16 or float16 [B, M, V]";
constexpr const char* kCodes = "int32 [T, L]";

/// One of two words, as 0 or 1; what is no string counts as its str().
int32_t either(const char* verb, const char* name, nb::handle given, const char* zero, const char* one) {
  const nb::str text(given);
  if (!text.c_str()) nb::raise_python_error();  // surrogates
  const std::string_view word(text.c_str());
  if (word == zero) return 0;
  if (word == one) return 1;
  wrong_value(verb, name, "'" + std::string(zero) + "' or '" + one + "'", "'" + std::string(word) + "'");
}

// ---- inputs and outputs that need no more of Python

/// Whether every array is plain, and of the rank that "name letters, .." gives it, "B+1" at least one long. "name?" may
/// be None, "-" anything; in place of offsets "B+1" may be a tuple of two. More than are named may be anything.
bool all_plain(const char* names, Fields arrays) {
  nb::dlpack::dltensor t;
  for (nb::handle array : arrays) {
    if (!*names) break;
    const std::string_view name(names, std::strcspn(names, ","));
    names += std::min(name.size() + 2, std::strlen(names));
    if (name == "-" || (array.is_none() && name.find('?') != name.npos)) continue;
    if (PyTuple_Check(array.ptr()) && name == "offsets B+1") {
      if (nb::len(array) != 2 || !all_plain("starts B, ends B", nb::borrow<Fields>(array))) return false;
      continue;
    }
    const auto rank = std::count(name.begin(), name.end(), ' ');
    if (!plain(array, &t) || (rank && rank != t.ndim) || (name.find('+') != name.npos && !t.shape[0]) ||
        (rank > 1 && t.shape[rank - 1] > kMostWidth))
      return false;
  }
  return !*names;
}

/// The bits, uint16, of a bfloat16 array on the CPU that only DLPack lends; None for any other.
nb::object bfloat16_bits(nb::handle source) {
  nb::ndarray<nb::ro> array;
  if (!nb::try_cast(source, array, false) || array.dtype() != nb::dlpack::dtype{4, 16, 1} || array.device_type() != 1)
    return nb::none();
  using Lender = nb::ndarray<nb::ro>;
  const nb::capsule lender(new Lender(array), [](void* p) noexcept { delete static_cast<Lender*>(p); });
  const std::vector<size_t> shape(array.shape_ptr(), array.shape_ptr() + array.ndim());
  return nb::cast(nb::ndarray<nb::numpy, nb::ro>(array.data(), array.ndim(), shape.data(), lender, array.stride_ptr(),
                                                 nb::dtype<uint16_t>()));
}

/// Whether a caller's array may take a result of this shape and NumPy type number, or, below 0, of the type of `like`.
bool fits(nb::handle array, nb::typed<nb::tuple, int64_t, nb::ellipsis> shape, nb::handle like, int number) {
  nb::dlpack::dltensor t;
  if (!plain(array, &t) || t.ndim != static_cast<int>(shape.size())) return false;
  for (int i = 0; i < t.ndim; ++i)
    if (t.shape[i] != nb::cast<int64_t>(shape[i])) return false;
  return t.dtype == (number < 0 ? nb::cast<View>(like).tensor.dtype : numpy_type(number));
}

// ---- encode, vote

void encode_codes(const Codebook& book, Lent x, Lent codes) {
  Call call("encode");
  const Rows rows_x = rows(x, call, "x", 2, kEmbeddings);
  const auto out = array<int32_t, 2>(codes, call, "out", kCodes);
  run(call, with(encode_workspace, book), with(encode, book, rows_x, out), &book);
}

void leaf_numbers(const Codebook& book, Lent codes, Lent out) {
  Call call("leaves", kOnlyCpu);
  const auto from = array<const int32_t, 2>(codes, call, "codes", kCodes);
  raise(leaves(book, from, array<int64_t, 1>(out, call, "out", "int64 [T]")));
}

void prototype_rows(const Codebook& book, Lent codes, Lent out) {
  Call call("prototypes");
  const auto from = array<const int32_t, 2>(codes, call, "codes", kCodes);
  const auto to = array<float, 2>(out, call, "out", "float32 [T, D]");
  run(call, [](const Context&) { return size_t{0}; }, with(code_prototypes, book, from, to), &book);
}

void vote_agents(const Codebook& book, const Fields& histories, int64_t budget, const std::vector<int64_t>& fanout,
                 const std::vector<int64_t>& beam, Lent out_codes, Lent out_votes, Lent out_count,
                 Lent out_prototypes) {
  Call call("vote");
  VoteParams params;
  params.budget = budget;
  if (std::max(fanout.size(), beam.size()) > kMaxLevels)
    throw nb::value_error("vote: fanout and beam expected at most 8 levels");
  std::copy(fanout.begin(), fanout.end(), params.fanout);
  std::copy(beam.begin(), beam.end(), params.beam);
  Batch batch(call, histories);
  batch.read_votes();
  const Histories& in = batch.in;
  const Agents out{array<int32_t, 3>(out_codes, call, "out codes", "int32 [B, M, L]"),
                   array<int64_t, 2>(out_votes, call, "out votes", "int64 [B, M]"),
                   array<int32_t, 1>(out_count, call, "out count", "int32 [B]"), book.fingerprint(),
                   array<float, 3>(out_prototypes, call, "out prototypes", "float32 [B, M, D]")};
  run(call, with(vote_workspace, book, params, in), with(vote, book, params, in, out), &book);
}

// ---- route

/// The arguments that route and its backward share.
struct RouteArguments {
  RouteParams params;
  Batch batch;
  const Histories& in = batch.in;
  RouteAgents agents;

  RouteArguments(Call& call, const Codebook* book, const Fields& histories, Lent prototypes, Lent count, Lent codes,
                 Lent lists, nb::handle tau, nb::handle normalize, int64_t sparse, nb::handle precision)
      : batch(call, histories) {
    batch.read_rows(book);
    params.normalize = static_cast<Normalize>(either(call, "normalize", normalize, "history", "agents"));
    params.precision = static_cast<Precision>(either(call, "precision", precision, "float32", "bfloat16"));
    agents.prototypes = array<const float, 3>(prototypes, call, "prototypes", "float32 [B, M, D]");
    if (agents.prototypes.shape[2] > kMostWidth)
      wrong_value(call, "prototypes", "float32 [B, M, D], D at most 2^20", describe(prototypes));
    params.sparse = sparse;
    agents.count = array<const int32_t, 1>(count, call, "count", "int32 [B]", true);
    agents.codes = array<const int32_t, 3>(codes, call, "agents.codes", "int32 [B, M, L]", true);
    agents.lists = array<const int32_t, 3>(lists, call, "agents.lists", "int32 [B, C_1, K]", true);
    if (PyFloat_Check(tau.ptr()) || PyLong_Check(tau.ptr())) {
      temperature_ = static_cast<float>(nb::cast<double>(tau));
      if (!(temperature_ > 0) || !(temperature_ <= 3.4028234e38f))
        wrong_value(call, "temperature", "finite and > 0", nb::cast<std::string>(nb::str(tau)));
      params.temperature = {&temperature_, {1}};
    } else {
      hold_ = nb::cast<View>(tau);
      params.temperature = array<const float, 1>(hold_, call, "temperature", "a number, or float32 [1] or [M]");
    }
  }

 private:
  float temperature_ = 0;
  View hold_;
};

void nearest_agents(const Codebook& book, Lent prototypes, Lent count, Lent out) {
  Call call("agent_lists");
  const RouteAgents agents{array<const float, 3>(prototypes, call, "prototypes", "float32 [B, M, D]"),
                           array<const int32_t, 1>(count, call, "count", "int32 [B]", true)};
  const auto to = array<int32_t, 3>(out, call, "out", "int32 [B, C_1, K]");
  run(call, with(agent_lists_workspace, book, agents), with(agent_lists, book, agents, to), &book);
}

void route_tokens(const Codebook* book, const Fields& histories, Lent prototypes, Lent count, Lent codes, Lent lists,
                  nb::handle temperature, nb::handle normalize, int64_t sparse, nb::handle precision, Lent tokens,
                  Lent lse, Lent mean_x) {
  Call call("route");
  const RouteArguments a(call, book, histories, prototypes, count, codes, lists, temperature, normalize, sparse,
                         precision);
  Tokens out;
  if (!tokens.none) out.tokens = rows<MutableRows>(tokens, call, "out tokens", 3, kTokens);
  out.lse = array<float, 2>(lse, call, "out lse", "float32 [B, M]");
  out.mean_x = array<float, 3>(mean_x, call, "out mean_x", "float32 [B, M, D]", true);
  run(call, with(route_workspace, book, a.params, a.in, a.agents, out),
      with(route, book, a.params, a.in, a.agents, out), book);
}

/// Rows of a table.
Ids listed(Call& call, Lent rows, const char* name) { return ids(rows, call, name, "int32 or int64 [U]", true); }

void route_gradients(const Codebook* book, const Fields& histories, Lent prototypes, Lent count, Lent codes, Lent lists,
                     nb::handle temperature, nb::handle normalize, int64_t sparse, nb::handle precision, Lent tokens,
                     Lent lse, Lent mean_x, Lent d_tokens, Lent d_lse, Lent d_mean_x, Lent x_rows, Lent v_rows, Lent dx,
                     Lent dv, Lent dbias, Lent dspread, Lent dprototypes, Lent dtemperature) {
  Call call("route_backward");
  constexpr const char* kMeanX = "float32 [B, M, D]";
  const RouteArguments a(call, book, histories, prototypes, count, codes, lists, temperature, normalize, sparse,
                         precision);
  RouteForward f;
  if (!d_tokens.none) {
    f.tokens = rows(tokens, call, "tokens", 3, kTokens);
    f.d_tokens = rows(d_tokens, call, "d_tokens", 3, kTokens);
  }
  f.lse = array<const float, 2>(lse, call, "lse", "float32 [B, M]");
  f.mean_x = array<const float, 3>(mean_x, call, "mean_x", kMeanX, true);
  f.d_lse = array<const float, 2>(d_lse, call, "d_lse", "float32 [B, M]", true);
  f.d_mean_x = array<const float, 3>(d_mean_x, call, "d_mean_x", kMeanX, true);
  const RouteGradients out{array<float, 2>(dx, call, "dx", "float32 [T, D], or of the table", true),
                           array<float, 2>(dv, call, "dv", "float32 [T, V], or of the table", true),
                           array<float, 1>(dbias, call, "dbias", "float32 [T]", true),
                           array<float, 1>(dspread, call, "dspread", "float32 [T]", true),
                           array<float, 3>(dprototypes, call, "dprototypes", "float32 [B, M, D]", true),
                           array<float, 1>(dtemperature, call, "dtemperature", "float32 [1] or [M]", true),
                           listed(call, x_rows, "x_rows"),
                           listed(call, v_rows, "v_rows")};
  run(call, with(route_backward_workspace, book, a.params, a.in, a.agents, f, out),
      with(route_backward, book, a.params, a.in, a.agents, f, out), book);
}

void missing_rows(const Codebook* book, const Fields& histories, Lent out) {
  Call call("missing");
  Batch batch(call, histories);
  batch.read_rows(book);
  const auto to = array<float, 1>(out, call, "out", "float32 [T]");
  run(call, with(missing_workspace, book, batch.in), with(missing, book, batch.in, to), book);
}

/// Of `compress`; by votes in history mode.
void share_out(Lent lse, Lent votes, Lent out) {
  Call call("compress");
  const auto mass = array<const float, 2>(lse, call, "lse", "float32 [B, M]");
  const auto of_votes = array<const int64_t, 2>(votes, call, "agents' votes", "int64 [B, M]", true);
  const auto to = array<float, 2>(out, call, "out log_share", "float32 [B, M]");
  const Normalize normalize = of_votes ? Normalize::history : Normalize::agents;
  run(
      call, [](const Context&) { return size_t{0}; },
      [&](const Context& context) {
        return call_backend("compress", &Backend::log_share, context, normalize, mass, of_votes, to);
      });
}

// ---- leaf sums

/// Where sums lie: offsets [B + 1], or (starts, ends) [B] each.
MutableSpans sum_spans(Call& call, Lent starts, Lent ends) {
  const auto first = array<int64_t, 1>(starts, call, "out starts", "int64 [B], or offsets [B + 1]");
  const auto last = array<int64_t, 1>(ends, call, "out ends", "int64 [B]", true);
  if (!last) return {first.data, first.data + 1, first.shape[0] - 1};
  if (last.shape[0] != first.shape[0]) wrong_value(call, "out ends", "[B]", describe(ends));
  return {first.data, last.data, first.shape[0]};
}

void sum_leaves(const Codebook& book, const Fields& histories, Lent x, Lent v, Lent starts, Lent ends, Lent codes,
                Lent bias, Lent spread, Lent votes) {
  Call call("leaf_sums");
  Batch batch(call, histories);
  batch.read_rows(true, true);
  const Histories& in = batch.in;
  const LeafSums out{array<float, 2>(x, call, "out x", "float32 [S, D]"),
                     array<float, 2>(v, call, "out v", "float32 [S, V]"),
                     sum_spans(call, starts, ends),
                     array<int32_t, 2>(codes, call, "out codes", "int32 [S, L]"),
                     array<float, 1>(bias, call, "out bias", "float32 [S]"),
                     array<float, 1>(spread, call, "out spread", "float32 [S]"),
                     array<int64_t, 1>(votes, call, "out votes", "int64 [S]")};
  run(call, with(leaf_sums_workspace, book, in), with(leaf_sums, book, in, out), &book);
}

void leaf_gradients(const Codebook& book, const Fields& histories, const Fields& sums, const Fields& gradients,
                    Lent v_rows, Lent dv, Lent dbias) {
  Call call("leaf_sums_backward");
  Batch batch(call, histories), of_sums(call, sums), of_gradients(call, gradients);
  batch.read_rows(true);
  of_sums.read_sums();
  const Histories& in = batch.in;
  LeafSumsForward f;
  f.sums = of_sums.in;
  of_gradients.read_gradients(f);
  const LeafSumsGradients out{array<float, 2>(dv, call, "dv", "float32 [T, V], or of the table", true),
                              array<float, 1>(dbias, call, "dbias", "float32 [T]", true),
                              listed(call, v_rows, "v_rows")};
  run(call, with(leaf_sums_backward_workspace, book, in, out), with(leaf_sums_backward, book, in, f, out), &book);
}

// ---- attend

/// [R, ..] as [1, R, ..], for tokens with offsets.
template <class T, int N>
Array<T, N + 1> as_one_user(const Array<T, N>& a) noexcept {
  Array<T, N + 1> one{a.data, {1}};
  std::copy_n(a.shape, N, one.shape + 1);
  return one;
}

/// Of users' tokens: [B, M, ..], or [R, ..] with offsets.
template <class T, int N>
Array<T, N> token_array(Lent given, bool ragged, Call& call, const char* name, const char* of_users,
                        const char* of_rows) {
  return ragged ? as_one_user(array<T, N - 1>(given, call, name, of_rows, true))
                : array<T, N>(given, call, name, of_users, true);
}

struct AttendArguments {
  AttendInputs in;
  bool ragged;

  AttendArguments(Call& call, Lent q, Lent keys, Lent values, Lent offsets, Lent bias, Lent tokens, int64_t most,
                  float scale)
      : ragged(!tokens.none) {
    const int dims = 4 - ragged;
    in.q = rows(q, call, "q", 3, "float32, bfloat16 or float16 [N, H, d]");
    in.keys = rows(keys, call, "keys", dims, ragged ? "q's type, [R, H, d]" : "q's type, [B, M, H, d]");
    in.values = rows(values, call, "values", dims, ragged ? "q's type, [R, H, V]" : "q's type, [B, M, H, V]");
    in.bias = token_array<const float, 2>(bias, ragged, call, "bias", "float32 [B, M]", "float32 [R]");
    in.scale = scale;
    const int64_t* const k = keys.tensor.shape;
    const int64_t* const w = values.tensor.shape;
    in.agents = ragged ? most : k[1];
    in.heads = q.tensor.shape[1];
    if (k[dims - 2] != in.heads || !std::equal(k, k + dims - 1, w) || k[dims - 1] != q.tensor.shape[2])
      throw nb::value_error((std::string(call) + ": expected q [N, H, d], keys " +
                             (ragged ? "[R, H, d] and values [R, H, V]" : "[B, M, H, d] and values [B, M, H, V]") +
                             ", got " + describe(q) + ", " + describe(keys) + " and " + describe(values))
                                .c_str());
    in.candidates = spans(offsets, call, "candidate_offsets");
    if (ragged) {
      in.tokens = spans(tokens, call, "token_offsets");
      if (!bias.none && bias.tensor.shape[0] != k[0])
        wrong_value(call, "bias", "[R] = [" + std::to_string(k[0]) + "]", describe(bias));
    } else if (in.candidates.users != k[0]) {
      wrong_value(call, "candidate_offsets", "[" + std::to_string(k[0] + 1) + "]", describe(offsets));
    }
  }
};

void attend_candidates(Lent q, Lent keys, Lent values, Lent candidate_offsets, Lent bias, Lent token_offsets,
                       int64_t longest, float scale, Lent out, Lent lse) {
  Call call("attend");
  const AttendArguments a(call, q, keys, values, candidate_offsets, bias, token_offsets, longest, scale);
  const Attended to{rows<MutableRows>(out, call, "out", 3, "q's type, [N, H, V]"),
                    array<float, 2>(lse, call, "out lse", "float32 [N, H]")};
  run(call, with(attend_workspace, a.in), with(attend, a.in, to));
}

void attend_gradients(Lent d_out, Lent d_lse, Lent out, Lent lse, Lent q, Lent keys, Lent values,
                      Lent candidate_offsets, Lent bias, Lent token_offsets, int64_t longest, float scale, Lent dq,
                      Lent dkeys, Lent dvalues, Lent dbias) {
  Call call("attend_backward");
  const AttendArguments a(call, q, keys, values, candidate_offsets, bias, token_offsets, longest, scale);
  const AttendForward forward{
      rows(d_out, call, "d_out", 3, "[N, H, V]"), array<const float, 2>(d_lse, call, "d_lse", "float32 [N, H]", true),
      rows(out, call, "out", 3, "[N, H, V]"), array<const float, 2>(lse, call, "lse", "float32 [N, H]")};
  const AttendGradients to{
      array<float, 3>(dq, call, "dq", "float32 [N, H, d]"),
      token_array<float, 4>(dkeys, a.ragged, call, "dkeys", "float32 [B, M, H, d]", "float32 [R, H, d]"),
      token_array<float, 4>(dvalues, a.ragged, call, "dvalues", "float32 [B, M, H, V]", "float32 [R, H, V]"),
      token_array<float, 2>(dbias, a.ragged, call, "dbias", "float32 [B, M]", "float32 [R]")};
  run(call, with(attend_backward_workspace, a.in), with(attend_backward, a.in, forward, to));
}

// ---- match

struct MatchArguments {
  Batch batch;
  MatchInputs in;

  MatchArguments(Call& call, const Fields& sums, Lent codes, Lent rows, Lent offsets) : batch(call, sums) {
    batch.read_matched();
    in.sums = batch.in;
    in.codes = array<const int32_t, 2>(codes, call, "codes", "int32 [N, L], or [items, L] with ids");
    in.ids = ids(rows, call, "ids", "int32 or int64 [N]", true);
    in.candidates = spans(offsets, call, "candidate_offsets");
  }
};

void match_candidates(const Codebook& book, const Fields& sums, Lent codes, Lent rows_of_codes, Lent candidate_offsets,
                      Lent v, Lent lse) {
  Call call("match");
  const MatchArguments a(call, sums, codes, rows_of_codes, candidate_offsets);
  const Match to{rows<MutableRows>(v, call, "out v", 3, "the type of the sums' v, [N, L, V]"),
                 array<float, 2>(lse, call, "out lse", "float32 [N, L]")};
  run(call, with(match_workspace, book, a.in), with(match, book, a.in, to));
}

void match_gradients(const Codebook& book, const Fields& sums, Lent d_v, Lent d_lse, Lent codes, Lent rows_of_codes,
                     Lent candidate_offsets, Lent dv, Lent dbias) {
  Call call("match_backward");
  const MatchArguments a(call, sums, codes, rows_of_codes, candidate_offsets);
  MatchForward forward;
  if (!d_v.none) forward.d_v = rows(d_v, call, "d_v", 3, "float32, bfloat16 or float16 [N, L, V]");
  forward.d_lse = array<const float, 2>(d_lse, call, "d_lse", "float32 [N, L]", true);
  const MatchGradients to{array<float, 2>(dv, call, "dv", "float32 [S, V]", true),
                          array<float, 1>(dbias, call, "dbias", "float32 [S]", true)};
  run(call, with(match_backward_workspace, book, a.in), with(match_backward, book, a.in, forward, to));
}

void fill(nb::module_& m) {
  nb::set_leak_warnings(false);  // torch's registry may keep codebooks to the end
  m.attr("VERSION") = HISAC_VERSION;
  nb::exception<CorruptFile>(m, "CorruptFileError", PyExc_ValueError).doc() =
      "The bytes are no hisac codebook or state, or a damaged one.";

  add_codebook(m);
  add_fit(m);
  add_state(m);
  m.def("encode", encode_codes, "book"_a, "x"_a, "codes"_a);
  m.def("leaves", leaf_numbers, "book"_a, "codes"_a, "out"_a);
  m.def("prototypes", prototype_rows, "book"_a, "codes"_a, "out"_a);
  m.def("vote", vote_agents, "book"_a, "histories"_a, "budget"_a, "fanout"_a, "beam"_a, "out_codes"_a, "out_votes"_a,
        "out_count"_a, "out_prototypes"_a);
  m.def("agent_lists", nearest_agents, "book"_a, "prototypes"_a, "count"_a.none(), "out"_a);
  m.def("route", route_tokens, "book"_a.none(), "histories"_a, "prototypes"_a, "count"_a.none(), "codes"_a.none(),
        "lists"_a.none(), "temperature"_a, "normalize"_a.none(), "sparse"_a, "precision"_a.none(), "tokens"_a.none(),
        "lse"_a, "mean_x"_a.none());
  m.def("route_backward", route_gradients, "book"_a.none(), "histories"_a, "prototypes"_a, "count"_a.none(),
        "codes"_a.none(), "lists"_a.none(), "temperature"_a, "normalize"_a.none(), "sparse"_a, "precision"_a.none(),
        "tokens"_a.none(), "lse"_a, "mean_x"_a.none(), "d_tokens"_a.none(), "d_lse"_a.none(), "d_mean_x"_a.none(),
        "x_rows"_a.none(), "v_rows"_a.none(), "dx"_a.none(), "dv"_a.none(), "dbias"_a.none(), "dspread"_a.none(),
        "dprototypes"_a.none(), "dtemperature"_a.none());
  m.def("missing", missing_rows, "book"_a.none(), "histories"_a, "out"_a);
  m.def("log_share", share_out, "lse"_a, "votes"_a.none(), "out"_a);
  m.def("leaf_sums", sum_leaves, "book"_a, "histories"_a, "out_x"_a, "out_v"_a, "out_starts"_a, "out_ends"_a.none(),
        "out_codes"_a, "out_bias"_a, "out_spread"_a, "out_votes"_a);
  m.def("leaf_sums_backward", leaf_gradients, "book"_a, "histories"_a, "sums"_a, "gradients"_a, "v_rows"_a.none(),
        "dv"_a.none(), "dbias"_a.none());
  m.def("attend", attend_candidates, "q"_a, "keys"_a, "values"_a, "candidate_offsets"_a, "bias"_a.none(),
        "token_offsets"_a.none(), "longest"_a, "scale"_a, "out"_a, "lse"_a);
  m.def("attend_backward", attend_gradients, "d_out"_a, "d_lse"_a.none(), "out"_a, "lse"_a, "q"_a, "keys"_a, "values"_a,
        "candidate_offsets"_a, "bias"_a.none(), "token_offsets"_a.none(), "longest"_a, "scale"_a, "dq"_a, "dkeys"_a,
        "dvalues"_a, "dbias"_a.none());
  m.def("match", match_candidates, "book"_a, "sums"_a, "codes"_a, "ids"_a.none(), "candidate_offsets"_a, "v"_a,
        "lse"_a);
  m.def("match_backward", match_gradients, "book"_a, "sums"_a, "d_v"_a.none(), "d_lse"_a.none(), "codes"_a,
        "ids"_a.none(), "candidate_offsets"_a, "dv"_a.none(), "dbias"_a.none());

  m.def("plain", all_plain, "names"_a, "arrays"_a);
  m.def("bfloat16_bits", bfloat16_bits, "source"_a);
  m.def("fits", fits, "array"_a, "shape"_a, "like"_a, "number"_a);
  m.def(
      "use_cuda",
      [](nb::capsule backend, int32_t device_type) {
        cuda_device_type = device_type;
        set_cuda_backend(static_cast<const Backend*>(backend.data("hisac.cuda")));
      },
      "backend"_a, "device_type"_a = 2, nb::sig("def use_cuda(backend: object, device_type: int = 2) -> None"));
  m.def("set_num_threads", set_workers, "n"_a);
  m.def("get_num_threads", [] { return std::atomic_load(&pool())->workers(); });
  m.def("available_isas", [] { return std::string(available_isas()); });
  m.def("active_isa", [] { return std::string(active_isa()); });
}

}  // namespace
}  // namespace hisac::bind

extern "C" NB_EXPORT PyObject* PyInit__core() {
  static PyObject* const definition = NB_CALL(module_new)(
      "_core", "The compiled core of hisac. Use the functions of hisac, which check kinds and allocate results.",
      reinterpret_cast<void*>(hisac::bind::fill_once<hisac::bind::fill>), NB_ABI_MINOR_TAG);
  return definition;
}
