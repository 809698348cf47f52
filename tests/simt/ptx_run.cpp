// SPDX-License-Identifier: Apache-2.0
// What PTX instructions do to one thread: a row of a table each, and no other is known. Registers are 64 bits wide and
// hold what their declared width keeps, zero-extended; an instruction reads its operands as its own type.
#include <cfenv>
#include <limits>
#include <regex>
#include <utility>

#include "ptx.h"

namespace ptx {
namespace {

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
} world;

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

bool is_float(Type t) { return t.kind == 'f' || t.kind == 'h'; }
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

/// f() under a rounding, which what it reads and the result, volatile both, do not leave.
template <class F>
auto rounded(uint64_t way, F f) {
  if (way == 0 || way == "rn"_w) return f();
  std::fesetround(way == "rz"_w ? FE_TOWARDZERO : way == "rm"_w ? FE_DOWNWARD : FE_UPWARD);
  volatile auto y = f();
  std::fesetround(FE_TONEAREST);
  return +y;
}
template <class T>
T whole(uint64_t way, T x) {
  return way == "rni"_w   ? std::nearbyint(x)
         : way == "rzi"_w ? std::trunc(x)
         : way == "rmi"_w ? std::floor(x)
         : way == "rpi"_w ? std::ceil(x)
                          : x;
}
float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

template <class T>
bool holds(uint64_t compare, T a, T b) {
  if (a != a || b != b) return compare == "nan"_w || (compare & 255) == 'u';  // equ, ltu
  switch ((compare & 255) == 'u' ? compare >> 8 : compare) {
    case "eq"_w:
      return a == b;
    case "ne"_w:
      return a != b;
    case "lt"_w:
    case "lo"_w:
      return a < b;
    case "le"_w:
    case "ls"_w:
      return a <= b;
    case "gt"_w:
    case "hi"_w:
      return a > b;
    case "ge"_w:
    case "hs"_w:
      return a >= b;
    default:
      return compare == "num"_w;
  }
}
/// What an atomic or a reduction over lanes makes of an old value and another.
template <class T>
T combined(uint64_t mode, T old, T with, T other = 0) {
  switch (mode) {
    case "add"_w:
      return static_cast<T>(static_cast<uint64_t>(old) + static_cast<uint64_t>(with));
    case "min"_w:
      return std::min(old, with);
    case "max"_w:
      return std::max(old, with);
    case "inc"_w:
      return old >= with ? 0 : old + 1;
    case "dec"_w:
      return old == 0 || old > with ? with : old - 1;
    case "and"_w:
      return old & with;
    case "or"_w:
      return old | with;
    case "xor"_w:
      return old ^ with;
    case "cas"_w:
      return old == with ? other : old;
    default:
      return with;  // exch
  }
}

}  // namespace

class Frame {
 public:
  struct Passed {  // barriers so far
    uint16_t syncs = 0, warp_syncs = 0;
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
  /// Operand 0 = f(operands 1 to 3), of the instruction's type.
  template <class F>
  void integers(F f) {
    with_integer(i->type, [&](auto zero) {
      using T = decltype(zero);
      out(bits_of(static_cast<T>(f(in<T>(1), in<T>(2), in<T>(3)))));
    });
  }
  template <class F>
  void floats(F f) {
    with_float(i->type, [&](auto zero) {
      using T = decltype(zero);
      volatile T a = in<T>(1), b = in<T>(2), c = in<T>(3);
      out(bits_of<T>(rounded(i->rounding, [&]() -> T { return f(T(a), T(b), T(c)); })));
    });
  }
  /// Of float32: an approximation of f.
  template <class F>
  void approximate(F f) {
    const float y = f(i->ftz ? flushed(in<float>(1)) : in<float>(1));
    out(bits_of(i->ftz ? flushed(y) : y));
  }
  /// The product of operands 1 and 2, `above` of their bits left out below, and operand 3 added.
  void product(bool high) {
    with_integer(i->type, [&](auto zero) {
      using T = decltype(zero);
      const auto wide = [](T x) { return static_cast<unsigned __int128>(static_cast<__int128>(x)); };
      out(static_cast<uint64_t>(wide(in<T>(1)) * wide(in<T>(2)) >> (high ? 8 * sizeof(T) : 0)) + raw(3));
    });
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
    Touch own = {static_cast<int16_t>(t.thread), static_cast<int16_t>(t.warp), passed_.syncs, passed_.warp_syncs,
                 atomic};
    if (!writes && !ordered(read)) {  // several readers, for all of whom a write must wait
      own.thread = -2;
      if (read.warp != own.warp) own.warp = -2;
    }
    (writes ? write : read) = own;
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
    void* const to = memory('s', raw(0), bytes, true);
    (bytes == 16 ? simt::copy16 : simt::copy4)(to, from ? memory('g', raw(1), bytes, false) : to, from != 0);
  }
  void land(int open) {
    for (const simt::Copy& c : simt::current->copies)  // writes once more
      for (int k = 0; k < c.bytes && c.group + open < simt::current->group; ++k)
        touch(static_cast<size_t>(static_cast<std::byte*>(c.to) - simt::shared() + k), true, false);
    simt::land(open);
  }
  void call() {
    const Function& f = *i->callee;
    if (!f.defined || i->operands.size() != f.results.size() + f.parameters.size()) stop("a call of something else");
    Frame frame(f, this, passed_);
    const Instruction* const own = i;
    for (size_t k = 0; k < f.parameters.size(); ++k)
      std::memcpy(frame.variable(f.parameters[k]), reinterpret_cast<void*>(raw(own->left + k)), f.parameters[k].bytes);
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
  void multiply_add() {
    const uint32_t a[4] = {in<uint32_t>(4), in<uint32_t>(5), in<uint32_t>(6), in<uint32_t>(7)};
    float d[4] = {in<float>(10), in<float>(11), in<float>(12), in<float>(13)};
    simt::multiply_add(d, a, in<uint32_t>(8), in<uint32_t>(9), file(), i->line);
    for (size_t k = 0; k < 4; ++k) out(bits_of(d[k]), k);
  }

  // ---- bits

  void move() {
    const size_t left = i->left, right = i->operands.size() - left;
    const uint64_t bits = 8 * i->type.bytes / std::max(left, right);
    uint64_t all = 0;
    for (size_t k = 0; k < right; ++k) all |= (right > 1 ? raw(left + k) & low(bits) : raw(left)) << (k * bits);
    for (size_t k = 0; k < left; ++k) out(left > 1 ? all >> (k * bits) & low(bits) : all, k);
  }
  void compare() {
    const size_t a = i->left;
    bool y = false;
    with_number(i->type, [&](auto zero) { y = holds(i->words[1], in<decltype(zero)>(a), in<decltype(zero)>(a + 1)); });
    const bool joined = i->words.size() == 4;
    const auto with = [&](bool x) { return joined ? combined<int>(i->words[2], x, flag(a + 2)) != 0 : x; };
    const bool results[] = {with(y), with(!y)};
    for (size_t k = 0; k < a; ++k) out(results[k], k);
  }
  void shift(bool left) {
    integers([&](auto a, auto, auto) {
      using T = decltype(a);
      const uint32_t n = in<uint32_t>(2), bits = 8 * sizeof(T);
      return static_cast<T>(left       ? (n < bits ? bits_of(a) << n : 0)
                            : n < bits ? bits_of(T(a >> n))
                            : a < 0    ? ~0ull
                                       : 0);
    });
  }
  void extract() {
    integers([&](auto a, auto, auto) {
      using T = decltype(a);
      const unsigned bits = 8 * sizeof(T), place = in<uint8_t>(2), length = in<uint8_t>(3);
      const unsigned kept = std::min(length, bits - std::min(place, bits)), top = std::min(place + length, bits) - 1;
      const uint64_t y = kept ? bits_of(a) >> place & low(kept) : 0;
      return static_cast<T>(std::is_signed_v<T> && length && bits_of(a) >> top & 1 ? y | ~low(kept) : y);
    });
  }
  void insert() {
    const uint64_t bits = 8 * i->type.bytes, place = in<uint8_t>(3), field = low(in<uint8_t>(4));
    out(place < bits ? (raw(2) & ~(field << place)) | (raw(1) & field) << place : raw(2));
  }
  void find_top() {
    with_integer(i->type, [&](auto zero) {
      using T = decltype(zero);
      const uint64_t x = bits_of(in<T>(1)) ^ (in<T>(1) < 0 ? ~0ull : 0), bits = 8 * sizeof(T);
      const uint64_t top = x ? 63 - static_cast<uint64_t>(__builtin_clzll(x)) : ~0ull;
      out(x && i->words[1] == "shiftamt"_w ? bits - 1 - top : top);
    });
  }
  void permute() {
    const uint64_t both = in<uint32_t>(1) | raw(2) << 32;
    uint64_t y = 0;
    for (uint64_t k = 0; k < 4; ++k) {
      const uint64_t choice = raw(3) >> (4 * k), byte = both >> (8 * (choice & 7)) & 255;
      y |= (choice & 8 ? byte / 128 * 255 : byte) << (8 * k);
    }
    out(y);
  }
  void logic() {
    uint64_t y = 0;
    for (uint64_t k = 0; k < 8; ++k)
      if (raw(4) >> k & 1) y |= (k & 4 ? raw(1) : ~raw(1)) & (k & 2 ? raw(2) : ~raw(2)) & (k & 1 ? raw(3) : ~raw(3));
    out(y);
  }
  void funnel() {
    const uint64_t both = in<uint32_t>(1) | raw(2) << 32, n = in<uint32_t>(3);
    const uint64_t by = i->words[2] == "wrap"_w ? n & 31 : std::min<uint64_t>(n, 32);
    out(i->words[1] == "l"_w ? both << by >> 32 : both >> by);
  }

  // ---- conversions

  template <class T, class F>
  T nearest_in(F x) const {  // what T cannot hold becomes its end, NaN 0
    using Limits = std::numeric_limits<T>;
    return x != x                               ? T{0}
           : x >= static_cast<F>(Limits::max()) ? Limits::max()
           : x <= static_cast<F>(Limits::min()) ? Limits::min()
                                                : static_cast<T>(x);
  }
  void convert() {
    const Type to = i->type, from = i->from;
    if (is_float(from) && from.bytes == 2) {
      const uint16_t h = in<uint16_t>(1);
      const float x = from.kind == 'h' ? simt::float_of(static_cast<uint32_t>(h) << 16) : simt::from_half(h);
      return out(to.bytes == 8 ? bits_of<double>(x) : bits_of(x));
    }
    if (is_float(to) && (to.bytes == 2 || to.pair)) {
      const auto narrow = [&](float x) -> uint32_t {
        return to.kind == 'h' ? simt::round_to_bfloat16(x) : simt::to_half(x);
      };
      return out(to.pair ? narrow(in<float>(2)) | narrow(in<float>(1)) << 16 : narrow(in<float>(1)));
    }
    with_number(from, [&](auto f) {
      using F = decltype(f);
      F x = in<F>(1);
      if constexpr (std::is_floating_point_v<F>) {
        x = whole(i->rounding, x);
        if (is_float(to) && i->sat) x = x > 0 ? std::fmin(x, F{1}) : F{0};
      }
      volatile F source = x;
      with_number(to, [&](auto t) {
        using T = decltype(t);
        if constexpr (std::is_floating_point_v<T>)
          out(bits_of<T>(
              rounded((i->rounding & 255) == 'i' ? 0 : i->rounding, [&] { return static_cast<T>(source); })));
        else if constexpr (std::is_floating_point_v<F>)
          out(bits_of(nearest_in<T>(x)));
        else
          out(bits_of(i->sat ? nearest_in<T>(static_cast<__int128>(x)) : static_cast<T>(x)));
      });
    });
  }

  const Instruction* i = nullptr;

 private:
  const Function& f_;
  const Frame* const caller_;
  Passed& passed_;
  size_t at_ = 0;
  std::vector<uint64_t> r_;
  std::vector<simt::Quad> memory_;
};

namespace {

uint64_t reversed(uint64_t x) {
  uint64_t y = 0;
  for (int k = 0; k < 64; ++k) y |= (x >> k & 1) << (63 - k);
  return y;
}

struct Row {
  const char *word, *rest;
  void (*run)(Frame&);
};
#define DO(...) [](Frame& f) { __VA_ARGS__; }
#define BITS(value)                                                           \
  [](Frame& f) {                                                              \
    [[maybe_unused]] const uint64_t a = f.raw(1), b = f.raw(2), c = f.raw(3); \
    f.out(value);                                                             \
  }
#define TYPED(kind, value) \
  DO(f.kind([]([[maybe_unused]] auto a, [[maybe_unused]] auto b, [[maybe_unused]] auto c) { return value; }))
#define DIVISION(value, overflowing)                                                                               \
  [](Frame& f) {                                                                                                   \
    f.integers([&](auto a, auto b, auto) {                                                                         \
      if (b == 0) f.stop("a division by zero");                                                                    \
      using T = decltype(a);                                                                                       \
      return std::is_signed_v<T> && b == static_cast<T>(-1) ? static_cast<T>(overflowing) : static_cast<T>(value); \
    });                                                                                                            \
  }

// <I> integers, <B> bits, <F> floats, <A> any of them, <M> in memory, <R> roundings, <C> comparisons, <S> scopes
const Row rows[] = {
    {"mov", "pred|<A>", DO(f.move())},
    {"add", "<I>", BITS(a + b)},
    {"sub", "<I>", BITS(a - b)},
    {"mul", "lo.<I>", BITS(a * b)},
    {"mad", "lo.<I>", BITS(a * b + c)},
    {"mul", "hi.<I>", DO(f.product(true))},
    {"mad", "hi.<I>", DO(f.product(true))},
    {"mul", "wide.[us](16|32)", DO(f.product(false))},
    {"mad", "wide.[us](16|32)", DO(f.product(false))},
    {"div", "<I>", DIVISION(a / b, 0 - static_cast<uint64_t>(a))},
    {"rem", "<I>", DIVISION(a % b, 0)},
    {"min", "<I>", TYPED(integers, std::min(a, b))},
    {"max", "<I>", TYPED(integers, std::max(a, b))},
    {"abs", "s(16|32|64)", TYPED(integers, a < 0 ? 0 - static_cast<uint64_t>(a) : static_cast<uint64_t>(a))},
    {"neg", "s(16|32|64)", BITS(0 - a)},
    {"and", "pred|<B>", BITS(a & b)},
    {"or", "pred|<B>", BITS(a | b)},
    {"xor", "pred|<B>", BITS(a ^ b)},
    {"not", "pred|<B>", BITS(~a)},
    {"shl", "<B>", DO(f.shift(true))},
    {"shr", "(<I>|<B>)", DO(f.shift(false))},
    {"bfe", "[us](32|64)", DO(f.extract())},
    {"bfi", "b(32|64)", DO(f.insert())},
    {"bfind", "(shiftamt.)?[us](32|64)", DO(f.find_top())},
    {"clz", "b32", BITS(a ? static_cast<uint64_t>(__builtin_clzll(a)) - 32 : 32)},
    {"clz", "b64", BITS(a ? static_cast<uint64_t>(__builtin_clzll(a)) : 64)},
    {"popc", "b(32|64)", BITS(static_cast<uint64_t>(__builtin_popcountll(a)))},
    {"brev", "b32", BITS(reversed(a) >> 32)},
    {"brev", "b64", BITS(reversed(a))},
    {"prmt", "b32", DO(f.permute())},
    {"lop3", "b32", DO(f.logic())},
    {"shf", "(l|r).(wrap|clamp).b32", DO(f.funnel())},
    {"setp", "<C>.((and|or|xor).)?<A>", DO(f.compare())},
    {"selp", "<A>", DO(f.out(f.flag(3) ? f.raw(1) : f.raw(2)))},

    {"add", "(<R>.)?<F>", TYPED(floats, a + b)},
    {"sub", "(<R>.)?<F>", TYPED(floats, a - b)},
    {"mul", "(<R>.)?<F>", TYPED(floats, a* b)},
    {"div", "<R>.<F>", TYPED(floats, a / b)},
    {"fma", "<R>.<F>", TYPED(floats, std::fma(a, b, c))},
    {"min", "<F>", TYPED(floats, simt::least(a, b))},
    {"max", "<F>", TYPED(floats, -simt::least(-a, -b))},
    {"neg", "<F>", TYPED(floats, -a)},
    {"abs", "<F>", TYPED(floats, std::fabs(a))},
    {"copysign", "<F>", TYPED(floats, std::copysign(b, a))},
    {"rcp", "<R>.<F>", TYPED(floats, 1 / a)},
    {"sqrt", "<R>.<F>", TYPED(floats, std::sqrt(a))},
    {"rcp", "approx.(ftz.)?f32", DO(f.approximate([](float x) { return 1 / x; }))},
    {"sqrt", "approx.(ftz.)?f32", DO(f.approximate([](float x) { return std::sqrt(x); }))},
    {"rsqrt", "approx.(ftz.)?f32", DO(f.approximate([](float x) { return 1 / std::sqrt(x); }))},
    {"lg2", "approx.(ftz.)?f32", DO(f.approximate(simt::log2))},
    {"ex2", "approx.ftz.f32", DO(f.approximate(simt::exp2))},

    {"cvt", "(sat.)?[us](8|16|32|64).[us](8|16|32|64)", DO(f.convert())},
    {"cvt", "<R>.<F>.[us](8|16|32|64)", DO(f.convert())},
    {"cvt", "r[nzmp]i.(sat.)?[us](8|16|32|64).<F>", DO(f.convert())},
    {"cvt", "(r[nzmp]i.)?(sat.)?(f32.f32|f64.f64)", DO(f.convert())},
    {"cvt", "f64.f32|<R>.f32.f64|<F>.f16|f32.bf16|rn.b?f16(x2)?.f32", DO(f.convert())},
    {"cvta", "(global|shared|local|const|param).u64", DO(f.cvta(false))},
    {"cvta", "to.(global|shared|local|const|param).u64", DO(f.cvta(true))},

    {"ld",
     "((volatile|relaxed|acquire).)?(<S>.)?((global|shared|local|param|const).)?((c[agsv]|lu|nc|L[12]::\\w+).)*(v[24].)"
     "?<M>",
     DO(f.load())},
    {"st",
     "((volatile|relaxed|release).)?(<S>.)?((global|shared|local|param).)?((c[gs]|w[bt]|L[12]::\\w+).)*(v[24].)?<M>",
     DO(f.store())},
    {"atom", "<O>(exch|cas).b(32|64)|<O><P>", DO(f.atomic(true))},
    {"red", "<O><P>", DO(f.atomic(false))},
    {"membar", "cta|gl|sys", DO((void)f)},
    {"fence", "(sc|acq_rel).<S>", DO((void)f)},
    {"prefetch", "global.L[12]", DO((void)f)},
    {"cp", "async.(ca|cg).shared.global(.L2::\\w+)?", DO(f.copy())},
    {"cp", "async.commit_group", DO((void)f; simt::commit())},
    {"cp", "async.wait_group", DO(f.land(f.in<int>(0)))},
    {"cp", "async.wait_all", DO(simt::commit(); f.land(0))},

    {"bra", "(uni)?", DO(f.jump())},
    {"call", "(uni)?", DO(f.call())},
    {"ret", "(uni)?", DO(f.end())},
    {"trap", "", DO(f.stop("a trap"))},
    {"bar", "sync", DO(f.sync())},
    {"barrier", "sync(.aligned)?", DO(f.sync())},
    {"bar", "warp.sync", DO(f.sync_warp())},
    {"shfl", "sync.(up|down|bfly|idx).b32", DO(f.shuffle())},
    {"vote", "sync.((all|any|uni).pred|ballot.b32)", DO(f.vote())},
    {"match", "(any|all).sync.b(32|64)", DO(f.match())},
    {"redux", "sync.((add|min|max).[us]32|(and|or|xor).b32)", DO(f.reduce())},
    {"ldmatrix", "sync.aligned.m8n8.x4(.trans)?.shared.b16", DO(f.matrices())},
    {"mma", "sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", DO(f.multiply_add())},
};

void thread(void*) {
  if (std::exchange(world.block, simt::block()) != simt::block())
    world.shadow.assign(world.module->static_shared + world.launch->shared_bytes, {});
  Frame::Passed passed;
  Frame frame(*world.kernel, nullptr, passed);
  for (size_t k = 0; k < world.launch->sizes.size(); ++k)
    std::memcpy(frame.variable(world.kernel->parameters[k]), world.launch->parameters[k], world.launch->sizes[k]);
  frame.run();
}

}  // namespace

void (*meaning(const std::string& first, const std::string& rest))(Frame&) {
  const char* const shorthand[][2] = {{"<O>", "((relaxed|acquire|release|acq_rel).)?(<S>.)?((global|shared).)?"},
                                      {"<P>", "((add|min|max).[us](32|64)|(inc|dec).u32|(and|or|xor).b(32|64))"},
                                      {"<I>", "[us](16|32|64)"},
                                      {"<B>", "b(16|32|64)"},
                                      {"<F>", "f(32|64)"},
                                      {"<A>", "([bus](16|32|64)|f(32|64))"},
                                      {"<M>", "([bus](8|16|32|64)|f(32|64))"},
                                      {"<R>", "r[nzmp]"},
                                      {"<S>", "(cta|gpu|sys)"},
                                      {"<C>", "(eq|ne|lt|le|gt|ge|lo|ls|hi|hs|equ|neu|ltu|leu|gtu|geu|num|nan)"},
                                      {".", "\\."}};
  for (const Row& row : rows) {
    if (first != row.word) continue;
    std::string pattern = row.rest;
    for (const auto& [from, to] : shorthand)
      for (size_t at = 0; (at = pattern.find(from, at)) != std::string::npos; at += from[0] == '.' ? 2 : 0)
        pattern.replace(at, std::strlen(from), to);
    if (std::regex_match(rest, std::regex(pattern))) return row.run;
  }
  return nullptr;
}

void run(const Module& module, const Function& kernel, const std::vector<Range>& arrays, const simt::Launch& launch) {
  bool same = kernel.parameters.size() == launch.sizes.size();
  for (size_t k = 0; same && k < launch.sizes.size(); ++k) same = kernel.parameters[k].bytes == launch.sizes[k];
  if (!same) refuse("parameters of other sizes: " + kernel.name, module.file.c_str(), 0);
  world.module = &module;
  world.kernel = &kernel;
  world.launch = &launch;
  world.arrays = &arrays;
  world.block = -1;
  simt::run(launch.blocks, launch.threads, module.static_shared + launch.shared_bytes, thread, nullptr);
}

}  // namespace ptx
