// SPDX-License-Identifier: Apache-2.0
#include "verbs/route_inputs.h"

#include <cstdio>

#include "codebook/checks.h"

namespace hisac {
namespace {

/// "x is [300, 48]", or "x_ids is [300]" where rows are gathered.
struct Extent {
  char text[80];
  Extent(const char* name, const Rows& rows, const Ids& ids) noexcept {
    if (ids)
      std::snprintf(text, sizeof text, "%s_ids is [%" PRId64 "]", name, ids.size);
    else
      std::snprintf(text, sizeof text, "%s is [%" PRId64 ", %" PRId64 "]", name, rows.rows, rows.width);
  }
};

/// The types of x, v, their ids and the scale, and that all have the same number of behaviours.
Status check_gathered(const char* verb, const RouteInputs& in) noexcept {
  const bool int8 = in.x.data && in.x.dtype == DType::int8;
  if (in.x.data && !int8) HISAC_TRY(check_float(verb, "x", in.x.dtype, ", float16 or int8"));
  HISAC_TRY(check_float(verb, "v", in.v.dtype));
  for (const Ids* ids : {&in.x_ids, &in.v_ids})
    if (*ids && ids->dtype != DType::int32 && ids->dtype != DType::int64)
      return Status::error(Code::wrong_type, "%s: %s expected int32 or int64", verb,
                           ids == &in.x_ids ? "x_ids" : "v_ids");
  if (in.x_ids && !in.x.data) return Status::error(Code::invalid_argument, "%s: x_ids expected with x, got none", verb);
  if (in.x_scale && !int8)
    return Status::error(Code::invalid_argument, "%s: x_scale expected with x of int8, got another", verb);
  if (in.x_scale && in.x_scale.shape[0] != 1 && in.x_scale.shape[0] != in.x.rows)
    return Status::error(Code::invalid_argument, "%s: x_scale expected [1] or [%" PRId64 "], got [%" PRId64 "]", verb,
                         in.x.rows, in.x_scale.shape[0]);
  const int64_t x_rows = in.x_ids ? in.x_ids.size : in.x.rows, v_rows = in.behaviours();
  if (in.x.data && x_rows != v_rows)
    return Status::error(Code::invalid_argument, "%s: %s, %s: T differs (%" PRId64 ", %" PRId64 ")", verb,
                         Extent("x", in.x, in.x_ids).text, Extent("v", in.v, in.v_ids).text, x_rows, v_rows);
  return {};
}

}  // namespace

bool sizes_fit(const RouteInputs& in, int64_t longest) noexcept {
  const int64_t* const p = in.prototypes.shape;
  return within({p[2], in.v.width}, 1, kMostWidth) && within({p[1]}, 0, kMostAgents) &&
         within({in.histories.users, in.behaviours(), longest}, 0, kMostRows);
}

Status check_route(const char* verb, const RouteParams& params, const RouteInputs& in, Device device) noexcept {
  const int64_t* const p = in.prototypes.shape;
  const int64_t rows = in.behaviours();
  HISAC_TRY(check_gathered(verb, in));
  if (in.x.data && in.x.width != p[2])
    return Status::error(Code::invalid_argument,
                         "%s: prototypes is [%" PRId64 ", %" PRId64 ", %" PRId64 "], x is [%" PRId64 ", %" PRId64
                         "]: D differs (%" PRId64 ", %" PRId64 ")",
                         verb, p[0], p[1], p[2], in.x.rows, in.x.width, p[2], in.x.width);
  if (!within({p[2], in.v.width}, 1, kMostWidth))
    return Status::error(Code::invalid_argument, "%s: expected D and V of 1 to 2^20, got %" PRId64 " and %" PRId64,
                         verb, p[2], in.v.width);
  if (!within({in.histories.users, rows}, 0, kMostRows))
    return Status::error(Code::invalid_argument,
                         "%s: expected at most 2^40 users and behaviours, got %" PRId64 " and %" PRId64, verb,
                         in.histories.users, rows);
  HISAC_TRY(check_histories(verb, in.histories, rows, device));
  if (p[0] != in.histories.users)
    return Status::error(Code::invalid_argument,
                         "%s: prototypes is [%" PRId64 ", %" PRId64 ", %" PRId64 "], offsets name %" PRId64
                         " users: B differs (%" PRId64 ", %" PRId64 ")",
                         verb, p[0], p[1], p[2], in.histories.users, p[0], in.histories.users);
  if (p[1] > kMostAgents)
    return Status::error(Code::invalid_argument, "%s: expected at most 2^24 agents, got %" PRId64, verb, p[1]);
  const int64_t temperatures = params.temperature.shape[0];
  if (!params.temperature || (temperatures != 1 && temperatures != p[1]))
    return Status::error(Code::invalid_argument, "%s: temperature expected [1] or [%" PRId64 "], got [%" PRId64 "]",
                         verb, p[1], params.temperature ? temperatures : 0);
  if (in.count) HISAC_TRY(check_length(verb, "count", p[0], in.count.shape[0]));
  if (in.spread) HISAC_TRY(check_length(verb, "spread", rows, in.spread.shape[0]));
  if (in.bias) HISAC_TRY(check_length(verb, "bias", rows, in.bias.shape[0]));
  if (params.refine < 0)
    return Status::error(Code::invalid_argument, "%s: refine expected 0 or more, got %d", verb, params.refine);
  const bool leaf = params.method == Method::leaf;
  if (!in.codes && (rows > 0 ? leaf || !in.x.data : leaf && !in.book))
    return Status::error(Code::invalid_argument,
                         "%s: codes expected where x is not given and with the leaf method, got none", verb);
  if (in.codes || leaf) HISAC_TRY(check_book(verb, in.book));
  if (in.codes) {
    HISAC_TRY(check_codes(verb, *in.book, in.codes.shape, rows));
    if (!in.x.data && in.book->width() != p[2])
      return Status::error(Code::invalid_argument,
                           "%s: prototypes is [%" PRId64 ", %" PRId64 ", %" PRId64 "], the codebook has D = %" PRId64
                           ": D differs",
                           verb, p[0], p[1], p[2], in.book->width());
  }
  return {};
}

}  // namespace hisac
