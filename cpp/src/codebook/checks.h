// SPDX-License-Identifier: Apache-2.0
// Checks of what belongs to a codebook; each message says what was expected and what came.
#pragma once
#include "base/checks.h"
#include "hisac/codebook.h"

namespace hisac {

inline Status check_book(const char* verb, const Codebook* book) noexcept {
  if (book && !book->empty()) return {};
  return Status::error(Code::invalid_argument, "%s: codebook expected, got an empty one", verb);
}

/// codes is [rows, L] of this book.
inline Status check_codes(const char* verb, const Codebook& book, const int64_t* shape, int64_t rows) noexcept {
  if (shape[0] == rows && shape[1] == book.levels()) return {};
  return Status::error(Code::invalid_argument, "%s: codes expected [%" PRId64 ", %d], got [%" PRId64 ", %" PRId64 "]",
                       verb, rows, book.levels(), shape[0], shape[1]);
}

}  // namespace hisac
