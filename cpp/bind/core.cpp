// SPDX-License-Identifier: Apache-2.0
// hisac._core: the verbs over borrowed arrays. Python passes contiguous inputs and allocated outputs.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cerrno>
#include <string_view>

#include "arrays.h"
#include "runtime.h"

namespace hisac::bind {
namespace {

using nb::literals::operator""_a;

constexpr const char* kX = "float32, bfloat16 or float16 [T, D]";
constexpr const char* kRouteX = "float32, bfloat16, float16 or int8 [T, D]";
constexpr const char* kV = "float32, bfloat16 or float16 [T, V]";
constexpr const char* kTokens = "float32, bfloat16 or float16 [B, M, V]";
constexpr const char* kCodes = "int32 [T, L]";

/// One of two words, as 0 or 1.
int32_t either(const char* verb, const char* name, std::string_view word, const char* zero, const char* one) {
  if (word == zero) return 0;
  if (word == one) return 1;
  wrong_value(verb, name, "'" + std::string(zero) + "' or '" + one + "'", "'" + std::string(word) + "'");
}

// ---- the codebook

void make_codebook(Codebook* self, const std::vector<View>& centers) {
  Array<const float, 2> levels[kMaxLevels];
  if (centers.size() < 1 || centers.size() > kMaxLevels)
    throw nb::value_error(("Codebook: expected 1 to 8 levels, got " + std::to_string(centers.size())).c_str());
  for (size_t l = 0; l < centers.size(); ++l)
    levels[l] = array<const float, 2>(centers[l], "Codebook", "centers", "float32 [C, D]");
  Codebook book;
  raise(Codebook::build(levels, static_cast<int>(centers.size()), &book));
  new (self) Codebook(std::move(book));
}

Codebook load_codebook(const std::string& path) {
  Codebook book;
  Status status;
  int os_error = 0;
  {
    nb::gil_scoped_release release;
    errno = 0;
    status = Codebook::load(path.c_str(), &book);
    os_error = errno;
  }
  raise(status, os_error);
  return book;
}

void save_codebook(const Codebook& book, const std::string& path) {
  errno = 0;
  const Status status = book.save(path.c_str());
  raise(status, errno);
}

Codebook parse_codebook(nb::bytes bytes) {
  Codebook book;
  raise(Codebook::parse(bytes.c_str(), bytes.size(), &book));
  return book;
}

nb::bytes serialize_codebook(const Codebook& book) {
  std::string bytes(book.file_size(), '\0');
  raise(book.serialize({reinterpret_cast<std::byte*>(bytes.data()), {static_cast<int64_t>(bytes.size())}}));
  return nb::bytes(bytes.data(), bytes.size());
}

void copy_centers(const Codebook& book, int level, View out) {
  if (level < 0 || level >= book.levels()) throw nb::index_error("Codebook: no such level");
  const auto to = array<float, 2>(out, "Codebook", "out", "float32 [C, D]");
  if (to.shape[0] != book.size(level) || to.shape[1] != book.width())
    wrong_value("Codebook", "out", "[C, D]", describe(out));
  std::copy_n(book.centers(level), book.size(level) * book.width(), to.data);
}

// ---- encode, fit, vote

void encode_codes(const Codebook& book, View x, View codes) {
  const Rows rows_x = rows(x, "encode", "x", 2, kX);
  const auto out = array<int32_t, 2>(codes, "encode", "out", kCodes);
  run([&](int workers) { return encode_workspace(book, workers); },
      [&](const Context& context) { return encode(context, book, rows_x, out); });
}

void leaf_numbers(const Codebook& book, View codes, View out) {
  raise(leaves(book, array<const int32_t, 2>(codes, "leaves", "codes", kCodes),
               array<int64_t, 1>(out, "leaves", "out", "int64 [T]")));
}

void prototype_rows(const Codebook& book, View codes, View out) {
  const auto from = array<const int32_t, 2>(codes, "prototypes", "codes", kCodes);
  const auto to = array<float, 2>(out, "prototypes", "out", "float32 [T, D]");
  run([](int) { return size_t{0}; }, [&](const Context& context) { return code_prototypes(context, book, from, to); });
}

nb::tuple fit_centers(View x, const std::vector<View>& centers, int iterations, uint64_t seed, nb::object progress) {
  const Rows rows_x = rows(x, "fit", "x", 2, kX);
  FitParams params;
  Array<float, 2> levels[kMaxLevels];
  if (centers.size() < 1 || centers.size() > kMaxLevels)
    throw nb::value_error(("fit: codes expected 1 to 8 levels, got " + std::to_string(centers.size())).c_str());
  params.levels = static_cast<int>(centers.size());
  params.iterations = iterations;
  params.seed = seed;
  for (int l = 0; l < params.levels; ++l) {
    levels[l] = array<float, 2>(centers[l], "fit", "centers", "float32 [C, D]");
    params.sizes[l] = levels[l].shape[0];
  }
  params.ctx = &progress;
  params.keep_going = [](void*) {
    nb::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() == 0;
  };
  if (!progress.is_none())
    params.progress = [](void* ctx, int level, int round, double error) {
      nb::gil_scoped_acquire acquire;
      try {
        (*static_cast<nb::object*>(ctx))(level, round, error);
        return true;
      } catch (nb::python_error& e) {
        e.restore();
        return false;
      }
    };
  FitReport report;
  run([&](int workers) { return fit_workspace(params, rows_x.rows, rows_x.width, workers); },
      [&](const Context& context) { return fit(context, params, rows_x, levels, &report); });
  nb::list rounds, errors, unused;
  for (int l = 0; l < params.levels; ++l) {
    rounds.append(report.iterations[l]);
    errors.append(report.error[l]);
    unused.append(report.unused[l]);
  }
  return nb::make_tuple(report.rows, report.left_out, nb::tuple(rounds), nb::tuple(errors), nb::tuple(unused));
}

void vote_agents(const Codebook& book, View codes, View starts, View ends, int64_t budget,
                 const std::vector<int64_t>& fanout, View weights, View out_codes, View out_votes, View out_count) {
  VoteParams params;
  params.budget = budget;
  if (fanout.size() > kMaxLevels) throw nb::value_error("vote: fanout expected at most 8 levels");
  std::copy(fanout.begin(), fanout.end(), params.fanout);
  const auto from = array<const int32_t, 2>(codes, "vote", "codes", kCodes);
  const Histories h = histories(starts, ends, "vote");
  const auto weight = array<const float, 1>(weights, "vote", "weights", "float32 [T]", true);
  const Agents out{array<int32_t, 3>(out_codes, "vote", "out codes", "int32 [B, M, L]"),
                   array<int64_t, 2>(out_votes, "vote", "out votes", "int64 [B, M]"),
                   array<int32_t, 1>(out_count, "vote", "out count", "int32 [B]")};
  const int64_t most = longest(h, from.shape[0]);
  run([&](int workers) { return vote_workspace(book, params, most, workers); },
      [&](const Context& context) { return vote(context, book, params, from, h, weight, out); });
}

// ---- route

/// The arguments that route and its backward share.
struct RouteArguments {
  RouteParams params;
  RouteInputs in;
  float temperature = 0;
  int64_t most = 0;  // rows of the longest history

  RouteArguments(const char* verb, const View& x, const View& v, const View& starts, const View& ends,
                 const View& prototypes, const View& count, nb::handle tau, std::string_view normalize,
                 const View& bias, const View& spread, const View& codes, const Codebook* book, std::string_view method,
                 int refine, std::string_view missing, std::string_view precision, const View& x_ids, const View& v_ids,
                 const View& x_scale)
      : RouteArguments(verb, x, v, starts, ends, bias, spread, codes, book, x_ids, v_ids, x_scale) {
    params.normalize = static_cast<Normalize>(either(verb, "normalize", normalize, "history", "agents"));
    params.method = static_cast<Method>(either(verb, "method", method, "exact", "leaf"));
    params.missing = static_cast<Missing>(either(verb, "missing", missing, "drop", "token"));
    params.precision = static_cast<Precision>(either(verb, "precision", precision, "float32", "bfloat16"));
    params.refine = refine;
    in.prototypes = array<const float, 3>(prototypes, verb, "prototypes", "float32 [B, M, D]");
    in.count = array<const int32_t, 1>(count, verb, "count", "int32 [B]", true);
    if (PyFloat_Check(tau.ptr()) || PyLong_Check(tau.ptr())) {
      temperature = static_cast<float>(nb::cast<double>(tau));
      if (!(temperature > 0) || !(temperature <= 3.4028234e38f))
        wrong_value(verb, "temperature", "finite and > 0", nb::cast<std::string>(nb::str(tau)));
      params.temperature = {&temperature, {1}};
    } else {
      View view;
      if (!nb::try_cast(tau, view))
        wrong_type(verb, "temperature", "a number, or float32 [1] or [M]", "something else");
      params.temperature = array<const float, 1>(view, verb, "temperature", "a number, or float32 [1] or [M]");
      hold = view;
    }
  }

  /// Those of leaf_sums.
  RouteArguments(const char* verb, const View& x, const View& v, const View& starts, const View& ends, const View& bias,
                 const View& spread, const View& codes, const Codebook* book, const View& x_ids, const View& v_ids,
                 const View& x_scale) {
    if (!x.none) in.x = rows(x, verb, "x", 2, kRouteX, true);
    in.v = rows(v, verb, "v", 2, kV);
    in.histories = histories(starts, ends, verb);
    in.bias = array<const float, 1>(bias, verb, "bias", "float32 [T]", true);
    in.spread = array<const float, 1>(spread, verb, "spread", "float32 [T]", true);
    in.codes = array<const int32_t, 2>(codes, verb, "codes", kCodes, true);
    in.book = book;
    in.x_ids = ids(x_ids, verb, "x_ids");
    in.v_ids = ids(v_ids, verb, "v_ids");
    in.x_scale = array<const float, 1>(x_scale, verb, "x_scale", "float32 [1] or [rows of x]", true);
    most = longest(in.histories, in.behaviours());
  }
  RouteArguments(const RouteArguments&) = delete;

  View hold;
};

void route_tokens(View x, View v, View starts, View ends, View prototypes, View count, nb::handle temperature,
                  const std::string& normalize, View bias, View spread, View codes, const Codebook* book,
                  const std::string& method, int refine, const std::string& missing, const std::string& precision,
                  View x_ids, View v_ids, View x_scale, View tokens, View lse, View refined) {
  const RouteArguments a("route", x, v, starts, ends, prototypes, count, temperature, normalize, bias, spread, codes,
                         book, method, refine, missing, precision, x_ids, v_ids, x_scale);
  const Tokens out{rows<MutableRows>(tokens, "route", "out tokens", 3, kTokens),
                   array<float, 2>(lse, "route", "out lse", "float32 [B, M]"),
                   array<float, 3>(refined, "route", "out prototypes", "float32 [B, M, D]", true)};
  run([&](int workers) { return route_workspace(a.params, a.in, a.most, workers); },
      [&](const Context& context) { return route(context, a.params, a.in, out); });
}

void route_gradients(View d_tokens, View d_lse, View tokens, View lse, View x, View v, View starts, View ends,
                     View prototypes, View count, nb::handle temperature, const std::string& normalize, View bias,
                     View spread, View codes, const Codebook* book, const std::string& method,
                     const std::string& missing, const std::string& precision, View x_ids, View v_ids, View x_scale,
                     View dv, View dtemperature, View dbias, View dx, View dprototypes) {
  constexpr const char* kVerb = "route_backward";
  const RouteArguments a(kVerb, x, v, starts, ends, prototypes, count, temperature, normalize, bias, spread, codes,
                         book, method, 0, missing, precision, x_ids, v_ids, x_scale);
  const RouteForward forward{rows(d_tokens, kVerb, "d_tokens", 3, kTokens),
                             array<const float, 2>(d_lse, kVerb, "d_lse", "float32 [B, M]", true),
                             rows(tokens, kVerb, "tokens", 3, kTokens),
                             array<const float, 2>(lse, kVerb, "lse", "float32 [B, M]")};
  const RouteGradients out{array<float, 2>(dv, kVerb, "dv", "float32 [T, V]", true),
                           array<float, 1>(dtemperature, kVerb, "dtemperature", "float32 [1] or [M]", true),
                           array<float, 1>(dbias, kVerb, "dbias", "float32 [T]", true),
                           array<float, 2>(dx, kVerb, "dx", "float32 [T, D]", true),
                           array<float, 3>(dprototypes, kVerb, "dprototypes", "float32 [B, M, D]", true)};
  run([&](int workers) { return route_backward_workspace(a.params, a.in, out, a.most, workers); },
      [&](const Context& context) { return route_backward(context, a.params, a.in, forward, out); });
}

void sum_leaves(View x, View v, View starts, View ends, View bias, View spread, View codes, const Codebook& book,
                View x_ids, View v_ids, View x_scale, View out_x, View out_v, View out_offsets, View out_bias,
                View out_spread, View out_codes) {
  constexpr const char* kVerb = "leaf_sums";
  const RouteArguments a(kVerb, x, v, starts, ends, bias, spread, codes, &book, x_ids, v_ids, x_scale);
  const LeafSums out{array<float, 2>(out_x, kVerb, "out x", "float32 [S, D]"),
                     array<float, 2>(out_v, kVerb, "out v", "float32 [S, V]"),
                     array<int64_t, 1>(out_offsets, kVerb, "out offsets", "int64 [B + 1]"),
                     array<float, 1>(out_bias, kVerb, "out bias", "float32 [S]"),
                     array<float, 1>(out_spread, kVerb, "out spread", "float32 [S]"),
                     array<int32_t, 2>(out_codes, kVerb, "out codes", "int32 [S, L]")};
  run([&](int workers) { return leaf_sums_workspace(a.in, a.most, workers); },
      [&](const Context& context) { return leaf_sums(context, a.in, out); });
}

void sum_of_rows(View rows, View order, View begin, View out) {
  constexpr const char* kVerb = "sum_rows";
  const auto from = array<const float, 2>(rows, kVerb, "rows", "float32 [T, V]");
  const auto sorted = array<const int64_t, 1>(order, kVerb, "order", "int64 [N]");
  const auto groups = array<const int64_t, 1>(begin, kVerb, "begin", "int64 [G + 1]");
  const auto sums = array<float, 2>(out, kVerb, "sums", "float32 [G, V]");
  run([](int) { return size_t{0}; },
      [&](const Context& context) { return sum_rows(context, from, sorted, groups, sums); });
}

// ---- attend

struct AttendArguments {
  AttendInputs in;

  AttendArguments(const char* verb, const View& q, const View& keys, const View& values, const View& offsets,
                  const View& bias, float scale) {
    in.q = rows(q, verb, "q", 3, "float32, bfloat16 or float16 [N, H, d]");
    in.keys = rows(keys, verb, "keys", 4, "q's type, [B, M, H, d]");
    in.values = rows(values, verb, "values", 4, "q's type, [B, M, H, V]");
    in.bias = array<const float, 2>(bias, verb, "bias", "float32 [B, M]", true);
    in.scale = scale;
    const int64_t* const k = keys.tensor.shape;
    const int64_t* const w = values.tensor.shape;
    in.agents = k[1];
    in.heads = q.tensor.shape[1];
    if (k[2] != in.heads || k[0] != w[0] || k[1] != w[1] || k[2] != w[2] || k[3] != q.tensor.shape[2])
      throw nb::value_error((std::string(verb) +
                             ": expected q [N, H, d], keys [B, M, H, d] and values [B, M, H, V], got " + describe(q) +
                             ", " + describe(keys) + " and " + describe(values))
                                .c_str());
    borrow(offsets, verb, "candidate_offsets", 1, "int32 or int64 [B + 1]", false);
    const bool wide = offsets.tensor.dtype == dtype_of<int64_t>();
    if (!wide && offsets.tensor.dtype != dtype_of<int32_t>())
      wrong_type(verb, "candidate_offsets", "int32 or int64 [B + 1]", describe(offsets));
    if (offsets.tensor.shape[0] != k[0] + 1)
      wrong_value(verb, "candidate_offsets", "[" + std::to_string(k[0] + 1) + "]", describe(offsets));
    char* const data = static_cast<char*>(offsets.tensor.data) + offsets.tensor.byte_offset;
    in.candidates = {data, data + (wide ? 8 : 4), wide ? DType::int64 : DType::int32, k[0]};
  }
};

void attend_candidates(View q, View keys, View values, View candidate_offsets, View bias, float scale, View out,
                       View lse) {
  const AttendArguments a("attend", q, keys, values, candidate_offsets, bias, scale);
  const Attended to{rows<MutableRows>(out, "attend", "out", 3, "q's type, [N, H, V]"),
                    array<float, 2>(lse, "attend", "out lse", "float32 [N, H]")};
  run([&](int workers) { return attend_workspace(a.in, workers); },
      [&](const Context& context) { return attend(context, a.in, to); });
}

void attend_gradients(View d_out, View d_lse, View out, View lse, View q, View keys, View values,
                      View candidate_offsets, View bias, float scale, View dq, View dkeys, View dvalues, View dbias) {
  constexpr const char* kVerb = "attend_backward";
  const AttendArguments a(kVerb, q, keys, values, candidate_offsets, bias, scale);
  const AttendForward forward{
      rows(d_out, kVerb, "d_out", 3, "[N, H, V]"), array<const float, 2>(d_lse, kVerb, "d_lse", "float32 [N, H]", true),
      rows(out, kVerb, "out", 3, "[N, H, V]"), array<const float, 2>(lse, kVerb, "lse", "float32 [N, H]")};
  const AttendGradients to{array<float, 3>(dq, kVerb, "dq", "float32 [N, H, d]"),
                           array<float, 4>(dkeys, kVerb, "dkeys", "float32 [B, M, H, d]"),
                           array<float, 4>(dvalues, kVerb, "dvalues", "float32 [B, M, H, V]"),
                           array<float, 2>(dbias, kVerb, "dbias", "float32 [B, M]", true)};
  run([&](int workers) { return attend_backward_workspace(a.in, workers); },
      [&](const Context& context) { return attend_backward(context, a.in, forward, to); });
}

}  // namespace

NB_MODULE(_core, m) {
  nb::set_leak_warnings(false);  // torch's registry may keep codebooks to the end
  m.doc() = "The compiled core of hisac. Use the functions of hisac, which check kinds and allocate results.";
  nb::exception<CorruptFile>(m, "CorruptFileError", PyExc_ValueError).doc() =
      "The bytes are no hisac codebook, or a damaged one.";

  nb::class_<Codebook>(m, "Codebook")
      .def("__init__", make_codebook, "centers"_a)
      .def_static("load", load_codebook, "path"_a)
      .def_static("parse", parse_codebook, "data"_a)
      .def("save", save_codebook, "path"_a)
      .def("serialize", serialize_codebook)
      .def("copy_centers", copy_centers, "level"_a, "out"_a)
      .def_prop_ro(
          "sizes",
          [](const Codebook& book) {
            nb::list sizes;
            for (int l = 0; l < book.levels(); ++l) sizes.append(book.size(l));
            return nb::tuple(sizes);
          },
          nb::sig("def sizes(self) -> tuple[int, ...]"))
      .def_prop_ro("width", &Codebook::width)
      .def_prop_ro("fingerprint", &Codebook::fingerprint);

  m.def("encode", encode_codes, "book"_a, "x"_a, "codes"_a);
  m.def("leaves", leaf_numbers, "book"_a, "codes"_a, "out"_a);
  m.def("prototypes", prototype_rows, "book"_a, "codes"_a, "out"_a);
  m.def("fit", fit_centers, "x"_a, "centers"_a, "iterations"_a, "seed"_a, "progress"_a.none(),
        nb::sig("def fit(x: typing.Any, centers: collections.abc.Sequence[typing.Any], iterations: int, seed: int, "
                "progress: object | None) -> tuple[int, int, tuple[int, ...], tuple[float, ...], tuple[int, ...]]"));
  m.def("vote", vote_agents, "book"_a, "codes"_a, "starts"_a, "ends"_a.none(), "budget"_a, "fanout"_a,
        "weights"_a.none(), "out_codes"_a, "out_votes"_a, "out_count"_a);
  m.def("route", route_tokens, "x"_a.none(), "v"_a, "starts"_a, "ends"_a.none(), "prototypes"_a, "count"_a.none(),
        "temperature"_a, "normalize"_a, "bias"_a.none(), "spread"_a.none(), "codes"_a.none(), "book"_a.none(),
        "method"_a, "refine"_a, "missing"_a, "precision"_a, "x_ids"_a.none(), "v_ids"_a.none(), "x_scale"_a.none(),
        "tokens"_a, "lse"_a, "refined"_a.none());
  m.def("route_backward", route_gradients, "d_tokens"_a, "d_lse"_a.none(), "tokens"_a, "lse"_a, "x"_a.none(), "v"_a,
        "starts"_a, "ends"_a.none(), "prototypes"_a, "count"_a.none(), "temperature"_a, "normalize"_a, "bias"_a.none(),
        "spread"_a.none(), "codes"_a.none(), "book"_a.none(), "method"_a, "missing"_a, "precision"_a, "x_ids"_a.none(),
        "v_ids"_a.none(), "x_scale"_a.none(), "dv"_a.none(), "dtemperature"_a.none(), "dbias"_a.none(), "dx"_a.none(),
        "dprototypes"_a.none());
  m.def("leaf_sums", sum_leaves, "x"_a.none(), "v"_a, "starts"_a, "ends"_a.none(), "bias"_a.none(), "spread"_a.none(),
        "codes"_a, "book"_a, "x_ids"_a.none(), "v_ids"_a.none(), "x_scale"_a.none(), "out_x"_a, "out_v"_a,
        "out_offsets"_a, "out_bias"_a, "out_spread"_a, "out_codes"_a);
  m.def("sum_rows", sum_of_rows, "rows"_a, "order"_a, "begin"_a, "out"_a);
  m.def("attend", attend_candidates, "q"_a, "keys"_a, "values"_a, "candidate_offsets"_a, "bias"_a.none(), "scale"_a,
        "out"_a, "lse"_a);
  m.def("attend_backward", attend_gradients, "d_out"_a, "d_lse"_a.none(), "out"_a, "lse"_a, "q"_a, "keys"_a, "values"_a,
        "candidate_offsets"_a, "bias"_a.none(), "scale"_a, "dq"_a, "dkeys"_a, "dvalues"_a, "dbias"_a.none());

  m.def("set_num_threads", [](int n) { Pool::get().resize(n); }, "n"_a);
  m.def("get_num_threads", [] { return Pool::get().workers(); });
  m.def("available_isas", [] { return std::string(available_isas()); });
  m.def("active_isa", [] { return std::string(active_isa()); });
}

}  // namespace hisac::bind
