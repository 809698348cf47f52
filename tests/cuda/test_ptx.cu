// SPDX-License-Identifier: Apache-2.0
// Small kernels for what nvcc can make of arithmetic, conversions, bits, lanes, atomics, memory and calls. What is
// CUDA's own comes from ptx_words.h, where it stands twice; the PTX must leave the bits of the C++. Then PTX that is
// spoilt on purpose, which must be noticed.
#include "ptx_words.h"

namespace words {

constexpr int kThreads = 64, kInputs = kThreads + 4;
struct Inputs {
  uint64_t u[kInputs];
  double d[kInputs];
  float f[kInputs];
};

/// A column of results for each thread.
struct Results {
  uint64_t* next;
  template <class T>
  SIMT_DEVICE void operator()(T x) {
    uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof x);
    next[simt::thread()] = bits;
    next += kThreads;
  }
};

template <class T>
SIMT_DEVICE void integers(const Inputs& in, Results& put) {
  using U = std::make_unsigned_t<T>;
  const int t = simt::thread(), bits = 8 * sizeof(T);
  const T a = static_cast<T>(in.u[t]), b = static_cast<T>(in.u[t + 1] >> (t & 63)), c = static_cast<T>(in.u[t + 2]);
  const int n = static_cast<int>(in.u[t + 3] & static_cast<unsigned>(bits - 1));
  const T divisor = b == 0 || b == static_cast<T>(-1) ? T(7) : b;
  put(static_cast<T>(U(a) + U(b)));
  put(static_cast<T>(U(a) - U(b)));
  put(static_cast<T>(uint64_t(a) * uint64_t(b) + uint64_t(c)));
  put(static_cast<T>(a / divisor));
  put(static_cast<T>(a % divisor));
  put(static_cast<T>(a / T(10)));
  put(a < b ? a : b);
  put(a > b ? a : b);
  if constexpr (std::is_signed_v<T>) put(static_cast<T>(a < 0 ? U(0) - U(a) : U(a)));
  put(static_cast<T>((a & b) | (~a ^ c)));
  put(static_cast<T>(U(a) << n));
  put(static_cast<T>(a >> n));
  put(static_cast<T>((a >> (n / 2)) & 0x35));
  put(static_cast<uint32_t>((a < b) | (a <= c) << 1 | (a == c) << 2 | (a != b) << 3 | (a > c) << 4 | (a >= b) << 5));
  put(static_cast<uint32_t>(((a < b && b < c) || c == a) != (a < c)));
}

template <class T>
SIMT_DEVICE void products(const Inputs& in, Results& put) {
  const int t = simt::thread();
  const T a = static_cast<T>(in.u[t]), b = static_cast<T>(in.u[t + 1]);
  put(high(a, b));
  put(static_cast<T>(high(a, b) + static_cast<T>(in.u[t + 2] >> 40)));
  put(static_cast<int64_t>(static_cast<int32_t>(a)) * static_cast<int32_t>(b));
  put(static_cast<uint64_t>(static_cast<uint32_t>(a)) * static_cast<uint32_t>(b) + in.u[t + 2]);
  put(static_cast<int32_t>(static_cast<int16_t>(a)) * static_cast<int16_t>(b));
}

template <class U>
SIMT_DEVICE void bits(const Inputs& in, Results& put) {
  using S = std::make_signed_t<U>;
  const int t = simt::thread();
  const uint32_t place = static_cast<uint32_t>(in.u[t + 1] % 80), length = static_cast<uint32_t>(in.u[t + 2] % 80);
  const U a = static_cast<U>(t == 5 ? 0 : t == 6 ? ~0ull : in.u[t] >> (t & 31)), b = static_cast<U>(in.u[t + 1]);
  put(zeros(a));
  put(ones(a));
  put(turned(a));
  put(top_bit(a));
  put(top_bit(static_cast<S>(a)));
  put(free_bits(a));
  put(free_bits(static_cast<S>(a)));
  put(field(a, place, length));
  put(field(static_cast<S>(a), place, length));
  put(insert(a, b, place, length));
}

template <class T>
SIMT_DEVICE void to_integers(T x, Results& put) {
  put(whole<int32_t, kNearest>(x));
  put(whole<int32_t, kZero>(x));
  put(whole<int32_t, kDown>(x));
  put(whole<int32_t, kUp>(x));
  put(whole<uint32_t, kNearest>(x));
  put(whole<uint32_t, kDown>(x));
  put(whole<int64_t, kNearest>(x));
  put(whole<int64_t, kZero>(x));
  put(whole<int64_t, kUp>(x));
  put(whole<uint64_t, kZero>(x));
  put(whole<uint64_t, kUp>(x));
}
template <class T>
SIMT_DEVICE void to_floats(T x, Results& put) {
  put(static_cast<float>(x));
  put(static_cast<double>(x));
  put(narrow<kZero>(x));
  put(narrow<kDown>(x));
  put(narrow<kUp>(x));
}

template <class T>
SIMT_DEVICE void floats(T a, T b, T c, Results& put) {
  put(a + b);
  put(a - b);
  put(a * b);
  put(a / b);
  put(T(1) / a);
  put(std::sqrt(a));
  put(std::fma(a, b, c));
  put(lesser(a, b));
  put(greater(a, b));
  put(-a);
  put(std::fabs(a));
  put(std::copysign(a, b));
  put(std::floor(a));
  put(std::ceil(a));
  put(std::trunc(a));
  put(std::rint(a));
  put(static_cast<uint32_t>((a < b) | (a <= b) << 1 | (a == b) << 2 | (a != b) << 3 | (a > b) << 4 | (a >= b) << 5));
  put(static_cast<uint32_t>((!(a < b)) | (!(a <= b)) << 1 | (!(a > b)) << 2 | (!(a >= b)) << 3 | (a != a) << 4));
  put(a < b || !(b < c) ? a : c);
}

SIMT_KERNEL(kThreads) arithmetic(const Inputs* in, uint64_t* out) {
  Results put = {out};
  integers<int16_t>(*in, put);
  integers<uint16_t>(*in, put);
  integers<int32_t>(*in, put);
  integers<uint32_t>(*in, put);
  integers<int64_t>(*in, put);
  integers<uint64_t>(*in, put);
  products<int32_t>(*in, put);
  products<uint32_t>(*in, put);
  products<int64_t>(*in, put);
  products<uint64_t>(*in, put);
  bits<uint32_t>(*in, put);
  bits<uint64_t>(*in, put);
  const int t = simt::thread();
  const uint32_t a = static_cast<uint32_t>(in->u[t]), b = static_cast<uint32_t>(in->u[t + 1]);
  const uint32_t c = static_cast<uint32_t>(in->u[t + 2] >> 7);
  put(chosen_bytes(a, b, c));
  put(funnel<false, false>(a, b, c & 63));
  put(funnel<false, true>(a, b, c & 63));
  put(funnel<true, false>(a, b, c & 63));
  put(funnel<true, true>(a, b, c & 63));
  put(majority(a, b, c));
}

SIMT_KERNEL(kThreads) conversions(const Inputs* in, uint64_t* out) {
  Results put = {out};
  const int t = simt::thread();
  const uint64_t u = in->u[t] >> (t & 63);
  const float f = in->f[t];
  const double d = in->d[t];
  to_integers(f, put);
  to_integers(d, put);
  to_floats(static_cast<int32_t>(u), put);
  to_floats(static_cast<uint32_t>(u), put);
  to_floats(static_cast<int64_t>(u), put);
  to_floats(u, put);
  to_floats(d, put);
  put(exact<kDown>(static_cast<int64_t>(u)));
  put(exact<kUp>(u));
  put(times<kZero>(f, in->f[t + 1]));
  put(times<kDown>(f, in->f[t + 1]));
  put(times<kUp>(f, in->f[t + 1]));
  put(static_cast<int64_t>(static_cast<int8_t>(u)));
  put(static_cast<uint64_t>(static_cast<uint8_t>(u)));
  put(static_cast<int32_t>(static_cast<int16_t>(u >> 3)));
  put(static_cast<float>(static_cast<int8_t>(u)));
  put(static_cast<float>(static_cast<uint16_t>(u)));
  put(clamped(static_cast<int32_t>(in->u[t + 1]) >> (t & 31)));
  put(unit(f));
  put(simt::to_half(f));
  put(simt::from_half(static_cast<uint16_t>(u)));
  put(simt::pack(f, in->f[t + 1]));
}

SIMT_KERNEL(kThreads) real_numbers(const Inputs* in, uint64_t* out) {
  Results put = {out};
  const int t = simt::thread();
  floats(in->f[t], in->f[t + 1], in->f[t + 2], put);
  floats(in->d[t], in->d[t + 1], in->d[t + 2], put);
  put(simt::exp2(in->f[t]));
  put(simt::log2(in->f[t]));
  put(inverse_root(in->f[t]));
}

SIMT_KERNEL(kThreads) lanes(const Inputs* in, uint64_t* out) {
  Results put = {out};
  const int t = simt::thread();
  const uint32_t x = static_cast<uint32_t>(in->u[t]), few = x % 3;
  put(simt::shuffle_xor(x, 5));
  put(simt::shuffle(in->u[t], (t * 7 + 3) & 31));
  put(simt::shuffle(in->d[t], t & 7));
  put(from_above(x, 3));
  put(from_below(x, 5));
  put(from_eighth(x, 6));
  put(simt::ballot(x & 1));
  put(somebody(few == 2 && t < 9));
  put(everybody(few < 3 || t == 40));
  put(alike(few));
  put(alike(static_cast<uint64_t>(few) << 40));
  put(all_alike(t / 32 ? few : 8u));
  put(lane_sum(x));
  put(lane_max(static_cast<int32_t>(x)));
}

SIMT_KERNEL(kThreads) atomics(const Inputs* in, uint64_t* out) {
  auto* const shared = reinterpret_cast<uint32_t*>(simt::shared());
  const int t = simt::thread();
  const uint64_t u = in->u[t];
  const uint32_t low = static_cast<uint32_t>(u);
  if (t < 8) shared[t] = 0;
  simt::sync();
  simt::atomic_add(&shared[u & 7], low);
  raise_by(&out[u % 5], u);
  simt::atomic_add(reinterpret_cast<int32_t*>(out + 5), static_cast<int32_t>(low));
  raise_to(out + 6, u);
  raise_to(reinterpret_cast<int64_t*>(out + 7), static_cast<int64_t>(u));
  lower_to(reinterpret_cast<int32_t*>(out + 8), static_cast<int32_t>(low));
  set_bits(out + 9, u & uint64_t{1} << (u & 63));
  set_bits(reinterpret_cast<uint32_t*>(out + 10), low & 0x10101);
  keep_bits(out + 11, u | 0xff);
  flip_bits(out + 12, u);
  count_round(reinterpret_cast<uint32_t*>(out + 13), 10u);
  Results put = {out + 64};
  uint64_t* const cell = out + 64 + 8 * kThreads + t;  // what they return
  *cell = u >> 1;
  put(raise_by(cell, u));
  put(put_where(cell, t & 1 ? u + (u >> 1) : 3, u));
  put(put_where(reinterpret_cast<uint32_t*>(cell), low, 77u));
  put(put_there(cell, ~u));
  put(lower_to(reinterpret_cast<int32_t*>(cell), 5));
  simt::sync();
  if (t < 8) put(shared[t]);
}

struct Pair {
  int32_t a;
  double b;
};
CALLED Pair scaled(Pair p, int n) { return {p.a + n, p.b * n}; }
CALLED uint64_t steps(uint64_t n, int limit) {  // recursive, not at its end
  return n <= 1 || limit == 0 ? 0 : (n & 1) + steps(n / 2, limit - 1) * 3;
}
CALLED void fill(int32_t* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = i * i - n;
}
TABLE const uint16_t squares[6] = {0, 1, 4, 9, 16, 65535};
TABLE const double roots[3] = {0, 1, 1.4142135623730951};

SIMT_KERNEL(kThreads) memory(const Inputs* in, uint64_t* out, uint8_t first, Pair pair) {
  Results put = {out};
  const int t = simt::thread();
  int32_t local[12];
  fill(local, 12);
  for (uint64_t u = in->u[t]; u > 9; u /= 13) local[u % 12] ^= static_cast<int32_t>(u);
  put(local[in->u[t] % 12]);
  put(scaled({t, in->f[t]}, first).b);
  put(scaled(pair, t).a);
  put(steps(in->u[t], 40));
  put(squares[in->u[t] % 6]);
  put(roots[t % 3]);
  std::byte* const shared = simt::shared();
  auto* const quads = reinterpret_cast<simt::Quad*>(shared);
  simt::copy16(quads + t, reinterpret_cast<const simt::Quad*>(in->u) + t / 2, t % 3 != 0);
  simt::commit();
  simt::copy4(shared + kThreads * 16 + t * 4, in->f + t, t % 5 != 0);
  simt::commit();
  simt::wait<1>();
  simt::sync();
  const simt::Quad q = quads[t ^ 1];
  put(q.word[0] ^ q.word[2]);
  put(q.word[1] ^ q.word[3]);
  simt::wait<0>();
  simt::sync();
  put(reinterpret_cast<const uint32_t*>(shared + kThreads * 16)[kThreads - 1 - t]);
  reinterpret_cast<uint16_t*>(shared)[t] = static_cast<uint16_t>(in->u[t]);
  reinterpret_cast<int8_t*>(shared)[2 * kThreads + t] = static_cast<int8_t>(in->u[t] >> 16);
  simt::sync_warp();
  put(reinterpret_cast<const int16_t*>(shared)[t ^ 3]);
  put(static_cast<int32_t>(reinterpret_cast<const int8_t*>(shared)[2 * kThreads + (t ^ 5)]));
  reinterpret_cast<simt::Quad*>(out + 16 * kThreads)[t] = {{q.word[3], q.word[2], q.word[1], q.word[0]}};
}

SIMT_KERNEL(kThreads) exchange(const Inputs* in, uint64_t* out) {
  auto* const shared = reinterpret_cast<uint64_t*>(simt::shared());
  const int t = simt::thread();
  shared[t] = in->u[t];
  simt::sync();
  out[t] = shared[t ^ 33];
}

}  // namespace words

#ifndef __CUDACC__
#include <regex>

#include "../cpp/support.h"
#include "ptx.h"

namespace {

using namespace words;

Inputs inputs(uint64_t seed) {
  test::Random r(seed);
  Inputs in;
  const double odd[] = {0.,           -0.,          0.5,          -0.5,   1.5,    2.5,     NAN,   INFINITY, -INFINITY,
                        2147483647.5, 4294967295.5, -2147483649., 9.3e18, 1.9e19, -9.3e18, 1e300, 1e-310,   16777217.};
  const int n = sizeof odd / sizeof *odd;
  for (int i = 0; i < kInputs; ++i) {
    in.u[i] = r.bits();
    const double random = std::ldexp(static_cast<double>(r.uniform()) + 0x1p-40 * r.uniform(),
                                     static_cast<int>(r.below(seed % 2 ? 70 : 12)) - 4);
    in.d[i] = r.below(3) == 0 ? odd[r.below(n)] : random;
    in.f[i] =
        static_cast<float>(r.below(3) == 0 ? odd[r.below(n)] : std::ldexp(random, static_cast<int>(r.below(9)) - 4));
  }
  return in;
}

/// The kernels' text, `what` of it spoilt.
std::string spoilt(const std::string& what) {
  const char* const edits[][3] = {
      {"range", "(st\\.global\\.u64[^\\]]*)\\]", "$1+8]"},      {"shared", "(st\\.shared\\.u64[^\\]]*)\\]", "$1+8]"},
      {"alignment", "(st\\.global\\.u64[^\\]]*)\\]", "$1+-4]"}, {"opcode", "xor\\.b32", "frob.b32"},
      {"modifier", "ld\\.global\\.u64", "ld.weird.global.u64"}, {"barrier", "bar\\.sync[^;]*;", ""},
      {"lane", "xor\\.b32([^;]*), 264;", "xor.b32$1, 272;"},
  };
  std::string text = ptx::read(HISAC_TEST_PTX);
  const size_t begin = text.find("exchange");
  for (const auto& [name, from, to] : edits) {
    if (what != name) continue;
    const std::string kernel = text.substr(begin), edited = std::regex_replace(kernel, std::regex(from), to);
    if (edited == kernel) ptx::refuse("nothing to spoil", HISAC_TEST_PTX, 0);
    return text.substr(0, begin) + edited;
  }
  return text;
}

}  // namespace

/// [order 0-2] [what is spoilt]
int main(int argc, char** argv) {
  simt::options.order = static_cast<simt::Order>(argc > 1 ? std::atoi(argv[1]) : 0);
  ptx::load_ptx("words.ptx", spoilt(argc > 2 ? argv[2] : ""));
  for (uint64_t seed = 0; seed < 8; ++seed) {
    simt::options.seed = seed + 1;
    test::Guarded<Inputs> in(std::vector<Inputs>{inputs(seed)});
    test::Guarded<uint64_t> out(256 * kThreads), few(kThreads);
    simt::launch(exchange, 1, kThreads, kThreads * 8, nullptr, in.data(), few.data());
    simt::launch(arithmetic, 1, kThreads, 0, nullptr, in.data(), out.data());
    simt::launch(conversions, 1, kThreads, 0, nullptr, in.data(), out.data());
    simt::launch(real_numbers, 1, kThreads, 0, nullptr, in.data(), out.data());
    simt::launch(lanes, 1, kThreads, 0, nullptr, in.data(), out.data());
    simt::launch(atomics, 3, kThreads, 32, nullptr, in.data(), out.data());
    simt::launch(memory, 1, kThreads, kThreads * 20, nullptr, in.data(), out.data(), uint8_t{201}, Pair{-3, 0.1});
  }
  std::puts("the PTX leaves the bits of the C++");
}
#endif
