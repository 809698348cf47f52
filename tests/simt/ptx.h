// SPDX-License-Identifier: Apache-2.0
// The PTX that nvcc made of the kernels, run on the emulator's fibers: barriers, shuffles, asynchronous copies,
// ldmatrix and mma are those of emulator.h. It sees what the emulated source cannot show: inline assembly, the layout
// of parameters, what the compiler did. Every access is checked for alignment and range, shared memory for races
// between threads that no barrier orders; an instruction or modifier that is not known stops the program by name.
//
//   ptx_parse.cpp  text to instructions
//   ptx_run.cpp    one thread's run through them
//   ptx_twin.cpp   every simt::launch twice, its C++ and its PTX, which must leave the same bytes
#pragma once
#include <deque>
#include <string>
#include <unordered_map>

#include "emulator.h"

namespace ptx {

enum class Op : uint8_t {
  mov,
  add,
  sub,
  mul,
  mul_hi,
  mul_wide,
  mad,
  mad_hi,
  mad_wide,
  div,
  rem,
  min,
  max,
  neg,
  abs,
  float_add,
  float_sub,
  float_mul,
  float_div,
  float_min,
  float_max,
  float_neg,
  float_abs,
  copysign,
  fma,
  rcp,
  sqrt,
  rsqrt,
  ex2,
  lg2,
  and_,
  or_,
  xor_,
  not_,
  shl,
  shr,
  bfe,
  bfi,
  bfind,
  clz,
  popc,
  brev,
  prmt,
  lop3,
  shf,
  setp,
  selp,
  cvt,
  cvt_pair,
  cvta,
  cvta_to,
  ld,
  st,
  atom,
  red,
  nothing,
  bra,
  call,
  ret,
  sync,
  sync_warp,
  shfl,
  vote,
  match,
  redux,
  copy,
  commit,
  wait,
  wait_all,
  ldmatrix,
  mma,
  trap
};
enum class Type : uint8_t {
  none,
  pred,
  b8,
  b16,
  b32,
  b64,
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  f16,
  bf16,
  f32,
  f64,
  f16x2,
  bf16x2
};
enum class Word : uint8_t {  // modifiers that say what is done
  none,
  eq,
  ne,
  lt,
  le,
  gt,
  ge,
  equ,
  neu,
  ltu,
  leu,
  gtu,
  geu,
  num,
  nan,
  add,
  min,
  max,
  inc,
  dec,
  and_,
  or_,
  xor_,
  exch,
  cas,
  up,
  down,
  bfly,
  idx,
  all,
  any,
  uni,
  ballot,
  left,
  right,
  wrap,
  clamp
};
enum class Rounding : uint8_t { none, rn, rz, rm, rp, rni, rzi, rmi, rpi };
enum class Space : uint8_t { generic, global, shared, local, param, constant };

/// The value of register `slot` + offset. Slot 0 is always zero: a number lies in its offset.
struct Operand {
  uint32_t slot = 0;
  bool negated = false;               // of a predicate
  uint64_t offset = 0, mask = ~0ull;  // the bits that the register has
};

struct Function;
struct Instruction {
  Op op = Op::nothing;
  Type type = Type::none, from = Type::none;  // the first and the last one named
  Word compare = Word::none, mode = Word::none, also = Word::none;
  Rounding rounding = Rounding::none;
  Space space = Space::generic;
  bool ftz = false, sat = false, transposed = false, shift_amount = false, guarded = false;
  uint8_t vector = 1;  // elements of a load or store
  uint8_t left = 0;    // operands in the first group of braces
  int line = 0;
  Operand guard;
  uint64_t used = ~0ull;  // bytes of a load that somebody looks at
  std::vector<Operand> operands;
  size_t target = 0;
  const Function* callee = nullptr;
  std::string text;
};

/// Slots of a frame's registers that hold something from the start.
enum Slot : uint32_t {
  kZero,
  kFrame,
  kSink,
  kTidX,
  kTidY,
  kTidZ,
  kThreadsX,
  kThreadsY,
  kThreadsZ,
  kBlockX,
  kBlockY,
  kBlockZ,
  kBlocksX,
  kBlocksY,
  kBlocksZ,
  kLane,
  kLanesEq,
  kLanesLt,
  kLanesLe,
  kLanesGt,
  kLanesGe,
  kNamed,
  kDynamic = kNamed,  // where the dynamic shared memory begins
  kSlots
};
inline constexpr const char* kSlotNames[kNamed] = {"",
                                                   "",
                                                   "_",
                                                   "%tid.x",
                                                   "%tid.y",
                                                   "%tid.z",
                                                   "%ntid.x",
                                                   "%ntid.y",
                                                   "%ntid.z",
                                                   "%ctaid.x",
                                                   "%ctaid.y",
                                                   "%ctaid.z",
                                                   "%nctaid.x",
                                                   "%nctaid.y",
                                                   "%nctaid.z",
                                                   "%laneid",
                                                   "%lanemask_eq",
                                                   "%lanemask_lt",
                                                   "%lanemask_le",
                                                   "%lanemask_gt",
                                                   "%lanemask_ge"};

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

/// One launch of a kernel: `arguments` point to values of `sizes` bytes.
void run(const Module& module, const Function& kernel, const std::vector<Range>& buffers, const simt::Launch& launch);

/// From here on every simt::launch runs twice, emulated and then the PTX of these texts, and stops where the bytes left
/// in the arrays that the parameters point to differ. They are all those got by operator new or held by test::Guarded.
void twin(std::string name, const std::string& text);
std::string read(const char* path);

}  // namespace ptx
