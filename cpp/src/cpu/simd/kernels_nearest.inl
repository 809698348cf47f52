// SPDX-License-Identifier: Apache-2.0
// The part of kernels.inl that finds the nearest codeword: rounding of rows and centers to bfloat16, the screen of a
// row of products, square distances in float64.

HISAC_INLINE float smallest_of(vf x) { return folded<W / 2>(x, smaller)[0]; }

static int64_t screen(int64_t m, const float* z, Screen& row, int32_t* out) {
  vf low = splat(kInfinity), high = splat(kInfinity);
  for (int64_t j = 0; j < m; j += W) {
    const vf score = load(row.half + j) - load(z + j), error = row.error * load(row.norm + j);
    const vf lower = score - error, upper = score + error;
    low = smaller(lower, low);
    high = smaller(upper, high);
  }
  row.low = smallest_of(low);
  const float most_possible = smallest_of(high) + row.slack;
  if (most_possible < row.threshold) row.threshold = most_possible;
  if (row.low > row.threshold) return 0;
  const float threshold = row.threshold, error = row.error;
  const float *half = row.half, *norm = row.norm;
  vu bit;
  for (int l = 0; l < W; ++l) bit[l] = 1u << l;
  uint32_t lanes =
      folded<W / 2>((vu)(low <= threshold) & bit, [](vu a, vu b) __attribute__((always_inline)) { return a | b; })[0];
  int64_t count = 0;
  for (; lanes; lanes &= lanes - 1)
    for (int64_t j = __builtin_ctz(lanes); j < m; j += W) {
      out[count] = static_cast<int32_t>(j);
      count += half[j] - z[j] - error * norm[j] <= threshold;
    }
  return count;
}

static double square_distance(int64_t width, const float* a, const float* b) {
  vd sum[2] = {};
  int64_t d = 0;
  for (; d + W <= width; d += W)
    for (int h = 0; h < 2; ++h) {
      const vd step = __builtin_convertvector(load_half(a + d + h * (W / 2)), vd) -
                      __builtin_convertvector(load_half(b + d + h * (W / 2)), vd);
      sum[h] += step * step;
    }
  double total = 0;
  for (; d < width; ++d) {
    const double step = double(a[d]) - double(b[d]);
    total += step * step;
  }
  return sum_of(sum[0] + sum[1]) + total;
}

/// Bisects the bits of the floats, which are ordered as they are.
static float kth_smallest(int64_t m, const float* d, int64_t k) {
  vf smallest = splat(kInfinity), largest = {};
  for (int64_t j = 0; j < m; j += W) {
    const vf x = load(d + j);
    smallest = smaller(x, smallest);
    largest = larger(x < kInfinity ? x : vf{}, largest);
  }
  const auto bits = [](float x) __attribute__((always_inline)) {
    int32_t b;
    __builtin_memcpy(&b, &x, 4);
    return b;
  };
  int32_t low = bits(smallest_of(smallest)), high = bits(largest_of(largest));
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    vi within = {};
    for (int64_t j = 0; j < m; j += W) within -= (vi)load(d + j) <= middle;
    const int64_t count = sum_of(within);
    if (count < k) {
      low = middle + 1;
    } else {
      high = middle;
      if (count == k) break;
    }
  }
  largest = vf{};  // of those that are within
  for (int64_t j = 0; j < m; j += W) {
    const vf x = load(d + j);
    largest = larger((vi)x <= high ? x : vf{}, largest);
  }
  return largest_of(largest);
}

static int64_t columns_below(int64_t m, const float* d, float most, int32_t* out) {
  vu bit;
  for (int l = 0; l < W; ++l) bit[l] = 1u << l;
  int64_t count = 0;
  for (int64_t j = 0; j < m; j += W) {
    uint32_t lanes = folded<W / 2>((vu)(load(d + j) <= most) & bit,
                                   [](vu a, vu b) __attribute__((always_inline)) { return a | b; })[0];
    if (m - j < W) lanes &= (1u << (m - j)) - 1;
    for (; lanes; lanes &= lanes - 1) out[count++] = static_cast<int32_t>(j + __builtin_ctz(lanes));
  }
  return count;
}

#if defined(HISAC_BF16)
static Rounded round_bf16(int64_t width, const float* src, const float* shift, uint32_t* dst) {
  uint16_t* const halves = reinterpret_cast<uint16_t*>(dst);
  vf squares = {}, errors = {};
  each_vector(width, [&](int64_t d, size_t have) __attribute__((always_inline)) {
    const vf given = load_first(src + d, have), x = shift ? given - load_first(shift + d, have) : given;
    const vh rounded = narrow_flushed(x);
    const vf error = x - widen(rounded, DType::bfloat16);
    squares += x * x;
    errors += error * error;
    store_first(halves + d, rounded, (have + 1) / 2 * 2);
  });
  return {sum_of(squares), sum_of(errors)};
}
#endif
