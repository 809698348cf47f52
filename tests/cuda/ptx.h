// SPDX-License-Identifier: Apache-2.0
// The PTX that nvcc made of the kernels, run on the emulator's fibers: barriers, shuffles, asynchronous copies,
// ldmatrix and mma are those of emulator.h. It shows what the emulated source cannot: inline assembly, the layout of
// parameters, what the compiler did. Every access is checked for alignment and range, shared memory for races between
// threads that no barrier orders; an instruction or a modifier that is not known stops the program by name.
//
//   ptx_parse.cpp      text to instructions
//   ptx_frame.h        a thread's registers, memory and meetings
//   ptx_run.cpp        what each instruction does
//   ptx_emulation.cpp  every simt::launch twice, its C++ and its PTX, which must leave the same bytes
#pragma once
#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"

namespace ptx {

/// A word of an instruction's name, its first eight letters.
constexpr uint64_t word(const char* s, size_t n) {
  uint64_t w = 0;
  for (size_t i = 0; i < n && i < 8; ++i) w = w << 8 | static_cast<unsigned char>(s[i]);
  return w;
}
constexpr uint64_t operator""_w(const char* s, size_t n) { return word(s, n); }

struct Type {
  char kind = 'b';  // b u s f, h: bfloat16
  uint8_t bytes = 8;
  bool pair = false;
};

/// The value of register `slot` + offset. Slot 0 is always zero: a number lies in its offset.
struct Operand {
  uint32_t slot = 0;
  bool negated = false;               // a predicate
  uint64_t offset = 0, mask = ~0ull;  // mask: the bits that the register has
};

struct Function;
class Frame;
struct Instruction {
  void (*run)(Frame&) = nullptr;
  std::vector<uint64_t> words;
  Type type, from;        // the first and the last one named
  uint64_t rounding = 0;  // its word
  char space = 0;         // g s l p c, 0: generic
  uint8_t vector = 1;     // elements of a load or store
  uint8_t left = 0;       // operands in the first group of braces
  bool ftz = false, sat = false, guarded = false;
  int line = 0;
  Operand guard;
  uint64_t used = ~0ull;  // bytes of a load that somebody looks at
  std::vector<Operand> operands;
  size_t target = 0;
  const Function* callee = nullptr;
  std::string text;
};

/// Registers that hold something from the start.
enum Slot : uint32_t { kZero, kFrame, kDynamic, kThread, kThreads, kBlock, kBlocks, kLane, kSink, kSlots };

struct Variable {
  size_t offset = 0, bytes = 0;
};
struct Function {
  std::string name;
  bool defined = false;
  std::vector<Instruction> code;
  std::vector<Variable> parameters, results;  // in the frame
  size_t registers = kSlots, frame_bytes = 0;
};

/// Memory that kernels may touch.
struct Range {
  uintptr_t begin, end;
  bool holds(uint64_t address, uint64_t bytes) const {
    return address >= begin && address <= end && bytes <= end - address;
  }
};

constexpr uint64_t kShared = 1024;  // where the block's shared memory begins in its window; 0 is no address

struct Module {
  std::string file;
  std::unordered_map<std::string, Function> functions;
  std::deque<std::vector<simt::Quad>> memory;  // of .global and .const variables
  std::vector<Range> globals, constants;
  size_t static_shared = 0;  // bytes before the dynamic ones, a multiple of 128

  Module(std::string name, const std::string& text);
};

[[noreturn]] void refuse(const std::string& what, const char* file, int line);

/// What the instruction of this first word and rest of its name does; null: unknown.
void (*meaning(const std::string& first, const std::string& rest))(Frame&);

/// One launch of a kernel, which may touch `arrays`.
void run(const Module& module, const Function& kernel, const std::vector<Range>& arrays, const simt::Launch& launch);

/// From here on every simt::launch runs twice, emulated and then as PTX, from the same memory, and the program stops
/// where they leave different bytes in the arrays that its parameters point to: those that operator new gave or that a
/// test::Guarded holds. A kernel that reads others is out of range. May be called for several texts.
void load_ptx(std::string name, std::string text);
void load_ptx_files(const std::string& paths);  // separated by colons
std::string read(const std::string& path);

}  // namespace ptx
