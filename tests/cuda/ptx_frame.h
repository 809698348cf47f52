// SPDX-License-Identifier: Apache-2.0
// One thread in one function: its registers, its memory, where it meets others. Registers are 64 bits wide and hold
// what their declared width keeps, zero-extended; an instruction reads its operands as its own type.
#pragma once
#include "ptx.h"

namespace ptx {

/// Who touched a byte of shared memory last, and when, counted in barriers of the block and of the warp.
struct Touch {
  int16_t thread = -1, warp = -1;  // -1: nobody; -2: several
  uint16_t syncs = 0, warp_syncs = 0;
  bool atomic = false;
};

struct World {
  const Module* module;
  const Function* kernel;
  const simt::Launch* launch;
  const std::vector<Range>* arrays;
  struct Shadow {
    Touch write, read;
  };
  std::vector<Shadow> shadow;
  int block;
};
inline World world;

template <class T>
T value_of(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T>
uint64_t bits_of(T x) {
  if constexpr (std::is_integral_v<T>) return static_cast<uint64_t>(x);  // a signed one's sign goes on
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}
constexpr uint64_t low(uint64_t bits) { return bits >= 64 ? ~0ull : (1ull << bits) - 1; }

inline bool is_float(Type t) { return t.kind == 'f' || t.kind == 'h'; }
/// f(a value of the type)
template <class F>
void with_integer(Type t, F f) {
  const bool s = t.kind == 's';
  if (t.bytes == 1) return s ? f(int8_t{}) : f(uint8_t{});
  if (t.bytes == 2) return s ? f(int16_t{}) : f(uint16_t{});
  if (t.bytes == 4) return s ? f(int32_t{}) : f(uint32_t{});
  s ? f(int64_t{}) : f(uint64_t{});
}
template <class F>
void with_float(Type t, F f) {
  t.bytes == 8 ? f(double{}) : f(float{});
}
template <class F>
void with_number(Type t, F f) {
  is_float(t) ? with_float(t, f) : with_integer(t, f);
}

/// What an atomic or a reduction over lanes makes of an old value and another.
template <class T>
T combined(uint64_t mode, T old, T with, T other = 0) {
  return mode == "add"_w   ? static_cast<T>(static_cast<uint64_t>(old) + static_cast<uint64_t>(with))
         : mode == "min"_w ? std::min(old, with)
         : mode == "max"_w ? std::max(old, with)
         : mode == "inc"_w ? static_cast<T>(old >= with ? 0 : old + 1)
         : mode == "dec"_w ? static_cast<T>(old == 0 || old > with ? with : old - 1)
         : mode == "and"_w ? static_cast<T>(old & with)
         : mode == "or"_w  ? static_cast<T>(old | with)
         : mode == "xor"_w ? static_cast<T>(old ^ with)
         : mode == "cas"_w ? (old == with ? other : old)
                           : with;  // exch
}

class Frame {
 public:
  struct Passed {  // of a thread: barriers so far, groups of copies, copies under way
    uint16_t syncs = 0, warp_syncs = 0;
    int group = 0;
    struct Copy {
      size_t byte, bytes;
      int group;
    };
    std::deque<Copy> copies;
  };
  Frame(const Function& function, const Frame* caller, Passed& passed)
      : f_(function), caller_(caller), passed_(passed), r_(f_.registers, ~0ull), memory_(f_.frame_bytes / 16 + 1) {
    const simt::Thread& t = *simt::current;
    const int known[] = {t.thread, t.threads, t.block, t.blocks, t.lane};
    for (uint32_t k = 0; k < 5; ++k) r_[kThread + k] = static_cast<uint64_t>(known[k]);
    r_[kZero] = 0;
    r_[kFrame] = reinterpret_cast<uintptr_t>(memory_.data());
    r_[kDynamic] = kShared + world.module->static_shared;
  }
  std::byte* variable(const Variable& v) { return reinterpret_cast<std::byte*>(memory_.data()) + v.offset; }

  void run() {
    for (at_ = 0; at_ < f_.code.size();) {
      i = &f_.code[at_++];
      if (!i->guarded || flag(i->guard)) i->run(*this);
    }
  }
  const Instruction* i = nullptr;  // the one at work

  [[noreturn]] void stop(const char* what) const {
    simt::stop((std::string(what) + ": " + i->text).c_str(), file(), i->line);
  }
  const char* file() const { return world.module->file.c_str(); }
  void jump() { at_ = i->target; }
  void end() { at_ = f_.code.size(); }

  // ---- operands

  uint64_t raw(const Operand& o) const { return r_[o.slot] + o.offset; }
  uint64_t raw(size_t k) const { return k < i->operands.size() ? raw(i->operands[k]) : 0; }
  bool flag(const Operand& o) const { return (raw(o) & 1) != o.negated; }
  bool flag(size_t k) const { return flag(i->operands[k]); }
  template <class T>
  T in(size_t k) const {
    return value_of<T>(raw(k));
  }
  void out(uint64_t bits, size_t k = 0) {
    const Operand& o = i->operands[k];
    r_[o.slot] = bits & o.mask;
  }

  // ---- memory

  std::byte* memory(char space, uint64_t address, size_t bytes, bool writes, bool atomic = false,
                    uint64_t used = ~0ull) {
    if (address % bytes) stop("a misaligned access");
    size_t first = 0, last = bytes;
    while (!(used >> first & 1)) ++first;
    while (!(used >> (last - 1) & 1)) --last;
    const uintptr_t shared = reinterpret_cast<uintptr_t>(simt::shared());
    if (space == 's') address = shared + static_cast<uint32_t>(address) - kShared;
    const auto in = [&](const Range& r) { return r.holds(address + first, last - first); };
    const auto within = [&](const std::vector<Range>& ranges) { return std::any_of(ranges.begin(), ranges.end(), in); };
    bool ok = false;
    if ((space == 's' || space == 0) && in({shared, shared + world.shadow.size()})) {
      for (size_t k = first; k < last; ++k)
        if (used >> k & 1) touch(address + k - shared, writes, atomic);
      ok = true;
    }
    if (space == 'g' || space == 0) ok = ok || within(*world.arrays) || within(world.module->globals);
    if (space == 'c' || (space == 0 && !writes)) ok = ok || within(world.module->constants);
    if (space == 'l' || space == 'p' || space == 0)
      for (const Frame* f = this; f && !ok; f = f->caller_) ok = in({f->r_[kFrame], f->r_[kFrame] + f->f_.frame_bytes});
    if (!ok) stop("an access out of range");
    return reinterpret_cast<std::byte*>(address);
  }
  void touch(size_t byte, bool writes, bool atomic) {
    auto& [write, read] = world.shadow[byte];
    const simt::Thread& t = *simt::current;
    const auto ordered = [&](const Touch& o) {
      return o.thread == -1 || o.thread == t.thread || o.syncs < passed_.syncs ||
             (o.warp == t.warp && o.warp_syncs < passed_.warp_syncs);
    };
    if (!ordered(write) && !(atomic && write.atomic)) stop("a race in shared memory, with a write");
    if (writes && !ordered(read)) stop("a race in shared memory, with a read");
    Touch touch = {static_cast<int16_t>(t.thread), static_cast<int16_t>(t.warp), passed_.syncs, passed_.warp_syncs,
                   atomic};
    if (!writes && !ordered(read)) {  // several readers, for all of whom a write must wait
      touch.thread = -2;
      if (read.warp != touch.warp) touch.warp = -2;
    }
    (writes ? write : read) = touch;
    if (writes) read = {};
  }
  void load() {
    const size_t each = i->type.bytes, n = i->vector;
    const std::byte* const p = memory(i->space, raw(i->left), each * n, false, false, i->used);
    for (size_t k = 0; k < n; ++k) {
      uint64_t bits = 0;
      std::memcpy(&bits, p + k * each, each);
      with_integer(i->type, [&](auto zero) { out(bits_of(value_of<decltype(zero)>(bits)), k); });
    }
  }
  void store() {
    const size_t each = i->type.bytes, n = i->vector;
    std::byte* const p = memory(i->space, raw(0), each * n, true);
    for (size_t k = 0; k < n; ++k) {
      const uint64_t bits = raw(1 + k);
      std::memcpy(p + k * each, &bits, each);
    }
  }
  void atomic(bool returns) {
    const size_t a = returns, words = i->words.size();
    with_integer(i->type, [&](auto zero) {
      using T = decltype(zero);
      auto* const p = reinterpret_cast<T*>(memory(i->space, raw(a), sizeof(T), true, true));
      const T old = *p;
      *p = combined(i->words[words - 2], old, in<T>(a + 1), in<T>(a + 2));
      if (returns) out(bits_of(old));
    });
  }
  void cvta(bool to) {
    const uint64_t base = i->space == 's' ? reinterpret_cast<uintptr_t>(simt::shared()) - kShared : 0;
    out(to ? raw(1) - base : raw(1) + base);
  }
  void copy() {
    const size_t bytes = raw(2), from = i->operands.size() > 3 ? raw(3) : bytes;
    if ((bytes != 4 && bytes != 16) || (from != 0 && from != bytes)) stop("an asynchronous copy of a part");
    std::byte* const to = memory('s', raw(0), bytes, true);
    (bytes == 16 ? simt::copy16 : simt::copy4)(to, from ? memory('g', raw(1), bytes, false) : to, from != 0);
    passed_.copies.push_back({static_cast<size_t>(to - simt::shared()), bytes, passed_.group});
  }
  void commit() {
    simt::commit();
    ++passed_.group;
  }
  void land(int open) {
    for (auto& c = passed_.copies; !c.empty() && c[0].group + open < passed_.group; c.pop_front())
      for (size_t k = 0; k < c[0].bytes; ++k) touch(c[0].byte + k, true, false);  // a write once more
    simt::land(open);
  }
  void call() {
    const Function& f = *i->callee;
    if (!f.defined || i->operands.size() != f.results.size() + f.parameters.size()) stop("a call of something else");
    Frame frame(f, this, passed_);
    for (size_t k = 0; k < f.parameters.size(); ++k)
      std::memcpy(frame.variable(f.parameters[k]), reinterpret_cast<void*>(raw(i->left + k)), f.parameters[k].bytes);
    frame.run();
    for (size_t k = 0; k < f.results.size(); ++k)
      std::memcpy(reinterpret_cast<void*>(raw(k)), frame.variable(f.results[k]), f.results[k].bytes);
  }

  // ---- threads together

  void sync() {
    if (i->operands.size() != 1 || raw(0) != 0) stop("a barrier of some threads");
    simt::sync(file(), i->line);
    ++passed_.syncs;
  }
  void all_lanes(size_t k) const {
    if (in<uint32_t>(k) != ~0u) stop("a warp's operation for some lanes only");
  }
  void sync_warp() {
    all_lanes(0);
    simt::sync_warp(file(), i->line);
    ++passed_.warp_syncs;
  }
  void meet(uint64_t value, size_t lanes) {
    all_lanes(lanes);
    simt::meet(value, 0, 0, file(), i->line);
  }
  void shuffle() {
    const uint64_t way = i->words[2], x = raw(i->left);
    const int b = in<int>(i->left + 1u) & 31, c = in<int>(i->left + 2u), lane = simt::lane(), segment = c >> 8 & 31;
    meet(x, i->left + 3u);
    const int end = (lane & segment) | (c & 31 & ~segment);
    const int from = way == "up"_w     ? lane - b
                     : way == "down"_w ? lane + b
                     : way == "bfly"_w ? lane ^ b
                                       : (lane & segment) | (b & ~segment);
    const bool valid = way == "up"_w ? from >= end : from <= end;
    out(simt::given(valid ? from : lane, 0));
    if (i->left == 2) out(valid, 1);
  }
  uint64_t lanes_with(uint64_t value) const {
    uint64_t bits = 0;
    for (int k = 0; k < 32; ++k) bits |= static_cast<uint64_t>(simt::given(k, 0) == value) << k;
    return bits;
  }
  void vote() {
    meet(flag(1), 2);
    const uint64_t yes = lanes_with(1), way = i->words[2];
    out(way == "ballot"_w ? yes : way == "any"_w ? yes != 0 : yes == low(32) || (way == "uni"_w && yes == 0));
  }
  void match() {
    const uint64_t x = raw(i->left);
    meet(x, i->left + 1u);
    const uint64_t same = lanes_with(x);
    out(i->words[1] == "any"_w || same == low(32) ? same : 0);
    if (i->left == 2) out(same == low(32), 1);
  }
  void reduce() {
    meet(raw(1), 2);
    with_integer(i->type, [&](auto zero) {
      using T = decltype(zero);
      T y = value_of<T>(simt::given(0, 0));
      for (int k = 1; k < 32; ++k) y = combined(i->words[2], y, value_of<T>(simt::given(k, 0)));
      out(bits_of(y));
    });
  }
  void matrices() {
    uint32_t r[4];
    const void* const row = memory('s', raw(4), 16, false);
    (i->words[5] == "trans"_w ? simt::load_matrices_transposed : simt::load_matrices)(r, row, file(), i->line);
    for (size_t k = 0; k < 4; ++k) out(r[k], k);
  }
  template <class F>
  void multiply_add(F f) {
    const uint32_t a[4] = {in<uint32_t>(4), in<uint32_t>(5), in<uint32_t>(6), in<uint32_t>(7)};
    float d[4] = {in<float>(10), in<float>(11), in<float>(12), in<float>(13)};
    f(d, a, in<uint32_t>(8), in<uint32_t>(9), file(), i->line);
    for (size_t k = 0; k < 4; ++k) out(bits_of(d[k]), k);
  }

 private:
  const Function& f_;
  const Frame* const caller_;
  Passed& passed_;
  size_t at_ = 0;
  std::vector<uint64_t> r_;
  std::vector<simt::Quad> memory_;
};

}  // namespace ptx
