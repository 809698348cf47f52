// SPDX-License-Identifier: Apache-2.0
// Calls a lambda on ranges through the caller's executor, or serially.
#pragma once
#include <algorithm>

#include "hisac/context.h"

namespace hisac {

/// Calls work(begin, end, worker) on disjoint ranges that cover [0, n).
template <class Work>
void parallel_for(const Context& context, int64_t n, Work work) {
  if (n <= 0) return;
  if (workers_of(context) == 1 || n == 1) return work(int64_t{0}, n, 0);
  context.executor->parallel_for(
      context.executor->ctx, n,
      [](void* arg, int64_t begin, int64_t end, int worker) { (*static_cast<Work*>(arg))(begin, end, worker); }, &work);
}

/// Calls work(i, worker) for each i in [0, n).
template <class Work>
void parallel_each(const Context& context, int64_t n, Work work) {
  parallel_for(context, n, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t i = begin; i < end; ++i) work(i, worker);
  });
}

/// Calls work(begin, end, worker) on disjoint ranges that cover [0, n), each of which begins at a multiple of `piece`.
template <class Work>
void parallel_pieces(const Context& context, int64_t n, int64_t piece, Work work) {
  parallel_for(context, (n + piece - 1) / piece,
               [&](int64_t begin, int64_t end, int worker) { work(begin * piece, std::min(end * piece, n), worker); });
}

}  // namespace hisac
