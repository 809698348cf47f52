// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "base/parallel.h"
#include "cpu/verbs.h"

namespace hisac::cpu {

Status log_share(const Context& context, Normalize normalize, Array<const float, 2> lse, Array<const int64_t, 2> votes,
                 Array<float, 2> out) noexcept {
  const int64_t seats = out.shape[1];
  parallel_each(context, out.shape[0], [&](int64_t b, int) {
    const auto logit = [&](int64_t a) {
      const double mass = double(lse.data[b * seats + a]);
      if (normalize == Normalize::agents || mass == -INFINITY) return mass;
      return std::log(static_cast<double>(votes ? std::max<int64_t>(votes.data[b * seats + a], 0) : 1));
    };
    double most = -INFINITY, sum = 0;
    for (int64_t a = 0; a < seats; ++a) most = std::max(most, logit(a));
    if (most > -INFINITY)
      for (int64_t a = 0; a < seats; ++a) sum += std::exp(logit(a) - most);
    if (sum == 0) most = 0, sum = 1;  // no token has a share
    const double total = std::log(sum);
    for (int64_t a = 0; a < seats; ++a) out.data[b * seats + a] = static_cast<float>(logit(a) - most - total);
  });
  return {};
}

}  // namespace hisac::cpu
