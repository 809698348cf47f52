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
    vf top = splat(-kInfinity), sum = {};
    for (int64_t j = 0; j < m; j += W) top = larger(load(row + j), top);
    const float t = largest_of(top), safe = t == -kInfinity ? 0.f : t;
    for (int64_t j = 0; j < m; j += W) sum += exp2v(load(row + j) - safe);
    lse[i] = t == -kInfinity ? t : safe + __builtin_log2f(sum_of(sum));
  }
}

template <bool products>
HISAC_INLINE vf route_logit(const float* z, const RouteWeights& p, int i, vf norm, vf rate) {
  if (!products) return load(z) + p.shift[i];
  return p.shift[i] - rate * larger(p.row_norm[i] + norm - 2.f * load(z), vf{});
}

/// Where weights go in pairs of rows; lo null: one half.
struct PairTarget {
  uint32_t *hi, *lo;
  PairTarget operator+(int64_t j) const { return {hi + j, lo ? lo + j : lo}; }
};

/// Weights of one vector of agents, their sum, and the largest logit.
template <bool products>
HISAC_INLINE void weigh(int n, const float* z, int64_t ldz, const RouteWeights& p, vf norm, vf rate, vf top, float* e,
                        int64_t lde, vf& peak, vf& sum) {
  peak = splat(-kInfinity);
  sum = vf{};
  for (int i = 0; i < n; ++i) {
    const vf logit = route_logit<products>(z + i * ldz, p, i, norm, rate), w = exp2v(logit - top);
    peak = larger(logit, peak);
    store(e + i * lde, w);
    sum += w;
  }
}

/// The same in pairs of rows; lo, if wanted, is what rounding left.
template <bool products>
HISAC_INLINE void weigh(int n, const float* z, int64_t ldz, const RouteWeights& p, vf norm, vf rate, vf top,
                        PairTarget e, int64_t lde, vf& peak, vf& sum) {
  const auto halves = [](vu pair, vf& even, vf& odd) __attribute__((always_inline)) {
    even = (vf)(pair << 16);
    odd = (vf)(pair & 0xffff0000u);
  };
  peak = splat(-kInfinity);
  sum = vf{};
  for (int i = 0; i < n; i += 2) {
    vf even = route_logit<products>(z + i * ldz, p, i, norm, rate);
    vf odd = i + 1 < n ? route_logit<products>(z + (i + 1) * ldz, p, i + 1, norm, rate) : splat(-kInfinity);
    peak = larger(larger(even, odd), peak);
    even = exp2v(even - top);
    odd = exp2v(odd - top);
    const vu hi = pair_of(even, odd);
    *reinterpret_cast<vu_loose*>(e.hi + i / 2 * lde) = hi;
    vf high_even, high_odd;
    halves(hi, high_even, high_odd);
    sum += high_even + high_odd;
    if (!e.lo) continue;
    const vu lo = pair_of(even - high_even, odd - high_odd);
    *reinterpret_cast<vu_loose*>(e.lo + i / 2 * lde) = lo;
    halves(lo, even, odd);
    sum += even + odd;
  }
}

template <bool products, class T>
HISAC_INLINE bool route_weights_of(int n, int64_t m, const float* z, int64_t ldz, const RouteWeights& p, T e,
                                   int64_t lde) {
  constexpr float kRise = 12;
  bool changed = false;
  for (int64_t j = 0; j < m; j += W) {
    const vf norm = load(p.norm + j), rate = load(p.rate + j), old = load(p.top + j);
    const vf top = old == -kInfinity ? vf{} : old;
    vf peak, sum, factor = splat(1.f);
    weigh<products>(n, z + j, ldz, p, norm, rate, top, e + j, lde, peak, sum);
    const vi rises = (peak > top + kRise) | ((old == -kInfinity) & (peak > -kInfinity));
    int any = 0;
    for (int l = 0; l < W; ++l) any |= rises[l];
    if (any) {
      const vf next = larger(peak, old);
      const vf safe = next == -kInfinity ? vf{} : next;  // no mass yet: -inf - -inf would be NaN
      weigh<products>(n, z + j, ldz, p, norm, rate, safe, e + j, lde, peak, sum);
      factor = exp2v(old - safe);
      store(p.top + j, next);
      if (!changed)
        for (int64_t c = 0; c < j; c += W) store(p.factor + c, splat(1.f));
      changed = true;
    }
    if (changed) store(p.factor + j, factor);
    store(p.mass + j, load(p.mass + j) * factor + sum);
  }
  return changed;
}

static bool route_weights(int n, int64_t m, const float* z, int64_t ldz, const RouteWeights& p, float* e, int64_t lde) {
  return p.row_norm ? route_weights_of<true>(n, m, z, ldz, p, e, lde)
                    : route_weights_of<false>(n, m, z, ldz, p, e, lde);
}

#if defined(HISAC_PAIRS)
static bool route_weights_split(int n, int64_t m, const float* z, int64_t ldz, const RouteWeights& p, uint32_t* e_hi,
                                uint32_t* e_lo, int64_t lde) {
  const PairTarget e{e_hi, e_lo};
  return p.row_norm ? route_weights_of<true>(n, m, z, ldz, p, e, lde)
                    : route_weights_of<false>(n, m, z, ldz, p, e, lde);
}

static bool route_weights_pairs(int n, int64_t m, const float* z, int64_t ldz, const RouteWeights& p, uint32_t* e,
                                int64_t lde) {
  return route_weights_split(n, m, z, ldz, p, e, nullptr, lde);
}
#endif

/// raw <- weights w = 2^(raw + shift_i - lse_a); dz = w (g + offset_a); d_bias_i = sum_a dz; in agents mode
/// dz -= 2^(raw - row_lse_i) d_bias_i; g <- rate_a dz.
template <bool shares>
HISAC_INLINE void route_gradient_of(int n, int64_t m, float* raw, float* g, int64_t ldz, const RouteGradient& p) {
  for (int i = 0; i < n; ++i) {
    float *r = raw + i * ldz, *q = g + i * ldz;
    vf bias_sum = {}, distance_sum = {};
    const auto take = [&](int64_t j, vf w, vf dz) __attribute__((always_inline)) {
      const vf logit = larger(load(r + j), splat(-3e38f));  // 0 * -inf would be NaN
      if (shares) dz -= exp2v(logit - p.row_lse[i]) * p.d_bias[i];
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
      if (shares)
        store(q + j, dz);
      else
        take(j, w, dz);
    }
    p.d_bias[i] = sum_of(bias_sum);
    for (int64_t j = 0; shares && j < m; j += W) take(j, weight(j), load(q + j));
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

/// A logit that two of its kind, added, keep finite; NaN loses.
HISAC_INLINE vf bounded(vf x) { return smaller(larger(x, splat(-1.7e38f)), splat(1.7e38f)); }

static void row_softmax(int n, int64_t m, float* z, int64_t ldz, float scale, const float* bias, float* lse) {
  for (int i = 0; i < n; ++i) {
    float* row = z + i * ldz;
    vf top = splat(-kInfinity), sum = {};
    for (int64_t j = 0; j < m; j += W) {
      const vf x = bounded(scale * load(row + j)) + load(bias + j);
      store(row + j, x);
      top = larger(x, top);
    }
    const float t = largest_of(top), safe = t == -kInfinity ? 0.f : t;
    for (int64_t j = 0; j < m; j += W) {
      const vf e = exp2v(load(row + j) - safe);
      store(row + j, e);
      sum += e;
    }
    const float total = sum_of(sum), inverse = t == -kInfinity ? 0.f : 1.f / total;
    lse[i] = t == -kInfinity ? t : safe + __builtin_log2f(total);
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
