// SPDX-License-Identifier: Apache-2.0
#include "backend.h"
#include "codebook/checks.h"

namespace hisac {

Status code_prototypes(const Context& context, const Codebook& book, Array<const int32_t, 2> codes,
                       Array<float, 2> out) noexcept {
  HISAC_TRY(check_book("prototypes", &book));
  HISAC_TRY(check_codes("prototypes", book, codes, codes.shape[0]));
  HISAC_TRY(check_shape("prototypes", "out", {codes.shape[0], book.width()}, out));
  return call_backend("prototypes", &Backend::code_prototypes, context, book, codes, out);
}

}  // namespace hisac
