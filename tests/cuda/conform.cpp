// SPDX-License-Identifier: Apache-2.0
#include "conform.cu"  // emulated
