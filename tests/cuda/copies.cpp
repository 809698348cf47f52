// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies, compiled with the sanitizers: both the spoiling at the issue and the landing are seen as writes.
#include "emulator.h"

namespace simt {
namespace {

void move(const Copy& c, bool spoil) {
  for (int i = 0; i < c.bytes / 4; ++i)
    static_cast<uint32_t*>(c.to)[i] = spoil ? ~0u : c.valid ? static_cast<const uint32_t*>(c.from)[i] : 0;
}

void copy(void* to, const void* from, int bytes, bool valid) {
  const uintptr_t size = static_cast<uintptr_t>(bytes);
  if (reinterpret_cast<uintptr_t>(to) % size || reinterpret_cast<uintptr_t>(from) % size)
    stop("a misaligned cp.async", __FILE__, __LINE__);
  const Copy c{to, from, bytes, valid};
  issue(c);
  move(c, true);
}

}  // namespace

void copy16(void* to, const void* from, bool valid) { copy(to, from, 16, valid); }
void copy4(void* to, const void* from, bool valid) { copy(to, from, 4, valid); }

void land(int open) {
  for (Copy c; landed(open, &c);) move(c, false);
}

}  // namespace simt
