// SPDX-License-Identifier: Apache-2.0
#include "backend.h"

#include "cpu/verbs.h"

namespace hisac::cpu {

constexpr Backend kBackend = [] {
  Backend backend;
  HISAC_EACH_VERB(HISAC_FILL_VERB)
  HISAC_EACH_CPU_VERB(HISAC_FILL_VERB)
  return backend;
}();

}  // namespace hisac::cpu
