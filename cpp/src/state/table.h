// SPDX-License-Identifier: Apache-2.0
// The bytes of a state: a head, then arrays by their room. Keys, votes, masses, spreads and slots are sorted by leaf,
// so that a new leaf moves them and no row of x or v; those of leaf i are in row slots[i]. Read-only forms have no
// slots: leaf i has row i.
#pragma once
#include "base/checksum.h"
#include "codebook/body.h"
#include "codebook/checks.h"
#include "hisac/state.h"

namespace hisac {

constexpr int64_t kMostTableVotes = (int64_t{1} << 40) - 1;
constexpr int64_t kMostEpoch = int64_t{1} << 54;              // beyond any time that counts
constexpr int64_t kFar = 20;                                  // half-lives after the epoch at which it moves
constexpr int64_t kMostHalfLife = (int64_t{1} << 31) / kFar;  // so that it moves before times, int32, end
constexpr float kMostWeight = 0x1p40f;
constexpr int64_t kMostCount = int64_t{1} << 60;  // of what is counted over a state's life

/// Whether a row of this weight is there.
inline bool usable(float weight) noexcept { return weight > 0 && weight <= std::numeric_limits<float>::max(); }

/// n += more, up to the most.
inline void count(int64_t& n, int64_t more) noexcept { n = std::min(n + more, kMostCount); }

struct StateHead {
  static constexpr char kMagic[8] = {'h', 'i', 's', 'a', 'c', 's', 't', 0};
  static constexpr uint32_t kVersion = 1;

  char magic[8];
  uint32_t version;
  DType type;
  uint64_t checksum;  // of all bytes, with 0 in this place
  int64_t bytes;
  uint64_t fingerprint, model_tag, weighting;
  int64_t width, value_width, most, room, ring_room, half_life;
  int32_t mean_x, begun;  // begun: there has been a row
  int64_t epoch, position;
  uint64_t revision;
  int64_t zero, leaves;  // the offsets [2] of the table's histories
  int64_t first, ring;   // the oldest row of the ring, and how many there are
  int64_t votes, seen, absent, dropped_leaves, dropped_votes;
  int64_t migrated;  // a leaf may have rows of items whose code is another one
  int64_t reserved[5];
};
static_assert(sizeof(StateHead) == 256, "no padding");

struct RingRow {
  int64_t id;
  float weight;
  int32_t time;  // since the epoch
};

/// That of no state is empty.
inline const StateHead& head_of(const UserState& state) noexcept {
  static constexpr StateHead kNone{};
  return state ? *reinterpret_cast<const StateHead*>(state.data()) : kNone;
}

/// Where the arrays of a state are, by the sizes in its head. Elements only shrink, so all are aligned.
struct StateTable {
  StateHead* head;
  uint64_t* keys;                 // [leaves] the leaves' numbers, ascending
  int64_t* votes;                 // [leaves]
  RingRow* ring;                  // [ring_room]
  float* masses;                  // [leaves]
  float* spreads;                 // [leaves], with mean x
  int32_t* slots;                 // [leaves], of float32
  uint16_t *v_scales, *x_scales;  // [leaves] bfloat16, of int8
  std::byte *v, *x;               // [room, V], [room, D] with mean x

  /// memory null: only counts bytes, which are in `bytes`.
  StateTable(const StateHead& sizes, std::byte* memory) noexcept : head(reinterpret_cast<StateHead*>(memory)) {
    int64_t at = sizeof(StateHead);
    const auto take = [&](auto*& array, bool present, int64_t n) {
      array = memory && present ? reinterpret_cast<std::remove_reference_t<decltype(array)>>(memory + at) : nullptr;
      if (present) at += n * static_cast<int64_t>(sizeof *array);
    };
    const int64_t room = sizes.room, element = bytes_of(sizes.type);
    const bool mean_x = sizes.mean_x, int8 = sizes.type == DType::int8;
    take(keys, true, room);
    take(votes, true, room);
    take(ring, true, sizes.ring_room);
    take(masses, true, room);
    take(spreads, mean_x, room);
    take(slots, sizes.type == DType::float32, room);
    take(v_scales, int8, room);
    take(x_scales, int8 && mean_x, room);
    take(v, true, room * sizes.value_width * element);
    take(x, mean_x, room * sizes.width * element);
    bytes = (at + 63) / 64 * 64;
  }
  explicit StateTable(const UserState& state) noexcept : StateTable(head_of(state), state.data()) {}

  int64_t slot(int64_t leaf) const noexcept { return slots ? slots[leaf] : leaf; }
  /// Whether leaf i has row i.
  bool in_order() const noexcept {
    for (int64_t i = 0; slots && i < head->leaves; ++i)
      if (slots[i] != i) return false;
    return true;
  }
  float* v_row(int64_t slot) const noexcept { return reinterpret_cast<float*>(v) + slot * head->value_width; }
  float* x_row(int64_t slot) const noexcept { return reinterpret_cast<float*>(x) + slot * head->width; }
  /// The i-th oldest row of the ring.
  RingRow& ring_row(int64_t i) const noexcept {
    const int64_t at = head->first + i;
    return ring[at < head->ring_room ? at : at - head->ring_room];
  }
  RingRow pop() const noexcept {
    const RingRow row = ring_row(0);
    if (++head->first == head->ring_room) head->first = 0;
    --head->ring;
    return row;
  }
  void push(const RingRow& row) const noexcept { ring_row(head->ring++) = row; }

  int64_t bytes;
};

inline uint64_t checksum_of(StateHead head, const std::byte* state) noexcept {
  Checksum<8> checksum;
  head.checksum = 0;
  checksum.add(&head, sizeof head);
  checksum.add(state + sizeof head, static_cast<size_t>(head.bytes) - sizeof head);
  return checksum.value();
}

/// The code [L] of a leaf; an invalid one of a number that the codebook does not have.
inline void codes_of_leaf(const Codebook& book, uint64_t leaf, int32_t* codes) noexcept {
  const Codebook::Body& body = book.body();
  for (int l = 0; l < body.levels; ++l) {
    codes[l] = static_cast<int32_t>(std::min<uint64_t>(leaf / body.stride[l], std::numeric_limits<int32_t>::max()));
    leaf %= body.stride[l];
  }
}

/// A state of this codebook, in a context on the CPU.
inline Status check_state(const char* verb, const Context* context, const Codebook& book,
                          const UserState& state) noexcept {
  HISAC_TRY(check_book(verb, &book));
  if (!state) return invalid("%s: expected a state, got none", verb);
  if (context && context->device != Device::cpu)
    return Status::error(Code::not_implemented, "%s: expected a context on the CPU, got one on CUDA", verb);
  if (state.fingerprint() != book.fingerprint())
    return invalid("%s: codebook expected %016" PRIx64 ", got %016" PRIx64, verb, state.fingerprint(),
                   book.fingerprint());
  const int64_t width = head_of(state).width;
  if (width == book.width()) return {};  // of hostile bytes it need not be
  return invalid("%s: codebook expected of D = %" PRId64 ", got %" PRId64, verb, width, book.width());
}

/// Memory of at least so many bytes, aligned to 64, that is not the state's.
inline Status check_memory(const char* verb, const Array<std::byte, 1>& memory, int64_t bytes,
                           const UserState& state) noexcept {
  const auto at = reinterpret_cast<uintptr_t>(memory.data), own = reinterpret_cast<uintptr_t>(state.data());
  if (at % 64)
    return invalid("%s: memory expected aligned to 64 bytes, got address %p", verb, static_cast<void*>(memory.data));
  if (!memory.data || memory.shape[0] < bytes)
    return invalid("%s: memory expected of at least %" PRId64 " bytes, got %" PRId64, verb, bytes,
                   memory.data ? memory.shape[0] : 0);
  const auto end = [](uintptr_t begin, int64_t size) { return begin + static_cast<uintptr_t>(size); };
  if (!state || at >= end(own, head_of(state).bytes) || own >= end(at, bytes)) return {};
  return invalid("%s: memory expected beside the state's, got memory that overlaps with it", verb);
}

/// One that can be written to.
inline Status check_writable(const char* verb, const UserState& state) noexcept {
  if (state.type() == DType::float32) return {};
  return Status::error(Code::not_implemented, "%s: a state of float32 expected, got %s, which is for reading", verb,
                       state.type() == DType::int8 ? "int8" : "bfloat16");
}

}  // namespace hisac
