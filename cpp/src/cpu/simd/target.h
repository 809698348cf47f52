// SPDX-License-Identifier: Apache-2.0
// HISAC_TARGET_BEGIN("avx2,fma") .. HISAC_TARGET_END: the functions between them are compiled for that instruction set.
#pragma once

#define HISAC_PRAGMA(tokens) _Pragma(#tokens)
#if defined(__clang__)
#define HISAC_TARGET_BEGIN(isa) HISAC_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define HISAC_TARGET_END HISAC_PRAGMA(clang attribute pop)
#else
#define HISAC_TARGET_BEGIN(isa) HISAC_PRAGMA(GCC push_options) HISAC_PRAGMA(GCC target(isa))
#define HISAC_TARGET_END HISAC_PRAGMA(GCC pop_options)
#endif
