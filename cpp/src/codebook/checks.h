// SPDX-License-Identifier: Apache-2.0
// Checks of what belongs to a codebook; each message says what was expected and what came.
#pragma once
#include "base/checks.h"
#include "hisac/codebook.h"
#include "hisac/histories.h"

namespace hisac {

inline Status check_book(const char* verb, const Codebook* book) noexcept {
  if (book && !book->empty()) return {};
  return invalid("%s: codebook expected, got an empty one", verb);
}

/// D of a batch: that of x, or of the codebook where x is not given; 0 where there is neither.
inline int64_t width_of(const Codebook* book, const Histories& histories) noexcept {
  return histories.x.width ? histories.x.width : book ? book->width() : 0;
}

/// codes is [rows, L] of this book.
template <class T>
Status check_codes(const char* verb, const Codebook& book, const Array<T, 2>& codes, int64_t rows) noexcept {
  return check_shape(verb, "codes", {rows, book.levels()}, codes);
}

}  // namespace hisac
