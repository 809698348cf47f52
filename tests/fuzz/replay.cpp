// SPDX-License-Identifier: Apache-2.0
// Runs a fuzz target without libFuzzer: over the files named, or over N pseudo-random inputs (the same every time).
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

#include "support.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int argc, char** argv) {
  char* end = nullptr;
  const long inputs = argc == 2 ? std::strtol(argv[1], &end, 10) : 0;
  if (inputs > 0 && *end == 0) {
    test::Random random(7);
    for (long i = 0; i < inputs; ++i) {
      std::vector<uint8_t> bytes(static_cast<size_t>(random.below(i % 8 == 0 ? 4096 : 400)));
      for (uint8_t& b : bytes) b = static_cast<uint8_t>(random.below(256));
      LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    }
    std::printf("%ld inputs under %s\n", inputs, hisac::available_isas());
    return 0;
  }
  for (int i = 1; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    std::printf("%s: %zu bytes\n", argv[i], bytes.size());
  }
  return argc > 1 ? 0 : 2;
}
