// SPDX-License-Identifier: Apache-2.0
// The verbs on a GPU: those of the other headers, with arrays on the current device and Context{.device =
// Device::cuda}, from the library hisac_cuda.
//
// A call puts all its work on context.stream. It allocates nothing and waits for nothing, so it may be captured into a
// graph. Its results have the same bits every time, and a user's do not depend on the other users of the batch.
//
// What a verb needs in the context:
//
//   verb                           workspace                                 codebook_image
//   encode                         none                                      always
//   code_prototypes, prototypes    none                                      always
//   vote                           yes                                       for prototypes
//   compress                       yes                                       always
//   leaf_sums, leaf_sums_backward  yes                                       where x is not given
//   route, route_backward          yes                                       where x or temperature is not given, and
//                                                                            for sparse routing without lists
//   agent_lists                    yes                                       always
//   missing                        yes                                       where x is not given
//   attend, attend_backward        yes                                       never
//   match, match_backward          yes                                       never
//   fit                            not on CUDA: Code::not_implemented
//
// Sparse routing (RouteParams::sparse) has the CPU's meaning, and its integers, but not its saving: all behaviours are
// multiplied by all agents, and a mask then hides the agents to which a behaviour is not routed. The mask is in the
// workspace, B C_1 M / 8 bytes.
//
// What a verb takes at most. More is refused with Code::not_implemented and the message "expected .., got ..":
//
//   vote                                          B 2^30
//   leaf_sums, route, their backwards, missing    B 2^30, T 2^31 - 1
//   route                                         D 4,096
//   route_backward                                D 4,096, V 4,096
//   match, match_backward                         B 2^30, S 2^31 - 1, N L 2^30
//   attend, attend_backward                       N, B, M, H, d, V 2^30 each; d and V further as shared memory allows:
//
//     shared memory of a block                 227 KiB (H100, H200)   163 KiB (A100)   99 KiB (RTX)
//     attend: d                                3,072                  2,048            1,024
//       the same where all is bfloat16         6,688                  4,640            2,592
//     attend_backward: d + V                   3,056                  2,032            1,008
//       the same where all is bfloat16         6,688                  4,640            2,592
//     encode: D that is fast                   784                    528              272
//
// These are for V of 128 or more; d and V count as the next multiples of 16. `encode` takes any D: where residuals do
// not fit in shared memory, it computes them again from x for every use.
//
// The host does not see what lies on the device, so no value there is an error. Where the CPU would name one:
//
//   offsets (starts, ends)   A start is clamped to [0, T], an end to [start, T].
//   candidates               Of attend and match: a user's range begins, at the earliest, where all earlier users'
//                            ranges have ended. A candidate outside every range has zero rows and an lse of -inf.
//   NaN in attend            A NaN or an infinity in q, keys or values may spoil all results of its user's head. On the
//                            CPU one in a key or in q makes tokens absent, and one in values stays in its column.
//   longest of Histories     `vote` alone depends on it. Any accepted workspace serves histories of any length, if the
//                            codebook has at most 2^18 leaves, or if the counters of a vote by fan-out fit in shared
//                            memory. Otherwise a user with more rows than the workspace is made for has no agents: its
//                            count is 0.
//   rows of Histories        `leaf_sums`: the first user whose rows are beyond it, and all users after it, have no
//                            sums: for `route` their histories are empty. Gradients of tables: the last behaviours of
//                            a batch with more rows may have gradients of 0, of bias and spread too.
//   rows of LeafSums         Fewer than all histories have: as with too small `rows`.
//   codebook_image           Its size, alignment and fingerprint are checked, its bytes are not.
//
// Precision. Tensor cores multiply bfloat16 numbers, so on CUDA
//
//   Precision::float32       writes x, prototypes, v and weights as sums of two bfloat16 numbers each. x . p is a sum
//   of route                 of three products, within 2^-15 sum_d |x_d p_d| and the rounding of float32 sums. Where x
//                            and v are both bfloat16, they are exact. Distances are taken from zero, not from an origin
//                            among the prototypes as on the CPU: center x and prototypes that lie far from zero.
//   Precision::bfloat16      rounds each of them, by at most 2^-8 of itself, and multiplies once. Norms are those of
//   of route                 the rounded numbers, so an agent in a behaviour's place has distance 0.
//   route_backward           does the same, with the gradients of tokens in the place of v.
//   attend and its backward  do as Precision::float32 does. Where all inputs are bfloat16, they are exact.
//   leaf_sums                adds 64 rows in float32, and those sums in float64.
//   match and its backward   add in float64, in a fixed order that need not be that of the index, with exponentials of
//                            float32.
//   log_share of compress    adds exponentials of float32 in float64, where the CPU's are of float64.
//   encode, vote, agent_lists, code_prototypes and prototypes have the CPU's bits.
#pragma once
#include "status.h"

namespace hisac {

/// Makes every verb but `fit` take a context on CUDA; not_implemented where there is no device or driver.
Status enable_cuda() noexcept;

}  // namespace hisac
