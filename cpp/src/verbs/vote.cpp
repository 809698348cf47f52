// SPDX-License-Identifier: Apache-2.0
#include "hisac/vote.h"

#include <algorithm>

#include "backend.h"
#include "base/arena.h"
#include "codebook/checks.h"
#include "verbs/histories.h"

namespace hisac {
Status check_fingerprint(const char* verb, const Codebook& book, const Agents& agents) noexcept {
  if (agents.fingerprint == book.fingerprint()) return {};
  if (!agents.fingerprint) return invalid("%s: agents expected with the fingerprint of their codebook, got 0", verb);
  return invalid("%s: agents expected of codebook %016" PRIx64 ", got %016" PRIx64, verb, book.fingerprint(),
                 agents.fingerprint);
}

Status check_rule(const Codebook& book, const VoteParams& params) noexcept {
  const auto given = [](const int64_t* k) { return std::any_of(k, k + kMaxLevels, [](int64_t n) { return n != 0; }); };
  const bool fanout = given(params.fanout), beam = given(params.beam);
  if (const int rules = (params.budget != 0) + fanout + beam; rules != 1)
    return invalid("vote: expected exactly one of budget, fanout and beam, got %d", rules);
  if (params.budget) {
    if (params.budget >= 1 && params.budget <= kMaxSeats) return {};
    return invalid("vote: budget expected 1 to %" PRId64 ", got %" PRId64, kMaxSeats, params.budget);
  }
  const int64_t* const k = beam ? params.beam : params.fanout;
  int64_t product = 1;
  for (int l = 0; l < kMaxLevels; ++l) {
    if ((l < book.levels()) != (k[l] != 0) || k[l] < 0 || (beam && k[l] > kMaxSeats))
      return invalid("vote: %s for each of %d levels",
                     beam ? "beam expected one number of 1 to 4096" : "fanout expected one number >= 1", book.levels());
    if (k[l]) product = k[l] > kMaxSeats ? kMaxSeats + 1 : std::min(product * k[l], kMaxSeats + 1);
  }
  if (product <= kMaxSeats || beam) return {};
  return invalid("vote: fanout expected a product of at most %" PRId64 ", got more", kMaxSeats);
}

int64_t seats(const VoteParams& params, int levels) noexcept {
  if (params.budget) return params.budget;
  if (params.beam[0]) return params.beam[levels - 1];
  int64_t product = 1;
  for (int l = 0; l < levels; ++l) product *= params.fanout[l];
  return product;
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
  out.fingerprint = book.fingerprint();
  return prototypes(context, book, out, out.prototypes);
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
