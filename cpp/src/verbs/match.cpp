// SPDX-License-Identifier: Apache-2.0
#include "hisac/match.h"

#include "backend.h"
#include "base/arena.h"
#include "codebook/checks.h"
#include "verbs/histories.h"

namespace hisac {
namespace {

/// Whether a workspace may be sized by these inputs.
bool sizes_fit(const MatchInputs& in) noexcept {
  return sizes_fit(in.sums, 1, 0) && within({in.size(), in.candidates.users}, 0, kMostRows);
}

/// The inputs with `longest` and `rows` of the sums stated.
MatchInputs stated(const MatchInputs& in, Device device) noexcept {
  MatchInputs out = in;
  out.sums = stated(in.sums, device);
  return out;
}

/// Checks the inputs, and states `longest` and `rows` of the sums.
Status check(const char* verb, const Codebook& book, MatchInputs& in, Device device) noexcept {
  HISAC_TRY(check_book(verb, &book));
  const Histories& sums = in.sums;
  if (sums.x_ids || sums.v_ids)
    return invalid("%s: sums expected without ids, got %s", verb, sums.x_ids ? "x_ids" : "v_ids");
  HISAC_TRY(check_float(verb, "v", sums.v.dtype));
  if (!within({sums.v.width}, 1, kMostWidth))
    return invalid("%s: expected V of 1 to 2^20, got %" PRId64, verb, sums.v.width);
  HISAC_TRY(check_shape(verb, "codes of sums", {sums.v.rows, book.levels()}, sums.codes));
  HISAC_TRY(check_sizes(verb, sums));
  if (!sizes_fit(in))
    return invalid("%s: expected at most 2^40 sums, users and candidates, got %" PRId64 ", %" PRId64 " and %" PRId64,
                   verb, sums.v.rows, in.candidates.users, in.size());
  HISAC_TRY(check_offsets(verb, in.sums, device));
  if (in.ids && in.ids.dtype != DType::int32 && in.ids.dtype != DType::int64)
    return Status::error(Code::wrong_type, "%s: ids expected int32 or int64", verb);
  HISAC_TRY(check_shape(verb, "codes", {in.codes.shape[0], book.levels()}, in.codes));
  if (in.candidates.users != sums.offsets.users)
    return invalid("%s: offsets of sums name %" PRId64 " users, candidate_offsets %" PRId64 ": B differs", verb,
                   sums.offsets.users, in.candidates.users);
  return check_in_order(verb, "candidate_offsets", in.candidates, in.size(), device);
}

}  // namespace

size_t match_workspace(const Context& context, const Codebook& book, const MatchInputs& inputs) noexcept {
  if (!sizes_fit(inputs)) return Arena::kLimit;
  return backend_workspace(&Backend::match_workspace, context, book, stated(inputs, context.device));
}

Status match(const Context& context, const Codebook& book, const MatchInputs& given, Match out) noexcept {
  MatchInputs inputs = given;
  HISAC_TRY(check("match", book, inputs, context.device));
  const int64_t n = inputs.size(), levels = book.levels(), width = inputs.sums.v.width;
  if (out.v.rows != n * levels || out.v.width != width || out.v.dtype != inputs.sums.v.dtype ||
      !has_shape(out.lse, {n, levels}))
    return invalid("match: out expected v %s of the type of the sums' and lse %s", ShapeText({n, levels, width}).text,
                   ShapeText({n, levels}).text);
  return call_backend("match", &Backend::match, context, book, inputs, out);
}

size_t match_backward_workspace(const Context& context, const Codebook& book, const MatchInputs& inputs) noexcept {
  if (!sizes_fit(inputs)) return Arena::kLimit;
  return backend_workspace(&Backend::match_backward_workspace, context, book, stated(inputs, context.device));
}

Status match_backward(const Context& context, const Codebook& book, const MatchInputs& given,
                      const MatchForward& forward, const MatchGradients& out) noexcept {
  constexpr const char* kVerb = "match_backward";
  MatchInputs inputs = given;
  HISAC_TRY(check(kVerb, book, inputs, context.device));
  const int64_t n = inputs.size(), levels = book.levels(), rows = inputs.sums.v.rows, width = inputs.sums.v.width;
  const Rows& d_v = forward.d_v;
  if (d_v.data) HISAC_TRY(check_float(kVerb, "d_v", d_v.dtype));
  if ((d_v.data && (d_v.rows != n * levels || d_v.width != width)) ||
      (forward.d_lse && !has_shape(forward.d_lse, {n, levels})))
    return invalid("match_backward: expected d_v %s and d_lse %s", ShapeText({n, levels, width}).text,
                   ShapeText({n, levels}).text);
  if (out.v) HISAC_TRY(check_shape(kVerb, "dv", {rows, width}, out.v));
  if (out.bias) HISAC_TRY(check_shape(kVerb, "dbias", {rows}, out.bias));
  return call_backend(kVerb, &Backend::match_backward, context, book, inputs, forward, out);
}

}  // namespace hisac
