// SPDX-License-Identifier: Apache-2.0
#include "backend.h"
#include "codebook/checks.h"

namespace hisac {

Status code_prototypes(const Context& context, const Codebook& book, Array<const int32_t, 2> codes,
                       Array<float, 2> out) noexcept {
  HISAC_TRY(check_book("prototypes", &book));
  HISAC_TRY(check_codes("prototypes", book, codes.shape, codes.shape[0]));
  if (out.shape[0] != codes.shape[0] || out.shape[1] != book.width())
    return Status::error(Code::invalid_argument,
                         "prototypes: out expected [%" PRId64 ", %" PRId64 "], got [%" PRId64 ", %" PRId64 "]",
                         codes.shape[0], book.width(), out.shape[0], out.shape[1]);
  return call_backend("prototypes", &Backend::code_prototypes, context, book, codes, out);
}

}  // namespace hisac
