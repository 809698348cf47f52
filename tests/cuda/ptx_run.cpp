// SPDX-License-Identifier: Apache-2.0
// What PTX instructions compute: a row of a table each, and no other is known.
#include <cfenv>
#include <limits>
#include <regex>
#include <utility>

#include "ptx_frame.h"

namespace ptx {
namespace {

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
  const bool or_unordered = (compare & 255) == 'u';  // equ, ltu
  if (a != a || b != b) return or_unordered || compare == "nan"_w;
  const uint64_t way = or_unordered ? compare >> 8 : compare;
  return way == "eq"_w                    ? a == b
         : way == "ne"_w                  ? a != b
         : way == "lt"_w || way == "lo"_w ? a < b
         : way == "le"_w || way == "ls"_w ? a <= b
         : way == "gt"_w || way == "hi"_w ? a > b
         : way == "ge"_w || way == "hs"_w ? a >= b
                                          : way == "num"_w;
}

/// Operand 0 = value(operands 1 to 3), of the instruction's type.
template <class F>
void integers(Frame& f, F value) {
  with_integer(f.i->type, [&](auto zero) {
    using T = decltype(zero);
    f.out(bits_of(static_cast<T>(value(f.in<T>(1), f.in<T>(2), f.in<T>(3)))));
  });
}
template <class F>
void floats(Frame& f, F value) {
  with_float(f.i->type, [&](auto zero) {
    using T = decltype(zero);
    volatile T a = f.in<T>(1), b = f.in<T>(2), c = f.in<T>(3);
    f.out(bits_of<T>(rounded(f.i->rounding, [&]() -> T { return value(T(a), T(b), T(c)); })));
  });
}
/// Of float32, by the emulator's meaning of an approximation.
template <class F>
void approximate(Frame& f, F value) {
  const float y = value(f.i->ftz ? flushed(f.in<float>(1)) : f.in<float>(1));
  f.out(bits_of(f.i->ftz ? flushed(y) : y));
}
/// Operand 1 times operand 2, or the upper half of that, plus operand 3.
void product(Frame& f, bool high) {
  with_integer(f.i->type, [&](auto zero) {
    using T = decltype(zero);
    const auto wide = [](T x) { return static_cast<unsigned __int128>(static_cast<__int128>(x)); };
    f.out(static_cast<uint64_t>(wide(f.in<T>(1)) * wide(f.in<T>(2)) >> (high ? 8 * sizeof(T) : 0)) + f.raw(3));
  });
}

// ---- bits

void move(Frame& f) {
  const size_t left = f.i->left, right = f.i->operands.size() - left;
  const uint64_t bits = 8 * f.i->type.bytes / std::max(left, right);
  uint64_t all = 0;
  for (size_t k = 0; k < right; ++k) all |= (right > 1 ? f.raw(left + k) & low(bits) : f.raw(left)) << (k * bits);
  for (size_t k = 0; k < left; ++k) f.out(left > 1 ? all >> (k * bits) & low(bits) : all, k);
}
void compare(Frame& f) {
  const size_t a = f.i->left;
  bool y = false;
  with_number(f.i->type,
              [&](auto zero) { y = holds(f.i->words[1], f.in<decltype(zero)>(a), f.in<decltype(zero)>(a + 1)); });
  const bool joined = f.i->words.size() == 4;
  const auto with = [&](bool x) { return joined ? combined<int>(f.i->words[2], x, f.flag(a + 2)) != 0 : x; };
  const bool results[] = {with(y), with(!y)};
  for (size_t k = 0; k < a; ++k) f.out(results[k], k);
}
void shift(Frame& f, bool left) {
  integers(f, [&](auto a, auto, auto) {
    using T = decltype(a);
    const uint32_t n = f.in<uint32_t>(2), bits = 8 * sizeof(T);
    return static_cast<T>(left ? (n < bits ? bits_of(a) << n : 0) : n < bits ? bits_of(T(a >> n)) : a < 0 ? ~0ull : 0);
  });
}
void extract(Frame& f) {
  integers(f, [&](auto a, auto, auto) {
    using T = decltype(a);
    const unsigned bits = 8 * sizeof(T), place = f.in<uint8_t>(2), length = f.in<uint8_t>(3);
    const unsigned kept = std::min(length, bits - std::min(place, bits)), top_bit = std::min(place + length, bits) - 1;
    const uint64_t y = kept ? bits_of(a) >> place & low(kept) : 0;
    return static_cast<T>(std::is_signed_v<T> && length && bits_of(a) >> top_bit & 1 ? y | ~low(kept) : y);
  });
}
void insert(Frame& f) {
  const uint64_t bits = 8 * f.i->type.bytes, place = f.in<uint8_t>(3), field = low(f.in<uint8_t>(4));
  f.out(place < bits ? (f.raw(2) & ~(field << place)) | (f.raw(1) & field) << place : f.raw(2));
}
void find_top(Frame& f) {
  with_integer(f.i->type, [&](auto zero) {
    using T = decltype(zero);
    const uint64_t x = bits_of(f.in<T>(1)) ^ (f.in<T>(1) < 0 ? ~0ull : 0), bits = 8 * sizeof(T);
    const uint64_t top_bit = x ? 63 - static_cast<uint64_t>(__builtin_clzll(x)) : ~0ull;
    f.out(x && f.i->words[1] == "shiftamt"_w ? bits - 1 - top_bit : top_bit);
  });
}
void permute(Frame& f) {
  const uint64_t both = f.in<uint32_t>(1) | f.raw(2) << 32;
  uint64_t y = 0;
  for (uint64_t k = 0; k < 4; ++k) {
    const uint64_t choice = f.raw(3) >> (4 * k), byte = both >> (8 * (choice & 7)) & 255;
    y |= (choice & 8 ? byte / 128 * 255 : byte) << (8 * k);
  }
  f.out(y);
}
void logic(Frame& f) {
  uint64_t y = 0;
  for (uint64_t k = 0; k < 8; ++k)
    if (f.raw(4) >> k & 1)
      y |= (k & 4 ? f.raw(1) : ~f.raw(1)) & (k & 2 ? f.raw(2) : ~f.raw(2)) & (k & 1 ? f.raw(3) : ~f.raw(3));
  f.out(y);
}
void funnel(Frame& f) {
  const uint64_t both = f.in<uint32_t>(1) | f.raw(2) << 32, n = f.in<uint32_t>(3);
  const uint64_t by = f.i->words[2] == "wrap"_w ? n & 31 : std::min<uint64_t>(n, 32);
  f.out(f.i->words[1] == "l"_w ? both << by >> 32 : both >> by);
}

// ---- conversions

template <class T, class F>
T nearest_in(F x) {  // what T cannot hold becomes its end, NaN 0
  using Limits = std::numeric_limits<T>;
  return x != x                               ? T{0}
         : x >= static_cast<F>(Limits::max()) ? Limits::max()
         : x <= static_cast<F>(Limits::min()) ? Limits::min()
                                              : static_cast<T>(x);
}
void convert(Frame& f) {
  const Type to = f.i->type, from = f.i->from;
  if (is_float(from) && from.bytes == 2) {
    const uint16_t h = f.in<uint16_t>(1);
    const float x = from.kind == 'h' ? simt::float_of(static_cast<uint32_t>(h) << 16) : simt::from_half(h);
    return f.out(to.bytes == 8 ? bits_of<double>(x) : bits_of(x));
  }
  if (is_float(to) && (to.bytes == 2 || to.pair)) {
    const auto narrow = [&](float x) -> uint32_t {
      return to.kind == 'h' ? simt::round_to_bfloat16(x) : simt::to_half(x);
    };
    return f.out(to.pair ? narrow(f.in<float>(2)) | narrow(f.in<float>(1)) << 16 : narrow(f.in<float>(1)));
  }
  with_number(from, [&](auto source) {
    using F = decltype(source);
    F x = f.in<F>(1);
    if constexpr (std::is_floating_point_v<F>) {
      x = whole(f.i->rounding, x);
      if (is_float(to) && f.i->sat) x = x > 0 ? std::fmin(x, F{1}) : F{0};
    }
    volatile F kept = x;
    with_number(to, [&](auto zero) {
      using T = decltype(zero);
      if constexpr (std::is_floating_point_v<T>)
        f.out(bits_of<T>(
            rounded((f.i->rounding & 255) == 'i' ? 0 : f.i->rounding, [&] { return static_cast<T>(kept); })));
      else if constexpr (std::is_floating_point_v<F>)
        f.out(bits_of(nearest_in<T>(x)));
      else
        f.out(bits_of(f.i->sat ? nearest_in<T>(static_cast<__int128>(x)) : static_cast<T>(x)));
    });
  });
}

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
  DO(kind(f, []([[maybe_unused]] auto a, [[maybe_unused]] auto b, [[maybe_unused]] auto c) { return value; }))
#define DIVISION(value, overflowing)                                                                               \
  [](Frame& f) {                                                                                                   \
    integers(f, [&](auto a, auto b, auto) {                                                                        \
      if (b == 0) f.stop("a division by zero");                                                                    \
      using T = decltype(a);                                                                                       \
      return std::is_signed_v<T> && b == static_cast<T>(-1) ? static_cast<T>(overflowing) : static_cast<T>(value); \
    });                                                                                                            \
  }

// <I> integers, <B> bits, <F> floats, <A> any of them, <M> in memory, <R> roundings, <C> comparisons, <S> scopes
const Row rows[] = {
    {"mov", "pred|<A>", DO(move(f))},
    {"add", "<I>", BITS(a + b)},
    {"sub", "<I>", BITS(a - b)},
    {"mul", "lo.<I>", BITS(a * b)},
    {"mad", "lo.<I>", BITS(a * b + c)},
    {"mul", "hi.<I>", DO(product(f, true))},
    {"mad", "hi.<I>", DO(product(f, true))},
    {"mul", "wide.[us](16|32)", DO(product(f, false))},
    {"mad", "wide.[us](16|32)", DO(product(f, false))},
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
    {"shl", "<B>", DO(shift(f, true))},
    {"shr", "(<I>|<B>)", DO(shift(f, false))},
    {"bfe", "[us](32|64)", DO(extract(f))},
    {"bfi", "b(32|64)", DO(insert(f))},
    {"bfind", "(shiftamt.)?[us](32|64)", DO(find_top(f))},
    {"clz", "b32", BITS(a ? static_cast<uint64_t>(__builtin_clzll(a)) - 32 : 32)},
    {"clz", "b64", BITS(a ? static_cast<uint64_t>(__builtin_clzll(a)) : 64)},
    {"popc", "b(32|64)", BITS(static_cast<uint64_t>(__builtin_popcountll(a)))},
    {"brev", "b32", BITS(reversed(a) >> 32)},
    {"brev", "b64", BITS(reversed(a))},
    {"prmt", "b32", DO(permute(f))},
    {"lop3", "b32", DO(logic(f))},
    {"shf", "(l|r).(wrap|clamp).b32", DO(funnel(f))},
    {"setp", "<C>.((and|or|xor).)?<A>", DO(compare(f))},
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
    {"rcp", "approx.(ftz.)?f32", DO(approximate(f, [](float x) { return 1 / x; }))},
    {"sqrt", "approx.(ftz.)?f32", DO(approximate(f, [](float x) { return std::sqrt(x); }))},
    {"rsqrt", "approx.(ftz.)?f32", DO(approximate(f, [](float x) { return 1 / std::sqrt(x); }))},
    {"lg2", "approx.(ftz.)?f32", DO(approximate(f, simt::log2))},
    {"ex2", "approx.ftz.f32", DO(approximate(f, simt::exp2))},

    {"cvt", "(sat.)?[us](8|16|32|64).[us](8|16|32|64)", DO(convert(f))},
    {"cvt", "<R>.<F>.[us](8|16|32|64)", DO(convert(f))},
    {"cvt", "r[nzmp]i.(sat.)?[us](8|16|32|64).<F>", DO(convert(f))},
    {"cvt", "(r[nzmp]i.)?(sat.)?(f32.f32|f64.f64)", DO(convert(f))},
    {"cvt", "f64.f32|<R>.f32.f64|<F>.f16|f32.bf16|rn.b?f16(x2)?.f32", DO(convert(f))},
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
    {"cp", "async.commit_group", DO(f.commit())},
    {"cp", "async.wait_group", DO(f.land(f.in<int>(0)))},
    {"cp", "async.wait_all", DO(f.commit(); f.land(0))},

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
    {"mma", "sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", DO(f.multiply_add(simt::multiply_add))},
    {"mma", "sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", DO(f.multiply_add(simt::multiply_add_half))},
};

void thread(void*) {
  if (std::exchange(world.block, simt::block()) != simt::block())
    world.shadow.assign(world.module->static_shared + world.launch->shared_bytes, {});
  Frame::Passed passed;
  Frame frame(*world.kernel, nullptr, passed);
  for (size_t k = 0; k < world.launch->count; ++k)
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
      for (size_t place = 0; (place = pattern.find(from, place)) != std::string::npos; place += from[0] == '.' ? 2 : 0)
        pattern.replace(place, std::strlen(from), to);
    if (std::regex_match(rest, std::regex(pattern))) return row.run;
  }
  return nullptr;
}

void run(const Module& module, const Function& kernel, const std::vector<Range>& arrays, const simt::Launch& launch) {
  bool same = kernel.parameters.size() == launch.count;
  for (size_t k = 0; same && k < launch.count; ++k) same = kernel.parameters[k].bytes == launch.sizes[k];
  if (!same) refuse("parameters of other sizes: " + kernel.name, module.file.c_str(), 0);
  world.module = &module;
  world.kernel = &kernel;
  world.launch = &launch;
  world.arrays = &arrays;
  world.block = -1;
  simt::run(launch.blocks, launch.threads, module.static_shared + launch.shared_bytes, thread, nullptr);
}

}  // namespace ptx
