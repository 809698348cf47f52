// SPDX-License-Identifier: Apache-2.0
// The header of a codebook's file, as text and as a struct: the JSON of safetensors.
//
//   {"__metadata__":{"fingerprint":"<16 hex digits>","format":"hisac.codebook","version":"1"},
//    "centers.0":{"dtype":"F32","shape":[C,D],"data_offsets":[begin,end]}, ...}
//
// The metadata has a temperature where the codebook has one, and what `fit` saw: "fit.rows" and "fit.left_out", and
// with a number a level, between spaces, "fit.iterations", "fit.error" and "fit.unused".
//
// Files are hostile: the parser takes the strict subset of JSON that the format needs (objects, strings without escapes
// other than \" and \\, unsigned integers, arrays of them), and checks every bound before use.
#pragma once
#include <string_view>

#include "base/checks.h"
#include "hisac/codebook.h"

namespace hisac {

struct FileHeader {
  int levels = 0;
  uint64_t fingerprint = 0;
  float temperature = 0;
  FitReport report{};
  uint64_t shape[kMaxLevels][2] = {}, range[kMaxLevels][2] = {};  // of each tensor; bytes of the payload
};

constexpr uint64_t kMostHeader = 4096;  // of what write_header writes

inline Status corrupt(const char* what) noexcept {
  return Status::error(Code::corrupt_file, "codebook file: %s", what);
}

bool is_hex16(std::string_view text) noexcept;

/// text [length] -> the header of a file whose payload has so many bytes.
Status read_header(const char* text, uint64_t length, uint64_t payload, FileHeader* header) noexcept;

/// out [kMostHeader]; returns the bytes written, a multiple of 8.
uint64_t write_header(const Codebook& book, char* out) noexcept;

}  // namespace hisac
