// SPDX-License-Identifier: Apache-2.0
#include "hisac/fit.h"

#include "backend.h"
#include "base/arena.h"

namespace hisac {
namespace {

Status check_params(const FitParams& params, int64_t width) noexcept {
  if (params.levels < 1 || params.levels > kMaxLevels)
    return invalid("fit: sizes expected 1 to %d levels, got %d", kMaxLevels, params.levels);
  if (params.iterations < 0) return invalid("fit: iterations expected 0 or more, got %d", params.iterations);
  if (!within({width}, 1, kMostWidth))
    return invalid("fit: x expected [T, D] with D from 1 to 2^20, got D = %" PRId64, width);
  for (int l = 0; l < params.levels; ++l)
    if (!within({params.sizes[l]}, 1, 1 << 20))
      return invalid("fit: sizes expected 1 to 2^20 at level %d, got %" PRId64, l, params.sizes[l]);
  return {};
}

Status check(const FitParams& params, const Rows& x, const Array<float, 2>* centers) noexcept {
  HISAC_TRY(check_float("fit", "x", x.dtype));
  HISAC_TRY(check_params(params, x.width));
  for (int l = 0; l < params.levels; ++l)
    if (!has_shape(centers[l], {params.sizes[l], x.width}))
      return invalid("fit: centers of level %d expected %s, got %s", l, ShapeText({params.sizes[l], x.width}).text,
                     ShapeText(centers[l].shape).text);
  return {};
}

}  // namespace

size_t fit_workspace(const Context& context, const FitParams& params, int64_t rows, int64_t width) noexcept {
  if (rows < 0 || !check_params(params, width).ok()) return 0;
  if (rows > kMostRows) return Arena::kLimit;
  return backend_workspace(&Backend::fit_workspace, context, params, rows, width);
}

Status fit(const Context& context, const FitParams& params, Rows x, const Array<float, 2>* centers,
           FitReport* report) noexcept {
  if (context.device == Device::cpu) HISAC_TRY(check(params, x, centers));  // no other backend has fit
  return call_backend("fit", &Backend::fit, context, params, x, centers, report);
}

}  // namespace hisac
