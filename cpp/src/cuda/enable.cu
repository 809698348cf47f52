// SPDX-License-Identifier: Apache-2.0
#include "../on_cuda.h"
#include "hisac/cuda.h"
#include "simt.h"

namespace hisac {
namespace {

const cuda::Verbs verbs = {simt::use_device, cuda::sum_rows, cuda::route, cuda::route_workspace};

}  // namespace

Status enable_cuda() noexcept {
  simt::Machine machine;
  if (const auto e = simt::machine(&machine); e != decltype(e){})
    return Status::error(Code::not_implemented, "CUDA: %s", simt::describe(e));
  use_cuda(&verbs);
  return {};
}

}  // namespace hisac
