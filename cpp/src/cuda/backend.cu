// SPDX-License-Identifier: Apache-2.0
#include "backend.h"

#include "cuda/device/simt.h"
#include "cuda/verbs.h"
#include "hisac/cuda.h"

namespace hisac {
namespace {

constexpr Backend backend = [] {
  Backend b;
  b.encode = cuda::encode;
  b.encode_workspace = cuda::encode_workspace;
  b.code_prototypes = cuda::code_prototypes;
  b.vote = cuda::vote;
  b.vote_workspace = cuda::vote_workspace;
  b.leaf_sums = cuda::leaf_sums;
  b.leaf_sums_workspace = cuda::leaf_sums_workspace;
  b.route = cuda::route;
  b.route_workspace = cuda::route_workspace;
  b.route_backward = cuda::route_backward;
  b.route_backward_workspace = cuda::route_backward_workspace;
  b.sum_rows = cuda::sum_rows;
  b.attend = cuda::attend;
  b.attend_workspace = cuda::attend_workspace;
  b.attend_backward = cuda::attend_backward;
  b.attend_backward_workspace = cuda::attend_backward_workspace;
  b.use_device = simt::use_device;
  return b;
}();

}  // namespace

Status enable_cuda() noexcept {
  simt::Machine machine;
  if (const auto e = simt::machine(&machine); e != decltype(e){})
    return Status::error(Code::not_implemented, "CUDA: %s", simt::describe(e));
  set_cuda_backend(&backend);
  return {};
}

}  // namespace hisac
