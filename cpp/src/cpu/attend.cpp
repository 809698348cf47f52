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
  float *keys = nullptr, *values = nullptr;                // [M, d], [M, V]
  float *packed_keys = nullptr, *packed_values = nullptr;  // for q . k [d, M] and w values [M, V]
  float* bias = nullptr;                                   // [pad(M)] base 2; -inf: absent

  void carve(Arena& arena, const AttendInputs& in) noexcept {
    keys = arena.take<float>(in.agents * in.q.width);
    values = arena.take<float>(in.agents * in.values.width);
    packed_keys = arena.take<float>(simd::packed_size(in.q.width, in.agents));
    packed_values = arena.take<float>(simd::packed_size(in.agents, in.values.width));
    bias = arena.take<float>(simd::pad(in.agents));
  }

  void load(const AttendInputs& in, int64_t b, int64_t h) noexcept {
    const simd::Kernels& k = simd::kernels();
    std::fill(bias, bias + simd::pad(in.agents), -INFINITY);
    for (int64_t m = 0; m < in.agents; ++m) {
      const int64_t row = (b * in.agents + m) * in.heads + h;
      const float squares = load_row(in.keys, row, keys + m * in.q.width);
      load_row(in.values, row, values + m * in.values.width);
      const float x = in.bias ? in.bias.data[b * in.agents + m] : 0.f;
      if (std::isfinite(x) && finite(keys + m * in.q.width, in.q.width, squares)) {
        bias[m] = simd::base2(x);
      } else {  // absent: 0 times what it holds could be NaN
        std::fill(keys + m * in.q.width, keys + (m + 1) * in.q.width, 0.f);
        std::fill(values + m * in.values.width, values + (m + 1) * in.values.width, 0.f);
      }
    }
    k.pack_columns(in.q.width, in.agents, keys, in.q.width, packed_keys);
    k.pack_rows(in.agents, in.values.width, values, in.values.width, packed_values);
  }
};

/// Loads n candidates of one head as [n, stride] with zero padding. Where `present` [n] is wanted, a row that holds a
/// NaN or an infinity is not present and becomes zero.
void load_candidates(const Rows& rows, int64_t heads, int64_t first, int n, int64_t h, float* out,
                     bool* present = nullptr) noexcept {
  for (int i = 0; i < n; ++i) {
    float* const row = out + i * simd::pad(rows.width);
    const float squares = load_row(rows, (first + i) * heads + h, row);
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

  void carve(Arena& arena, const AttendInputs& in, int workers) noexcept {
    unit = arena.take<int64_t>(in.candidates.users + 1);
    worker = arena.take_each<ForwardWorker>(workers, [&](ForwardWorker& one) {
      one.head.carve(arena, in);
      one.q = arena.take<float>(simd::kBlock * simd::pad(in.q.width));
      one.z = arena.take<float>(simd::kBlock * simd::pad(in.agents));
      one.lse = arena.take<float>(simd::kBlock);
      one.out = arena.take<float>(simd::kBlock * simd::pad(in.values.width));
    });
  }
};

void attend_span(const AttendInputs& in, const Attended& out, int64_t first, int64_t last, int64_t h,
                 ForwardWorker& w) noexcept {
  const simd::Kernels& k = simd::kernels();
  const int64_t ldq = simd::pad(in.q.width), ldz = simd::pad(in.agents), ldv = simd::pad(in.values.width);
  const int64_t bytes = bytes_of(out.out.dtype);
  for (int64_t i = first; i < last; i += simd::kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(simd::kBlock, last - i));
    bool present[simd::kBlock];
    load_candidates(in.q, in.heads, i, n, h, w.q, present);
    k.matmul(n, in.q.width, in.agents, w.q, ldq, w.head.packed_keys, w.z, ldz, nullptr);
    k.row_softmax(n, in.agents, w.z, ldz, in.scale * simd::kLog2e, w.head.bias, w.lse);
    k.matmul(n, in.agents, in.values.width, w.z, ldz, w.head.packed_values, w.out, ldv, nullptr);
    for (int j = 0; j < n; ++j) {
      const int64_t row = (i + j) * in.heads + h;
      if (!present[j]) {
        std::fill(w.out + j * ldv, w.out + (j + 1) * ldv, 0.f);
        w.lse[j] = -INFINITY;
      }
      k.store_row(static_cast<std::byte*>(out.out.data) + row * in.values.width * bytes, out.out.dtype, in.values.width,
                  w.out + j * ldv, 1.f);
      out.lse.data[row] = w.lse[j] * simd::kLn2;
    }
  }
}

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

class Backward {
 public:
  Backward(const AttendInputs& in, const AttendForward* forward, const AttendGradients* out, int workers) noexcept
      : in_(in), forward_(forward), out_(out), k_(simd::kernels()), workers_(workers) {}

  void carve(Arena& arena) noexcept {
    head_bias_ = arena.take<float>(in_.candidates.users * in_.heads, in_.agents);
    const int64_t block = simd::kBlock;
    worker_ = arena.take_each<BackwardWorker>(workers_, [&](BackwardWorker& one) {
      one.head.carve(arena, in_);
      one.packed_rows = arena.take<float>(simd::packed_size(in_.agents, in_.q.width));
      one.packed_columns = arena.take<float>(simd::packed_size(in_.values.width, in_.agents));
      arena.take_into(block * simd::pad(in_.q.width), one.q, one.dq);
      arena.take_into(block * simd::pad(in_.values.width), one.d_out, one.out);
      arena.take_into(block * simd::pad(in_.agents), one.z, one.g);
      arena.take_into(block, one.lse, one.offset);
      const int depth = fold_depth(tiles_of(in_.q.rows / std::max<int64_t>(1, in_.heads)));
      one.stack = arena.take_each<Sums>(depth, [&](Sums& sums) { sums = arena.take<float>(sum_floats()); });
    });
  }

  void run(const Context& context) noexcept {
    std::fill_n(out_->q.data, in_.q.rows * in_.q.width, 0.f);
    for (int w = 0; w < workers_; ++w) {
      std::fill(worker_[w].q, worker_[w].q + simd::kBlock * simd::pad(in_.q.width), 0.f);
      std::fill(worker_[w].d_out, worker_[w].d_out + simd::kBlock * simd::pad(in_.values.width), 0.f);
    }
    parallel_for(context, in_.candidates.users * in_.heads, [&](int64_t begin, int64_t end, int w) {
      for (int64_t u = begin; u < end; ++u) head(u / in_.heads, u % in_.heads, worker_[w]);
    });
    for (int64_t b = 0; out_->bias && b < in_.candidates.users; ++b)
      for (int64_t m = 0; m < in_.agents; ++m) {
        float total = 0;
        for (int64_t h = 0; h < in_.heads; ++h) total += head_bias_[(b * in_.heads + h) * in_.agents + m];
        out_->bias.data[b * in_.agents + m] = total;
      }
  }

 private:
  void head(int64_t b, int64_t h, BackwardWorker& w) noexcept {
    w.head.load(in_, b, h);
    k_.pack_rows(in_.agents, in_.q.width, w.head.keys, in_.q.width, w.packed_rows);
    k_.pack_columns(in_.values.width, in_.agents, w.head.values, in_.values.width, w.packed_columns);
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
    for (int64_t m = 0; m < in_.agents; ++m) {
      const int64_t row = (b * in_.agents + m) * in_.heads + h;
      k_.store_row(out_->keys.data + row * in_.q.width, DType::float32, in_.q.width, keys + m * simd::pad(in_.q.width),
                   in_.scale);
      k_.store_row(out_->values.data + row * in_.values.width, DType::float32, in_.values.width,
                   values + m * simd::pad(in_.values.width), 1.f);
      head_bias_[(b * in_.heads + h) * in_.agents + m] = bias[m];
    }
  }

  void block(int64_t first, int n, int64_t h, BackwardWorker& w, Sums sums) noexcept {
    const int64_t ldq = simd::pad(in_.q.width), ldz = simd::pad(in_.agents), ldv = simd::pad(in_.values.width);
    bool present[simd::kBlock];
    load_candidates(in_.q, in_.heads, first, n, h, w.q, present);
    load_candidates(forward_->d_out, in_.heads, first, n, h, w.d_out);
    load_candidates(forward_->out, in_.heads, first, n, h, w.out);
    for (int i = 0; i < n; ++i) {
      const int64_t row = (first + i) * in_.heads + h;
      const float lse = forward_->lse.data[row];
      double dot = 0;
      for (int64_t c = 0; c < in_.values.width; ++c) dot += double(w.d_out[i * ldv + c]) * w.out[i * ldv + c];
      w.lse[i] = lse == -INFINITY ? lse : simd::base2(lse);
      w.offset[i] = lse == -INFINITY
                        ? 0.f
                        : static_cast<float>((forward_->d_lse ? double(forward_->d_lse.data[row]) : 0.0) - dot);
    }
    k_.matmul(n, in_.q.width, in_.agents, w.q, ldq, w.head.packed_keys, w.z, ldz, nullptr);
    k_.row_weights(n, in_.agents, w.z, ldz, in_.scale * simd::kLog2e, w.head.bias, w.lse);
    k_.matmul(n, in_.values.width, in_.agents, w.d_out, ldv, w.packed_columns, w.g, ldz, nullptr);
    k_.attend_gradient(n, in_.agents, w.z, w.g, ldz, w.offset, bias_of(sums));
    k_.matmul(n, in_.agents, in_.q.width, w.g, ldz, w.packed_rows, w.dq, ldq, nullptr);
    for (int i = 0; i < n; ++i)
      k_.store_row(out_->q.data + ((first + i) * in_.heads + h) * in_.q.width, DType::float32, in_.q.width,
                   w.dq + i * ldq, in_.scale);
    k_.accumulate(n, in_.agents, in_.q.width, w.g, ldz, w.q, ldq, sums, ldq);
    k_.accumulate(n, in_.agents, in_.values.width, w.z, ldz, w.d_out, ldv, values_of(sums), ldv);
  }

  float* values_of(Sums sums) const noexcept { return sums + simd::pad(in_.agents) * simd::pad(in_.q.width); }
  float* bias_of(Sums sums) const noexcept {
    return values_of(sums) + simd::pad(in_.agents) * simd::pad(in_.values.width);
  }
  int64_t sum_floats() const noexcept {
    return simd::pad(in_.agents) * (simd::pad(in_.q.width) + simd::pad(in_.values.width) + 1);
  }

  const AttendInputs& in_;
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
  Forward().carve(arena, inputs, workers_of(context));
  return arena.used();
}

Status attend(const Context& context, const AttendInputs& inputs, Attended out) noexcept {
  Arena arena(context.workspace);
  Forward forward;
  forward.carve(arena, inputs, workers_of(context));
  HISAC_TRY(arena.check("attend"));
  std::fill_n(static_cast<std::byte*>(out.out.data), out.out.rows * inputs.values.width * bytes_of(out.out.dtype),
              std::byte{0});
  std::fill(out.lse.data, out.lse.data + out.out.rows, -INFINITY);
  forward.unit[0] = 0;
  for (int64_t b = 0; b < inputs.candidates.users; ++b)
    forward.unit[b + 1] =
        forward.unit[b] + (inputs.candidates.end(b) - inputs.candidates.start(b) + kSpan - 1) / kSpan * inputs.heads;
  parallel_for(context, forward.unit[inputs.candidates.users], [&](int64_t begin, int64_t end, int worker) {
    ForwardWorker& w = forward.worker[worker];
    int64_t loaded = -1;
    for (int64_t u = begin; u < end; ++u) {  // spans of one head are consecutive
      const int64_t b =
          std::upper_bound(forward.unit, forward.unit + inputs.candidates.users + 1, u) - forward.unit - 1;
      const int64_t spans = (forward.unit[b + 1] - forward.unit[b]) / inputs.heads;
      const int64_t h = (u - forward.unit[b]) / spans, span = (u - forward.unit[b]) % spans;
      if (loaded != b * inputs.heads + h) w.head.load(inputs, b, h);
      loaded = b * inputs.heads + h;
      const int64_t first = inputs.candidates.start(b) + span * kSpan;
      attend_span(inputs, out, first, std::min(first + kSpan, inputs.candidates.end(b)), h, w);
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
