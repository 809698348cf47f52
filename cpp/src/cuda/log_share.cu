// SPDX-License-Identifier: Apache-2.0
// The log of each token's share of its user's history, for `compress`: a warp for a user.
#include "cuda/device/elements.h"
#include "cuda/device/launcher.h"
#include "cuda/verbs.h"

namespace hisac::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

/// Logits in base 2, of lse or of votes.
struct Logits {
  Array<const float, 2> lse;
  Array<const int64_t, 2> votes;
  bool of_votes;
  SIMT_DEVICE double operator()(int64_t i) const {
    const double mass = static_cast<double>(lse.data[i]) / kLn2;
    if (!of_votes || lse.data[i] == -kInfinity) return mass;
    const int64_t n = votes.data ? votes.data[i] : 1;
    return n > 0 ? static_cast<double>(simt::log2(static_cast<float>(n))) : -static_cast<double>(kInfinity);
  }
};

SIMT_KERNEL(kThreads) share_out(Logits logit, Array<float, 2> out) {
  const int64_t seats = out.shape[1], step = int64_t{simt::blocks()} * kWarps;
  for (int64_t b = int64_t{simt::block()} * kWarps + simt::warp(); b < out.shape[0]; b += step) {
    const int64_t begin = b * seats, end = begin + seats;
    double most = -static_cast<double>(kInfinity), sum = 0;
    for (int64_t i = begin + simt::lane(); i < end; i += 32) most = logit(i) > most ? logit(i) : most;
    for (int m = 16; m; m /= 2) {
      const double other = simt::shuffle_xor(most, m);
      most = other > most ? other : most;
    }
    const bool some = most > -static_cast<double>(kInfinity);
    for (int64_t i = begin + simt::lane(); some && i < end; i += 32)
      sum += static_cast<double>(simt::exp2(static_cast<float>(logit(i) - most)));
    for (int m = 16; m; m /= 2) sum += simt::shuffle_xor(sum, m);
    const double first = some ? most : 0, total = some ? static_cast<double>(simt::log2(static_cast<float>(sum))) : 0;
    for (int64_t i = begin + simt::lane(); i < end; i += 32)
      out.data[i] = static_cast<float>((logit(i) - first - total) * kLn2);
  }
}

}  // namespace

Status log_share(const Context& context, Normalize normalize, Array<const float, 2> lse, Array<const int64_t, 2> votes,
                 Array<float, 2> out) noexcept {
  Launcher launch("compress", context);
  const int64_t blocks = (out.shape[0] + kWarps - 1) / kWarps;
  launch(share_out, least(blocks, launch.machine.processors * 8), kThreads, 0,
         Logits{lse, votes, normalize == Normalize::history}, out);
  return launch.status();
}

}  // namespace hisac::cuda
