// SPDX-License-Identifier: Apache-2.0
// The table of backends. A public verb (verbs/) checks shapes, types and parameters, and then calls the function of the
// same name in the table of the context's device. cpu/backend.cpp and cuda/backend.cu fill their tables by name.
#pragma once
#include <atomic>

#include "base/checks.h"
#include "hisac/attend.h"
#include "hisac/encode.h"
#include "hisac/fit.h"
#include "hisac/leaf_sums.h"
#include "hisac/match.h"
#include "hisac/route.h"
#include "hisac/vote.h"

namespace hisac {

/// What `compress` makes of lse, and of votes in history mode, which may be null. Of `compress` alone.
Status log_share(const Context& context, Normalize normalize, Array<const float, 2> lse, Array<const int64_t, 2> votes,
                 Array<float, 2> out) noexcept;

// clang-format off
/// The verbs that a backend has, by the names of the public ones, and what they are made of.
#define HISAC_EACH_VERB(X)                                                     \
  X(encode) X(encode_workspace) X(code_prototypes) X(vote) X(vote_workspace)   \
  X(leaf_sums) X(leaf_sums_workspace) X(agent_lists) X(agent_lists_workspace)  \
  X(leaf_sums_backward) X(leaf_sums_backward_workspace)                        \
  X(route) X(route_workspace) X(route_backward) X(route_backward_workspace)    \
  X(missing) X(missing_workspace) X(log_share)                                 \
  X(attend) X(attend_workspace) X(attend_backward) X(attend_backward_workspace)\
  X(match) X(match_workspace) X(match_backward) X(match_backward_workspace)

/// Those of the CPU alone.
#define HISAC_EACH_CPU_VERB(X) X(fit_begin) X(fit_add) X(fit_next) X(fit_workspace)
// clang-format on

/// Functions with the signatures of the public verbs; null where a backend does not have one.
struct Backend {
#define HISAC_MEMBER(verb) decltype(&hisac::verb) verb = nullptr;
  HISAC_EACH_VERB(HISAC_MEMBER)
  HISAC_EACH_CPU_VERB(HISAC_MEMBER)
#undef HISAC_MEMBER
  /// Makes a device the current one and returns the one before; null on the CPU.
  int (*use_device)(int device) noexcept = nullptr;
};

/// Inside a backend's namespace: declares its verbs.
#define HISAC_DECLARE_VERB(verb) decltype(hisac::verb) verb;
/// Fills `backend` with the verb of the same name.
#define HISAC_FILL_VERB(verb) backend.verb = verb;

namespace cpu {
extern const Backend kBackend;
}

/// The table that enable_cuda (hisac/cuda.h) has set; null before. One in each shared library: symbols are hidden.
inline std::atomic<const Backend*> enabled_cuda_backend{nullptr};
inline const Backend* cuda_backend() noexcept { return enabled_cuda_backend.load(std::memory_order_acquire); }
inline void set_cuda_backend(const Backend* backend) noexcept {
  enabled_cuda_backend.store(backend, std::memory_order_release);
}

inline const Backend* backend_of(const Context& context) noexcept {
  return context.device == Device::cpu ? &cpu::kBackend : cuda_backend();
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
