// SPDX-License-Identifier: Apache-2.0
// hisac._core.Fit: a fit in steps, with the memory that it works in.
#pragma once
#include "codebook.h"

namespace hisac::bind {

constexpr const char* kEmbeddings = "float32, bfloat16 or float16 [T, D]";

class Fit {
 public:
  Fit(const std::vector<int64_t>& sizes, int iterations, uint64_t seed, int64_t rows, int64_t width,
      const std::vector<View>& init, Lent weights, int process, int processes, bool progress)
      : call_("fit", kOnlyCpu), threads_(std::atomic_load(&pool())), executor_(threads_->executor()) {
    if (sizes.size() < 1 || sizes.size() > kMaxLevels)
      throw nb::value_error(("fit: sizes expected 1 to 8 levels, got " + std::to_string(sizes.size())).c_str());
    params_.levels = static_cast<int>(sizes.size());
    params_.iterations = iterations;
    params_.seed = seed;
    params_.process = process;
    params_.processes = processes;
    if (!weights.none) params_.weights = array<const float, 1>(weights, call_, "weights", "float32 [T]");
    for (size_t l = 0; l < sizes.size(); ++l) {
      params_.sizes[l] = sizes[l];
      memory_[l].resize(static_cast<size_t>(sizes[l]) * static_cast<size_t>(width));
      centers_[l] = {memory_[l].data(), {sizes[l], width}};
      if (l < init.size()) init_[l] = array<const float, 2>(init[l], call_, "init", "float32 [C, D]");
    }
    if (!init.empty()) params_.init = init_;
    params_.ctx = this;
    if (progress)
      params_.progress = [](void* self, int level, int round, double error) {
        static_cast<Fit*>(self)->told_ = {level, round, error};
        return true;
      };
    context_.executor = &executor_;
    context_.workspace = scratch_.take(fit_workspace(context_, params_, rows, width));
    raise(fit_begin(context_, params_, rows, width, centers_, &report_, &step_));
  }
  Fit(const Fit&) = delete;

  void add(Lent x) {
    Call call("fit", kOnlyCpu);
    const Rows chunk = rows(x, call, "x", 2, kEmbeddings);
    raise(without_gil([&] { return fit_add(context_, &step_, chunk); }));
  }

  /// (level, round, error) of a round that has ended, if `progress` is to see it.
  nb::object next() {
    told_ = {};
    raise(without_gil([&] { return fit_next(context_, &step_); }));
    return told_.round ? nb::object(nb::make_tuple(told_.level, told_.round, told_.error)) : nb::none();
  }

  bool reads() const { return step_.reads; }
  bool done() const { return step_.done; }
  const Array<int64_t, 1>& shared() const { return step_.shared; }

  Codebook book() const {
    Array<const float, 2> made[kMaxLevels];
    std::copy_n(centers_, params_.levels, made);
    Codebook book;
    raise(Codebook::build(made, params_.levels, &book, &report_));
    return book;
  }

 private:
  Call call_;
  std::shared_ptr<ThreadPool> threads_;
  Executor executor_;
  Context context_;
  FitParams params_;
  Array<const float, 2> init_[kMaxLevels];
  std::vector<float> memory_[kMaxLevels];
  Array<float, 2> centers_[kMaxLevels];
  FitReport report_;
  Scratch scratch_;
  FitStep step_;
  struct {
    int level, round;
    double error;
  } told_ = {};
};

inline void add_fit(nb::module_& m) {
  nb::class_<Fit>(m, "Fit")
      .def(nb::init<const std::vector<int64_t>&, int, uint64_t, int64_t, int64_t, const std::vector<View>&, Lent, int,
                    int, bool>(),
           "sizes"_a, "iterations"_a, "seed"_a, "rows"_a, "width"_a, "init"_a, "weights"_a.none(), "process"_a,
           "processes"_a, "progress"_a)
      .def("add", &Fit::add, "x"_a)
      .def("next", &Fit::next, nb::sig("def next(self) -> tuple[int, int, float] | None"))
      .def_prop_ro("reads", &Fit::reads)
      .def_prop_ro("done", &Fit::done)
      .def_prop_ro(
          "shared",
          [](nb::handle self) {
            const Array<int64_t, 1>& shared = nb::cast<const Fit&>(self).shared();
            const size_t size = static_cast<size_t>(shared.shape[0]);
            return nb::cast(nb::ndarray<nb::numpy, int64_t>(shared.data, 1, &size, self));
          },
          nb::sig("def shared(self) -> numpy.typing.NDArray[numpy.int64]"))
      .def("book", &Fit::book);
}

}  // namespace hisac::bind
