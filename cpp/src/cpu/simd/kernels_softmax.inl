// SPDX-License-Identifier: Apache-2.0
// The part of kernels.inl that makes weights of logits: the softmaxes of route and attend, and their gradients.

static void distance_logits(int n, int64_t m, float* z, int64_t ldz, const float* row_norm, const float* norm,
                            const float* rate) {
  for (int i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; j += W) {
      float* p = z + i * ldz + j;
      const vf d = larger(row_norm[i] + load(norm + j) - 2.f * load(p), vf{});
      store(p, -load(rate + j) * d);
    }
}

static void row_lse(int n, int64_t m, const float* z, int64_t ldz, float* lse) {
  for (int i = 0; i < n; ++i) {
    const float* row = z + i * ldz;
    vf lane_max = splat(-kInfinity), sum = {};
    for (int64_t j = 0; j < m; j += W) lane_max = larger(load(row + j), lane_max);
    const float row_max = largest_of(lane_max), safe = row_max == -kInfinity ? 0.f : row_max;
    for (int64_t j = 0; j < m; j += W) sum += exp2v(load(row + j) - safe);
    lse[i] = row_max == -kInfinity ? row_max : safe + __builtin_log2f(sum_of(sum));
  }
}

template <bool products>
HISAC_INLINE vf route_logit(const float* z, const RouteWeights& p, int i, vf norm, vf rate) {
  if (!products) return load(z) + p.shift[i];
  return p.shift[i] - rate * larger(p.row_norm[i] + norm - 2.f * load(z), vf{});
}

/// The weights of pairs of rows in bfloat16; lo null: without the lo of bf16x3.
struct Bf16Weights {
  uint32_t *hi, *lo;
  Bf16Weights operator+(int64_t j) const { return {hi + j, lo ? lo + j : lo}; }
};

/// The weights of a block for one vector of agents, their sum, and the block's largest logit.
template <bool products>
HISAC_INLINE void weigh(int n, const float* z, int64_t ldz, const RouteWeights& p, vf norm, vf rate, vf max_logit,
                        float* e, int64_t lde, vf& block_max, vf& sum) {
  block_max = splat(-kInfinity);
  sum = vf{};
  for (int i = 0; i < n; ++i) {
    const vf logit = route_logit<products>(z + i * ldz, p, i, norm, rate), w = exp2v(logit - max_logit);
    block_max = larger(logit, block_max);
    store(e + i * lde, w);
    sum += w;
  }
}

/// The same in bfloat16, two rows an element; lo, if wanted, is what the rounding of hi leaves.
template <bool products>
HISAC_INLINE void weigh(int n, const float* z, int64_t ldz, const RouteWeights& p, vf norm, vf rate, vf max_logit,
                        Bf16Weights e, int64_t lde, vf& block_max, vf& sum) {
  const auto widen_pair = [](vu pair, vf& even, vf& odd) __attribute__((always_inline)) {
    even = (vf)(pair << 16);
    odd = (vf)(pair & 0xffff0000u);
  };
  block_max = splat(-kInfinity);
  sum = vf{};
  for (int i = 0; i < n; i += 2) {
    vf even = route_logit<products>(z + i * ldz, p, i, norm, rate);
    vf odd = i + 1 < n ? route_logit<products>(z + (i + 1) * ldz, p, i + 1, norm, rate) : splat(-kInfinity);
    block_max = larger(larger(even, odd), block_max);
    even = exp2v(even - max_logit);
    odd = exp2v(odd - max_logit);
    const vu hi = pair_of(even, odd);
    *reinterpret_cast<vu_loose*>(e.hi + i / 2 * lde) = hi;
    vf high_even, high_odd;
    widen_pair(hi, high_even, high_odd);
    sum += high_even + high_odd;
    if (!e.lo) continue;
    const vu lo = pair_of(even - high_even, odd - high_odd);
    *reinterpret_cast<vu_loose*>(e.lo + i / 2 * lde) = lo;
    widen_pair(lo, even, odd);
    sum += even + odd;
  }
}

template <bool products, class T>
HISAC_INLINE bool route_weights_of(int n, int64_t m, const float* z, int64_t ldz, const RouteWeights& p, T e,
                                   int64_t lde) {
  constexpr float kMaxExcess = 12;
  bool changed = false;
  for (int64_t j = 0; j < m; j += W) {
    const vf norm = load(p.norm + j), rate = load(p.rate + j), old_max = load(p.max_logit + j);
    const vf max_logit = old_max == -kInfinity ? vf{} : old_max;
    vf block_max, sum, factor = splat(1.f);
    weigh<products>(n, z + j, ldz, p, norm, rate, max_logit, e + j, lde, block_max, sum);
    const vi exceeds = (block_max > max_logit + kMaxExcess) | ((old_max == -kInfinity) & (block_max > -kInfinity));
    int any = 0;
    for (int l = 0; l < W; ++l) any |= exceeds[l];
    if (any) {
      const vf new_max = larger(block_max, old_max);
      const vf safe = new_max == -kInfinity ? vf{} : new_max;  // no logit yet: -inf - -inf would be NaN
      weigh<products>(n, z + j, ldz, p, norm, rate, safe, e + j, lde, block_max, sum);
      factor = exp2v(old_max - safe);
      store(p.max_logit + j, new_max);
      if (!changed)
        for (int64_t c = 0; c < j; c += W) store(p.factor + c, splat(1.f));
      changed = true;
    }
    if (changed) store(p.factor + j, factor);
    store(p.denominator + j, load(p.denominator + j) * factor + sum);
  }
  return changed;
}

static bool route_weights(int n, int64_t m, const float* z, int64_t ldz, const RouteWeights& p, float* e, int64_t lde) {
  return p.row_norm ? route_weights_of<true>(n, m, z, ldz, p, e, lde)
                    : route_weights_of<false>(n, m, z, ldz, p, e, lde);
}

#if defined(HISAC_BF16)
static bool route_weights_bf16(int n, int64_t m, const float* z, int64_t ldz, const RouteWeights& p, uint32_t* e_hi,
                               uint32_t* e_lo, int64_t lde) {
  const Bf16Weights e{e_hi, e_lo};
  return p.row_norm ? route_weights_of<true>(n, m, z, ldz, p, e, lde)
                    : route_weights_of<false>(n, m, z, ldz, p, e, lde);
}
#endif

/// raw <- weights w = 2^(raw + shift_i - lse_a); dz = w (g + offset_a); d_bias_i = sum_a dz; in agents mode
/// dz -= 2^(raw - row_lse_i) d_bias_i; g <- rate_a dz.
template <bool softmax_over_agents>
HISAC_INLINE void route_gradient_of(int n, int64_t m, float* raw, float* g, int64_t ldz, const RouteGradient& p) {
  for (int i = 0; i < n; ++i) {
    float *r = raw + i * ldz, *q = g + i * ldz;
    vf bias_sum = {}, distance_sum = {};
    const auto add_gradients = [&](int64_t j, vf w, vf dz) __attribute__((always_inline)) {
      const vf logit = larger(load(r + j), splat(-3e38f));  // 0 * -inf would be NaN
      if (softmax_over_agents) dz -= exp2v(logit - p.row_lse[i]) * p.d_bias[i];
      store(r + j, w);
      store(p.d_raw + j, load(p.d_raw + j) + dz * logit);
      const vf distance = dz * load(p.rate + j);
      store(q + j, distance);
      store(p.column_sum + j, load(p.column_sum + j) + distance);
      distance_sum += distance;
    };
    const auto weight = [&](int64_t j) __attribute__((always_inline)) {
      return exp2v(load(r + j) + p.shift[i] - load(p.lse + j));
    };
    for (int64_t j = 0; j < m; j += W) {
      const vf w = weight(j), dz = w * (load(q + j) + load(p.offset + j));
      bias_sum += dz;
      if (softmax_over_agents)
        store(q + j, dz);
      else
        add_gradients(j, w, dz);
    }
    p.d_bias[i] = sum_of(bias_sum);
    for (int64_t j = 0; softmax_over_agents && j < m; j += W) add_gradients(j, weight(j), load(q + j));
    p.row_sum[i] = sum_of(distance_sum);
  }
}

static void route_gradient(int n, int64_t m, float* raw, float* g, int64_t ldz, const RouteGradient& p) {
  if (p.row_lse)
    route_gradient_of<true>(n, m, raw, g, ldz, p);
  else
    route_gradient_of<false>(n, m, raw, g, ldz, p);
}

// ---- attend

/// Clamps a logit so that the sum of two is finite; NaN becomes the smallest.
HISAC_INLINE vf bounded(vf x) { return smaller(larger(x, splat(-1.7e38f)), splat(1.7e38f)); }

static void row_softmax(int n, int64_t m, float* z, int64_t ldz, float scale, const float* bias, float* lse) {
  for (int i = 0; i < n; ++i) {
    float* row = z + i * ldz;
    vf lane_max = splat(-kInfinity), sum = {};
    for (int64_t j = 0; j < m; j += W) {
      const vf x = bounded(scale * load(row + j)) + load(bias + j);
      store(row + j, x);
      lane_max = larger(x, lane_max);
    }
    const float row_max = largest_of(lane_max), safe = row_max == -kInfinity ? 0.f : row_max;
    for (int64_t j = 0; j < m; j += W) {
      const vf e = exp2v(load(row + j) - safe);
      store(row + j, e);
      sum += e;
    }
    const float total = sum_of(sum), inverse = row_max == -kInfinity ? 0.f : 1.f / total;
    lse[i] = row_max == -kInfinity ? row_max : safe + __builtin_log2f(total);
    for (int64_t j = 0; j < m; j += W) store(row + j, load(row + j) * inverse);
  }
}

static void row_weights(int n, int64_t m, float* z, int64_t ldz, float scale, const float* bias, const float* lse) {
  for (int i = 0; i < n; ++i) {
    const float shift = lse[i] == -kInfinity ? kInfinity : lse[i];
    for (int64_t j = 0; j < m; j += W) {
      float* p = z + i * ldz + j;
      store(p, exp2v(bounded(scale * load(p)) + load(bias + j) - shift));
    }
  }
}

static void attend_gradient(int n, int64_t m, const float* w, float* g, int64_t ldz, const float* offset,
                            float* column_sum) {
  for (int64_t j = 0; j < m; j += W) {
    vf sum = load(column_sum + j);
    for (int i = 0; i < n; ++i) {
      const vf dz = load(w + i * ldz + j) * (load(g + i * ldz + j) + offset[i]);
      store(g + i * ldz + j, dz);
      sum += dz;
    }
    store(column_sum + j, sum);
  }
}

// ---- match

template <int... I>
HISAC_INLINE vi lane_numbers(std::integer_sequence<int, I...>) {
  return vi{I...};
}

/// The first n lanes of x, and -inf in the others.
HISAC_INLINE vf first_lanes(vf x, int64_t n) {
  const vi here = lane_numbers(LanesOf<vi>()) < static_cast<int32_t>(n < W ? n : W);
  return (vf)(((vi)x & here) | ((vi)splat(-kInfinity) & ~here));
}

static float largest(int64_t n, const float* x) {
  vf most = splat(-kInfinity);
  for (int64_t i = 0; i < n; i += W) most = larger(first_lanes(load(x + i), n - i), most);
  return largest_of(most);
}

/// `across` vectors of the columns of weigh_rows; of the last one only the first `have` columns are there.
template <int across>
HISAC_INLINE void weigh_columns(int n, const float* bias, const float* w, const float* rows, int64_t ld, float* sum,
                                size_t have = W) {
  vf total[across] = {};
  for (int i = 0; i < n; ++i) {
    if (bias[i] == -kInfinity) continue;
#pragma GCC unroll 4
    for (int a = 0; a < across; ++a)
      total[a] += w[i] * (have == W ? load(rows + i * ld + a * W) : load_first(rows + i * ld + a * W, have));
  }
#pragma GCC unroll 4
  for (int a = 0; a < across; ++a) __builtin_memcpy(sum + a * W, &total[a], (a + 1 < across ? W : have) * 4);
}

static float weigh_rows(int n, int64_t width, const float* bias, float shift, float scale, const float* rows,
                        int64_t ld, float* sum) {
  float w[kBlock];
  vf total = {};
  for (int i = 0; i < n; i += W) {
    const vf x = exp2v((first_lanes(load(bias + i), n - i) - shift) * kLog2e) * scale;
    store(w + i, x);
    total += x;
  }
  int64_t d = 0;
  for (; d + 4 * W <= width; d += 4 * W) weigh_columns<4>(n, bias, w, rows + d, ld, sum + d);
  for (; d + W <= width; d += W) weigh_columns<1>(n, bias, w, rows + d, ld, sum + d);
  if (d < width) weigh_columns<1>(n, bias, w, rows + d, ld, sum + d, lanes_of(width - d));
  return sum_of(total);
}
