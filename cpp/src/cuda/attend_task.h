// SPDX-License-Identifier: Apache-2.0
// What the kernels of `attend` are told. Candidates form units: tiles of a user's candidates that a block takes for one
// head, and, where sums over candidates are wanted, spans of kSpan, whose sums meet in the spans' order. The lists of
// units lie on the device, for only the device knows the offsets; neither depends on the number of processors.
#pragma once
#include "cuda/device/product.h"
#include "hisac/attend.h"

#ifndef HISAC_CUDA_SPAN
#define HISAC_CUDA_SPAN 1024  // a test of many spans takes small ones
#endif

namespace hisac::cuda::attention {

constexpr int kSpan = HISAC_CUDA_SPAN;
constexpr int kRows = 32;      // of a step
constexpr int kChunk = 128;    // columns that a step multiplies at a time
constexpr int kColumns = 128;  // sums of a row that a warp holds; those over candidates: half keys, half values
constexpr int kThreads = 128;  // at most

enum Pass { kForward, kOfCandidates, kOfTokens };  // out and lse; d q; d keys, d values and d bias

struct Unit {
  int32_t user, first, last;  // candidates [first, last); user -1: nobody's
};
struct SharedUser {
  int32_t user, slot, count;  // count spans: the first is in the results, the others in slots
};
struct List {
  struct Head {
    int32_t units, shared;
    unsigned long long next;  // the work not yet taken
  };
  Head* head = nullptr;
  Unit* unit = nullptr;
  int32_t* before = nullptr;     // [B + 1] spans of earlier users
  SharedUser* shared = nullptr;  // those of several spans
};

struct Matrix {
  const void* data = nullptr;
  DType type = DType::float32;
  int width = 0, depth = 0;  // depth: to 16s
  bool aligned = false;      // rows of whole 16 bytes at 16

  Matrix() = default;
  explicit Matrix(const Rows& m)
      : data(m.data),
        type(m.dtype),
        width(static_cast<int>(m.width)),
        depth((width + 15) / 16 * 16),
        aligned(cuda::aligned(m)) {}
  SIMT_BOTH int chunks() const { return (depth + kChunk - 1) / kChunk; }
};

struct Task : ClampedSpans {  // of candidates
  Matrix q, keys, values, d_out;
  ClampedSpans token_spans;   // without starts user b has the rows from b M on
  int tokens = 0, heads = 0;  // M, the most that a user has
  int64_t token_rows = 0;
  const float* bias = nullptr;
  float scale = 1, rate = 1;  // rate: of q . k in base 2
  float spread = 0;           // 2^spread is at least 2 M
  int warps = 0;              // of a block, a power of two; 16 rows each
  struct Offsets {            // in shared memory
    int kept[2], streamed[2], kept_terms, streamed_terms, work;
  } offset = {};
  size_t shared_bytes = 0;
  // workspace
  List tiles, spans;
  float *shift = nullptr, *slope = nullptr;         // [N, H] -lse in base 2, dlse - dout . out
  float* slots = nullptr;                           // [N / kSpan, M H (d + V)]
  float *biases = nullptr, *slot_biases = nullptr;  // [H, R], [N / kSpan, H, M]
  Attended result;
  AttendForward forward;  // of the backward, with its gradients
  AttendGradients gradients;

  SIMT_DEVICE int64_t first_token(int b) const {
    return token_spans.starts ? token_spans.start(b) : int64_t{b} * tokens;
  }
  SIMT_DEVICE int tokens_of(int b) const {
    if (!token_spans.starts) return tokens;
    const int64_t n = token_spans.length(b);
    return n < tokens ? static_cast<int>(n) : tokens;
  }
  SIMT_BOTH int64_t slot_floats() const { return int64_t{tokens} * heads * (keys.width + values.width); }
  SIMT_BOTH int column_tiles(Pass pass) const {
    const int widest = keys.width > values.width ? keys.width : values.width;
    return pass == kForward        ? (values.width + kColumns - 1) / kColumns
           : pass == kOfCandidates ? (keys.width + kColumns - 1) / kColumns
                                   : (widest + kColumns / 2 - 1) / (kColumns / 2);
  }
  SIMT_BOTH int tiles_of(Pass pass) const {  // of a unit's head
    return column_tiles(pass) * (pass == kOfTokens ? (tokens + 16 * warps - 1) / (16 * warps) : 1);
  }
};

}  // namespace hisac::cuda::attention
