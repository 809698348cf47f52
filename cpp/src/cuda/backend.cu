// SPDX-License-Identifier: Apache-2.0
#include "backend.h"

#include "cuda/device/simt.h"
#include "cuda/verbs.h"
#include "hisac/cuda.h"

namespace hisac {
namespace cuda {

constexpr Backend kBackend = [] {
  Backend backend;
  HISAC_EACH_VERB(HISAC_FILL_VERB)
  backend.use_device = simt::use_device;
  return backend;
}();

}  // namespace cuda

Status enable_cuda() noexcept {
  simt::Machine machine;
  if (const auto e = simt::machine(&machine); e != decltype(e){})
    return Status::error(Code::not_implemented, "CUDA: %s", simt::describe(e));
  set_cuda_backend(&cuda::kBackend);
  return {};
}

}  // namespace hisac
