// SPDX-License-Identifier: Apache-2.0
#include "../on_cuda.h"
#include "hisac/cuda.h"
#include "simt.h"

namespace hisac {
namespace {

constexpr cuda::Verbs verbs = [] {
  cuda::Verbs v;
  v.use_device = simt::use_device;
  v.encode = cuda::encode;
  v.code_prototypes = cuda::code_prototypes;
  v.vote = cuda::vote;
  v.vote_workspace = cuda::vote_workspace;
  v.route = cuda::route;
  v.route_workspace = cuda::route_workspace;
  v.leaf_sums = cuda::leaf_sums;
  v.leaf_sums_workspace = cuda::leaf_sums_workspace;
  v.attend = cuda::attend;
  v.attend_workspace = cuda::attend_workspace;
  v.attend_backward = cuda::attend_backward;
  v.attend_backward_workspace = cuda::attend_backward_workspace;
  v.sum_rows = cuda::sum_rows;
  v.route_backward = cuda::route_backward;
  v.route_backward_workspace = cuda::route_backward_workspace;
  return v;
}();

}  // namespace

Status enable_cuda() noexcept {
  simt::Machine machine;
  if (const auto e = simt::machine(&machine); e != decltype(e){})
    return Status::error(Code::not_implemented, "CUDA: %s", simt::describe(e));
  use_cuda(&verbs);
  return {};
}

}  // namespace hisac
