// SPDX-License-Identifier: Apache-2.0
#include "on_cuda.h"

#include <atomic>

namespace hisac {
namespace {
std::atomic<const cuda::Verbs*> enabled{nullptr};
}

const cuda::Verbs* cuda_verbs() noexcept { return enabled.load(std::memory_order_acquire); }
void use_cuda(const cuda::Verbs* verbs) noexcept { enabled.store(verbs, std::memory_order_release); }

}  // namespace hisac
