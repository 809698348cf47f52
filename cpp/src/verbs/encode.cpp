// SPDX-License-Identifier: Apache-2.0
#include "hisac/encode.h"

#include "backend.h"
#include "codebook/checks.h"
#include "verbs/histories.h"

namespace hisac {

size_t encode_workspace(const Context& context, const Codebook& book) noexcept {
  if (book.empty()) return 0;
  return backend_workspace(&Backend::encode_workspace, context, book);
}

Status check_encode(const Codebook& book, const Rows& x, const Array<int32_t, 2>& codes) noexcept {
  HISAC_TRY(check_book("encode", &book));
  HISAC_TRY(check_float("encode", "x", x.dtype));
  if (x.width != book.width())
    return invalid("encode: x is %s, the codebook has D = %" PRId64 ": D differs", ShapeText({x.rows, x.width}).text,
                   book.width());
  return check_codes("encode", book, codes, x.rows);
}

Status encode(const Context& context, const Codebook& book, Rows x, Array<int32_t, 2> codes) noexcept {
  HISAC_TRY(check_encode(book, x, codes));
  return call_backend("encode", &Backend::encode, context, book, x, codes);
}

}  // namespace hisac
