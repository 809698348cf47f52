// SPDX-License-Identifier: Apache-2.0
// The verbs on the CPU, with the signatures of the public ones, which have checked shapes, types and parameters. Each
// stands in the file of its name.
#pragma once
#include "backend.h"

namespace hisac::cpu {

decltype(hisac::encode) encode;
decltype(hisac::encode_workspace) encode_workspace;
decltype(hisac::code_prototypes) code_prototypes;
decltype(hisac::fit) fit;  // kmeans.cpp
decltype(hisac::fit_workspace) fit_workspace;
decltype(hisac::vote) vote;
decltype(hisac::vote_workspace) vote_workspace;
decltype(hisac::leaf_sums) leaf_sums;
decltype(hisac::leaf_sums_workspace) leaf_sums_workspace;
decltype(hisac::route) route;
decltype(hisac::route_workspace) route_workspace;
decltype(hisac::route_backward) route_backward;
decltype(hisac::route_backward_workspace) route_backward_workspace;
decltype(hisac::sum_rows) sum_rows;
decltype(hisac::attend) attend;
decltype(hisac::attend_workspace) attend_workspace;
decltype(hisac::attend_backward) attend_backward;
decltype(hisac::attend_backward_workspace) attend_backward_workspace;

}  // namespace hisac::cpu
