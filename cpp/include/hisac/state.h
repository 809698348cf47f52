// SPDX-License-Identifier: Apache-2.0
// A user's state between requests: a leaf table and a ring of recent rows. It follows every event; agents and tokens
// are derived from it, always fresh, and never stored.
//
// A state is bytes. It lies in memory that its owner lends, without pointers, the same bytes on every machine, and a
// UserState is a view of it. So millions of states can lie in a file or a store of keys and values.
//
//   parse the bytes -> append the events -> compress, match, recent -> seal, or serialise -> write, if the revision
//   of what is stored is still that which was read
//
// A checksum finds damage, not intent: who can write the bytes can write the checksum. Where a store is not trusted,
// sign the bytes outside, and check the signature before `parse`. Hostile bytes are refused or give wrong numbers; they
// are never a fault. A state is personal data: the ids, weights and times of recent behaviours, and which interests a
// user has had, and how much of each, as leaves of the codebook. Deleting a user is deleting the bytes; deleting a
// behaviour is `forget`.
#pragma once
#include <limits>

#include "compress.h"
#include "match.h"

namespace hisac {

constexpr int64_t kMostLeaves = int64_t{1} << 24;  // and rows of the ring
/// In the place of a time: masses are those at the epoch.
constexpr int64_t kEpoch = std::numeric_limits<int64_t>::min();

struct StateParams {
  int64_t leaves = 0;      // S, the most of the table
  int64_t ring = 0;        // R, the most recent rows; 0: rows enter the table at once
  int64_t width = 0;       // V
  int64_t half_life = 0;   // in units of time, up to 2^31 / 20: 3.4 years of seconds; 0: nothing decays
  bool mean_x = true;      // false: x is the leaf's prototype
  uint64_t model_tag = 0;  // the version of v; rows of another one are refused
  uint64_t weighting = 0;  // a number that you give to your rule of weights; states of another one do not merge
};

/// The tables of items. v must be that of the state's model_tag. x is read where the state has mean x.
struct StateItems {
  Rows x{}, v{};                    // [items, D], [items, V]; types as of Histories
  Array<const int32_t, 2> codes{};  // [items, L]
  Array<const float, 1> x_scale{};  // with x of int8
  uint64_t model_tag = 0;
};

/// n behaviours, the oldest first.
struct StateEvents {
  Ids ids{};                            // [n] rows of the tables of items
  Array<const float, 1> weights{};      // [n]; null: 1
  Array<const int64_t, 1> times{};      // [n]; null: 0
  Array<const int64_t, 1> positions{};  // [n]: of the events in their log; null: not checked
  /// A later time counts as this one. Give the clock's time, so that no wrong time ages all that is there.
  int64_t latest = std::numeric_limits<int64_t>::max();
};

/// What `forget` makes leaves of again: rows that have left the ring (`recent` says which have not), of which those of
/// the leaf are read; or a function that gives the rows of a leaf, whose code is codes [L], and leaves *out as it is
/// where there are none. What it gives has to stay until it is called again, or `forget` returns.
struct StateKept {
  const StateEvents* rows = nullptr;
  Status (*of_leaf)(void* ctx, const int32_t* codes, StateEvents* out) = nullptr;
  void* ctx = nullptr;
  bool whole = false;  // all leaves are made again, of `rows`
};

/// Of the ring, the oldest first.
struct StateRecent {
  Array<int64_t, 1> ids, times;  // [rows of the ring]
  Array<float, 1> log_share;     // the log of a row's share in the mass of ring and table
};

struct StateStats {
  int64_t leaves = 0, ring = 0, seen = 0, votes = 0;  // seen: rows that were appended, ever
  double absent_share = 0;     // of the rows that are not in the ring: had no valid code, item or weight
  int64_t dropped_leaves = 0;  // by a full table or `expire`
  int64_t dropped_votes = 0;   // of these, as they were then
  double outside = 0;          // the share of votes at leaves that are no agent's; 0 without agents
  double churn = 0;            // the share of agents that are none of the agents before; 0 without these
};

/// What `migrate` could not map: leaves that have votes alone, and these votes.
struct StateLoss {
  int64_t leaves = 0, votes = 0;
};

/// A row of weight w and time t has, against the state's epoch E and with a half-life h,
///   mass  w 2^((t - E) / h),   votes  rint(2^12 w 2^((t - E) / h)), without a half-life rint(w).
/// A w above 2^40 counts as 2^40. A row of weight 0.3 has no vote without a half-life: let weights be whole there.
///
/// A row is absent at once where w is not finite or not above 0, or its id is negative; and when it leaves the ring,
/// where its code is invalid or its id outside the tables. One with a NaN in x, an |x|^2 of 2^100 and more, or a v that
/// is not finite or not there, votes, and is not routed.
///
/// Times are whole numbers in units of your own. Let a unit be a second: times 2^31 units and more from the epoch count
/// as the farthest.
///
/// The epoch is the multiple of h at or before the first row's time, and without a half-life that time. It moves on by
/// whole half-lives when a row comes that is 20 of them or more later, without a half-life to a time that is 2^30 or
/// more later, and by one half-life when votes together would pass 2^40 - 1. Votes are then shifted right, and a leaf
/// whose mass is below 2^-100 has none any more, nor has a row that is so faint when it comes.
///
/// For one state, calls that change it come one at a time, and after them, in the order that the caller sees to, those
/// that read it; several threads may read it at once. `merge` and `migrate` read their other state. All row operations
/// work in a context on the CPU with workspace() bytes, and after an error the state is as before, but where said. A
/// UserState of no bytes is empty: its sizes are 0, and calls with it are errors.
class UserState {
 public:
  UserState() noexcept = default;

  // ---- bytes

  /// For S leaves: 256 bytes, 16 a row of the ring, and 28 + 4 (D + V) a leaf, 24 + 4 V without mean x, rounded up to a
  /// multiple of 64. 0 for params that `create` refuses.
  static size_t bytes(const Codebook& book, const StateParams& params) noexcept;
  /// A new state in `memory`, of at least these bytes, aligned to 64.
  static Status create(const Codebook& book, const StateParams& params, Array<std::byte, 1> memory,
                       UserState* out) noexcept;
  /// The state that `bytes` are, aligned to 64, where they lie. Code::corrupt_file for any others: everything is
  /// checked before it is used. It only reads: bytes of a file that is mapped for reading can be served, by the const
  /// functions but `seal`. A state with room for fewer than S leaves refuses an append of more events than it has free
  /// leaves; give it room by `serialise`.
  static Status parse(Array<std::byte, 1> bytes, UserState* out) noexcept;
  /// Writes the checksum into the bytes: data() [size()] are then bytes to store, with the room of the memory.
  void seal() const noexcept;
  /// A copy beside the state, sealed, with room for `room` leaves: no fewer than there are, and no more than S. type
  /// float32; bfloat16 and int8 are for reading alone: int8 with a scale for each row of x and of v, 28 + D + V bytes a
  /// leaf, 22 + V without mean x. An element of bfloat16 is within 2^-8 of itself, one of int8 within 1 / 252 of its
  /// row's largest.
  Status serialise(DType type, int64_t room, Array<std::byte, 1> out) const noexcept;
  size_t serialised_bytes(DType type, int64_t room) const noexcept;

  explicit operator bool() const noexcept { return data_ != nullptr; }
  std::byte* data() const noexcept { return data_; }
  int64_t size() const noexcept;
  StateParams params() const noexcept;
  DType type() const noexcept;
  int64_t leaves() const noexcept;        // in the table
  int64_t room() const noexcept;          // for leaves, in this memory
  int64_t ring() const noexcept;          // rows in it
  uint64_t fingerprint() const noexcept;  // of the codebook
  uint64_t options() const noexcept;      // a hash of what shapes the sums: half-life, mean x, weighting
  int64_t epoch() const noexcept;
  int64_t position() const noexcept;  // of the last event; -2^63 before the first
  /// Grows by 1 with each append that takes an event, each expire of a state that has had a row, each forget, also one
  /// that fails midway, each merge of what has seen an event, and each migrate.
  uint64_t revision() const noexcept;
  /// Whether a leaf may have rows of items whose code is another one, since it was mapped by its mean.
  bool migrated() const noexcept;

  // ---- rows

  size_t workspace() const noexcept;
  /// An event whose position is not above that of every earlier one changes nothing, so that a log may deliver events
  /// again. A row enters the table when it leaves the ring. Where the table is full, the leaf with fewest votes makes
  /// place for a new one, of equals the higher one. Code::out_of_memory where the memory has less room than S, and
  /// perhaps too little.
  Status append(const Context& context, const Codebook& book, const StateItems& items,
                const StateEvents& events) noexcept;
  /// Rows at the front of the ring that are more than `age` older than `now` leave it; with an age below 0 the ring
  /// stays. Then leaves are dropped whose votes, shifted by the whole half-lives from the epoch to `now`, are below
  /// `least`.
  Status expire(const Context& context, const Codebook& book, const StateItems& items, int64_t now, int64_t age,
                int64_t least) noexcept;
  /// Behaviours with these ids leave the ring, and the leaves of their codes are made again of exactly the kept rows,
  /// as if these came now; rows with these ids are passed over. An error where the table has such a leaf and nothing is
  /// kept.
  ///
  /// An item's rows are looked for in the leaf of its present code. Where its code has changed since, ask for `whole`.
  /// After `migrate`, which maps leaves by their means, any row may lie in another leaf: there it is an error not to
  /// ask for it. After an error of the function some leaves have been made again and none is lost; the call may be
  /// repeated.
  Status forget(const Context& context, const Codebook& book, const StateItems& items, const Ids& ids,
                const StateKept& kept) noexcept;
  /// Adds another part of the same user's history, of the same log: votes to the bit, the later epoch and position,
  /// rings by time. A part that is merged twice counts twice. Of a full table those leaves stay that have more votes. A
  /// state that has seen no event changes nothing.
  Status merge(const Context& context, const Codebook& book, const StateItems& items, const UserState& other) noexcept;
  /// The same state under another codebook of the same width, in `memory` of bytes(to, params()): each leaf goes where
  /// its mean x is encoded, or its prototype where there is no mean x. v stays: another model_tag is another state.
  Status migrate(const Context& context, const Codebook& from, const Codebook& to, Array<std::byte, 1> memory,
                 UserState* out, StateLoss* loss) const noexcept;
  size_t migrate_workspace(const Context& context, const Codebook& to) const noexcept;

  // ---- what is derived

  /// The table as histories of one user, for `vote`, `route` and other verbs: x_ids and v_ids are there only where rows
  /// do not lie in the order of leaves; packed: never, for `match`. It lies in the state, and in `memory`, aligned to
  /// 64. bias is the log of the mass at `now`, a time or kEpoch, as in all calls below.
  Status sums(const Codebook& book, int64_t now, bool packed, Array<std::byte, 1> memory,
              Histories* out) const noexcept;
  size_t sums_bytes(const Codebook& book, bool packed) const noexcept;
  /// `compress` of the table, B = 1: agents of its votes, tokens of float32 by `route` over its sums. params.method is
  /// not read: the rows are leaf sums.
  Status compress(const Context& context, const Codebook& book, const CompressParams& params, const Compressed& out,
                  int64_t now = kEpoch) const noexcept;
  size_t compress_workspace(const Context& context, const Codebook& book, const CompressParams& params,
                            const Compressed& out) const noexcept;
  /// `match` of the table, for candidates of this user: codes [N, L], or with ids [N] a table.
  Status match(const Context& context, const Codebook& book, Array<const int32_t, 2> codes, const Ids& ids, Match out,
               int64_t now = kEpoch) const noexcept;
  size_t match_workspace(const Context& context, const Codebook& book, Array<const int32_t, 2> codes,
                         const Ids& ids) const noexcept;
  /// The ring, and the log of the table's share in the mass of both; table_share may be null. Rows of the ring are no
  /// part of tokens: `attend` to them beside these, with biases log_share of the tokens + table_share, and log_share of
  /// the ring.
  Status recent(StateRecent out, float* table_share, int64_t now = kEpoch) const noexcept;
  /// agents and before: of one user, or null.
  Status stats(const Codebook& book, const Agents* agents, const Agents* before, StateStats* out) const noexcept;

 private:
  std::byte* data_ = nullptr;
};

}  // namespace hisac
