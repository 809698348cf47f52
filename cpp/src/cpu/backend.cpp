// SPDX-License-Identifier: Apache-2.0
#include "backend.h"

#include "cpu/verbs.h"

namespace hisac::cpu {

constexpr Backend backend = [] {
  Backend b;
  b.encode = encode;
  b.encode_workspace = encode_workspace;
  b.code_prototypes = code_prototypes;
  b.fit = fit;
  b.fit_workspace = fit_workspace;
  b.vote = vote;
  b.vote_workspace = vote_workspace;
  b.leaf_sums = leaf_sums;
  b.leaf_sums_workspace = leaf_sums_workspace;
  b.route = route;
  b.route_workspace = route_workspace;
  b.route_backward = route_backward;
  b.route_backward_workspace = route_backward_workspace;
  b.sum_rows = sum_rows;
  b.attend = attend;
  b.attend_workspace = attend_workspace;
  b.attend_backward = attend_backward;
  b.attend_backward_workspace = attend_backward_workspace;
  return b;
}();

}  // namespace hisac::cpu
