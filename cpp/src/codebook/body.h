// SPDX-License-Identifier: Apache-2.0
// What a Codebook holds: its centers and, for `encode`, each level packed once.
#pragma once
#include "codebook/level.h"
#include "hisac/codebook.h"

namespace hisac {

struct Codebook::Body {
  int levels = 0;
  int64_t width = 0;
  int64_t size[kMaxLevels] = {};
  uint64_t stride[kMaxLevels] = {};  // leaves below a node of the level: the product of the later sizes
  Level level[kMaxLevels];
  uint64_t fingerprint = 0;
  bool wide = false;  // 2^64 leaves or fewer, but more than int64 holds
  float* memory = nullptr;
};

}  // namespace hisac
