// SPDX-License-Identifier: Apache-2.0
#include "hisac/vote.h"

#include <algorithm>

#include "backend.h"
#include "base/arena.h"
#include "codebook/checks.h"
#include "verbs/histories.h"

namespace hisac {
namespace {

Status check_fingerprint(const char* verb, const Codebook& book, const Agents& agents) noexcept {
  if (agents.fingerprint == book.fingerprint()) return {};
  return Status::error(Code::invalid_argument, "%s: agents expected of codebook %016" PRIx64 ", got %016" PRIx64, verb,
                       book.fingerprint(), agents.fingerprint);
}

}  // namespace

Status check_rule(const Codebook& book, const VoteParams& params) noexcept {
  bool fanout = false;
  for (int64_t k : params.fanout) fanout |= k != 0;
  if ((params.budget != 0) == fanout)
    return Status::error(Code::invalid_argument, "vote: expected either budget or fanout, got %s",
                         fanout ? "both" : "neither");
  if (fanout) {
    int64_t product = 1;
    for (int l = 0; l < kMaxLevels; ++l) {
      const int64_t k = params.fanout[l];
      if ((l < book.levels()) != (k != 0) || k < 0)
        return Status::error(Code::invalid_argument, "vote: fanout expected one number >= 1 for each of %d levels",
                             book.levels());
      if (l < book.levels()) product = k > kMaxSeats ? kMaxSeats + 1 : std::min(product * k, kMaxSeats + 1);
    }
    if (product > kMaxSeats)
      return Status::error(Code::invalid_argument, "vote: fanout expected a product of at most %" PRId64 ", got more",
                           kMaxSeats);
  } else if (params.budget < 1 || params.budget > kMaxSeats) {
    return Status::error(Code::invalid_argument, "vote: budget expected 1 to %" PRId64 ", got %" PRId64, kMaxSeats,
                         params.budget);
  }
  return {};
}

int64_t seats(const VoteParams& params, int levels) noexcept {
  int64_t product = 1;
  for (int l = 0; l < levels && !params.budget; ++l) product *= params.fanout[l];
  return params.budget ? params.budget : product;
}

size_t vote_workspace(const Context& context, const Codebook& book, const VoteParams& params,
                      const Histories& histories) noexcept {
  if (book.empty() || !check_rule(book, params).ok()) return 0;
  if (!sizes_fit(histories, book.width(), 0)) return Arena::kLimit;
  return backend_workspace(&Backend::vote_workspace, context, book, params, stated(histories, context.device));
}

Status check_vote(const Codebook& book, const VoteParams& params, Histories& in, const Agents& out,
                  Device device) noexcept {
  HISAC_TRY(check_book("vote", &book));
  HISAC_TRY(check_rule(book, params));
  HISAC_TRY(check_sizes("vote", in));
  HISAC_TRY(check_codes("vote", book, in.codes, in.codes.shape[0]));
  HISAC_TRY(check_offsets("vote", in, device));
  const int64_t m = seats(params, book.levels()), users = in.offsets.users, levels = book.levels();
  HISAC_TRY(check_shape("vote", "out codes", {users, m, levels}, out.codes));
  HISAC_TRY(check_shape("vote", "out votes", {users, m}, out.votes));
  HISAC_TRY(check_shape("vote", "out count", {users}, out.count));
  if (out.prototypes) HISAC_TRY(check_shape("vote", "out prototypes", {users, m, book.width()}, out.prototypes));
  return out.fingerprint ? check_fingerprint("vote", book, out) : Status();
}

Status vote(const Context& context, const Codebook& book, const VoteParams& params, const Histories& histories,
            Agents out) noexcept {
  Histories in = histories;
  HISAC_TRY(check_vote(book, params, in, out, context.device));
  HISAC_TRY(call_backend("vote", &Backend::vote, context, book, params, in, out));
  if (!out.prototypes) return {};
  const auto& c = out.codes.shape;
  return code_prototypes(context, book, {out.codes.data, {c[0] * c[1], c[2]}},
                         {out.prototypes.data, {c[0] * c[1], book.width()}});
}

Status prototypes(const Context& context, const Codebook& book, const Agents& agents, Array<float, 3> out) noexcept {
  HISAC_TRY(check_book("prototypes", &book));
  HISAC_TRY(check_fingerprint("prototypes", book, agents));
  const int64_t* const c = agents.codes.shape;
  HISAC_TRY(check_shape("prototypes", "out", {c[0], c[1], book.width()}, out));
  return code_prototypes(context, book, {agents.codes.data, {c[0] * c[1], c[2]}},
                         {out.data, {c[0] * c[1], book.width()}});
}

}  // namespace hisac
