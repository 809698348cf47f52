// SPDX-License-Identifier: Apache-2.0
#include "base/parallel.h"
#include "cpu/verbs.h"

namespace hisac::cpu {

Status code_prototypes(const Context& context, const Codebook& book, Array<const int32_t, 2> codes,
                       Array<float, 2> out) noexcept {
  parallel_pieces(context, codes.shape[0], 256, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) book.prototype(codes.data + i * book.levels(), out.data + i * book.width());
  });
  return {};
}

}  // namespace hisac::cpu
