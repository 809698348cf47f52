// SPDX-License-Identifier: Apache-2.0
// The verbs on a GPU, behind the public ones, which have checked shapes, types and parameters: all arrays lie on the
// current device, everything is put on context.stream, nothing is allocated, nothing waits, so a call may be captured
// into a graph. The same bits every time, for any batch around a user. Offsets cannot be checked there: they are
// clamped to [0, T], and an end to its start.
#pragma once
#include "hisac/attend.h"
#include "hisac/encode.h"
#include "hisac/route.h"
#include "hisac/vote.h"

namespace hisac::cuda {

/// D up to 4,096. Needs context.codebook_image where x is not given. Precision::float32: products of float32
/// numbers as sums of three bfloat16 products, within 3 * 2^-18 |x| |p| and the sums' rounding; bfloat16: one product,
/// of rounded numbers, whose norms are taken too.
Status route(const Context& context, const RouteParams& params, const RouteInputs& inputs, Tokens out) noexcept;
size_t route_workspace(const RouteParams& params, const RouteInputs& inputs, int64_t longest) noexcept;

/// Both read context.codebook_image and need no workspace. Residuals of a D beyond what shared memory holds (some 700
/// on an H100) are made anew from x each time they are read, which is slower.
Status encode(const Context& context, const Codebook& book, Rows x, Array<int32_t, 2> codes) noexcept;
Status code_prototypes(const Context& context, const Codebook& book, Array<const int32_t, 2> codes,
                       Array<float, 2> out) noexcept;

Status sum_rows(const Context& context, Array<const float, 2> rows, Array<const int64_t, 1> order,
                Array<const int64_t, 1> begin, Array<float, 2> sums) noexcept;

/// Any codebook. The more workspace, the more users at a time, up to what `vote_workspace` names; where it holds fewer
/// rows than a user has, the rest do not vote: `longest` is a promise.
Status vote(const Context& context, const Codebook& book, const VoteParams& params, Array<const int32_t, 2> codes,
            Histories histories, Array<const float, 1> weights, Agents out) noexcept;
size_t vote_workspace(const Codebook& book, const VoteParams& params, int64_t longest) noexcept;

/// Products as route's at float32: inputs in two bfloat16 parts, or in one where they are bfloat16, weights in two.
/// d + V, each to 16s, up to what 16 rows of both (gradients; else of d) leave of a block's shared memory: some 3,000
/// on an H100 for float32. A range of candidates begins where all earlier users' have ended.
Status attend(const Context& context, const AttendInputs& inputs, Attended out) noexcept;
size_t attend_workspace(const AttendInputs& inputs) noexcept;
Status attend_backward(const Context& context, const AttendInputs& inputs, const AttendForward& forward,
                       const AttendGradients& out) noexcept;
size_t attend_backward_workspace(const AttendInputs& inputs) noexcept;

/// Users whose histories find no room for their entries in the workspace have no sums there: only histories that are
/// not ragged offsets can come to that, with a workspace for a `longest` that is too short, which no call can see.
Status leaf_sums(const Context& context, const RouteInputs& inputs, const LeafSums& out) noexcept;
size_t leaf_sums_workspace(const RouteInputs& inputs, int64_t longest) noexcept;

/// V up to 4,096 too. Products as the forward's; those with gradients of tokens and with weights likewise. Workspace
/// grows with T, whatever the longest history is; the leaf method's as leaf_sums', where too little means the same.
Status route_backward(const Context& context, const RouteParams& params, const RouteInputs& inputs,
                      const RouteForward& forward, const RouteGradients& out) noexcept;
size_t route_backward_workspace(const RouteParams& params, const RouteInputs& inputs, const RouteGradients& out,
                                int64_t longest) noexcept;

/// All of them, for ../on_cuda.h.
struct Verbs {
  int (*use_device)(int device) noexcept = nullptr;  // makes it the current one, returns the one before
  decltype(&cuda::encode) encode = nullptr;
  decltype(&cuda::code_prototypes) code_prototypes = nullptr;
  decltype(&cuda::vote) vote = nullptr;
  decltype(&cuda::vote_workspace) vote_workspace = nullptr;
  decltype(&cuda::route) route = nullptr;
  decltype(&cuda::route_workspace) route_workspace = nullptr;
  decltype(&cuda::leaf_sums) leaf_sums = nullptr;
  decltype(&cuda::leaf_sums_workspace) leaf_sums_workspace = nullptr;
  decltype(&cuda::attend) attend = nullptr;
  decltype(&cuda::attend_workspace) attend_workspace = nullptr;
  decltype(&cuda::attend_backward) attend_backward = nullptr;
  decltype(&cuda::attend_backward_workspace) attend_backward_workspace = nullptr;
  decltype(&cuda::sum_rows) sum_rows = nullptr;
  decltype(&cuda::route_backward) route_backward = nullptr;
  decltype(&cuda::route_backward_workspace) route_backward_workspace = nullptr;
};

}  // namespace hisac::cuda
