// SPDX-License-Identifier: Apache-2.0
#include "cpu/agent_lists.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "base/checks.h"
#include "base/parallel.h"
#include "cpu/blocks.h"
#include "cpu/nearest.h"
#include "cpu/rows.h"
#include "cpu/simd/pack.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
void AgentLists::carve(Arena& arena, int64_t agents, int64_t width) noexcept {
  arena.take_into(agents, index_, number_, own_, found_, measured_);
  origin_ = arena.take<float>(width);
  row_ = arena.take<float>(agents, width);
  packed_ = arena.take<float>(simd::packed_size(width, agents));
  arena.take_into(simd::pad(agents), norm_, minus_one_);
  codeword_ = arena.take<float>(simd::kBlock, simd::pad(width));
  codeword_norm_ = arena.take<float>(simd::kBlock);
  z_ = arena.take<float>(simd::kBlock, simd::pad(agents));
}

void AgentLists::load(const Codebook& book, const RouteAgents& agents, int64_t b) noexcept {
  const simd::Kernels& k = simd::kernels();
  const int64_t width = book.width(), count = count_of(agents, b), levels = agents.codes.shape[2];
  book_ = &book;
  agents_ = &agents;
  user_ = b;
  seats_ = agents.prototypes.shape[1];
  present_ = 0;
  std::fill_n(number_, seats_, -1);
  for (int64_t a = 0; a < count; ++a) {
    float* const row = row_ + (agents.lists ? 0 : present_ * width);
    const float norm = k.load_row(agents.prototypes.data + (b * seats_ + a) * width, DType::float32, width, row);
    if (!below_limit(norm, row, width)) continue;
    own_[present_] = agents.codes ? agents.codes.data[(b * seats_ + a) * levels] : -1;
    number_[a] = static_cast<int32_t>(present_);
    index_[present_++] = static_cast<int32_t>(a);
  }
  if (agents.lists || present_ == 0) return;
  std::copy_n(row_, width, origin_);
  float largest = 0;
  for (int64_t j = 0; j < present_; ++j)
    largest = std::max(largest, norm_[j] = k.subtract_row(width, origin_, row_ + j * width));
  largest_ = std::sqrt(double(largest));
  for (int64_t j = present_; j < simd::pad(present_); ++j) norm_[j] = INFINITY;
  std::fill_n(minus_one_, simd::pad(present_), -1.f);
  k.pack_columns(width, present_, row_, width, packed_);
}

void AgentLists::measure(const int32_t* codes, int n) noexcept {
  const simd::Kernels& k = simd::kernels();
  const int64_t width = book_->width(), ld = simd::pad(width), ldz = simd::pad(present_);
  codes_ = codes;
  if (agents_->lists || present_ == 0) return;
  for (int i = 0; i < n; ++i) {
    std::copy_n(book_->centers(0) + codes[i] * width, width, codeword_ + i * ld);
    codeword_norm_[i] = k.subtract_row(width, origin_, codeword_ + i * ld);
  }
  k.matmul(n, width, present_, codeword_, ld, packed_, z_, ldz, nullptr);
  k.distance_logits(n, present_, z_, ldz, codeword_norm_, norm_, minus_one_);
}

void AgentLists::sort(int i, int32_t* agents, int64_t n, int64_t k) noexcept {
  const int64_t width = book_->width();
  const float* const codeword = book_->centers(0) + codes_[i] * width;
  const float* const c[4] = {codeword, codeword, codeword, codeword};
  for (int64_t q = 0; q < n; q += 4) {
    const float* p[4];
    double exact[4];
    for (int64_t j = 0; j < 4; ++j)
      p[j] = agents_->prototypes.data + (user_ * seats_ + index_[agents[std::min(q + j, n - 1)]]) * width;
    square_distances(c, p, width, exact);
    for (int64_t j = 0; j < std::min<int64_t>(4, n - q); ++j) measured_[q + j] = {exact[j], agents[q + j]};
  }
  std::partial_sort(measured_, measured_ + k, measured_ + n, [](const Measured& a, const Measured& b) {
    return a.distance != b.distance ? a.distance < b.distance : a.agent < b.agent;
  });
  for (int64_t q = 0; q < n; ++q) agents[q] = measured_[q].agent;
}

void AgentLists::find_nearest(int i, int64_t k, int32_t* out) noexcept {
  const float* const d = z_ + i * simd::pad(present_);
  const double reach = std::sqrt(double(codeword_norm_[i])) + largest_;
  const double width = static_cast<double>(book_->width());
  const double error = 1.2 * (width + 24) * 0x1p-24 * reach * reach + width * 0x1p-120;
  int64_t n = present_, sure = 0;
  if (reach * reach < 1e37) {
    const double kth = simd::kernels().kth_smallest(present_, d, k);
    const float low = std::nextafter(static_cast<float>(std::max(kth - 2 * error, 0.0)), 0.f);
    n = simd::kernels().columns_below(present_, d, std::nextafter(static_cast<float>(kth + 2 * error), INFINITY), out);
    if (n > k) sure = std::partition(out, out + n, [&](int32_t j) { return d[j] < low; }) - out;
  } else {  // products may overflow
    std::iota(out, out + n, 0);
  }
  if (n > k) sort(i, out + sure, n - sure, k - sure);
}

int64_t AgentLists::nearest(int i, int64_t k, int32_t* out) noexcept {
  const int64_t n = std::min(k, present_);
  if (k < present_)
    find_nearest(i, k, found_);
  else
    std::iota(found_, found_ + n, 0);
  sort(i, found_, n, n);
  for (int64_t q = 0; q < n; ++q) out[q] = index_[found_[q]];
  return n;
}

void AgentLists::find(int i, int64_t k, float* out) noexcept {
  const int32_t c = codes_[i];
  for (int64_t j = 0; j < present_; ++j) out[j] = own_[j] == c ? 0.f : INFINITY;
  if (agents_->lists) {
    const auto& shape = agents_->lists.shape;
    const int32_t* const list = agents_->lists.data + (user_ * shape[1] + c) * shape[2];
    for (int64_t q = 0; q < std::min(k, shape[2]); ++q)
      if (list[q] >= 0 && list[q] < seats_ && number_[list[q]] >= 0) out[number_[list[q]]] = 0;
  } else {
    find_nearest(i, k, found_);
    for (int64_t q = 0; q < k; ++q) out[found_[q]] = 0;
  }
}

namespace {

class ListsCall {
 public:
  ListsCall(const Context& context, const Codebook& book, const RouteAgents& agents, Array<int32_t, 3> out) noexcept
      : context_(context), book_(book), agents_{agents.prototypes, agents.count}, out_(out) {}

  void carve(Arena& arena) noexcept {
    worker_ = arena.take_each<AgentLists>(workers_of(context_), [&](AgentLists& lists) {
      lists.carve(arena, agents_.prototypes.shape[1], book_.width());
    });
  }

  void run() noexcept {
    const int64_t nodes = out_.shape[1], k = out_.shape[2], blocks = (nodes + simd::kBlock - 1) / simd::kBlock;
    parallel_for(context_, out_.shape[0] * blocks, [&](int64_t begin, int64_t end, int w) {
      AgentLists& lists = worker_[w];
      int32_t codes[simd::kBlock];
      int64_t loaded = -1;
      for (int64_t block = begin; block < end; ++block) {
        const int64_t b = block / blocks, first = block % blocks * simd::kBlock;
        const int n = static_cast<int>(std::min<int64_t>(simd::kBlock, nodes - first));
        if (b != loaded) lists.load(book_, agents_, loaded = b);
        std::iota(codes, codes + n, static_cast<int32_t>(first));
        lists.measure(codes, n);
        for (int i = 0; i < n; ++i) {
          int32_t* const list = out_.data + (b * nodes + first + i) * k;
          std::fill(list + lists.nearest(i, k, list), list + k, -1);
        }
      }
    });
  }

 private:
  const Context& context_;
  const Codebook& book_;
  const RouteAgents agents_;
  const Array<int32_t, 3> out_;
  AgentLists* worker_ = nullptr;
};

}  // namespace

size_t agent_lists_workspace(const Context& context, const Codebook& book, const RouteAgents& agents) noexcept {
  return workspace_of(ListsCall(context, book, agents, {}));
}

Status agent_lists(const Context& context, const Codebook& book, const RouteAgents& agents,
                   Array<int32_t, 3> out) noexcept {
  return run_call("agent_lists", context, ListsCall(context, book, agents, out));
}

}  // namespace hisac::cpu
