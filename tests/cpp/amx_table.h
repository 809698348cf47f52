// SPDX-License-Identifier: Apache-2.0
// The "amx" table of the dispatch with emulated tiles in place of real ones, for any processor.
#pragma once
#include "cpu/simd/kernels.h"

namespace test {
const hisac::simd::Kernels& amx_emulation() noexcept;
}
