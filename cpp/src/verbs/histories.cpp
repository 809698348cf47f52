// SPDX-License-Identifier: Apache-2.0
#include "verbs/histories.h"

#include <tuple>

#include "codebook/checks.h"
#include "codebook/image.h"

namespace hisac {
namespace {

/// Of rows, or of their ids where they are gathered.
ShapeText extent(const Rows& rows, const Ids& ids) noexcept {
  return ids ? ShapeText({ids.size}) : ShapeText({rows.rows, rows.width});
}

/// The types and widths of x and v, and the scale.
Status check_rows(const char* verb, const Histories& in, int64_t width) noexcept {
  const bool int8 = in.x.data && in.x.dtype == DType::int8;
  if (in.x.data && !int8) HISAC_TRY(check_float(verb, "x", in.x.dtype, ", float16 or int8"));
  if (in.v.data || in.v.width) HISAC_TRY(check_float(verb, "v", in.v.dtype));
  if (!in.v.data && in.v.width && in.behaviours() > 0) return invalid("%s: v expected, got none", verb);
  if (in.x_scale && !int8) return invalid("%s: x_scale expected with x of int8, got another", verb);
  if (in.x_scale && in.x_scale.shape[0] != 1 && in.x_scale.shape[0] != in.x.rows)
    return invalid("%s: x_scale expected [1] or [%" PRId64 "], got [%" PRId64 "]", verb, in.x.rows,
                   in.x_scale.shape[0]);
  if (!within({width}, 1, kMostWidth) || !within({in.v.width}, in.v.data ? 1 : 0, kMostWidth))
    return invalid("%s: expected D and V of 1 to 2^20, got %" PRId64 " and %" PRId64, verb, width, in.v.width);
  return {};
}

}  // namespace

Status check_sizes(const char* verb, const Histories& in) noexcept {
  for (const auto& [name, ids] : {std::tuple("x_ids", &in.x_ids), std::tuple("v_ids", &in.v_ids)}) {
    if (!*ids && ids->size) return invalid("%s: %s expected [%" PRId64 "], got null", verb, name, ids->size);
    if (*ids && ids->dtype != DType::int32 && ids->dtype != DType::int64)
      return Status::error(Code::wrong_type, "%s: %s expected int32 or int64", verb, name);
  }
  if (in.x_ids && !in.x.data && !in.codes) return invalid("%s: x_ids expected with x or codes, got neither", verb);
  const int64_t rows = in.behaviours(), x_rows = in.x_ids ? in.x_ids.size : in.x.rows,
                v_rows = in.v_ids ? in.v_ids.size : in.v.rows, items = in.x_ids ? in.items() : rows;
  if ((in.x_ids || in.x.data) && (in.v_ids || in.v.data) && x_rows != v_rows)
    return invalid("%s: x%s is %s, v%s is %s: T differs (%" PRId64 ", %" PRId64 ")", verb, in.x_ids ? "_ids" : "",
                   extent(in.x, in.x_ids).text, in.v_ids ? "_ids" : "", extent(in.v, in.v_ids).text, x_rows, v_rows);
  if (in.codes) HISAC_TRY(check_shape(verb, "codes", {items, in.codes.shape[1]}, in.codes));
  if (in.bias) HISAC_TRY(check_shape(verb, "bias", {rows}, in.bias));
  if (in.spread) HISAC_TRY(check_shape(verb, "spread", {rows}, in.spread));
  if (in.weights && in.weights.dtype != DType::float32 && in.weights.dtype != DType::int64)
    return Status::error(Code::wrong_type, "%s: weights expected float32 or int64", verb);
  if (in.weights && in.weights.size != rows)
    return invalid("%s: weights expected [%" PRId64 "], got [%" PRId64 "]", verb, rows, in.weights.size);
  return {};
}

bool sizes_fit(const Histories& in, int64_t width, int64_t agents) noexcept {
  return within({width}, 1, kMostWidth) && within({in.v.width}, 0, kMostWidth) && within({agents}, 0, kMostAgents) &&
         within({in.offsets.users, in.behaviours(), in.longest, in.rows}, 0, kMostRows);
}

Histories stated(const Histories& in, Device device) noexcept {
  Histories out = in;
  const Spans& spans = in.offsets;
  const int64_t t = in.behaviours();
  if (out.longest && out.rows) return out;
  int64_t longest = t, rows = t;
  if (device == Device::cpu && spans.starts && spans.ends) {
    longest = rows = 0;
    for (int64_t b = 0; b < spans.users; ++b) {
      const int64_t n = std::clamp(spans.end(b), int64_t{0}, t) - std::clamp(spans.start(b), int64_t{0}, t);
      longest = std::max(longest, n);
      rows += std::max(n, int64_t{0});
    }
  } else if (!spans.ragged()) {
    const int64_t most = out.longest ? std::min(out.longest, t) : t;
    if (__builtin_mul_overflow(most, spans.users, &rows) || rows > kMostRows) rows = kMostRows;
  }
  if (!out.longest) out.longest = longest;
  if (!out.rows) out.rows = rows;
  return out;
}

Status check_offsets(const char* verb, Histories& in, Device device) noexcept {
  HISAC_TRY(check_spans(verb, "offsets", in.offsets, in.behaviours(), device));
  Histories counted = in;
  counted.longest = counted.rows = 0;
  counted = stated(counted, device);
  for (const auto& [name, given, most] :
       {std::tuple("longest", in.longest, counted.longest), std::tuple("rows", in.rows, counted.rows)})
    if (given < 0 || (device == Device::cpu && given && given < most))
      return invalid("%s: %s expected at least %" PRId64 ", got %" PRId64, verb, name, given < 0 ? 0 : most, given);
  in = stated(in, device);
  return {};
}

Status check_histories(const char* verb, const Codebook* book, Histories& in, int64_t width, Device device) noexcept {
  const int64_t rows = in.behaviours();
  HISAC_TRY(check_sizes(verb, in));
  if (!in.x.data && !book && rows > 0)
    return invalid("%s: codes and their codebook expected where x is not given, got no codebook", verb);
  HISAC_TRY(check_rows(verb, in, width));
  if (!within({in.offsets.users, rows}, 0, kMostRows))
    return invalid("%s: expected at most 2^40 users and behaviours, got %" PRId64 " and %" PRId64, verb,
                   in.offsets.users, rows);
  HISAC_TRY(check_offsets(verb, in, device));
  if (!book) return {};
  HISAC_TRY(check_book(verb, book));
  return in.codes || rows > 0 ? check_codes(verb, *book, in.codes, in.x_ids ? in.items() : rows) : Status();
}

Status check_listed(const char* verb, const char* name, const Ids& ids, const Ids& listed) noexcept {
  if (listed && listed.dtype != DType::int32 && listed.dtype != DType::int64)
    return Status::error(Code::wrong_type, "%s: %s_rows expected int32 or int64", verb, name);
  if (listed && !ids) return invalid("%s: %s_rows expected with %s_ids, got none", verb, name, name);
  return {};
}

/// Sets a temperature that is not given to that in the head of the codebook's image, on the device of the call.
static Status state_temperature(const char* verb, const Context& context, const Codebook* book,
                                RouteParams& params) noexcept {
  if (params.temperature) return {};
  if (!book || !(book->temperature() > 0))
    return invalid("%s: temperature expected, since %s, got none", verb,
                   book ? "the codebook has no default one" : "there is no codebook with a default one");
  const std::byte* image = book->image().data;
  if (context.device != Device::cpu) {
    HISAC_TRY(check_device_image(verb, context, *book));
    image = context.codebook_image.bytes.data;
  }
  params.temperature = {reinterpret_cast<const float*>(image + offsetof(ImageHead, temperature)), {1}};
  return {};
}

/// What sparse routing needs beside the rest.
static Status check_sparse(const char* verb, const Codebook* book, int64_t sparse, const RouteAgents& agents) noexcept {
  const auto& p = agents.prototypes.shape;
  if (sparse < 0)
    return Status::error(Code::invalid_argument, "%s: sparse expected 0 or more, got %" PRId64, verb, sparse);
  if (sparse == 0) return {};
  if (!book) return Status::error(Code::invalid_argument, "%s: book expected beside sparse, got none", verb);
  if (book->width() != p[2])
    return Status::error(Code::invalid_argument, "%s: prototypes is %s, the codebook has D = %" PRId64 ": D differs",
                         verb, ShapeText(p).text, book->width());
  HISAC_TRY(check_shape(verb, "agents' codes", {p[0], p[1], book->levels()}, agents.codes));
  if (!agents.lists) return {};
  const int64_t k = std::max(agents.lists.shape[2], std::min(sparse, p[1]));
  return check_shape(verb, "agents' lists", {p[0], book->size(0), k}, agents.lists);
}

Status check_route(const char* verb, const Context& context, const Codebook* book, RouteParams& params, Histories& in,
                   const RouteAgents& agents) noexcept {
  const auto& p = agents.prototypes.shape;
  if (in.x.data && in.x.width != p[2])
    return invalid("%s: prototypes is %s, x is %s: D differs (%" PRId64 ", %" PRId64 ")", verb, ShapeText(p).text,
                   ShapeText({in.x.rows, in.x.width}).text, p[2], in.x.width);
  HISAC_TRY(check_histories(verb, book, in, p[2], context.device));
  if (!in.x.data && book && in.codes && book->width() != p[2])
    return invalid("%s: prototypes is %s, the codebook has D = %" PRId64 ": D differs", verb, ShapeText(p).text,
                   book->width());
  if (p[0] != in.offsets.users)
    return invalid("%s: prototypes is %s, offsets name %" PRId64 " users: B differs (%" PRId64 ", %" PRId64 ")", verb,
                   ShapeText(p).text, in.offsets.users, p[0], in.offsets.users);
  if (p[1] > kMostAgents) return invalid("%s: expected at most 2^24 agents, got %" PRId64, verb, p[1]);
  if (agents.count) HISAC_TRY(check_shape(verb, "count", {p[0]}, agents.count));
  HISAC_TRY(check_sparse(verb, book, params.sparse, agents));
  HISAC_TRY(state_temperature(verb, context, book, params));
  const int64_t temperatures = params.temperature.shape[0];
  if (temperatures != 1 && temperatures != p[1])
    return invalid("%s: temperature expected [1] or [%" PRId64 "], got [%" PRId64 "]", verb, p[1], temperatures);
  return {};
}

}  // namespace hisac
