// SPDX-License-Identifier: Apache-2.0
// The data of a Codebook: its shape, its image, and each level's centers, packed once for `encode`.
#pragma once
#include "codebook/image.h"
#include "codebook/level.h"

namespace hisac {

/// Lies at the start of the scratch of a codebook, before the packed levels.
struct Codebook::Body {
  int levels = 0;
  int64_t width = 0;
  int64_t size[kMaxLevels] = {};
  uint64_t stride[kMaxLevels] = {};  // leaves below a node of the level: the product of the later sizes
  Level level[kMaxLevels];
  bool wide = false;  // more leaves than int64 can number
  const ImageHead* image = nullptr;
};

}  // namespace hisac
