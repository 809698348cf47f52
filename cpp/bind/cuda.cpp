// SPDX-License-Identifier: Apache-2.0
// hisac._cuda: the kernels of a GPU, a module of their own, so that a broken driver cannot break the CPU's.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "backend.h"
#include "hisac/cuda.h"

namespace nb = nanobind;

NB_MODULE(_cuda, m) {
  m.doc() = "hisac's verbs on a GPU. Use the functions of hisac with tensors there.";
  m.def(
      "enable",
      [] {
        const hisac::Status status = hisac::enable_cuda();
        return status.ok() ? std::string() : std::string(status.what());
      },
      "Empty, or why there is no GPU to run on.");
  m.def(
      "backend", [] { return nb::capsule(static_cast<const void*>(hisac::cuda_backend()), "hisac.cuda"); },
      "For _core.use_cuda, once enabled.");
}
