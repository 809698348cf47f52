// SPDX-License-Identifier: Apache-2.0
// From a public verb, once it has checked shapes and parameters, to the one behind it on the GPU.
#pragma once
#include "checks.h"
#include "cuda/verbs.h"

namespace hisac {

/// What enable_cuda (../include/hisac/cuda.h) has found; null before.
const cuda::Verbs* cuda_verbs() noexcept;
void use_cuda(const cuda::Verbs* verbs) noexcept;

template <class Verb, class... Arguments>
Status on_cuda(const char* name, Verb cuda::Verbs::* verb, const Arguments&... arguments) noexcept {
  if (const cuda::Verbs* verbs = cuda_verbs()) return (verbs->*verb)(arguments...);
  return Status::error(Code::not_implemented, "%s: expected enable_cuda() before a call on CUDA", name);
}

template <class Size, class... Arguments>
size_t bytes_on_cuda(Size cuda::Verbs::* size, const Arguments&... arguments) noexcept {
  const cuda::Verbs* verbs = cuda_verbs();
  return verbs ? (verbs->*size)(arguments...) : 0;
}

}  // namespace hisac
