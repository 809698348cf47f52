// SPDX-License-Identifier: Apache-2.0
// The scheduler of emulator.h. Compiled without sanitizers, whose runtimes it tells of its fibers: it may move data
// between lanes without seeming to order them.
#include "emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <memory>
#include <utility>
#include <vector>

extern "C" {  // there where the program is linked with ThreadSanitizer or AddressSanitizer
__attribute__((weak)) void* __tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_destroy_fiber(void*);
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
__attribute__((weak)) void __tsan_read_range(void*, size_t);
__attribute__((weak)) void* __asan_region_is_poisoned(void*, size_t);
__attribute__((weak)) void __sanitizer_start_switch_fiber(void**, const void*, size_t);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}

namespace simt {

Options options;
int planted = 0;
Counts counts;
Thread* current = nullptr;
void (*instead)(const Launch&) = nullptr;

namespace {

constexpr size_t kStack = 256 << 10;
enum class State { ready, at_barrier, at_meeting, done };

struct Fiber : Thread {
  ucontext_t context;
  void *memory = nullptr, *tsan = nullptr, *asan = nullptr;
  State state;
  const char* file;
  int line, barriers, meetings, group;
  std::vector<std::pair<int, Copy>> copies;  // and their groups, those under way
};

struct Warp {
  uint64_t mail[2][32][3];  // a lane is never more than one meeting ahead of another
  char order[2];
};

struct World {
  ucontext_t scheduler;
  void (*body)(void*);
  void* argument;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  void *tsan = nullptr, *asan = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
  uint64_t random = 1;
  char end, barrier[2];
} world;

uint64_t random() {
  world.random ^= world.random << 13;
  world.random ^= world.random >> 7;
  return world.random ^= world.random << 17;
}

void acquire(void* p) {
  if (__tsan_acquire) __tsan_acquire(p);
}
void release(void* p) {
  if (__tsan_release) __tsan_release(p);
}

void yield() {
  Fiber* const f = static_cast<Fiber*>(current);
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(f->state == State::done ? nullptr : &f->asan, world.stack, world.stack_size);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(world.tsan, 1);  // 1: orders nothing
  swapcontext(&f->context, &world.scheduler);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(f->asan, nullptr, nullptr);
}

void begin() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &world.stack, &world.stack_size);
  world.body(world.argument);
  static_cast<Fiber*>(current)->state = State::done;
  release(&world.end);
  yield();
  std::abort();
}

void resume(Fiber* f) {
  current = f;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&world.asan, f->memory, kStack);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(f->tsan, 1);
  swapcontext(&world.scheduler, &f->context);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(world.asan, nullptr, nullptr);
}

[[noreturn]] void fail(const char* what, int threads) {
  std::fprintf(stderr, "simt: %s, block %d\n", what, world.fibers[0]->block);
  for (int i = 0, shown = 0; i < threads && shown < 4; ++i) {
    const Fiber& f = *world.fibers[static_cast<size_t>(i)];
    if (f.state != State::at_barrier && f.state != State::at_meeting) continue;
    std::fprintf(stderr, "  thread %d waits at %s:%d\n", i, f.file, f.line);
    ++shown;
  }
  std::_Exit(70);
}

void* map(size_t bytes) { return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }

/// Opens the barrier, and every warp's meeting, at which all have arrived.
void open(int threads) {
  Fiber* first = nullptr;
  int live = 0, arrived = 0;
  for (int i = 0; i < threads; ++i) {
    Fiber* const f = world.fibers[static_cast<size_t>(i)].get();
    live += f->state != State::done;
    if (f->state != State::at_barrier) continue;
    ++arrived;
    if (!first) first = f;
    if (f->line != first->line || f->file != first->file) fail("barriers at different places", threads);
  }
  if (live && arrived == live && arrived != threads) fail("a barrier after some threads have ended", threads);
  for (int i = 0; i < threads && arrived == threads; ++i) world.fibers[static_cast<size_t>(i)]->state = State::ready;
  for (int w = 0; w < threads; w += 32) {
    int meeting = 0, done = 0;
    Fiber* const leader = world.fibers[static_cast<size_t>(w)].get();
    for (int i = w; i < w + 32; ++i) {
      Fiber* const f = world.fibers[static_cast<size_t>(i)].get();
      done += f->state == State::done;
      meeting += f->state == State::at_meeting;
      if (f->state == State::at_meeting && leader->state == State::at_meeting &&
          (f->line != leader->line || f->file != leader->file))
        fail("one warp's lanes at different operations", threads);
    }
    if (meeting && done) fail("a warp's operation misses lanes that have ended", threads);
    for (int i = w; i < w + 32 && meeting == 32; ++i) world.fibers[static_cast<size_t>(i)]->state = State::ready;
  }
}

void prepare(Fiber& f, int thread, int threads, int block, int blocks, std::byte* memory) {
  if (f.memory && __tsan_create_fiber) {  // fresh pages: ThreadSanitizer forgets the last block's accesses
    munmap(f.memory, kStack);
    f.memory = nullptr;
  }
  if (!f.memory) f.memory = map(kStack);
  f.thread = thread;
  f.threads = threads;
  f.lane = thread & 31;
  f.warp = thread >> 5;
  f.block = block;
  f.blocks = blocks;
  f.shared = memory;
  f.copies.clear();
  f.group = f.barriers = f.meetings = 0;
  f.state = State::ready;
  f.tsan = __tsan_create_fiber ? __tsan_create_fiber(0) : nullptr;
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.memory;
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, begin, 0);
}

}  // namespace

void sync(const char* file, int line) {
  Fiber* const f = static_cast<Fiber*>(current);
  void* const order = &world.barrier[f->barriers++ & 1];
  release(order);
  f->file = file;
  f->line = line;
  f->state = State::at_barrier;
  yield();
  acquire(order);
}

void meet(uint64_t a, uint64_t b, uint64_t c, const char* file, int line) {
  Fiber* const f = static_cast<Fiber*>(current);
  uint64_t* const mail = world.warps[static_cast<size_t>(f->warp)].mail[f->meetings++ & 1][f->lane];
  mail[0] = a;
  mail[1] = b;
  mail[2] = c;
  f->file = file;
  f->line = line;
  f->state = State::at_meeting;
  yield();
}

uint64_t given(int lane, int word) {
  const Fiber* const f = static_cast<Fiber*>(current);
  return world.warps[static_cast<size_t>(f->warp)].mail[(f->meetings - 1) & 1][lane][word];
}

void sync_warp(const char* file, int line) {
  Fiber* const f = static_cast<Fiber*>(current);
  void* const order = &world.warps[static_cast<size_t>(f->warp)].order[f->meetings & 1];
  release(order);
  meet(0, 0, 0, file, line);
  acquire(order);
}

void commit() { ++static_cast<Fiber*>(current)->group; }

void issue(const Copy& copy) {
  Fiber* const f = static_cast<Fiber*>(current);
  f->copies.emplace_back(f->group, copy);
}

bool landed(int open, Copy* copy) {
  Fiber* const f = static_cast<Fiber*>(current);
  if (f->copies.empty() || f->copies[0].first + open >= f->group) return false;
  *copy = f->copies[0].second;
  f->copies.erase(f->copies.begin());
  return true;
}

void stop(const char* what, const char* file, int line) {
  std::fprintf(stderr, "simt: %s at %s:%d, block %d thread %d\n", what, file, line, current->block, current->thread);
  std::_Exit(70);
}

namespace {

void load(uint32_t (&r)[4], const void* row, bool transposed, const char* file, int line) {
  void* const p = const_cast<void*>(row);
  if (reinterpret_cast<uintptr_t>(p) % 16) stop("a misaligned ldmatrix", file, line);
  if (__asan_region_is_poisoned && __asan_region_is_poisoned(p, 16)) stop("an ldmatrix out of bounds", file, line);
  if (__tsan_read_range) __tsan_read_range(p, 16);
  meet(reinterpret_cast<uint64_t>(row), 0, 0, file, line);
  const int outer = current->lane >> 2, inner = (current->lane & 3) * 2;
  for (int j = 0; j < 4; ++j) {
    const auto element = [&](int i, int k) {
      return static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(given(8 * j + i, 0))[k]);
    };
    r[j] = transposed ? element(inner, outer) | element(inner + 1, outer) << 16
                      : element(outer, inner) | element(outer, inner + 1) << 16;
  }
}

}  // namespace

void load_matrices(uint32_t (&r)[4], const void* row, const char* file, int line) { load(r, row, false, file, line); }
void load_matrices_transposed(uint32_t (&r)[4], const void* row, const char* file, int line) {
  load(r, row, true, file, line);
}

namespace {

/// sum(i, left, right) for each of a lane's four elements and the 16 factors of its row and column, as `widen` reads
/// them: the fragments of m16n8k16, see the PTX manual.
template <class Widen, class Sum>
void multiply(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* file, int line, Widen widen, Sum sum) {
  counts.multiply_adds += current->lane == 0;
  meet(a[0] | static_cast<uint64_t>(a[1]) << 32, a[2] | static_cast<uint64_t>(a[3]) << 32,
       b0 | static_cast<uint64_t>(b1) << 32, file, line);
  const int group = current->lane >> 2, pair = (current->lane & 3) * 2;
  float left[2][16], right[2][16];
  for (int k = 0; k < 16; k += 2) {
    const int quad = (k & 7) / 2, half = k >> 3;
    for (int r = 0; r < 2; ++r) {
      const uint64_t x = given(group * 4 + quad, half) >> (32 * r), y = given((pair + r) * 4 + quad, 2) >> (32 * half);
      for (int i = 0; i < 2; ++i) {
        left[r][k + i] = widen(static_cast<uint16_t>(x >> (16 * i)));
        right[r][k + i] = widen(static_cast<uint16_t>(y >> (16 * i)));
      }
    }
  }
  for (int i = 0; i < 4; ++i) sum(i, left[i >> 1], right[i & 1]);
}

}  // namespace

void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* file, int line) {
  const auto widen = [](uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); };
  multiply(a, b0, b1, file, line, widen, [&](int i, const float* left, const float* right) {
    for (int k = 0; k < 16; ++k) d[i] += left[k] * right[k];
  });
}

void multiply_add_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* file, int line) {
  const auto widen = [](uint16_t h) { return (h >> 10 & 31) == 0 ? 0.f : from_half(h); };
  multiply(a, b0, b1, file, line, widen, [&](int i, const float* left, const float* right) {
    double term[17] = {static_cast<double>(d[i])}, most = std::fabs(term[0]), total = 0;
    for (int k = 0; k < 16; ++k) {
      term[k + 1] = static_cast<double>(left[k]) * static_cast<double>(right[k]);
      most = std::max(most, std::fabs(term[k + 1]));
      total += term[k + 1];
    }
    total += term[0];
    if (most > 0 && std::isfinite(total)) {
      const double unit = std::ldexp(1, std::ilogb(most) - 23);
      total = 0;
      for (const double y : term) total += std::trunc(y / unit) * unit;
      const double last = std::ldexp(1, std::ilogb(total) - 23);
      if (total != 0) total = std::trunc(total / last) * last;
    }
    d[i] = static_cast<float>(total);
  });
}

void run(int blocks, int threads, size_t shared_bytes, void (*body)(void*), void* argument) {
  ++counts.launches;
  if (threads % 32 || threads > 1024) {
    std::fprintf(stderr, "simt: a block of %d threads\n", threads);
    std::_Exit(70);
  }
  world.body = body;
  world.argument = argument;
  world.random = options.seed * 0x9e3779b97f4a7c15u + 88172645463325252u;
  const size_t n = static_cast<size_t>(threads);
  while (world.fibers.size() < n) world.fibers.push_back(std::make_unique<Fiber>());
  world.warps.resize(std::max(world.warps.size(), n / 32));
  if (__tsan_get_current_fiber) world.tsan = __tsan_get_current_fiber();
  std::vector<int> block_order, order(n);
  std::vector<void*> ended;
  for (int i = 0; i < blocks; ++i) block_order.push_back(options.order == Order::reverse ? blocks - 1 - i : i);
  for (size_t i = block_order.size(); options.order == Order::random && i > 1; --i)
    std::swap(block_order[i - 1], block_order[random() % i]);
  for (size_t i = 0; i < n; ++i) order[i] = static_cast<int>(options.order == Order::reverse ? n - 1 - i : i);
  for (int b : block_order) {
    // ThreadSanitizer: pages that it forgets; else a heap block, whose ends AddressSanitizer watches
    const size_t bytes = std::max<size_t>(shared_bytes, 1);
    void* memory = nullptr;
    if (__tsan_create_fiber)
      memory = map(bytes);
    else if (posix_memalign(&memory, 128, bytes))
      std::abort();
    for (size_t i = 0; i < bytes; ++i) static_cast<volatile unsigned char*>(memory)[i] = 0xff;
    for (int t = 0; t < threads; ++t)
      prepare(*world.fibers[static_cast<size_t>(t)], t, threads, b, blocks, static_cast<std::byte*>(memory));
    for (;;) {
      for (size_t i = n; options.order == Order::random && i > 1; --i) std::swap(order[i - 1], order[random() % i]);
      bool ran = false, live = false;
      for (int t : order) {
        Fiber* const f = world.fibers[static_cast<size_t>(t)].get();
        if (f->state == State::ready) {
          ran = true;
          resume(f);
        }
      }
      for (size_t i = 0; i < n; ++i) live |= world.fibers[i]->state != State::done;
      if (!live) break;
      if (!ran) fail("a deadlock: some threads never arrive", threads);
      open(threads);
    }
    for (size_t i = 0; __tsan_destroy_fiber && i < n; ++i) ended.push_back(world.fibers[i]->tsan);
    if (__tsan_create_fiber)
      munmap(memory, bytes);
    else
      std::free(memory);
  }
  for (void* fiber : ended) __tsan_destroy_fiber(fiber);  // late, or its name would pass to another block's thread
  acquire(&world.end);
  current = nullptr;
}

}  // namespace simt
