// SPDX-License-Identifier: Apache-2.0
// The data of a Codebook: its shape, and each level's centers, packed once for `encode`.
#pragma once
#include <cstdlib>

#include "codebook/level.h"
#include "hisac/codebook.h"

namespace hisac {

struct Codebook::Body {
  ~Body() { std::free(memory); }

  int levels = 0;
  int64_t width = 0;
  int64_t size[kMaxLevels] = {};
  uint64_t stride[kMaxLevels] = {};  // leaves below a node of the level: the product of the later sizes
  Level level[kMaxLevels];
  uint64_t fingerprint = 0;
  bool wide = false;  // more leaves than int64 can number
  float* memory = nullptr;
};

}  // namespace hisac
