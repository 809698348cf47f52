// SPDX-License-Identifier: Apache-2.0
// Steps of products on tensor cores: a warp has 16 rows or several times 16, operands lie in shared memory as P parts
// of bfloat16, products of two low parts are left out.
#pragma once
#include "cuda/device/elements.h"

namespace hisac::cuda {

/// P matrices of bfloat16 in shared memory, `part_stride` elements from one to the next. A row is an odd number of 16
/// bytes long, so that no bank conflicts.
template <int P>
struct Operand {
  uint16_t* data;
  int pitch, part_stride;

  SIMT_DEVICE Operand from(int row, int column) const { return {data + row * pitch + column, pitch, part_stride}; }
  /// Where this lane points in the 16 x 16 elements at (row, column) whose four matrices it helps to load.
  SIMT_DEVICE const uint16_t* place(int part, int row, int column) const {
    return data + part * part_stride + (row + (simt::lane() & 15)) * pitch + column + (simt::lane() >> 4) * 8;
  }
};

/// The same for any float. The high part is clamped to finite numbers, so infinities and NaN are in the low part.
SIMT_DEVICE uint32_t bf16_parts_clamped(float x, float y, uint32_t* low) {
  const uint32_t high = simt::pack(smaller(larger(x, -kLargestBfloat16), kLargestBfloat16),
                                   smaller(larger(y, -kLargestBfloat16), kLargestBfloat16));
  *low = simt::pack(x - of_bfloat16(high), y - simt::float_of(high & 0xffff0000u));
  return high;
}

/// z[16 MT, 8 N] += a[16 MT, depth] b[8 N, depth]^T; b's rows past `rows`, to the next 16, are left out.
template <int MT, int Q, int S, int N>
SIMT_DEVICE void multiply_rows(float (*z)[N][4], const Operand<Q>& a, const Operand<S>& b, int depth, int rows) {
  SIMT_ROLLED for (int k = 0; k < depth; k += 16) {
    uint32_t left[Q][MT][4];
    SIMT_EACH (part, Q)
      SIMT_EACH (h, MT) simt::load_matrices(left[part][h], a.place(part, h * 16, k));
    SIMT_EACH (n, N / 2) {
      if (n * 16 >= rows) continue;
      SIMT_EACH (stored, S) {
        uint32_t right[4];
        simt::load_matrices(right, b.place(stored, n * 16, k));
        SIMT_EACH (part, Q - stored)
          SIMT_EACH (h, MT) {
            simt::multiply_add(z[h][2 * n], left[part][h], right[0], right[2]);
            simt::multiply_add(z[h][2 * n + 1], left[part][h], right[1], right[3]);
          }
      }
    }
  }
}

/// sum[16 MT, 8 C] += w[16 MT, 8 N] b[8 N, 8 C], w in Q parts; these columns of sum begin at 8 `first`. Rows of b past
/// `rows` and columns past `columns`, each to the next 16, are left out.
template <int MT, int Q, int C, int S, int N, int W>
SIMT_DEVICE void multiply_weights(float (*sum)[W][4], const float (*w)[N][4], const Operand<S>& b, int rows,
                                  int columns, int first = 0) {
  SIMT_EACH (k, N / 2) {
    if (k * 16 >= rows) continue;
    uint32_t left[2][MT][4];
    SIMT_EACH (h, MT)
      SIMT_EACH (i, 4) {
        const float* const pair = &w[h][2 * k + i / 2][i % 2 * 2];
        left[0][h][i] = Q > 1 ? bf16_parts(pair[0], pair[1], &left[1][h][i]) : simt::pack(pair[0], pair[1]);
      }
    SIMT_EACH (n, C / 2) {
      if (n * 16 >= columns) continue;
      SIMT_EACH (stored, S) {
        uint32_t right[4];
        simt::load_matrices_transposed(right, b.place(stored, k * 16, n * 16));
        SIMT_EACH (part, Q - stored)
          SIMT_EACH (h, MT) {
            simt::multiply_add(sum[h][first + 2 * n], left[part][h], right[0], right[1]);
            simt::multiply_add(sum[h][first + 2 * n + 1], left[part][h], right[2], right[3]);
          }
      }
    }
  }
}

}  // namespace hisac::cuda
