// SPDX-License-Identifier: Apache-2.0
#include "backend.h"

#include <atomic>

namespace hisac {
namespace {
std::atomic<const Backend*> enabled{nullptr};
}

const Backend* cuda_backend() noexcept { return enabled.load(std::memory_order_acquire); }
void set_cuda_backend(const Backend* backend) noexcept { enabled.store(backend, std::memory_order_release); }

}  // namespace hisac
