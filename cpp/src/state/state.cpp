// SPDX-License-Identifier: Apache-2.0
// States as bytes.
#include "hisac/state.h"

#include <cmath>
#include <cstring>

#include "cpu/simd/kernels.h"
#include "state/table.h"

namespace hisac {
namespace {

StateHead new_head(const Codebook& book, const StateParams& params) noexcept {
  StateHead head{};
  std::memcpy(head.magic, StateHead::kMagic, sizeof head.magic);
  head.version = StateHead::kVersion;
  head.type = DType::float32;
  head.fingerprint = book.fingerprint();
  head.model_tag = params.model_tag;
  head.weighting = params.weighting;
  head.width = book.width();
  head.value_width = params.width;
  head.most = head.room = params.leaves;
  head.ring_room = params.ring;
  head.half_life = params.half_life;
  head.mean_x = params.mean_x;
  head.position = std::numeric_limits<int64_t>::min();
  return head;
}

bool sizes_fit(const StateHead& h) noexcept {
  return within({h.width, h.value_width}, 1, kMostWidth) && within({h.most}, 1, kMostLeaves) &&
         within({h.ring_room}, 0, kMostLeaves) && within({h.half_life}, 0, kMostHalfLife);
}

Status check_params(const Codebook& book, const StateParams& params) noexcept {
  HISAC_TRY(check_book("state", &book));
  if (sizes_fit(new_head(book, params))) return {};
  return invalid(
      "state: expected leaves of 1 to 2^24, a ring of 0 to 2^24, a width of 1 to 2^20 and a half-life of 0 "
      "to %" PRId64 " units of time, got %" PRId64 ", %" PRId64 ", %" PRId64 " and %" PRId64,
      kMostHalfLife, params.leaves, params.ring, params.width, params.half_life);
}

bool is_form(DType type) noexcept { return type == DType::float32 || type == DType::bfloat16 || type == DType::int8; }

Status corrupt(const char* what) noexcept { return Status::error(Code::corrupt_file, "state: %s", what); }

/// Whether the counts of a head are those of a state with these sizes.
bool counts_fit(const StateHead& h) noexcept {
  return within({h.room}, 0, h.most) && within({h.leaves}, 0, h.room) && within({h.ring}, 0, h.ring_room) &&
         within({h.first}, 0, std::max<int64_t>(h.ring_room - 1, 0)) && within({h.votes}, 0, kMostTableVotes) &&
         within({h.epoch}, -kMostEpoch, kMostEpoch) && within({h.mean_x, h.begun, h.migrated}, 0, 1) && h.zero == 0 &&
         within({h.seen, h.absent, h.dropped_leaves, h.dropped_votes}, 0, kMostCount);
}

/// Keys ascend, votes add up, slots are rows. Two leaves of one row, which only hostile bytes have, are wrong numbers
/// and no fault.
bool table_fits(const StateTable& t) noexcept {
  const int64_t n = t.head->leaves;
  int64_t total = 0;
  bool ok = true;
  for (int64_t i = 0; i < n; ++i) {
    ok = ok && (i == 0 || t.keys[i - 1] < t.keys[i]) && within({t.votes[i]}, 0, kMostTableVotes);
    total += ok ? t.votes[i] : 0;
    ok = ok && (!t.slots || within({t.slots[i]}, 0, n - 1));
  }
  return ok && total == t.head->votes;
}

/// The smallest bfloat16 that is not below x >= 0.
uint16_t bfloat16_above(float x) noexcept {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0xffffu) >> 16);
}

/// A row of float32 as int8, with its scale.
void store_int8(const float* row, int64_t width, std::byte* to, uint16_t* scale_bits) noexcept {
  float largest = 0, scale;
  for (int64_t d = 0; d < width; ++d) largest = std::fmax(largest, std::fabs(row[d]));
  *scale_bits = bfloat16_above(std::fmin(largest / 127, 0x1p120f));
  const uint32_t bits = uint32_t{*scale_bits} << 16;
  std::memcpy(&scale, &bits, 4);
  for (int64_t d = 0; d < width; ++d) {
    const float steps = scale > 0 ? row[d] / scale : 0.f;
    to[d] = static_cast<std::byte>(static_cast<int8_t>(std::rint(std::fmin(std::fmax(steps, -127.f), 127.f))));
  }
}

}  // namespace

size_t UserState::bytes(const Codebook& book, const StateParams& params) noexcept {
  return check_params(book, params).ok() ? static_cast<size_t>(StateTable(new_head(book, params), nullptr).bytes) : 0;
}

Status UserState::create(const Codebook& book, const StateParams& params, Array<std::byte, 1> memory,
                         UserState* out) noexcept {
  HISAC_TRY(check_params(book, params));
  StateHead head = new_head(book, params);
  head.bytes = StateTable(head, nullptr).bytes;
  HISAC_TRY(check_memory("state", memory, head.bytes, {}));
  std::memset(memory.data, 0, static_cast<size_t>(head.bytes));
  std::memcpy(memory.data, &head, sizeof head);
  out->data_ = memory.data;
  return {};
}

Status UserState::parse(Array<std::byte, 1> bytes, UserState* out) noexcept {
  constexpr int64_t kLeast = sizeof(StateHead);
  const int64_t size = bytes.data ? bytes.shape[0] : 0;
  if (size < kLeast)
    return Status::error(Code::corrupt_file, "state: expected at least %" PRId64 " bytes, got %" PRId64, kLeast, size);
  HISAC_TRY(check_memory("state", bytes, kLeast, {}));
  const StateHead& head = *reinterpret_cast<const StateHead*>(bytes.data);
  if (std::memcmp(head.magic, StateHead::kMagic, sizeof head.magic) != 0) return corrupt("the bytes are no state");
  if (head.version != StateHead::kVersion)
    return Status::error(Code::corrupt_file, "state: version expected %u, got %u", StateHead::kVersion, head.version);
  if (!is_form(head.type)) return corrupt("expected a type of float32, bfloat16 or int8");
  if (!sizes_fit(head) || !counts_fit(head)) return corrupt("sizes are out of range");
  const StateTable table(head, bytes.data);
  if (head.bytes != table.bytes || bytes.shape[0] < table.bytes)
    return Status::error(Code::corrupt_file, "state: expected %" PRId64 " bytes, got %" PRId64, table.bytes,
                         std::min(head.bytes, bytes.shape[0]));
  if (head.checksum != checksum_of(head, bytes.data)) return corrupt("the checksum is not that of the bytes");
  if (!table_fits(table)) return corrupt("the leaves are not in order, or their votes do not add up");
  out->data_ = bytes.data;
  return {};
}

void UserState::seal() const noexcept {
  if (data_) reinterpret_cast<StateHead*>(data_)->checksum = checksum_of(head_of(*this), data_);
}

size_t UserState::serialised_bytes(DType type, int64_t room) const noexcept {
  StateHead head = head_of(*this);
  head.type = type;
  head.room = room;
  const bool fits = data_ && within({room}, head.leaves, head.most) && is_form(type);
  return fits ? static_cast<size_t>(StateTable(head, nullptr).bytes) : 0;
}

Status UserState::serialise(DType form, int64_t room, Array<std::byte, 1> out) const noexcept {
  if (!data_) return invalid("serialise: expected a state, got none");
  const StateTable from(*this);
  const int64_t n = from.head->leaves, width = from.head->width, value_width = from.head->value_width;
  if (!is_form(form)) return Status::error(Code::wrong_type, "serialise: type expected float32, bfloat16 or int8");
  if (form != type()) HISAC_TRY(check_writable("serialise", *this));
  if (!within({room}, n, from.head->most))
    return invalid("serialise: room expected %" PRId64 " to %" PRId64 ", got %" PRId64, n, from.head->most, room);
  StateHead head = *from.head;
  head.type = form;
  head.room = room;
  head.first = 0;
  head.bytes = StateTable(head, nullptr).bytes;
  HISAC_TRY(check_memory("serialise", out, head.bytes, *this));
  std::memset(out.data, 0, static_cast<size_t>(head.bytes));
  std::memcpy(out.data, &head, sizeof head);
  const StateTable to(head, out.data);
  std::copy_n(from.keys, n, to.keys);
  std::copy_n(from.votes, n, to.votes);
  std::copy_n(from.masses, n, to.masses);
  if (from.spreads) std::copy_n(from.spreads, n, to.spreads);
  for (int64_t i = 0; i < head.ring; ++i) to.ring[i] = from.ring_row(i);
  const simd::Kernels& k = simd::kernels();
  const auto copy = [&](const std::byte* rows, int64_t w, const uint16_t* from_scale, std::byte* to_rows,
                        uint16_t* scale) {
    const int64_t from_row = w * bytes_of(type()), to_row = w * bytes_of(form);
    for (int64_t i = 0; i < n; ++i) {
      const std::byte* const row = rows + from.slot(i) * from_row;
      std::byte* const target = to_rows + i * to_row;
      if (form == type()) {
        std::memcpy(target, row, static_cast<size_t>(to_row));
        if (scale) scale[i] = from_scale[i];
      } else if (form == DType::int8) {
        store_int8(reinterpret_cast<const float*>(row), w, target, scale + i);
      } else {
        k.store_row(target, form, w, reinterpret_cast<const float*>(row), 1);
      }
    }
  };
  copy(from.v, value_width, from.v_scales, to.v, to.v_scales);
  if (from.x) copy(from.x, width, from.x_scales, to.x, to.x_scales);
  for (int64_t i = 0; to.slots && i < n; ++i) to.slots[i] = static_cast<int32_t>(i);
  to.head->checksum = checksum_of(*to.head, out.data);
  return {};
}

int64_t UserState::size() const noexcept { return head_of(*this).bytes; }
StateParams UserState::params() const noexcept {
  const StateHead& h = head_of(*this);
  return {h.most, h.ring_room, h.value_width, h.half_life, h.mean_x != 0, h.model_tag, h.weighting};
}
DType UserState::type() const noexcept { return head_of(*this).type; }
int64_t UserState::leaves() const noexcept { return head_of(*this).leaves; }
int64_t UserState::room() const noexcept { return head_of(*this).room; }
int64_t UserState::ring() const noexcept { return head_of(*this).ring; }
uint64_t UserState::fingerprint() const noexcept { return head_of(*this).fingerprint; }
uint64_t UserState::options() const noexcept {
  const StateHead& h = head_of(*this);
  const uint64_t shaping[] = {static_cast<uint64_t>(h.half_life), static_cast<uint64_t>(h.mean_x), h.weighting};
  return fnv(kFnv, shaping, sizeof shaping);
}
int64_t UserState::epoch() const noexcept { return head_of(*this).epoch; }
int64_t UserState::position() const noexcept { return head_of(*this).position; }
bool UserState::migrated() const noexcept { return head_of(*this).migrated != 0; }
uint64_t UserState::revision() const noexcept { return head_of(*this).revision; }

}  // namespace hisac
