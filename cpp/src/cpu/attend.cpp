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

struct Shape {
  int64_t users, tokens, heads, width, value_width;
  explicit Shape(const AttendInputs& in) noexcept
      : users(in.candidates.users),
        tokens(in.agents),
        heads(in.heads),
        width(in.q.width),
        value_width(in.values.width) {}
};

/// One user's head, packed.
struct Head {
  float *keys = nullptr, *values = nullptr;                // [M, d], [M, V]
  float *packed_keys = nullptr, *packed_values = nullptr;  // for q . k [d, M] and w values [M, V]
  float* bias = nullptr;                                   // [pad(M)] base 2; -inf: absent

  void carve(Arena& arena, const Shape& s) noexcept {
    keys = arena.take<float>(s.tokens * s.width);
    values = arena.take<float>(s.tokens * s.value_width);
    packed_keys = arena.take<float>(simd::packed_size(s.width, s.tokens));
    packed_values = arena.take<float>(simd::packed_size(s.tokens, s.value_width));
    bias = arena.take<float>(simd::pad(s.tokens));
  }

  void load(const AttendInputs& in, const Shape& s, int64_t b, int64_t h) noexcept {
    const simd::Kernels& k = simd::kernels();
    const auto row_of = [&](const Rows& rows, int64_t m) {
      return static_cast<const std::byte*>(rows.data) +
             ((b * s.tokens + m) * s.heads + h) * rows.width * bytes_of(rows.dtype);
    };
    std::fill(bias, bias + simd::pad(s.tokens), -INFINITY);
    for (int64_t m = 0; m < s.tokens; ++m) {
      const float squares = k.load_row(row_of(in.keys, m), in.keys.dtype, s.width, keys + m * s.width);
      k.load_row(row_of(in.values, m), in.values.dtype, s.value_width, values + m * s.value_width);
      const float x = in.bias ? in.bias.data[b * s.tokens + m] : 0.f;
      if (std::isfinite(x) && finite(keys + m * s.width, s.width, squares)) {
        bias[m] = simd::base2(x);
      } else {  // absent: 0 times what it holds could be NaN
        std::fill(keys + m * s.width, keys + (m + 1) * s.width, 0.f);
        std::fill(values + m * s.value_width, values + (m + 1) * s.value_width, 0.f);
      }
    }
    k.pack_columns(s.width, s.tokens, keys, s.width, packed_keys);
    k.pack_rows(s.tokens, s.value_width, values, s.value_width, packed_values);
  }
};

/// Loads n candidates of one head as [n, stride] with zero padding. Where `present` [n] is wanted, a row that holds a
/// NaN or an infinity is not present and becomes zero.
void load_candidates(const Rows& rows, const Shape& s, int64_t first, int n, int64_t h, float* out,
                     bool* present = nullptr) noexcept {
  for (int i = 0; i < n; ++i) {
    float* const row = out + i * simd::pad(rows.width);
    const float squares = simd::kernels().load_row(
        static_cast<const std::byte*>(rows.data) + ((first + i) * s.heads + h) * rows.width * bytes_of(rows.dtype),
        rows.dtype, rows.width, row);
    if (!present) continue;
    present[i] = finite(row, rows.width, squares);
    if (!present[i]) std::fill(row, row + rows.width, 0.f);
  }
}

// ---- forward

struct ForwardWorker {
  Head head;
  float *q = nullptr, *z = nullptr, *lse = nullptr, *out = nullptr;
};

struct Forward {
  ForwardWorker* worker = nullptr;
  int64_t* unit = nullptr;  // [B + 1] units before a user

  void carve(Arena& arena, const Shape& s, int workers) noexcept {
    unit = arena.take<int64_t>(s.users + 1);
    worker = arena.take_each<ForwardWorker>(workers, [&](ForwardWorker& one) {
      one.head.carve(arena, s);
      one.q = arena.take<float>(simd::kBlock * simd::pad(s.width));
      one.z = arena.take<float>(simd::kBlock * simd::pad(s.tokens));
      one.lse = arena.take<float>(simd::kBlock);
      one.out = arena.take<float>(simd::kBlock * simd::pad(s.value_width));
    });
  }
};

void attend_span(const AttendInputs& in, const Shape& s, const Attended& out, int64_t first, int64_t last, int64_t h,
                 ForwardWorker& w) noexcept {
  const simd::Kernels& k = simd::kernels();
  const int64_t ldq = simd::pad(s.width), ldz = simd::pad(s.tokens), ldv = simd::pad(s.value_width);
  const int64_t bytes = bytes_of(out.out.dtype);
  for (int64_t i = first; i < last; i += simd::kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(simd::kBlock, last - i));
    bool present[simd::kBlock];
    load_candidates(in.q, s, i, n, h, w.q, present);
    k.matmul(n, s.width, s.tokens, w.q, ldq, w.head.packed_keys, w.z, ldz, nullptr);
    k.row_softmax(n, s.tokens, w.z, ldz, in.scale * simd::kLog2e, w.head.bias, w.lse);
    k.matmul(n, s.tokens, s.value_width, w.z, ldz, w.head.packed_values, w.out, ldv, nullptr);
    for (int j = 0; j < n; ++j) {
      const int64_t row = (i + j) * s.heads + h;
      if (!present[j]) {
        std::fill(w.out + j * ldv, w.out + (j + 1) * ldv, 0.f);
        w.lse[j] = -INFINITY;
      }
      k.store_row(static_cast<std::byte*>(out.out.data) + row * s.value_width * bytes, out.out.dtype, s.value_width,
                  w.out + j * ldv, 1.f);
      out.lse.data[row] = w.lse[j] * simd::kLn2;
    }
  }
}

// ---- backward

/// Sums over a range of one head's candidates.
struct State {
  float *keys = nullptr, *values = nullptr, *bias = nullptr;  // [pad(M), pad(d)], [pad(M), pad(V)], [pad(M)]
};

struct BackwardWorker {
  Head head;
  float *packed_rows = nullptr, *packed_columns = nullptr;  // keys [M, d] for dq, values [V, M] for d_out . values
  float *q = nullptr, *d_out = nullptr, *out = nullptr, *z = nullptr, *g = nullptr, *dq = nullptr;
  float *lse = nullptr, *offset = nullptr;
  State* stack = nullptr;
};

class Backward {
 public:
  Backward(const AttendInputs& in, const AttendForward* forward, const AttendGradients* out, int workers) noexcept
      : in_(in), s_(in), forward_(forward), out_(out), k_(simd::kernels()), workers_(workers) {}

  void carve(Arena& arena) noexcept {
    head_bias_ = arena.take<float>(s_.users * s_.heads, s_.tokens);
    const int64_t block = simd::kBlock;
    worker_ = arena.take_each<BackwardWorker>(workers_, [&](BackwardWorker& one) {
      one.head.carve(arena, s_);
      one.packed_rows = arena.take<float>(simd::packed_size(s_.tokens, s_.width));
      one.packed_columns = arena.take<float>(simd::packed_size(s_.value_width, s_.tokens));
      for (float** a : {&one.q, &one.dq}) *a = arena.take<float>(block * simd::pad(s_.width));
      for (float** a : {&one.d_out, &one.out}) *a = arena.take<float>(block * simd::pad(s_.value_width));
      for (float** a : {&one.z, &one.g}) *a = arena.take<float>(block * simd::pad(s_.tokens));
      for (float** a : {&one.lse, &one.offset}) *a = arena.take<float>(block);
      const int depth = fold_depth(tiles_of(in_.q.rows / std::max<int64_t>(1, s_.heads)));
      one.stack = arena.take_each<State>(depth, [&](State& state) {
        state.keys = arena.take<float>(key_floats());
        state.values = arena.take<float>(value_floats());
        state.bias = arena.take<float>(simd::pad(s_.tokens));
      });
    });
  }

  void run(const Context& context) noexcept {
    std::fill_n(out_->q.data, in_.q.rows * s_.width, 0.f);
    for (int w = 0; w < workers_; ++w) {
      std::fill(worker_[w].q, worker_[w].q + simd::kBlock * simd::pad(s_.width), 0.f);
      std::fill(worker_[w].d_out, worker_[w].d_out + simd::kBlock * simd::pad(s_.value_width), 0.f);
    }
    parallel_for(context, s_.users * s_.heads, [&](int64_t begin, int64_t end, int w) {
      for (int64_t u = begin; u < end; ++u) head(u / s_.heads, u % s_.heads, worker_[w]);
    });
    for (int64_t b = 0; out_->bias && b < s_.users; ++b)
      for (int64_t m = 0; m < s_.tokens; ++m) {
        float total = 0;
        for (int64_t h = 0; h < s_.heads; ++h) total += head_bias_[(b * s_.heads + h) * s_.tokens + m];
        out_->bias.data[b * s_.tokens + m] = total;
      }
  }

 private:
  void head(int64_t b, int64_t h, BackwardWorker& w) noexcept {
    w.head.load(in_, s_, b, h);
    k_.pack_rows(s_.tokens, s_.width, w.head.keys, s_.width, w.packed_rows);
    k_.pack_columns(s_.value_width, s_.tokens, w.head.values, s_.value_width, w.packed_columns);
    const int64_t start = in_.candidates.start(b), count = in_.candidates.end(b) - start;
    reset(w.stack[0]);
    fold(
        0, tiles_of(count), w.stack,
        [&](int64_t t, State& state) {
          reset(state);
          for (int64_t i = t * kTile; i < std::min((t + 1) * kTile, count); i += simd::kBlock)
            block(start + i, static_cast<int>(std::min<int64_t>(simd::kBlock, count - i)), h, w, state);
        },
        [&](State& state, const State& later) { merge(state, later); });
    const State& s = w.stack[0];
    for (int64_t m = 0; m < s_.tokens; ++m) {
      const int64_t row = (b * s_.tokens + m) * s_.heads + h;
      k_.store_row(out_->keys.data + row * s_.width, DType::float32, s_.width, s.keys + m * simd::pad(s_.width),
                   in_.scale);
      k_.store_row(out_->values.data + row * s_.value_width, DType::float32, s_.value_width,
                   s.values + m * simd::pad(s_.value_width), 1.f);
      head_bias_[(b * s_.heads + h) * s_.tokens + m] = s.bias[m];
    }
  }

  void block(int64_t first, int n, int64_t h, BackwardWorker& w, State& state) noexcept {
    const int64_t ldq = simd::pad(s_.width), ldz = simd::pad(s_.tokens), ldv = simd::pad(s_.value_width);
    bool present[simd::kBlock];
    load_candidates(in_.q, s_, first, n, h, w.q, present);
    load_candidates(forward_->d_out, s_, first, n, h, w.d_out);
    load_candidates(forward_->out, s_, first, n, h, w.out);
    for (int i = 0; i < n; ++i) {
      const int64_t row = (first + i) * s_.heads + h;
      const float lse = forward_->lse.data[row];
      double dot = 0;
      for (int64_t c = 0; c < s_.value_width; ++c) dot += double(w.d_out[i * ldv + c]) * w.out[i * ldv + c];
      w.lse[i] = lse == -INFINITY ? lse : simd::base2(lse);
      w.offset[i] = lse == -INFINITY
                        ? 0.f
                        : static_cast<float>((forward_->d_lse ? double(forward_->d_lse.data[row]) : 0.0) - dot);
    }
    k_.matmul(n, s_.width, s_.tokens, w.q, ldq, w.head.packed_keys, w.z, ldz, nullptr);
    k_.row_weights(n, s_.tokens, w.z, ldz, in_.scale * simd::kLog2e, w.head.bias, w.lse);
    k_.matmul(n, s_.value_width, s_.tokens, w.d_out, ldv, w.packed_columns, w.g, ldz, nullptr);
    k_.attend_gradient(n, s_.tokens, w.z, w.g, ldz, w.offset, state.bias);
    k_.matmul(n, s_.tokens, s_.width, w.g, ldz, w.packed_rows, w.dq, ldq, nullptr);
    for (int i = 0; i < n; ++i)
      k_.store_row(out_->q.data + ((first + i) * s_.heads + h) * s_.width, DType::float32, s_.width, w.dq + i * ldq,
                   in_.scale);
    k_.accumulate(n, s_.tokens, s_.width, w.g, ldz, w.q, ldq, state.keys, ldq);
    k_.accumulate(n, s_.tokens, s_.value_width, w.z, ldz, w.d_out, ldv, state.values, ldv);
  }

  int64_t key_floats() const noexcept { return simd::pad(s_.tokens) * simd::pad(s_.width); }
  int64_t value_floats() const noexcept { return simd::pad(s_.tokens) * simd::pad(s_.value_width); }

  void reset(State& s) const noexcept {
    std::fill(s.keys, s.keys + key_floats(), 0.f);
    std::fill(s.values, s.values + value_floats(), 0.f);
    std::fill(s.bias, s.bias + simd::pad(s_.tokens), 0.f);
  }

  void merge(State& state, const State& later) const noexcept {
    k_.add_row(key_floats(), later.keys, 1.f, state.keys);
    k_.add_row(value_floats(), later.values, 1.f, state.values);
    k_.add_row(simd::pad(s_.tokens), later.bias, 1.f, state.bias);
  }

  const AttendInputs& in_;
  Shape s_;
  const AttendForward* forward_;
  const AttendGradients* out_;
  const simd::Kernels& k_;
  int workers_;
  float* head_bias_ = nullptr;
  BackwardWorker* worker_ = nullptr;
};

}  // namespace

size_t attend_workspace(const Context& context, const AttendInputs& inputs) noexcept {
  Arena arena;
  Forward().carve(arena, Shape(inputs), workers_of(context));
  return arena.used();
}

Status attend(const Context& context, const AttendInputs& inputs, Attended out) noexcept {
  const Shape s(inputs);
  Arena arena(context.workspace);
  Forward forward;
  forward.carve(arena, s, workers_of(context));
  HISAC_TRY(arena.check("attend"));
  std::fill_n(static_cast<std::byte*>(out.out.data), out.out.rows * s.value_width * bytes_of(out.out.dtype),
              std::byte{0});
  std::fill(out.lse.data, out.lse.data + out.out.rows, -INFINITY);
  forward.unit[0] = 0;
  for (int64_t b = 0; b < s.users; ++b)
    forward.unit[b + 1] =
        forward.unit[b] + (inputs.candidates.end(b) - inputs.candidates.start(b) + kSpan - 1) / kSpan * s.heads;
  parallel_for(context, forward.unit[s.users], [&](int64_t begin, int64_t end, int worker) {
    ForwardWorker& w = forward.worker[worker];
    int64_t loaded = -1;
    for (int64_t u = begin; u < end; ++u) {  // spans of one head are consecutive
      const int64_t b = std::upper_bound(forward.unit, forward.unit + s.users + 1, u) - forward.unit - 1;
      const int64_t spans = (forward.unit[b + 1] - forward.unit[b]) / s.heads;
      const int64_t h = (u - forward.unit[b]) / spans, span = (u - forward.unit[b]) % spans;
      if (loaded != b * s.heads + h) w.head.load(inputs, s, b, h);
      loaded = b * s.heads + h;
      const int64_t first = inputs.candidates.start(b) + span * kSpan;
      attend_span(inputs, s, out, first, std::min(first + kSpan, inputs.candidates.end(b)), h, w);
    }
  });
  return {};
}

size_t attend_backward_workspace(const Context& context, const AttendInputs& inputs) noexcept {
  Arena arena;
  Backward(inputs, nullptr, nullptr, workers_of(context)).carve(arena);
  return arena.used();
}

Status attend_backward(const Context& context, const AttendInputs& inputs, const AttendForward& forward,
                       const AttendGradients& out) noexcept {
  Backward backward(inputs, &forward, &out, workers_of(context));
  Arena arena(context.workspace);
  backward.carve(arena);
  HISAC_TRY(arena.check("attend_backward"));
  backward.run(context);
  return {};
}

}  // namespace hisac::cpu
