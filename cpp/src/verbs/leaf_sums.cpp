// SPDX-License-Identifier: Apache-2.0
#include "hisac/leaf_sums.h"

#include "backend.h"
#include "base/arena.h"
#include "codebook/checks.h"
#include "verbs/histories.h"

namespace hisac {
namespace {

Status check_in(const char* verb, const Codebook& book, Histories& in, Device device) noexcept {
  HISAC_TRY(check_book(verb, &book));
  return check_histories(verb, &book, in, width_of(&book, in), device);
}

Status check_out(const Codebook& book, const Histories& in, const LeafSums& out, Device device) noexcept {
  const int64_t width = width_of(&book, in);
  const int64_t users = in.offsets.users, levels = book.levels();
  int64_t rows = 0;  // of all histories; on a device their lengths cannot be read
  for (int64_t b = 0; b < users && device == Device::cpu; ++b) rows += in.offsets.end(b) - in.offsets.start(b);
  const bool fits = out.x.shape[0] >= rows && out.v.shape[0] >= rows && out.bias.shape[0] >= rows &&
                    out.spread.shape[0] >= rows && out.votes.shape[0] >= rows && out.codes.shape[0] >= rows &&
                    out.offsets.users == users && out.x.shape[1] == width && out.v.shape[1] == in.v.width &&
                    out.codes.shape[1] == levels;
  if (fits) return {};
  return invalid("leaf_sums: out expected of %" PRId64 " users, with at least %" PRId64 " rows of x [%" PRId64
                 "], v [%" PRId64 "], codes [%" PRId64 "], bias, spread and votes",
                 users, rows, width, in.v.width, levels);
}

/// The sums of the same histories, float32, and their gradients.
Status check_forward(const Codebook& book, const Histories& in, const LeafSumsForward& f, Device device) noexcept {
  constexpr const char* kVerb = "leaf_sums_backward";
  const Histories& s = f.sums;
  const int64_t rows = s.codes.shape[0], width = width_of(&book, in), value_width = in.v.width;
  if (s.x.dtype != DType::float32 || s.v.dtype != DType::float32)
    return Status::error(Code::wrong_type, "%s: sums expected float32", kVerb);
  HISAC_TRY(check_codes(kVerb, book, s.codes, rows));
  if (s.offsets.users != in.offsets.users || s.x.rows != rows || s.x.width != width || s.v.rows != rows ||
      s.v.width != value_width || !has_shape(s.bias, {rows}) || !has_shape(s.spread, {rows}))
    return invalid("%s: sums expected of %" PRId64 " users, x %s, v %s, bias and spread %s", kVerb, in.offsets.users,
                   ShapeText({rows, width}).text, ShapeText({rows, value_width}).text, ShapeText({rows}).text);
  HISAC_TRY(check_spans(kVerb, "offsets of sums", s.offsets, rows, device));
  if (f.d_x) HISAC_TRY(check_shape(kVerb, "d_x", {rows, width}, f.d_x));
  if (f.d_v) HISAC_TRY(check_shape(kVerb, "d_v", {rows, value_width}, f.d_v));
  if (f.d_bias) HISAC_TRY(check_shape(kVerb, "d_bias", {rows}, f.d_bias));
  return f.d_spread ? check_shape(kVerb, "d_spread", {rows}, f.d_spread) : Status();
}

}  // namespace

size_t leaf_sums_workspace(const Context& context, const Codebook& book, const Histories& histories) noexcept {
  if (!sizes_fit(histories, width_of(&book, histories), 0)) return Arena::kLimit;
  return backend_workspace(&Backend::leaf_sums_workspace, context, book, stated(histories, context.device));
}

Status leaf_sums(const Context& context, const Codebook& book, const Histories& histories,
                 const LeafSums& out) noexcept {
  Histories in = histories;
  HISAC_TRY(check_in("leaf_sums", book, in, context.device));
  HISAC_TRY(check_out(book, in, out, context.device));
  return call_backend("leaf_sums", &Backend::leaf_sums, context, book, in, out);
}

size_t leaf_sums_backward_workspace(const Context& context, const Codebook& book, const Histories& histories,
                                    const LeafSumsGradients& out) noexcept {
  if (!sizes_fit(histories, width_of(&book, histories), 0)) return Arena::kLimit;
  const Histories in = stated(histories, context.device);
  return backend_workspace(&Backend::leaf_sums_backward_workspace, context, book, in, out);
}

Status leaf_sums_backward(const Context& context, const Codebook& book, const Histories& histories,
                          const LeafSumsForward& forward, const LeafSumsGradients& out) noexcept {
  Histories in = histories;
  HISAC_TRY(check_in("leaf_sums_backward", book, in, context.device));
  HISAC_TRY(check_forward(book, in, forward, context.device));
  HISAC_TRY(check_listed("leaf_sums_backward", "v", in.v_ids, out.v_rows));
  const int64_t rows = gradient_rows(in, in.v_ids, in.v.rows, out.v_rows);
  if (out.v) HISAC_TRY(check_shape("leaf_sums_backward", "dv", {rows, in.v.width}, out.v));
  if (out.bias) HISAC_TRY(check_shape("leaf_sums_backward", "dbias", {in.behaviours()}, out.bias));
  return call_backend("leaf_sums_backward", &Backend::leaf_sums_backward, context, book, in, forward, out);
}

}  // namespace hisac
