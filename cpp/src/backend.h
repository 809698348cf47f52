// SPDX-License-Identifier: Apache-2.0
// The table of backends. A public verb (verbs/) checks shapes, types and parameters, and then calls the function of the
// same name in the table of the context's device. cpu/backend.cpp and cuda/backend.cu fill their tables by name.
#pragma once
#include "base/checks.h"
#include "hisac/attend.h"
#include "hisac/encode.h"
#include "hisac/fit.h"
#include "hisac/leaf_sums.h"
#include "hisac/route.h"
#include "hisac/vote.h"

namespace hisac {

/// Functions with the signatures of the public verbs; null where a backend does not have the verb.
struct Backend {
  decltype(&hisac::encode) encode = nullptr;
  decltype(&hisac::encode_workspace) encode_workspace = nullptr;
  decltype(&hisac::code_prototypes) code_prototypes = nullptr;
  decltype(&hisac::fit) fit = nullptr;
  decltype(&hisac::fit_workspace) fit_workspace = nullptr;
  decltype(&hisac::vote) vote = nullptr;
  decltype(&hisac::vote_workspace) vote_workspace = nullptr;
  decltype(&hisac::leaf_sums) leaf_sums = nullptr;
  decltype(&hisac::leaf_sums_workspace) leaf_sums_workspace = nullptr;
  decltype(&hisac::route) route = nullptr;
  decltype(&hisac::route_workspace) route_workspace = nullptr;
  decltype(&hisac::route_backward) route_backward = nullptr;
  decltype(&hisac::route_backward_workspace) route_backward_workspace = nullptr;
  decltype(&hisac::sum_rows) sum_rows = nullptr;
  decltype(&hisac::attend) attend = nullptr;
  decltype(&hisac::attend_workspace) attend_workspace = nullptr;
  decltype(&hisac::attend_backward) attend_backward = nullptr;
  decltype(&hisac::attend_backward_workspace) attend_backward_workspace = nullptr;
  /// Makes a device the current one and returns the one before; null on the CPU.
  int (*use_device)(int device) noexcept = nullptr;
};

namespace cpu {
extern const Backend backend;
}

/// The table that enable_cuda (hisac/cuda.h) has set; null before.
const Backend* cuda_backend() noexcept;
void set_cuda_backend(const Backend* backend) noexcept;

inline const Backend* backend_of(const Context& context) noexcept {
  return context.device == Device::cpu ? &cpu::backend : cuda_backend();
}

/// Calls `function` of the context's backend; an error where there is none.
template <class Function, class... Arguments>
Status call_backend(const char* verb, Function Backend::* function, const Context& context,
                    const Arguments&... arguments) noexcept {
  const Backend* const backend = backend_of(context);
  if (!backend) return Status::error(Code::not_implemented, "%s: expected enable_cuda() before a call on CUDA", verb);
  if (!(backend->*function))
    return Status::error(Code::not_implemented, "%s: expected a context on the CPU, got one on CUDA", verb);
  return (backend->*function)(context, arguments...);
}

/// The bytes that `function` of the context's backend names; 0 where there is none.
template <class Function, class... Arguments>
size_t backend_workspace(Function Backend::* function, const Context& context, const Arguments&... arguments) noexcept {
  const Backend* const backend = backend_of(context);
  return backend && backend->*function ? (backend->*function)(context, arguments...) : 0;
}

}  // namespace hisac
