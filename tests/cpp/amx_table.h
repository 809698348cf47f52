// SPDX-License-Identifier: Apache-2.0
// The "amx" table of the dispatch with the scalar twin in place of tiles, for any x86-64.
#pragma once
#include "cpu/simd/kernels.h"

namespace test {
const hisac::simd::Kernels& amx_twin() noexcept;
}
