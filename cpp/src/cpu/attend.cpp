// SPDX-License-Identifier: Apache-2.0
// Target attention. Keys and values of one user and head are packed once and serve all its candidates, 64 at a time.
// The logits of such a block stay in cache. The backward processes all candidates of a user and head in order in one
// worker, so its sums need no atomics.
#include <algorithm>
#include <cmath>

#include "base/arena.h"
#include "base/checks.h"
#include "base/parallel.h"
#include "base/reduction_tree.h"
#include "cpu/rows.h"
#include "cpu/simd/pack.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

constexpr int64_t kSpan = 512;  // candidates of one unit of the forward

/// One user's head, packed.
struct Head {
  int64_t tokens = 0;                                      // m, at most M
  float *keys = nullptr, *values = nullptr;                // [M, d], [M, V]
  float *packed_keys = nullptr, *packed_values = nullptr;  // for q . k [d, M] and w values [M, V]
  float* bias = nullptr;                                   // [pad(M)] base 2; -inf: absent
};

/// What `attend` and its backward share.
struct AttendCall {
  AttendCall(const Context& context, const AttendInputs& in) noexcept : context_(context), in_(in) {}

  void carve_head(Arena& arena, Head& head) const noexcept {
    head.keys = arena.take<float>(m_ * d_);
    head.values = arena.take<float>(m_ * v_);
    head.packed_keys = arena.take<float>(simd::packed_size(d_, m_));
    head.packed_values = arena.take<float>(simd::packed_size(m_, v_));
    head.bias = arena.take<float>(ldm_);
  }

  void load_head(int64_t b, int64_t h, Head& head) const noexcept {
    const int64_t first = first_token(b);
    head.tokens = in_.tokens.starts ? in_.tokens.end(b) - first : m_;
    std::fill_n(head.bias, ldm_, -INFINITY);
    for (int64_t m = 0; m < head.tokens; ++m) {
      float *const key = head.keys + m * d_, *const value = head.values + m * v_;
      const float squares = load_row(in_.keys, (first + m) * in_.heads + h, key);
      load_row(in_.values, (first + m) * in_.heads + h, value);
      const float bias = in_.bias ? in_.bias.data[first + m] : 0.f;
      if (std::isfinite(bias) && finite(key, d_, squares)) {
        head.bias[m] = simd::base2(bias);
      } else {  // absent: 0 times what it holds could be NaN
        std::fill_n(key, d_, 0.f);
        std::fill_n(value, v_, 0.f);
      }
    }
    k_.pack_columns(d_, head.tokens, head.keys, d_, head.packed_keys);
    k_.pack_rows(head.tokens, v_, head.values, v_, head.packed_values);
  }

  /// Loads n candidates of one head as [n, stride] with zero padding. Where `present` [n] is wanted, a row that holds a
  /// NaN or an infinity is not present and becomes zero.
  void load_candidates(const Rows& rows, int64_t first, int n, int64_t h, float* out,
                       bool* present = nullptr) const noexcept {
    for (int i = 0; i < n; ++i) {
      float* const row = out + i * simd::pad(rows.width);
      const float squares = load_row(rows, candidate(first + i, h), row);
      if (!present) continue;
      present[i] = finite(row, rows.width, squares);
      if (!present[i]) std::fill_n(row, rows.width, 0.f);
    }
  }

  int64_t first_token(int64_t b) const noexcept { return in_.tokens.starts ? in_.tokens.start(b) : b * m_; }
  /// The row of a candidate for one head.
  int64_t candidate(int64_t i, int64_t h) const noexcept { return i * in_.heads + h; }

  const Context& context_;
  const AttendInputs& in_;
  const simd::Kernels& k_ = simd::kernels();
  const int64_t m_ = in_.agents, d_ = in_.q.width, v_ = in_.values.width;
  const int64_t ldm_ = simd::pad(m_), ldd_ = simd::pad(d_), ldv_ = simd::pad(v_);
};

// ---- forward

struct ForwardWorker {
  Head head;
  float *q = nullptr, *z = nullptr, *lse = nullptr, *out = nullptr;
};

class Forward : AttendCall {
 public:
  Forward(const Context& context, const AttendInputs& in, const Attended& out) noexcept
      : AttendCall(context, in), out_(out) {}

  void carve(Arena& arena) noexcept {
    unit_ = arena.take<int64_t>(in_.candidates.users + 1);
    worker_ = arena.take_each<ForwardWorker>(workers_of(context_), [&](ForwardWorker& one) {
      carve_head(arena, one.head);
      one.q = arena.take<float>(simd::kBlock * ldd_);
      one.z = arena.take<float>(simd::kBlock * ldm_);
      one.lse = arena.take<float>(simd::kBlock);
      one.out = arena.take<float>(simd::kBlock * ldv_);
    });
  }

  void run() noexcept {
    const Spans& candidates = in_.candidates;
    std::fill_n(static_cast<std::byte*>(out_.out.data), out_.out.rows * v_ * bytes_of(out_.out.dtype), std::byte{0});
    std::fill_n(out_.lse.data, out_.out.rows, -INFINITY);
    unit_[0] = 0;
    for (int64_t b = 0; b < candidates.users; ++b)
      unit_[b + 1] = unit_[b] + (candidates.end(b) - candidates.start(b) + kSpan - 1) / kSpan * in_.heads;
    parallel_for(context_, unit_[candidates.users], [&](int64_t begin, int64_t end, int worker) {
      ForwardWorker& w = worker_[worker];
      int64_t loaded = -1;
      for (int64_t u = begin; u < end; ++u) {  // spans of one head are consecutive
        const int64_t b = std::upper_bound(unit_, unit_ + candidates.users + 1, u) - unit_ - 1;
        const int64_t spans = (unit_[b + 1] - unit_[b]) / in_.heads;
        const int64_t h = (u - unit_[b]) / spans, span = (u - unit_[b]) % spans;
        if (loaded != b * in_.heads + h) load_head(b, h, w.head);
        loaded = b * in_.heads + h;
        const int64_t first = candidates.start(b) + span * kSpan, last = std::min(first + kSpan, candidates.end(b));
        for (int64_t i = first; i < last; i += simd::kBlock)
          block(i, static_cast<int>(std::min<int64_t>(simd::kBlock, last - i)), h, w);
      }
    });
  }

 private:
  void block(int64_t first, int n, int64_t h, ForwardWorker& w) const noexcept {
    const DType type = out_.out.dtype;
    bool present[simd::kBlock];
    load_candidates(in_.q, first, n, h, w.q, present);
    const int64_t m = w.head.tokens;
    k_.matmul(n, d_, m, w.q, ldd_, w.head.packed_keys, w.z, ldm_, nullptr);
    k_.row_softmax(n, m, w.z, ldm_, in_.scale * simd::kLog2e, w.head.bias, w.lse);
    k_.matmul(n, m, v_, w.z, ldm_, w.head.packed_values, w.out, ldv_, nullptr);
    for (int i = 0; i < n; ++i) {
      if (!present[i]) continue;  // zeros and -inf are there
      const int64_t row = candidate(first + i, h);
      k_.store_row(static_cast<std::byte*>(out_.out.data) + row * v_ * bytes_of(type), type, v_, w.out + i * ldv_, 1.f);
      out_.lse.data[row] = w.lse[i] * simd::kLn2;
    }
  }

  const Attended& out_;
  ForwardWorker* worker_ = nullptr;
  int64_t* unit_ = nullptr;  // [B + 1] units before a user
};

// ---- backward

/// Sums over a range of one head's candidates: [pad(M), pad(d)] of keys, [pad(M), pad(V)] of values, [pad(M)] of bias.
using Sums = float*;

struct BackwardWorker {
  Head head;
  float *packed_rows = nullptr, *packed_columns = nullptr;  // keys [M, d] for dq, values [V, M] for d_out . values
  float *q = nullptr, *d_out = nullptr, *out = nullptr, *z = nullptr, *g = nullptr, *dq = nullptr;
  float *lse = nullptr, *offset = nullptr;
  Sums* stack = nullptr;
};

class Backward : AttendCall {
 public:
  Backward(const Context& context, const AttendInputs& in, const AttendForward* forward,
           const AttendGradients* out) noexcept
      : AttendCall(context, in), forward_(forward), out_(out) {}

  void carve(Arena& arena) noexcept {
    rows_ = in_.keys.rows / std::max<int64_t>(1, in_.heads);  // a workspace may be asked for before H is checked
    head_bias_ = arena.take<float>(in_.heads, rows_);
    const int64_t block = simd::kBlock, depth = fold_depth(tiles_of(in_.q.rows / in_.heads));
    worker_ = arena.take_each<BackwardWorker>(workers_of(context_), [&](BackwardWorker& one) {
      carve_head(arena, one.head);
      one.packed_rows = arena.take<float>(simd::packed_size(m_, d_));
      one.packed_columns = arena.take<float>(simd::packed_size(v_, m_));
      arena.take_into(block * ldd_, one.q, one.dq);
      arena.take_into(block * ldv_, one.d_out, one.out);
      arena.take_into(block * ldm_, one.z, one.g);
      arena.take_into(block, one.lse, one.offset);
      one.stack = arena.take_each<Sums>(depth, [&](Sums& sums) { sums = arena.take<float>(sum_floats()); });
    });
  }

  void run() noexcept {
    const int64_t users = in_.candidates.users;
    std::fill_n(out_->q.data, in_.q.rows * d_, 0.f);
    if (in_.tokens.starts) {  // rows of no user
      std::fill_n(out_->keys.data, in_.keys.rows * d_, 0.f);
      std::fill_n(out_->values.data, in_.keys.rows * v_, 0.f);
      std::fill_n(head_bias_, in_.keys.rows, 0.f);
    }
    for (int w = 0; w < workers_of(context_); ++w) {
      std::fill_n(worker_[w].q, simd::kBlock * ldd_, 0.f);
      std::fill_n(worker_[w].d_out, simd::kBlock * ldv_, 0.f);
    }
    parallel_each(context_, users * in_.heads,
                  [&](int64_t u, int w) { head(u / in_.heads, u % in_.heads, worker_[w]); });
    for (int64_t row = 0; out_->bias && row < rows_; ++row) {
      float total = 0;
      for (int64_t h = 0; h < in_.heads; ++h) total += head_bias_[h * rows_ + row];
      out_->bias.data[row] = total;
    }
  }

 private:
  void head(int64_t b, int64_t h, BackwardWorker& w) noexcept {
    load_head(b, h, w.head);
    k_.pack_rows(w.head.tokens, d_, w.head.keys, d_, w.packed_rows);
    k_.pack_columns(v_, w.head.tokens, w.head.values, v_, w.packed_columns);
    const int64_t start = in_.candidates.start(b), count = in_.candidates.end(b) - start;
    std::fill_n(w.stack[0], sum_floats(), 0.f);
    fold(
        0, tiles_of(count), w.stack,
        [&](int64_t t, Sums sums) {
          std::fill_n(sums, sum_floats(), 0.f);
          for (int64_t i = t * kTile; i < std::min((t + 1) * kTile, count); i += simd::kBlock)
            block(start + i, static_cast<int>(std::min<int64_t>(simd::kBlock, count - i)), h, w, sums);
        },
        [&](Sums sums, Sums later) { k_.add_row(sum_floats(), later, 1.f, sums); });
    const Sums keys = w.stack[0], values = values_of(keys), bias = bias_of(keys);
    const int64_t first = first_token(b);
    for (int64_t m = 0; m < w.head.tokens; ++m) {
      const int64_t row = (first + m) * in_.heads + h;
      k_.store_row(out_->keys.data + row * d_, DType::float32, d_, keys + m * ldd_, in_.scale);
      k_.store_row(out_->values.data + row * v_, DType::float32, v_, values + m * ldv_, 1.f);
    }
    std::copy_n(bias, w.head.tokens, head_bias_ + h * rows_ + first);
  }

  void block(int64_t first, int n, int64_t h, BackwardWorker& w, Sums sums) noexcept {
    bool present[simd::kBlock];
    load_candidates(in_.q, first, n, h, w.q, present);
    load_candidates(forward_->d_out, first, n, h, w.d_out);
    load_candidates(forward_->out, first, n, h, w.out);
    for (int i = 0; i < n; ++i) {
      const int64_t row = candidate(first + i, h);
      const float lse = forward_->lse.data[row];
      double dot = 0;
      for (int64_t c = 0; c < v_; ++c) dot += double(w.d_out[i * ldv_ + c]) * w.out[i * ldv_ + c];
      const double d_lse = forward_->d_lse ? double(forward_->d_lse.data[row]) : 0;
      w.lse[i] = lse == -INFINITY ? lse : simd::base2(lse);
      w.offset[i] = lse == -INFINITY ? 0.f : static_cast<float>(d_lse - dot);
    }
    const int64_t m = w.head.tokens;
    k_.matmul(n, d_, m, w.q, ldd_, w.head.packed_keys, w.z, ldm_, nullptr);
    k_.row_weights(n, m, w.z, ldm_, in_.scale * simd::kLog2e, w.head.bias, w.lse);
    k_.matmul(n, v_, m, w.d_out, ldv_, w.packed_columns, w.g, ldm_, nullptr);
    k_.attend_gradient(n, m, w.z, w.g, ldm_, w.offset, bias_of(sums));
    k_.matmul(n, m, d_, w.g, ldm_, w.packed_rows, w.dq, ldd_, nullptr);
    for (int i = 0; i < n; ++i)
      k_.store_row(out_->q.data + candidate(first + i, h) * d_, DType::float32, d_, w.dq + i * ldd_, in_.scale);
    k_.accumulate(n, m, d_, w.g, ldm_, w.q, ldd_, sums, ldd_);
    k_.accumulate(n, m, v_, w.z, ldm_, w.d_out, ldv_, values_of(sums), ldv_);
  }

  float* values_of(Sums sums) const noexcept { return sums + ldm_ * ldd_; }
  float* bias_of(Sums sums) const noexcept { return values_of(sums) + ldm_ * ldv_; }
  int64_t sum_floats() const noexcept { return ldm_ * (ldd_ + ldv_ + 1); }

  const AttendForward* forward_;
  const AttendGradients* out_;
  int64_t rows_ = 0;            // of keys, a head
  float* head_bias_ = nullptr;  // [H, R]
  BackwardWorker* worker_ = nullptr;
};

}  // namespace

size_t attend_workspace(const Context& context, const AttendInputs& inputs) noexcept {
  return workspace_of(Forward(context, inputs, {}));
}

Status attend(const Context& context, const AttendInputs& inputs, Attended out) noexcept {
  return run_call("attend", context, Forward(context, inputs, out));
}

size_t attend_backward_workspace(const Context& context, const AttendInputs& inputs) noexcept {
  return workspace_of(Backward(context, inputs, nullptr, nullptr));
}

Status attend_backward(const Context& context, const AttendInputs& inputs, const AttendForward& forward,
                       const AttendGradients& out) noexcept {
  return run_call("attend_backward", context, Backward(context, inputs, &forward, &out));
}

}  // namespace hisac::cpu
