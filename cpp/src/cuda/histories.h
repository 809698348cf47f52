// SPDX-License-Identifier: Apache-2.0
// A batch's behaviours as the kernels of `route`, `leaf_sums` and `missing` meet them: which rows a user has, where the
// row of x and of v of each lies, what makes one absent.
#pragma once
#include <algorithm>

#include "codebook/image.h"
#include "cuda/device/elements.h"
#include "hisac/route.h"

namespace hisac::cuda {

/// Whether |row|^2 is below 2^100, which NaN is not. float64 decides where the float32 `norm` is close to the limit.
/// element(d): the row's, as loaded.
template <class Element>
SIMT_DEVICE bool below_limit(float norm, int64_t width, Element element) {
  if (norm < 0x1p99f || !(norm < 0x1p101f)) return norm < 0x1p99f;
  double squares = 0;
  SIMT_ROLLED for (int64_t d = 0; d < width; ++d) {
    const double y = element(d);
    squares += y * y;
  }
  return squares < 0x1p100;
}

struct Behaviours : ClampedSpans {
  Rows x, v;  // x.data null: the prototypes of the codes, and the rows are those of codes
  Ids x_ids, v_ids;
  const float* scale = nullptr;  // of x of int8
  bool scale_per_row = false;    // scale [rows of x]
  const float *bias = nullptr, *spread = nullptr;
  const int32_t* codes = nullptr;  // of a row of x
  int levels = 0;
  int32_t sizes[kMaxLevels] = {};
  const float* centers[kMaxLevels] = {};  // [C_l, center_pitch] each
  int center_pitch = 0;

  SIMT_BOTH bool gathers() const { return x_ids.data || v_ids.data; }
  SIMT_DEVICE const float* center(int level, int32_t code) const {
    return centers[level] + int64_t{code} * center_pitch;
  }
  SIMT_DEVICE bool valid(const int32_t* path) const {
    bool ok = true;
    SIMT_ROLLED for (int l = 0; l < levels; ++l) ok =
        ok && static_cast<uint32_t>(path[l]) < static_cast<uint32_t>(sizes[l]);
    return ok;
  }
  /// Eight columns of the prototype of codes, added from the root down; zero for invalid ones and beyond D.
  SIMT_DEVICE void prototype8(const int32_t* path, int64_t column, float (&f)[8]) const {
    SIMT_EACH (i, 8) f[i] = 0;
    if (!valid(path)) return;
    SIMT_ROLLED for (int l = 0; l < levels; ++l) {
      const float* const c = center(l, path[l]);
      SIMT_EACH (i, 8) f[i] += column + i < x.width ? c[column + i] : 0.f;
    }
  }
  SIMT_DEVICE float prototype(const int32_t* path, int64_t d) const {
    float y = 0;
    SIMT_ROLLED for (int l = 0; l < levels; ++l) y += center(l, path[l])[d];
    return y;
  }

  /// The row of x or v that behaviour b has; -1: none.
  SIMT_DEVICE int64_t x_row(int64_t b) const { return row_in_table(x_ids, b, x.rows); }
  SIMT_DEVICE int64_t v_row(int64_t b) const { return row_in_table(v_ids, b, v.rows); }
  /// An element of that row of x, as loaded.
  SIMT_DEVICE float x_element(int64_t row, int64_t d) const {
    if (!x.data) return prototype(codes + row * levels, d);
    return element(x.data, x.dtype, row * x.width + d) * (scale ? scale[scale_per_row ? row : 0] : 1.f);
  }
  SIMT_DEVICE float v_element(int64_t row, int64_t d) const { return element(v.data, v.dtype, row * v.width + d); }

  /// Whether a bias and a spread leave a behaviour present.
  SIMT_DEVICE static bool valid_terms(float bias, float spread) {
    return finite(bias) && spread >= 0 && spread <= kLargest;
  }
  /// By a warp: |x|^2 + spread of a behaviour that is present; -1 where it is absent.
  SIMT_DEVICE float norm_of(int64_t b) const {
    const int64_t row = x_row(b);
    const float own_spread = spread ? spread[b] : 0.f;
    const bool may =
        row >= 0 && v_row(b) >= 0 && valid_terms(bias ? bias[b] : 0.f, own_spread) && valid(codes + row * levels);
    float squares = 0;
    for (int64_t d = simt::lane(); may && d < x.width; d += 32) {
      const float y = x_element(row, d);
      squares = simt::fused(y, y, squares);
    }
    for (int m = 16; m; m /= 2) squares += simt::shuffle_xor(squares, m);
    const bool here = may && below_limit(squares, x.width, [&](int64_t d) { return x_element(row, d); });
    return here ? squares + own_spread : -1.f;
  }
};

// ---- host

/// width: D. book null: codes are not read.
inline Behaviours behaviours_of(const Codebook* book, const Histories& in, int64_t width) {
  Behaviours t;
  t.x = in.x;
  t.x.rows = in.items();
  t.x.width = width;
  if (!in.x.data) t.x.dtype = DType::float32;
  t.v = in.v;
  t.x_ids = in.x_ids;
  t.v_ids = in.v_ids;
  t.scale = in.x_scale.data;
  t.scale_per_row = in.x_scale.shape[0] != 1;
  static_cast<Spans&>(t) = in.offsets;
  t.rows = in.behaviours();
  t.bias = in.bias.data;
  t.spread = in.spread.data;
  if (in.codes && book && !book->empty()) {
    t.codes = in.codes.data;
    t.levels = book->levels();
    for (int l = 0; l < t.levels; ++l) t.sizes[l] = static_cast<int32_t>(std::min<int64_t>(book->size(l), 0x7fffffff));
  }
  return t;
}

/// What route and its backward are given.
struct RouteCall {
  const Codebook* book;  // null: codes are not read
  const RouteParams& params;
  const Histories& in;
  const RouteAgents& agents;

  int64_t width() const { return agents.prototypes.shape[2]; }
};

constexpr int64_t kMostColumns = 4096;  // D of `route`, D and V of its backward

/// What the public verbs allow and CUDA's do not.
inline Status check_counts(const char* verb, const Histories& in) {
  if (in.offsets.users <= 1 << 30 && in.behaviours() < int64_t{1} << 31) return {};
  return Status::error(Code::not_implemented,
                       "%s: expected B up to 2^30 and T below 2^31 on CUDA, got %" PRId64 " and %" PRId64, verb,
                       in.offsets.users, in.behaviours());
}
inline Status check_columns(const char* verb, const char* name, int64_t columns) {
  if (columns <= kMostColumns) return {};
  return Status::error(Code::not_implemented, "%s: expected %s up to %" PRId64 " on CUDA, got %" PRId64, verb, name,
                       kMostColumns, columns);
}

/// Where the levels' centers lie in the codebook's image.
inline Status place_centers(const char* verb, const Context& context, const Codebook& book, Behaviours& t) {
  HISAC_TRY(check_device_image(verb, context, book));
  const CodebookImage image(book);
  t.center_pitch = image.pitch;
  for (int l = 0; l < image.levels; ++l)
    t.centers[l] = reinterpret_cast<const float*>(context.codebook_image.bytes.data + image.level[l].pitched);
  return {};
}
/// The same where there is no x; else they are not needed.
inline Status place_centers(const char* verb, const Context& context, const Codebook* book, Behaviours& t) {
  return t.x.data || t.levels == 0 ? Status() : place_centers(verb, context, *book, t);
}

}  // namespace hisac::cuda
