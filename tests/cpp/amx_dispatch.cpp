// SPDX-License-Identifier: Apache-2.0
// In place of the core's dispatch.cpp: whole verbs run on the table of the AMX emulation.
#include "amx_table.h"
#include "hisac/hisac.h"

namespace hisac {
namespace simd {
const Kernels& kernels() noexcept { return test::amx_emulation(); }
}  // namespace simd

const char* active_isa() noexcept { return simd::kernels().name; }
const char* available_isas() noexcept { return simd::kernels().name; }
}  // namespace hisac
