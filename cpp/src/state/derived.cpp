// SPDX-License-Identifier: Apache-2.0
// What is made of a state and not kept: sums for the verbs, agents and tokens, matches, the recent rows, statistics.
#include <algorithm>
#include <cmath>

#include "base/arena.h"
#include "cpu/simd/kernels.h"
#include "state/table.h"
#include "verbs/histories.h"

namespace hisac {
namespace {

/// What time leaves of the log of a weight, from a time that is given against the epoch to `now`.
double log_decay(const StateHead& head, int64_t since_epoch, int64_t now) noexcept {
  if (!head.half_life) return 0;
  const double at = now == kEpoch ? 0 : static_cast<double>(now) - static_cast<double>(head.epoch);
  return 0.69314718055994531 * (static_cast<double>(since_epoch) - at) / static_cast<double>(head.half_life);
}

/// lse at the epoch -> lse at `now`: all masses of a table shrink by one factor. So no digit of a share is lost.
void decay(const StateHead& head, int64_t now, const Array<float, 2>& lse) noexcept {
  const double shift = log_decay(head, 0, now);
  for (int64_t i = 0; shift != 0 && i < lse.shape[0] * lse.shape[1]; ++i)
    lse.data[i] = static_cast<float>(double(lse.data[i]) + shift);
}

/// The table as histories of one user.
class Sums {
 public:
  Sums(const UserState& state, const Codebook& book, bool packed) noexcept
      : table_(state), head_(*table_.head), book_(book), packed_(packed), in_order_(table_.in_order()) {}

  void carve(Arena& arena) noexcept {
    codes_ = arena.take<int32_t>(head_.room, book_.levels());
    bias_ = arena.take<float>(head_.room);
    if (packed_ || head_.type != DType::float32) v_ = arena.take<float>(head_.room, head_.value_width);
    if (head_.type == DType::int8 && head_.mean_x) x_scale_ = arena.take<float>(head_.room);
  }

  Histories fill(int64_t now) noexcept {
    const simd::Kernels& k = simd::kernels();
    const bool x_by_id = !packed_ && !in_order_ && table_.x;
    const double shift = log_decay(head_, 0, now);
    const int64_t n = head_.leaves, levels = book_.levels(), row_bytes = head_.value_width * bytes_of(head_.type);
    for (int64_t i = 0; i < n; ++i) {
      codes_of_leaf(book_, table_.keys[i], codes_ + (x_by_id ? table_.slot(i) : i) * levels);
      bias_[i] = static_cast<float>(std::log(double(table_.masses[i])) + shift);
    }
    for (int64_t i = 0; x_scale_ && i < n; ++i) k.load_row(table_.x_scales + i, DType::bfloat16, 1, x_scale_ + i);
    for (int64_t i = 0; v_ && i < n; ++i) {
      const std::byte* const row = table_.v + table_.slot(i) * row_bytes;
      float scale = 1, *const out = v_ + i * head_.value_width;
      if (head_.type == DType::int8) {
        k.load_row(table_.v_scales + i, DType::bfloat16, 1, &scale);
        k.load_int8(reinterpret_cast<const int8_t*>(row), scale, head_.value_width, out);
      } else {
        k.load_row(row, head_.type, head_.value_width, out);
      }
    }
    Histories h = histories(n, x_by_id, !packed_ && !in_order_ && !v_);
    h.offsets = offsets(&head_.zero, 1);
    return h;
  }

  /// With room for all leaves, to size workspaces; the arrays may not be there.
  Histories largest(bool by_id) const noexcept {
    Histories h = histories(head_.room, by_id, by_id);
    h.offsets = offsets(1);
    h.longest = h.rows = std::max<int64_t>(head_.room, 1);
    return h;
  }

 private:
  Histories histories(int64_t n, bool x_by_id, bool v_by_id) const noexcept {
    Histories h;
    if (table_.x && !packed_) {
      h.x = rows(static_cast<const std::byte*>(table_.x), head_.type, n, head_.width);
      h.spread = {table_.spreads, {n}};
    }
    if (head_.type == DType::int8 && h.x.data) h.x_scale = {x_scale_, {n}};
    h.v = rows(v_ ? v_ : table_.v_row(0), n, head_.value_width);
    h.codes = {codes_ ? codes_ : reinterpret_cast<const int32_t*>(table_.head), {n, book_.levels()}};  // never null
    if (x_by_id) h.x_ids = ids(table_.slots, n);
    if (v_by_id) h.v_ids = ids(table_.slots, n);
    h.bias = {bias_, {n}};
    h.weights = weights(table_.votes, n);
    return h;
  }

  const StateTable table_;
  const StateHead& head_;
  const Codebook& book_;
  const bool packed_, in_order_;
  int32_t* codes_ = nullptr;
  float *bias_ = nullptr, *v_ = nullptr, *x_scale_ = nullptr;
};

/// Scratch for sums, and then `bytes` more at least.
size_t beside_sums(const UserState& state, const Codebook& book, bool packed, size_t bytes) noexcept {
  Arena arena;
  Sums(state, book, packed).carve(arena);
  arena.take<std::byte>(static_cast<int64_t>(std::min(bytes, Arena::kLimit)));
  return arena.used();
}

/// Calls verb(context, sums at `now`) with what is left of the workspace.
template <class Verb>
Status with_sums(const char* name, const Context& context, const Codebook& book, const UserState& state, bool packed,
                 int64_t now, Verb verb) noexcept {
  HISAC_TRY(check_state(name, &context, book, state));
  Arena arena(context.workspace);
  Sums sums(state, book, packed);
  sums.carve(arena);
  HISAC_TRY(arena.check(name));
  Context rest = context;
  std::byte* const left = arena.take_rest(0, &rest.workspace.shape[0]);
  rest.workspace.data = left;
  return verb(rest, sums.fill(now));
}

MatchInputs match_inputs(const Histories& sums, const Array<const int32_t, 2>& codes, const Ids& ids,
                         const int64_t* bounds) noexcept {
  MatchInputs in;
  in.sums = sums;
  in.codes = codes;
  in.ids = ids;
  in.candidates = offsets(bounds, 1);
  return in;
}

}  // namespace

size_t UserState::sums_bytes(const Codebook& book, bool packed) const noexcept {
  return beside_sums(*this, book, packed, 0);
}

Status UserState::sums(const Codebook& book, int64_t now, bool packed, Array<std::byte, 1> memory,
                       Histories* out) const noexcept {
  Context context;
  context.workspace = memory;
  return with_sums("sums", context, book, *this, packed, now, [&](const Context&, const Histories& h) {
    *out = h;
    return Status();
  });
}

size_t UserState::compress_workspace(const Context& context, const Codebook& book, const CompressParams& params,
                                     const Compressed& out) const noexcept {
  if (!check_state("compress", &context, book, *this).ok()) return 0;
  size_t most = 0;
  for (const bool by_id : {false, true})
    most =
        std::max(most, hisac::compress_workspace(context, book, params, Sums(*this, book, false).largest(by_id), out));
  return beside_sums(*this, book, false, most);
}

Status UserState::compress(const Context& context, const Codebook& book, const CompressParams& params,
                           const Compressed& out, int64_t now) const noexcept {
  HISAC_TRY(with_sums("compress", context, book, *this, false, kEpoch, [&](const Context& rest, const Histories& h) {
    CompressParams exact = params;
    exact.method = Method::exact;  // the rows are leaf sums
    return hisac::compress(rest, book, exact, h, out);
  }));
  decay(head_of(*this), now, out.tokens.lse);
  return {};
}

size_t UserState::match_workspace(const Context& context, const Codebook& book, Array<const int32_t, 2> codes,
                                  const Ids& ids) const noexcept {
  if (!check_state("match", &context, book, *this).ok()) return 0;
  const int64_t bounds[] = {0, ids ? ids.size : codes.shape[0]};
  const MatchInputs in = match_inputs(Sums(*this, book, true).largest(false), codes, ids, bounds);
  return beside_sums(*this, book, true, hisac::match_workspace(context, book, in));
}

Status UserState::match(const Context& context, const Codebook& book, Array<const int32_t, 2> codes, const Ids& ids,
                        Match out, int64_t now) const noexcept {
  HISAC_TRY(with_sums("match", context, book, *this, true, kEpoch, [&](const Context& rest, const Histories& h) {
    const int64_t bounds[] = {0, ids ? ids.size : codes.shape[0]};
    return hisac::match(rest, book, match_inputs(h, codes, ids, bounds), out);
  }));
  decay(head_of(*this), now, out.lse);
  return {};
}

Status UserState::recent(StateRecent out, float* table_share, int64_t now) const noexcept {
  if (!*this) return invalid("recent: expected a state, got none");
  const StateTable table(*this);
  const StateHead& head = *table.head;
  HISAC_TRY(check_shape("recent", "ids", {head.ring}, out.ids));
  HISAC_TRY(check_shape("recent", "times", {head.ring}, out.times));
  HISAC_TRY(check_shape("recent", "log_share", {head.ring}, out.log_share));
  double largest = -INFINITY, mass = 0, total = 0;
  const auto log_weight = [&](const RingRow& row) {
    if (!usable(row.weight)) return -double(INFINITY);
    return std::log(double(std::min(row.weight, kMostWeight))) + log_decay(head, row.time, now);
  };
  for (int64_t i = 0; i < head.leaves; ++i) mass += double(table.masses[i]);
  const double of_table = std::log(mass) + log_decay(head, 0, now);
  for (int64_t i = 0; i < head.ring; ++i) largest = std::fmax(largest, log_weight(table.ring_row(i)));
  largest = std::fmax(largest, of_table);
  const double shift = largest > -INFINITY ? largest : 0;
  for (int64_t i = 0; i < head.ring; ++i) total += std::exp(log_weight(table.ring_row(i)) - shift);
  total += std::exp(of_table - shift);
  const double whole = total > 0 ? shift + std::log(total) : 0;
  for (int64_t i = 0; i < head.ring; ++i) {
    const RingRow& row = table.ring_row(i);
    out.ids.data[i] = row.id;
    out.times.data[i] = head.epoch + row.time;
    out.log_share.data[i] = static_cast<float>(log_weight(row) - whole);
  }
  if (table_share) *table_share = static_cast<float>(of_table - whole);
  return {};
}

Status UserState::stats(const Codebook& book, const Agents* agents, const Agents* before,
                        StateStats* out) const noexcept {
  HISAC_TRY(check_state("stats", nullptr, book, *this));
  for (const Agents* const a : {agents, before}) {
    if (!a) continue;
    HISAC_TRY(check_shape("stats", "agents' codes", {1, a->codes.shape[1], book.levels()}, a->codes));
    HISAC_TRY(check_shape("stats", "agents' count", {1}, a->count));
    if (a->fingerprint) HISAC_TRY(check_fingerprint("stats", book, *a));
  }
  const StateTable table(*this);
  const StateHead& head = *table.head;
  const auto count = [](const Agents* a) {
    return a ? std::clamp<int64_t>(a->count.data[0], 0, a->codes.shape[1]) : int64_t{0};
  };
  const int64_t levels = book.levels(), n = count(agents);
  int64_t inside = 0, changed = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t* const codes = agents->codes.data + i * levels;
    bool known = false;
    for (int64_t j = 0; j < count(before) && !known; ++j)
      known = std::equal(codes, codes + levels, before->codes.data + j * levels);
    changed += !known;
    if (!book.valid(codes)) continue;
    const uint64_t leaf = book.leaf(codes);
    const int64_t at = std::lower_bound(table.keys, table.keys + head.leaves, leaf) - table.keys;
    if (at < head.leaves && table.keys[at] == leaf) inside += table.votes[at];
  }
  const double left = static_cast<double>(std::max<int64_t>(head.seen - head.ring, 1));
  *out = {head.leaves,
          head.ring,
          head.seen,
          head.votes,
          static_cast<double>(head.absent) / left,
          head.dropped_leaves,
          head.dropped_votes,
          agents && head.votes ? 1 - static_cast<double>(inside) / static_cast<double>(head.votes) : 0,
          before && n ? static_cast<double>(changed) / static_cast<double>(n) : 0};
  return {};
}

}  // namespace hisac
