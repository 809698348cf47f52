// SPDX-License-Identifier: Apache-2.0
#include "hisac/fit.h"

#include <cmath>

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

Status check(const FitParams& params, int64_t rows, int64_t width, const Array<float, 2>* centers) noexcept {
  HISAC_TRY(check_params(params, width));
  if (params.processes < 1 || params.process < 0 || params.process >= params.processes)
    return invalid("fit: process expected one of %d, got number %d", params.processes, params.process);
  if (params.weights && params.weights.shape[0] != rows)
    return invalid("fit: weights expected [%" PRId64 "], got [%" PRId64 "]", rows, params.weights.shape[0]);
  for (int l = 0; l < params.levels; ++l) {
    const ShapeText expected({params.sizes[l], width});
    if (!has_shape(centers[l], {params.sizes[l], width}))
      return invalid("fit: centers of level %d expected %s, got %s", l, expected.text,
                     ShapeText(centers[l].shape).text);
    if (!params.init) continue;
    const Array<const float, 2>& init = params.init[l];
    if (!has_shape(init, {params.sizes[l], width}))
      return invalid("fit: init of level %d expected %s, got %s", l, expected.text, ShapeText(init.shape).text);
    for (int64_t i = 0; i < params.sizes[l] * width; ++i)
      if (!(std::fabs(init.data[i]) < 0x1p110f))
        return invalid("fit: init of level %d expected below 2^110, got %g", l, double(init.data[i]));
  }
  return {};
}

Status check_step(const FitStep& step) noexcept {
  if (step.state && !step.done) return {};
  return invalid("fit: a step expected of a fit that has begun and is not done, got one that %s",
                 step.done ? "is done" : "has not begun");
}

}  // namespace

size_t fit_workspace(const Context& context, const FitParams& params, int64_t rows, int64_t width) noexcept {
  if (rows < 0 || !check_params(params, width).ok()) return 0;
  if (rows > kMostRows) return Arena::kLimit;
  return backend_workspace(&Backend::fit_workspace, context, params, rows, width);
}

Status fit_begin(const Context& context, const FitParams& params, int64_t rows, int64_t width,
                 const Array<float, 2>* centers, FitReport* report, FitStep* step) noexcept {
  if (context.device == Device::cpu) HISAC_TRY(check(params, rows, width, centers));  // no other backend has fit
  return call_backend("fit", &Backend::fit_begin, context, params, rows, width, centers, report, step);
}

Status fit_add(const Context& context, FitStep* step, Rows chunk) noexcept {
  HISAC_TRY(check_step(*step));
  HISAC_TRY(check_float("fit", "x", chunk.dtype));
  return call_backend("fit", &Backend::fit_add, context, step, chunk);
}

Status fit_next(const Context& context, FitStep* step) noexcept {
  HISAC_TRY(check_step(*step));
  return call_backend("fit", &Backend::fit_next, context, step);
}

Status fit(const Context& context, const FitParams& params, Rows x, const Array<float, 2>* centers,
           FitReport* report) noexcept {
  if (context.device == Device::cpu) HISAC_TRY(check_float("fit", "x", x.dtype));
  if (params.processes > 1) return invalid("fit: processes expected 1 in one call, got %d", params.processes);
  FitStep step;
  HISAC_TRY(fit_begin(context, params, x.rows, x.width, centers, report, &step));
  while (!step.done) {
    HISAC_TRY(fit_add(context, &step, x));
    HISAC_TRY(fit_next(context, &step));
  }
  return {};
}

}  // namespace hisac
