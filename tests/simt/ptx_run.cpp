// SPDX-License-Identifier: Apache-2.0
// One thread's way through a kernel's instructions. Registers are 64 bits wide and hold what their declared width
// keeps, zero-extended; an instruction reads its operands as its own type.
#include <cfenv>
#include <limits>

#include "ptx.h"

namespace ptx {
namespace {

/// Who touched a byte of shared memory last, and when, counted in barriers of the block and of the warp.
struct Touch {
  int16_t thread = -1, warp = -1;  // -2: several
  uint16_t syncs = 0, warp_syncs = 0;
  bool atomic = false;
};
struct Shadow {
  Touch write, read;
};

struct World {
  const Module* module;
  const Function* kernel;
  const simt::Launch* launch;
  const std::vector<Range>* buffers;
  std::vector<Shadow> shadow;
  int block;
} world;

template <class T>
T number_of(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T>
uint64_t bits_of(T x) {
  uint64_t bits = 0;
  if constexpr (std::is_integral_v<T>)
    bits = static_cast<uint64_t>(x);  // a signed one's sign goes on
  else
    std::memcpy(&bits, &x, sizeof x);
  return bits;
}
uint64_t low(int bits) { return bits >= 64 ? ~0ull : (1ull << bits) - 1; }

size_t size_of(Type t) {
  switch (t) {
    case Type::b8:
    case Type::u8:
    case Type::s8:
      return 1;
    case Type::b16:
    case Type::u16:
    case Type::s16:
      return 2;
    case Type::b32:
    case Type::u32:
    case Type::s32:
    case Type::f32:
      return 4;
    default:
      return 8;
  }
}

/// f(a value of the type)
template <class F>
void with_integer(Type t, F f) {
  switch (t) {
    case Type::b8:
    case Type::u8:
      return f(uint8_t{});
    case Type::b16:
    case Type::u16:
      return f(uint16_t{});
    case Type::b32:
    case Type::u32:
      return f(uint32_t{});
    case Type::b64:
    case Type::u64:
      return f(uint64_t{});
    case Type::s8:
      return f(int8_t{});
    case Type::s16:
      return f(int16_t{});
    case Type::s32:
      return f(int32_t{});
    default:
      return f(int64_t{});
  }
}
template <class F>
void with_float(Type t, F f) {
  if (t == Type::f64) return f(double{});
  f(float{});
}
bool is_float(Type t) { return t >= Type::f16; }

/// f() under a rounding; the volatile ones inside keep it there.
template <class F>
auto rounded(Rounding r, F f) {
  if (r <= Rounding::rn) return f();
  std::fesetround(r == Rounding::rz ? FE_TOWARDZERO : r == Rounding::rm ? FE_DOWNWARD : FE_UPWARD);
  volatile auto y = f();
  std::fesetround(FE_TONEAREST);
  return +y;
}
template <class T>
T whole(Rounding r, T x) {
  return r == Rounding::rni   ? std::nearbyint(x)
         : r == Rounding::rzi ? std::trunc(x)
         : r == Rounding::rmi ? std::floor(x)
         : r == Rounding::rpi ? std::ceil(x)
                              : x;
}
float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

template <class T>
bool holds(Word compare, T a, T b) {
  const bool unordered = a != a || b != b;
  switch (compare) {
    case Word::eq:
      return a == b;
    case Word::ne:
      return !unordered && a != b;
    case Word::lt:
      return a < b;
    case Word::le:
      return a <= b;
    case Word::gt:
      return a > b;
    case Word::ge:
      return a >= b;
    case Word::equ:
      return unordered || a == b;
    case Word::neu:
      return a != b;
    case Word::ltu:
      return unordered || a < b;
    case Word::leu:
      return unordered || a <= b;
    case Word::gtu:
      return unordered || a > b;
    case Word::geu:
      return unordered || a >= b;
    case Word::num:
      return !unordered;
    default:
      return unordered;
  }
}
/// What an atomic or a reduction over lanes makes of an old value and another.
template <class T>
T combined(Word mode, T old, T with, T other = 0) {
  switch (mode) {
    case Word::add:
      return static_cast<T>(static_cast<uint64_t>(old) + static_cast<uint64_t>(with));
    case Word::min:
      return std::min(old, with);
    case Word::max:
      return std::max(old, with);
    case Word::inc:
      return old >= with ? 0 : old + 1;
    case Word::dec:
      return old == 0 || old > with ? with : old - 1;
    case Word::and_:
      return old & with;
    case Word::or_:
      return old | with;
    case Word::xor_:
      return old ^ with;
    case Word::cas:
      return old == with ? other : old;
    default:
      return with;
  }
}

struct Counts {
  uint16_t syncs = 0, warp_syncs = 0;
};

class Frame {
 public:
  Frame(const Function& function, const Frame* caller, Counts& counts)
      : f_(function),
        caller_(caller),
        counts_(counts),
        r_(function.registers, 0x7ff4dead7fa4dead),
        memory_(f_.frame_bytes / 16 + 1) {
    const simt::Thread& t = *simt::current;
    const int lane = t.lane;
    for (uint32_t i = 0; i < kSlots; ++i) r_[i] = 0;
    r_[kFrame] = reinterpret_cast<uintptr_t>(memory_.data());
    r_[kTidX] = static_cast<uint64_t>(t.thread);
    r_[kThreadsX] = static_cast<uint64_t>(t.threads);
    r_[kBlockX] = static_cast<uint64_t>(t.block);
    r_[kBlocksX] = static_cast<uint64_t>(t.blocks);
    r_[kThreadsY] = r_[kThreadsZ] = r_[kBlocksY] = r_[kBlocksZ] = 1;
    r_[kLane] = static_cast<uint64_t>(lane);
    r_[kLanesEq] = 1ull << lane;
    r_[kLanesLt] = low(lane);
    r_[kLanesLe] = low(lane + 1);
    r_[kLanesGt] = low(32) & ~low(lane + 1);
    r_[kLanesGe] = low(32) & ~low(lane);
    r_[kDynamic] = kShared + world.module->static_shared;
    simt::Quad* const p = memory_.data();
    std::memset(static_cast<void*>(p), 0xff, memory_.size() * sizeof *p);
  }
  std::byte* variable(const Variable& v) { return reinterpret_cast<std::byte*>(memory_.data()) + v.offset; }

  void run() {
    for (size_t at = 0; at < f_.code.size();) {
      i_ = &f_.code[at++];
      if (i_->guarded && !flag(i_->guard)) continue;
      if (i_->op == Op::ret) return;
      if (i_->op == Op::bra)
        at = i_->target;
      else
        step();
    }
  }

 private:
  [[noreturn]] void stop(const char* what) const {
    simt::stop((std::string(what) + ": " + i_->text).c_str(), world.module->file.c_str(), i_->line);
  }

  // ---- operands

  uint64_t raw(const Operand& o) const { return r_[o.slot] + o.offset; }
  uint64_t raw(size_t k) const { return raw(i_->operands[k]); }
  bool flag(const Operand& o) const { return (raw(o) & 1) != o.negated; }
  template <class T>
  T in(size_t k) const {
    return k < i_->operands.size() ? number_of<T>(raw(k)) : T{};
  }
  void out(uint64_t bits, size_t k = 0) {
    const Operand& o = i_->operands[k];
    r_[o.slot] = bits & o.mask;
  }
  /// Operand 0 = f(operands 1 to 3), of the instruction's integer type.
  template <class F>
  void integers(F f) {
    with_integer(i_->type, [&](auto zero) {
      using T = decltype(zero);
      out(bits_of(static_cast<T>(f(in<T>(1), in<T>(2), in<T>(3)))));
    });
  }
  template <class F>
  void floats(F f) {
    with_float(i_->type, [&](auto zero) {
      using T = decltype(zero);
      if (i_->rounding <= Rounding::rn) return out(bits_of<T>(f(in<T>(1), in<T>(2), in<T>(3))));
      volatile T a = in<T>(1), b = in<T>(2), c = in<T>(3);
      out(bits_of<T>(rounded(i_->rounding, [&]() -> T { return f(T(a), T(b), T(c)); })));
    });
  }
  /// Of float32, by an approximation's meaning in emulator.h.
  template <class F>
  void approximate(F f) {
    const float x = in<float>(1), y = f(i_->ftz ? flushed(x) : x);
    out(bits_of(i_->ftz ? flushed(y) : y));
  }

  // ---- memory

  std::byte* memory(Space space, uint64_t address, size_t bytes, uint64_t used, bool writes, bool atomic = false) {
    if (address % bytes) stop("a misaligned access");
    const auto [first, count] = looked_at(bytes, used);
    const uint64_t shared_host = reinterpret_cast<uintptr_t>(simt::shared());
    const Range window = {shared_host, shared_host + world.shadow.size()};
    if (space == Space::shared) address = shared_host + (static_cast<uint32_t>(address) - kShared);
    const uint64_t begin = address + first;
    if (space == Space::shared || (space == Space::generic && window.holds(begin, count))) {
      if (!window.holds(begin, count)) stop("an access out of range");
      for (size_t i = 0; i < bytes; ++i)
        if (used >> i & 1) touch(address + i - shared_host, writes, atomic);
      return reinterpret_cast<std::byte*>(address);
    }
    const auto within = [&](const std::vector<Range>& ranges) {
      return std::any_of(ranges.begin(), ranges.end(), [&](const Range& r) { return r.holds(begin, count); });
    };
    bool ok = false;
    if (space == Space::generic || space == Space::global) ok = within(*world.buffers) || within(world.module->globals);
    if (!ok && !writes && (space == Space::generic || space == Space::constant)) ok = within(world.module->constants);
    if (!ok && space != Space::global && space != Space::constant)
      for (const Frame* f = this; f && !ok; f = f->caller_)
        ok = Range{f->r_[kFrame], f->r_[kFrame] + f->f_.frame_bytes}.holds(begin, count);
    if (!ok) stop("an access out of range");
    return reinterpret_cast<std::byte*>(address);
  }
  /// The first used byte and how many there are up to the last one.
  static std::pair<uint64_t, uint64_t> looked_at(size_t bytes, uint64_t used) {
    uint64_t first = 0, last = bytes;
    while (first < bytes && !(used >> first & 1)) ++first;
    while (last > first && !(used >> (last - 1) & 1)) --last;
    return {first, last - first};
  }

  void touch(size_t byte, bool writes, bool atomic) {
    Shadow& s = world.shadow[byte];
    const simt::Thread& t = *simt::current;
    const auto ordered = [&](const Touch& o) {
      return o.thread == -1 || o.thread == t.thread || o.syncs < counts_.syncs ||
             (o.warp == t.warp && o.warp_syncs < counts_.warp_syncs);
    };
    if (!ordered(s.write) && !(atomic && s.write.atomic)) stop("a race in shared memory, with a write");
    if (writes && !ordered(s.read)) stop("a race in shared memory, with a read");
    Touch own;
    own.thread = static_cast<int16_t>(t.thread);
    own.warp = static_cast<int16_t>(t.warp);
    own.syncs = counts_.syncs;
    own.warp_syncs = counts_.warp_syncs;
    own.atomic = atomic;
    if (!writes && !ordered(s.read)) {  // several readers: a write must wait for all
      own.thread = -2;
      if (s.read.warp != own.warp) own.warp = -2;
    }
    (writes ? s.write : s.read) = own;
    if (writes) s.read = {};
  }

  // ---- a warp's rendezvous

  void meet(uint64_t value, uint64_t lanes) {
    if (static_cast<uint32_t>(lanes) != ~0u) stop("a warp's operation for some lanes only");
    simt::meet(value, 0, 0, world.module->file.c_str(), i_->line);
  }
  void shuffle() {
    const bool flagged = i_->left == 2;
    const size_t a = flagged ? 2 : 1;
    const uint32_t b = in<uint32_t>(a + 1), c = in<uint32_t>(a + 2);
    meet(in<uint32_t>(a), raw(a + 3));
    const int lane = simt::lane(), segment = static_cast<int>(c >> 8 & 31), by = static_cast<int>(b & 31);
    const int clamp = static_cast<int>(c & 31), least = lane & segment, most = least | (clamp & ~segment);
    const int from = i_->mode == Word::up     ? lane - by
                     : i_->mode == Word::down ? lane + by
                     : i_->mode == Word::bfly ? lane ^ by
                                              : least | (by & ~segment);
    const bool valid = i_->mode == Word::up ? from >= most : from <= most;
    const uint64_t given = simt::given(valid ? from : lane, 0);
    out(given);
    if (flagged) out(valid, 1);
  }
  void vote() {
    meet(flag(i_->operands[1]), raw(2));
    uint64_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= simt::given(i, 0) << i;
    out(i_->mode == Word::ballot ? bits
        : i_->mode == Word::any  ? bits != 0
        : i_->mode == Word::all  ? bits == low(32)
                                 : bits == low(32) || bits == 0);
  }
  void match() {
    const size_t a = i_->left;
    meet(raw(a), raw(a + 1));
    uint64_t same = 0;
    for (int i = 0; i < 32; ++i) same |= static_cast<uint64_t>(simt::given(i, 0) == raw(a)) << i;
    if (i_->mode == Word::any) return out(same);
    out(same == low(32) ? same : 0);
    if (a == 2) out(same == low(32), 1);
  }

  // ---- the rest

  void convert() {
    const Type to = i_->type, from = i_->from;
    const Rounding r = i_->rounding;
    if (from == Type::f16 || from == Type::bf16) {
      const uint16_t h = in<uint16_t>(1);
      const float x = from == Type::f16 ? simt::from_half(h) : simt::float_of(static_cast<uint32_t>(h) << 16);
      out(to == Type::f64 ? bits_of<double>(x) : bits_of(x));
    } else if (to == Type::f16 || to == Type::bf16) {
      out(to == Type::f16 ? simt::to_half(in<float>(1)) : simt::round_to_bfloat16(in<float>(1)));
    } else if (is_float(from)) {
      with_float(from, [&](auto f) {
        using F = decltype(f);
        const F x = whole(r, in<F>(1));
        if (is_float(to)) {
          const F y = i_->sat ? (x > 0 ? std::fmin(x, F{1}) : F{0}) : x;
          with_float(to, [&](auto t) {
            using T = decltype(t);
            volatile F z = y;
            out(bits_of<T>(rounded(r > Rounding::rp ? Rounding::rn : r, [&] { return static_cast<T>(z); })));
          });
          return;
        }
        with_integer(to, [&](auto t) {  // the nearest there is; NaN is 0
          using T = decltype(t);
          using Limits = std::numeric_limits<T>;
          out(bits_of(x != x                               ? T{0}
                      : x >= static_cast<F>(Limits::max()) ? Limits::max()
                      : x <= static_cast<F>(Limits::min()) ? Limits::min()
                                                           : static_cast<T>(x)));
        });
      });
    } else {
      with_integer(from, [&](auto f) {
        using F = decltype(f);
        volatile F x = in<F>(1);
        if (is_float(to))
          return with_float(to, [&](auto t) {
            using T = decltype(t);
            out(bits_of<T>(rounded(r, [&] { return static_cast<T>(x); })));
          });
        with_integer(to, [&](auto t) {
          using T = decltype(t);
          using Limits = std::numeric_limits<T>;
          const __int128 y = x;
          out(bits_of(i_->sat && y > Limits::max()   ? Limits::max()
                      : i_->sat && y < Limits::min() ? Limits::min()
                                                     : static_cast<T>(x)));
        });
      });
    }
  }

  void pack_or_unpack() {
    const size_t n = i_->operands.size() - i_->left;
    const int bits = static_cast<int>(size_of(i_->type) * 8 / std::max<size_t>(i_->left, n));
    if (i_->left > 1) {
      for (size_t k = 0; k < i_->left; ++k) out(raw(i_->left) >> (static_cast<int>(k) * bits) & low(bits), k);
      return;
    }
    uint64_t all = 0;
    for (size_t k = 0; k < n; ++k) all |= (raw(1 + k) & low(n > 1 ? bits : 64)) << (static_cast<int>(k) * bits);
    out(all);
  }

  void load() {
    const size_t each = size_of(i_->type), n = i_->vector;
    const std::byte* const p = memory(i_->space, raw(i_->left), each * n, i_->used, false);
    with_integer(i_->type, [&](auto zero) {
      using T = decltype(zero);
      for (size_t k = 0; k < n; ++k) {
        uint64_t bits = 0;
        std::memcpy(&bits, p + k * each, each);
        out(is_float(i_->type) ? bits : bits_of(number_of<T>(bits)), k);
      }
    });
  }
  void store() {
    const size_t each = size_of(i_->type), n = i_->vector;
    std::byte* const p = memory(i_->space, raw(0), each * n, ~0ull, true);
    for (size_t k = 0; k < n; ++k) {
      const uint64_t bits = raw(1 + k);
      std::memcpy(p + k * each, &bits, each);
    }
  }
  void atomic(bool returns) {
    const size_t a = returns;
    with_integer(i_->type, [&](auto zero) {
      using T = decltype(zero);
      auto* const p = reinterpret_cast<T*>(memory(i_->space, raw(a), sizeof(T), ~0ull, true, true));
      const T old = *p;
      *p = combined(i_->mode, old, in<T>(a + 1), in<T>(a + 2));
      if (returns) out(bits_of(old));
    });
  }

  void copy() {
    const size_t bytes = raw(2), from = i_->operands.size() > 3 ? raw(3) : bytes;
    if ((bytes != 4 && bytes != 16) || (from != 0 && from != bytes)) stop("an asynchronous copy of a part");
    void* const to = memory(Space::shared, raw(0), bytes, ~0ull, true);
    const void* const source = from ? memory(Space::global, raw(1), bytes, ~0ull, false) : to;
    (bytes == 16 ? simt::copy16 : simt::copy4)(to, source, from != 0);
  }
  void land(int open) {
    for (const simt::Copy& c : simt::current->copies)  // a write once more
      if (c.group + open < simt::current->group)
        for (int i = 0; i < c.bytes; ++i)
          touch(static_cast<size_t>(static_cast<std::byte*>(c.to) - simt::shared() + i), true, false);
    simt::land(open);
  }

  void matrices() {
    uint32_t r[4];
    const char* const file = world.module->file.c_str();
    const void* const row = memory(Space::shared, raw(4), 16, ~0ull, false);
    i_->transposed ? simt::load_matrices_transposed(r, row, file, i_->line)
                   : simt::load_matrices(r, row, file, i_->line);
    for (size_t k = 0; k < 4; ++k) out(r[k], k);
  }
  void multiply() {
    float d[4];
    uint32_t a[4];
    for (size_t k = 0; k < 4; ++k) {
      a[k] = in<uint32_t>(4 + k);
      d[k] = in<float>(10 + k);
    }
    simt::multiply_add(d, a, in<uint32_t>(8), in<uint32_t>(9), world.module->file.c_str(), i_->line);
    for (size_t k = 0; k < 4; ++k) out(bits_of(d[k]), k);
  }

  void call() {
    const Function& f = *i_->callee;
    if (!f.defined || i_->operands.size() != f.results.size() + f.parameters.size()) stop("a call of something else");
    Frame frame(f, this, counts_);
    for (size_t k = 0; k < f.parameters.size(); ++k) {
      const Variable& v = f.parameters[k];
      std::memcpy(frame.variable(v), reinterpret_cast<const void*>(raw(i_->left + k)), v.bytes);
    }
    frame.run();
    for (size_t k = 0; k < f.results.size(); ++k)
      std::memcpy(reinterpret_cast<void*>(raw(k)), frame.variable(f.results[k]), f.results[k].bytes);
  }

  void step() {
    const uint64_t shared_host = reinterpret_cast<uintptr_t>(simt::shared());
    const char* const file = world.module->file.c_str();
    switch (i_->op) {
      case Op::mov:
        return i_->operands.size() > 2 ? pack_or_unpack() : out(raw(1));
      case Op::add:
        return out(raw(1) + raw(2));
      case Op::sub:
        return out(raw(1) - raw(2));
      case Op::mul:
        return out(raw(1) * raw(2));
      case Op::mad:
        return out(raw(1) * raw(2) + raw(3));
      case Op::neg:
        return out(0 - raw(1));
      case Op::and_:
        return out(raw(1) & raw(2));
      case Op::or_:
        return out(raw(1) | raw(2));
      case Op::xor_:
        return out(raw(1) ^ raw(2));
      case Op::not_:
        return out(~raw(1));
      case Op::selp:
        return out(flag(i_->operands[3]) ? raw(1) : raw(2));
      case Op::mul_wide:
      case Op::mad_wide:
      case Op::mul_hi:
      case Op::mad_hi:
        return with_integer(i_->type, [&](auto zero) {
          using T = decltype(zero);
          const auto wide = [](T x) { return static_cast<unsigned __int128>(static_cast<__int128>(x)); };
          const auto product = wide(in<T>(1)) * wide(in<T>(2));
          const bool is_wide = i_->op == Op::mul_wide || i_->op == Op::mad_wide;
          const bool adds = i_->op == Op::mad_wide || i_->op == Op::mad_hi;
          out(static_cast<uint64_t>(is_wide ? product : product >> (8 * sizeof(T))) + (adds ? raw(3) : 0));
        });
      case Op::div:
      case Op::rem:
        return integers([&](auto a, auto b, auto) {
          using T = decltype(a);
          if (b == 0) stop("a division by zero");
          if (std::is_signed_v<T> && b == static_cast<T>(-1))  // overflows once
            return i_->op == Op::div ? static_cast<T>(0 - static_cast<uint64_t>(a)) : T{0};
          return static_cast<T>(i_->op == Op::div ? a / b : a % b);
        });
      case Op::min:
        return integers([](auto a, auto b, auto) { return std::min(a, b); });
      case Op::max:
        return integers([](auto a, auto b, auto) { return std::max(a, b); });
      case Op::abs:
        return integers([](auto a, auto, auto) { return a < 0 ? 0 - static_cast<uint64_t>(a) : a; });
      case Op::float_add:
        return floats([](auto a, auto b, auto) { return a + b; });
      case Op::float_sub:
        return floats([](auto a, auto b, auto) { return a - b; });
      case Op::float_mul:
        return floats([](auto a, auto b, auto) { return a * b; });
      case Op::float_div:
        return floats([](auto a, auto b, auto) { return a / b; });
      case Op::float_min:
        return floats([](auto a, auto b, auto) { return std::fmin(a, b); });
      case Op::float_max:
        return floats([](auto a, auto b, auto) { return std::fmax(a, b); });
      case Op::float_neg:
        return floats([](auto a, auto, auto) { return -a; });
      case Op::float_abs:
        return floats([](auto a, auto, auto) { return std::fabs(a); });
      case Op::copysign:
        return floats([](auto a, auto b, auto) { return std::copysign(b, a); });
      case Op::fma:
        return floats([](auto a, auto b, auto c) { return std::fma(a, b, c); });
      case Op::rcp:
        return floats([](auto a, auto, auto) { return 1 / a; });
      case Op::sqrt:
        return floats([](auto a, auto, auto) { return std::sqrt(a); });
      case Op::rsqrt:
        return approximate([](float x) { return 1 / std::sqrt(x); });
      case Op::ex2:
        return i_->ftz ? out(bits_of(simt::exp2(in<float>(1)))) : out(bits_of(std::exp2(in<float>(1))));
      case Op::lg2:
        return approximate([](float x) { return simt::log2(x); });
      case Op::shl:
      case Op::shr:
        return with_integer(i_->type, [&](auto zero) {
          using T = decltype(zero);
          constexpr uint32_t kBits = 8 * sizeof(T);
          const uint32_t n = in<uint32_t>(2);
          const T a = in<T>(1);
          if (i_->op == Op::shl) return out(n < kBits ? bits_of(a) << n : 0);
          out(bits_of(static_cast<T>(n < kBits ? a >> n : a < 0 ? -1 : 0)));
        });
      case Op::bfe:
        return with_integer(i_->type, [&](auto zero) {
          using T = decltype(zero);
          constexpr int kBits = 8 * sizeof(T);
          const int place = in<uint8_t>(2), length = in<uint8_t>(3);
          const T a = in<T>(1);
          const int kept = std::min(length, std::max(kBits - place, 0)), top = std::min(place + length, kBits) - 1;
          uint64_t y = kept ? bits_of(a) >> place & low(kept) : 0;
          if (std::is_signed_v<T> && length && bits_of(a) >> top & 1) y |= ~low(kept);
          out(y);
        });
      case Op::bfi: {
        const int bits = i_->type == Type::b64 ? 64 : 32, place = in<uint8_t>(3), length = in<uint8_t>(4);
        const uint64_t field = place < bits ? low(length) << place : 0;
        return out((raw(2) & ~field) | (place < bits ? raw(1) << place & field : 0));
      }
      case Op::bfind:
        return with_integer(i_->type, [&](auto zero) {
          using T = decltype(zero);
          const T a = in<T>(1);
          const uint64_t x = (a < 0 ? ~bits_of(a) : bits_of(a)) & low(8 * sizeof(T));
          const int top = x ? 63 - __builtin_clzll(x) : -1;
          out(bits_of(x && i_->shift_amount ? static_cast<int>(8 * sizeof(T)) - 1 - top : top));
        });
      case Op::clz: {
        const uint64_t a = i_->type == Type::b32 ? in<uint32_t>(1) : raw(1);
        return out(static_cast<uint64_t>((a ? __builtin_clzll(a) : 64) - (i_->type == Type::b32 ? 32 : 0)));
      }
      case Op::popc:
        return out(static_cast<uint64_t>(__builtin_popcountll(i_->type == Type::b32 ? in<uint32_t>(1) : raw(1))));
      case Op::brev: {
        const int bits = i_->type == Type::b32 ? 32 : 64;
        uint64_t y = 0;
        for (int k = 0; k < bits; ++k) y |= (raw(1) >> k & 1) << (bits - 1 - k);
        return out(y);
      }
      case Op::prmt: {
        const uint64_t both = in<uint32_t>(1) | raw(2) << 32;
        uint64_t y = 0;
        for (int k = 0; k < 4; ++k) {
          const uint64_t choice = raw(3) >> (4 * k), byte = both >> (8 * (choice & 7)) & 255;
          y |= (choice & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * k);
        }
        return out(y);
      }
      case Op::lop3: {
        uint64_t y = 0;
        for (uint64_t k = 0; k < 8; ++k)
          if (raw(4) >> k & 1)
            y |= (k & 4 ? raw(1) : ~raw(1)) & (k & 2 ? raw(2) : ~raw(2)) & (k & 1 ? raw(3) : ~raw(3));
        return out(y);
      }
      case Op::shf: {
        const uint64_t both = in<uint32_t>(1) | raw(2) << 32, n = in<uint32_t>(3);
        const uint64_t by = i_->also == Word::wrap ? n & 31 : std::min<uint64_t>(n, 32);
        return out(i_->mode == Word::left ? both << by >> 32 : both >> by);
      }
      case Op::setp: {
        const size_t a = i_->left;
        bool y = false;
        const auto compare = [&](auto zero) {
          y = holds(i_->compare, in<decltype(zero)>(a), in<decltype(zero)>(a + 1));
        };
        is_float(i_->type) ? with_float(i_->type, compare) : with_integer(i_->type, compare);
        const bool with = i_->mode != Word::none && flag(i_->operands[a + 2]);
        const auto both = [&](bool x) { return i_->mode == Word::none ? x : combined<int>(i_->mode, x, with) != 0; };
        if (a == 2) out(both(!y), 1);
        return out(both(y));
      }
      case Op::cvt:
        return convert();
      case Op::cvt_pair: {
        const bool half = i_->type == Type::f16x2;
        const auto narrow = [&](float x) { return half ? simt::to_half(x) : simt::round_to_bfloat16(x); };
        return out(narrow(in<float>(2)) | narrow(in<float>(1)) << 16);
      }
      case Op::cvta:
        return out(raw(1) + (i_->space == Space::shared ? shared_host - kShared : 0));
      case Op::cvta_to:
        return out(raw(1) - (i_->space == Space::shared ? shared_host - kShared : 0));
      case Op::ld:
        return load();
      case Op::st:
        return store();
      case Op::atom:
        return atomic(true);
      case Op::red:
        return atomic(false);
      case Op::call:
        return call();
      case Op::sync:
        if (i_->operands.size() != 1 || raw(0) != 0) stop("a barrier of some threads");
        simt::sync(file, i_->line);
        ++counts_.syncs;
        return;
      case Op::sync_warp:
        if (in<uint32_t>(0) != ~0u) stop("a warp's operation for some lanes only");
        simt::sync_warp(file, i_->line);
        ++counts_.warp_syncs;
        return;
      case Op::shfl:
        return shuffle();
      case Op::vote:
        return vote();
      case Op::match:
        return match();
      case Op::redux:
        meet(raw(1), raw(2));
        return with_integer(i_->type, [&](auto zero) {
          using T = decltype(zero);
          T y = number_of<T>(simt::given(0, 0));
          for (int k = 1; k < 32; ++k) y = combined(i_->mode, y, number_of<T>(simt::given(k, 0)));
          out(bits_of(y));
        });
      case Op::copy:
        return copy();
      case Op::commit:
        return simt::commit();
      case Op::wait:
        return land(in<int>(0));
      case Op::wait_all:
        simt::commit();
        return land(0);
      case Op::ldmatrix:
        return matrices();
      case Op::mma:
        return multiply();
      case Op::trap:
        stop("a trap");
      default:
        return;
    }
  }

  const Function& f_;
  const Frame* caller_;
  Counts& counts_;
  const Instruction* i_ = nullptr;
  std::vector<uint64_t> r_;
  std::vector<simt::Quad> memory_;
};

void thread(void*) {
  const simt::Launch& launch = *world.launch;
  const size_t bytes = world.module->static_shared + launch.shared_bytes;
  if (world.block != simt::block()) world.shadow.assign(bytes, {});
  world.block = simt::block();
  Counts counts;
  Frame frame(*world.kernel, nullptr, counts);
  for (size_t k = 0; k < launch.parameters.size(); ++k)
    std::memcpy(frame.variable(world.kernel->parameters[k]), launch.parameters[k], launch.sizes[k]);
  frame.run();
}

}  // namespace

void run(const Module& module, const Function& kernel, const std::vector<Range>& buffers, const simt::Launch& launch) {
  bool same = kernel.parameters.size() == launch.sizes.size();
  for (size_t k = 0; same && k < launch.sizes.size(); ++k) same = kernel.parameters[k].bytes == launch.sizes[k];
  if (!same) refuse("parameters of other sizes: " + kernel.name, module.file.c_str(), 0);
  world.module = &module;
  world.kernel = &kernel;
  world.launch = &launch;
  world.buffers = &buffers;
  world.block = -1;
  simt::run(launch.blocks, launch.threads, module.static_shared + launch.shared_bytes, thread, nullptr);
}

}  // namespace ptx
