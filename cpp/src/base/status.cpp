// SPDX-License-Identifier: Apache-2.0
#include "hisac/status.h"

#include <cstdarg>
#include <cstdio>

#include "base/checks.h"

namespace hisac {

Status Status::error(Code code, const char* format, ...) noexcept {
  Status status;
  status.code_ = code;
  va_list args;
  va_start(args, format);
  std::vsnprintf(status.what_, sizeof status.what_, format, args);
  va_end(args);
  return status;
}

Status invalid(const char* format, ...) noexcept {
  char what[sizeof(Status)];  // longer than a message may be
  va_list args;
  va_start(args, format);
  std::vsnprintf(what, sizeof what, format, args);
  va_end(args);
  return Status::error(Code::invalid_argument, "%s", what);
}

}  // namespace hisac
