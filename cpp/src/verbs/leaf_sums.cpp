// SPDX-License-Identifier: Apache-2.0
#include "hisac/leaf_sums.h"

#include "backend.h"
#include "base/arena.h"
#include "codebook/checks.h"
#include "verbs/histories.h"

namespace hisac {
namespace {

Status check(const Codebook& book, const Histories& in, const LeafSums& out, Device device) noexcept {
  HISAC_TRY(check_book("leaf_sums", &book));
  const int64_t width = width_of(book, in);
  HISAC_TRY(check_histories("leaf_sums", &book, in, width, true, device));
  const int64_t users = in.offsets.users, levels = book.levels();
  int64_t rows = 0;  // of all histories; on a device their lengths cannot be read
  for (int64_t b = 0; b < users && device == Device::cpu; ++b) rows += in.offsets.end(b) - in.offsets.start(b);
  const bool fits = out.x.shape[0] >= rows && out.v.shape[0] >= rows && out.bias.shape[0] >= rows &&
                    out.spread.shape[0] >= rows && out.codes.shape[0] >= rows && out.offsets.shape[0] == users + 1 &&
                    out.x.shape[1] == width && out.v.shape[1] == in.v.width && out.codes.shape[1] == levels;
  if (fits) return {};
  return Status::error(Code::invalid_argument,
                       "leaf_sums: out expected offsets [%" PRId64 "] and at least %" PRId64 " rows of x [%" PRId64
                       "], v [%" PRId64 "], codes [%" PRId64 "], bias and spread",
                       users + 1, rows, width, in.v.width, levels);
}

}  // namespace

size_t leaf_sums_workspace(const Context& context, const Codebook& book, const Histories& histories,
                           int64_t longest) noexcept {
  if (!sizes_fit(histories, width_of(book, histories), 0, longest)) return Arena::kLimit;
  return backend_workspace(&Backend::leaf_sums_workspace, context, book, histories, longest);
}

Status leaf_sums(const Context& context, const Codebook& book, const Histories& histories,
                 const LeafSums& out) noexcept {
  HISAC_TRY(check(book, histories, out, context.device));
  return call_backend("leaf_sums", &Backend::leaf_sums, context, book, histories, out);
}

}  // namespace hisac
