// SPDX-License-Identifier: Apache-2.0
#include "hisac/status.h"

#include <cstdarg>
#include <cstdio>

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

}  // namespace hisac
