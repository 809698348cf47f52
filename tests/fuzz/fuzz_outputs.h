// SPDX-License-Identifier: Apache-2.0
// What a verb makes, by every crew of workers and under every instruction set, held against each other.
#pragma once
#include "fuzz.h"

namespace fuzz {

constexpr int kCrews[] = {1, 2, 7};
/// Runs a verb with every crew, each in a workspace of exactly its size.
template <class Size, class Verb>
void each_crew(Size size, Verb verb) {
  for (int crew = 0; crew < 3; ++crew) {
    test::Backwards manner{kCrews[crew], 1};
    const hisac::Executor executor = manner.executor();
    test::Workspace workspace(size(kCrews[crew]));
    const hisac::Status status = verb(hisac::Context{workspace.array(), crew ? &executor : nullptr}, crew);
    if (!status.ok()) std::fprintf(stderr, "%s\n", status.what());
    CHECK(status.ok());
    CHECK(workspace.intact());
  }
}

/// What the first instruction set made of this input, in order; each later one is held against it.
class Ledger {
 public:
  void turn(bool first) {
    first_ = first;
    at_ = 0;
  }
  bool first() const { return first_; }
  const std::byte* enter(const void* data, size_t bytes) {
    const std::byte* const p = static_cast<const std::byte*>(data);
    if (first_) kept_.emplace_back(p, p + bytes).push_back({});  // never empty: memcmp takes no null
    CHECK(at_ < kept_.size() && kept_[at_].size() == bytes + 1);
    return kept_[at_++].data();
  }

 private:
  bool first_ = true;
  size_t at_ = 0;
  std::vector<std::vector<std::byte>> kept_;
};
inline Ledger ledger;

/// An output of every crew.
template <class T>
struct Output {
  explicit Output(int64_t n, hisac::DType t = hisac::DType::float32)
      : type(t), crew{test::Guarded<T>(n), test::Guarded<T>(n), test::Guarded<T>(n)} {}
  T* operator[](int i) { return crew[i].data(); }

  /// The first instruction set's, once every crew's is known to be the same.
  T* settled() {
    const size_t bytes = test::size(crew[0].count()) * sizeof(T);
    for (test::Guarded<T>& c : crew) CHECK(c.intact() && std::memcmp(c.data(), crew[0].data(), bytes) == 0);
    if (!first) first = const_cast<std::byte*>(ledger.enter(crew[0].data(), bytes));
    return reinterpret_cast<T*>(first);
  }
  void equal() { CHECK(std::memcmp(settled(), crew[0].data(), test::size(crew[0].count()) * sizeof(T)) == 0); }
  void agree(bool tame, double tolerance) {
    settled();
    const size_t width = type == hisac::DType::float32 ? 4 : 2, n = test::size(crew[0].count()) * sizeof(T) / width;
    for (size_t i = 0; tame && i < n; ++i) {
      const float a = decode(first + i * width, type);
      const float b = decode(reinterpret_cast<const std::byte*>(crew[0].data()) + i * width, type);
      CHECK(!std::isnan(b));
      if (a == b || !(tolerance < 1e30)) continue;
      const double apart = std::fabs(double(a) - double(b));
      if (!(apart <= tolerance))
        std::fprintf(stderr, "%s: %.9g, %.9g: apart by more than %.3g\n", hisac::active_isa(), double(a), double(b),
                     tolerance);
      CHECK(apart <= tolerance);
    }
  }

  hisac::DType type;
  test::Guarded<T> crew[3];
  std::byte* first = nullptr;
};

}  // namespace fuzz
