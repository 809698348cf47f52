// SPDX-License-Identifier: Apache-2.0
#include "hisac/compress.h"

#include <algorithm>
#include <limits>

#include "backend.h"
#include "base/arena.h"
#include "codebook/checks.h"
#include "hisac/encode.h"
#include "verbs/histories.h"

namespace hisac {
namespace {

constexpr int64_t kGroupRows = int64_t{1} << 16;  // of the users whose leaf sums are made together, on the CPU

/// The inputs of a call, and what its verbs hand on to one another.
class Compression {
 public:
  Compression(const Context& context, const Codebook& book, const CompressParams& params, const Histories& histories,
              const Compressed& out) noexcept
      : context_(context),
        book_(book),
        params_(params),
        in_(stated(histories, context.device)),
        tokens_(out.tokens),
        log_share_(out.log_share),
        agents_(params.agents ? *params.agents : out.agents),
        users_(in_.offsets.users),
        seats_(params.agents ? params.agents->codes.shape[1] : seats(params.vote, book.levels())) {}

  /// Takes what is handed on, and then the scratch that all verbs use in turn.
  void carve(Arena& arena) noexcept {
    const int64_t levels = book_.levels(), t = in_.behaviours();
    const bool encodes = !in_.codes;
    if (encodes) in_.codes = {codes_ = arena.take<int32_t>(t, levels), {t, levels}};
    const auto give = [&](auto& array, std::initializer_list<int64_t> shape) {
      if (array.data) return;
      int64_t size = 1;
      for (const int64_t n : shape)
        if (__builtin_mul_overflow(size, n, &size)) size = std::numeric_limits<int64_t>::max();  // Arena::kLimit
      array.data = arena.take<std::remove_reference_t<decltype(*array.data)>>(size);
      std::copy(shape.begin(), shape.end(), array.shape);
    };
    if (!params_.agents) {
      agents_.fingerprint = book_.fingerprint();
      give(agents_.codes, {users_, seats_, levels});
      give(agents_.votes, {users_, seats_});
      give(agents_.count, {users_});
    }
    given_prototypes_ = params_.agents && agents_.prototypes;
    makes_lists_ = !params_.agents && agents_.lists;
    give(agents_.prototypes, {users_, seats_, book_.width()});
    size_t most = encodes ? encode_workspace(context_, book_) : 0;
    const auto need = [&](size_t bytes) { most = std::max(most, bytes); };
    if (!params_.agents) need(vote_workspace(context_, book_, params_.vote, in_));
    if (makes_lists_) need(agent_lists_workspace(context_, book_, agents_));
    if (params_.method == Method::leaf) {
      const int64_t rows =
          context_.device == Device::cpu ? std::max(in_.longest, std::min(in_.rows, kGroupRows)) : in_.rows;
      give(sums_.x, {rows, width_of(&book_, in_)});
      give(sums_.v, {rows, in_.v.width});
      give(sums_.codes, {rows, levels});
      give(sums_.bias, {rows});
      give(sums_.spread, {rows});
      give(sums_.votes, {rows});
      int64_t* const offsets = arena.take<int64_t>(users_ + 1);
      sums_.offsets = {offsets, offsets ? offsets + 1 : nullptr, users_};
      need(leaf_sums_workspace(context_, book_, in_));
      Histories sums = sums_.histories();
      sums.longest = in_.longest;
      need(route_workspace(context_, book_of_sums(), params_.route, sums, agents_, tokens_));
    } else {
      need(route_workspace(context_, &book_, params_.route, in_, agents_, tokens_));
    }
    std::byte* const scratch = arena.take_rest(static_cast<int64_t>(std::min(most, Arena::kLimit)), &scratch_bytes_);
    context_.workspace = {scratch, {scratch_bytes_}};
  }

  /// All that the verbs would refuse, so that none has written when one does.
  Status check() noexcept {
    if (codes_) HISAC_TRY(check_encode(book_, in_.x, {codes_, {in_.codes.shape[0], in_.codes.shape[1]}}));
    if (!params_.agents) HISAC_TRY(check_vote(book_, params_.vote, in_, agents_, context_.device));
    if (makes_lists_)
      HISAC_TRY(check_shape("compress", "agents' lists",
                            {users_, book_.size(0), std::clamp<int64_t>(agents_.lists.shape[2], 0, seats_)},
                            agents_.lists));
    HISAC_TRY(check_route("route", context_, &book_, params_.route, in_, agents_));
    Histories routed = in_;
    if (params_.method == Method::leaf) routed.v.dtype = DType::float32;
    HISAC_TRY(check_tokens(routed, agents_, tokens_));
    if (!log_share_) return {};
    HISAC_TRY(check_shape("compress", "log_share", {users_, seats_}, log_share_));
    if (params_.route.normalize == Normalize::agents || !agents_.votes) return {};
    return check_shape("compress", "agents' votes", {users_, seats_}, agents_.votes);
  }

  Status run() noexcept {
    if (codes_) HISAC_TRY(encode(context_, book_, in_.x, {codes_, {in_.codes.shape[0], in_.codes.shape[1]}}));
    if (!params_.agents)
      HISAC_TRY(vote(context_, book_, params_.vote, in_, agents_));
    else if (!given_prototypes_)
      HISAC_TRY(prototypes(context_, book_, agents_, agents_.prototypes));
    if (makes_lists_) HISAC_TRY(agent_lists(context_, book_, agents_, agents_.lists));
    HISAC_TRY(route_users());
    if (!log_share_) return {};
    return call_backend("compress", &Backend::log_share, context_, params_.route.normalize, tokens_.lse, agents_.votes,
                        log_share_);
  }

 private:
  Status route_users() noexcept {
    if (params_.method == Method::exact) return route(context_, &book_, params_.route, in_, agents_, tokens_);
    if (context_.device != Device::cpu) return route_sums(0, users_);
    for (int64_t first = 0, last; first < users_; first = last) {
      int64_t rows = 0;
      for (last = first; last < users_; ++last) {
        rows += in_.offsets.end(last) - in_.offsets.start(last);
        if (last > first && rows > kGroupRows) break;
      }
      HISAC_TRY(route_sums(first, last));
    }
    return {};
  }

  /// Leaf sums and tokens of the users [first, last).
  Status route_sums(int64_t first, int64_t last) noexcept {
    const int64_t users = last - first, row = first * seats_, width = agents_.prototypes.shape[2];
    Histories some = in_;
    const int64_t skipped = first * bytes_of(some.offsets.dtype);
    some.offsets.starts = static_cast<const std::byte*>(some.offsets.starts) + skipped;
    some.offsets.ends = static_cast<const std::byte*>(some.offsets.ends) + skipped;
    some.offsets.users = users;
    LeafSums sums = sums_;
    sums.offsets.users = users;
    HISAC_TRY(leaf_sums(context_, book_, some, sums));
    Tokens out = tokens_;
    const int64_t row_bytes = out.tokens.width * bytes_of(out.tokens.dtype);
    if (out.tokens.data) out.tokens.data = static_cast<std::byte*>(out.tokens.data) + row * row_bytes;
    out.tokens.rows = users * seats_;
    out.lse = {out.lse.data + row, {users, seats_}};
    if (out.mean_x) out.mean_x = {out.mean_x.data + row * width, {users, seats_, width}};
    RouteAgents agents{{agents_.prototypes.data + row * width, {users, seats_, width}},
                       {agents_.count.data ? agents_.count.data + first : nullptr, {users}},
                       {agents_.codes.data + row * book_.levels(), {users, seats_, book_.levels()}}};
    if (agents_.lists) {
      const int64_t nodes = agents_.lists.shape[1], k = agents_.lists.shape[2];
      agents.lists = {agents_.lists.data + first * nodes * k, {users, nodes, k}};
    }
    return route(context_, book_of_sums(), params_.route, sums.histories(), agents, out);
  }

  /// The codes of leaf sums are valid, and read by sparse routing alone.
  const Codebook* book_of_sums() const noexcept { return params_.route.sparse ? &book_ : nullptr; }

  Context context_;
  const Codebook& book_;
  CompressParams params_;
  Histories in_;
  const Tokens& tokens_;
  const Array<float, 2>& log_share_;
  Agents agents_;
  LeafSums sums_{};
  int64_t users_, seats_;
  int32_t* codes_ = nullptr;
  bool given_prototypes_ = false, makes_lists_ = false;
  int64_t scratch_bytes_ = 0;
};

Status check(const Codebook& book, const CompressParams& params, const Histories& in, const Compressed& out) noexcept {
  HISAC_TRY(check_book("compress", &book));
  HISAC_TRY(check_sizes("compress", in));
  if (!in.codes && (in.x_ids || !in.x.data))
    return Status::error(Code::invalid_argument, "compress: codes expected, or x to encode, got %s",
                         in.x_ids ? "no codes beside x_ids: encode the table once and keep them" : "neither");
  if (!in.offsets.starts && in.offsets.users == 0 && in.behaviours() > 0)
    return Status::error(Code::invalid_argument, "compress: offsets expected, got none");
  if (in.x.data && in.x.width != book.width())
    return Status::error(Code::invalid_argument,
                         "compress: x is %s, the codebook has D = %" PRId64 ": D differs (%" PRId64 ", %" PRId64 ")",
                         ShapeText({in.x.rows, in.x.width}).text, book.width(), in.x.width, book.width());
  if (out.tokens.tokens.data && !in.v.data && in.behaviours() > 0)
    return Status::error(Code::invalid_argument, "compress: v expected for tokens, got none");
  if (!params.agents) return check_rule(book, params.vote);
  if (params.agents->fingerprint) HISAC_TRY(check_fingerprint("compress", book, *params.agents));
  const auto& c = params.agents->codes.shape;
  return check_shape("compress", "agents' codes", {in.offsets.users, c[1], book.levels()}, params.agents->codes);
}

}  // namespace

size_t compress_workspace(const Context& context, const Codebook& book, const CompressParams& params,
                          const Histories& histories, const Compressed& out) noexcept {
  if (book.empty() || (!params.agents && !check_rule(book, params.vote).ok())) return 0;
  if (!sizes_fit(histories, width_of(&book, histories), 0)) return Arena::kLimit;
  Arena arena;
  Compression(context, book, params, histories, out).carve(arena);
  return arena.used();
}

Status compress(const Context& context, const Codebook& book, const CompressParams& params, const Histories& histories,
                const Compressed& out) noexcept {
  HISAC_TRY(check(book, params, histories, out));
  Compression compression(context, book, params, histories, out);
  Arena arena(context.workspace);
  compression.carve(arena);
  HISAC_TRY(arena.check("compress"));
  HISAC_TRY(compression.check());
  return compression.run();
}

}  // namespace hisac
