// SPDX-License-Identifier: Apache-2.0
// Any bytes parse or are refused; what parses has finite centers, and writes and reads back as itself, as a file and as
// an image. Any bytes are an image or are refused, and so is an image with one byte changed. The first byte chooses
// whether the bytes are a file as they are, or a header and a payload to put together: with the right length and
// fingerprint the depths of the parser are reached at once.
#include <string>

#include "fuzz.h"

namespace {

uint64_t fnv(uint64_t hash, const void* data, size_t size) {
  for (size_t i = 0; i < size; ++i) hash = (hash ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3u;
  return hash;
}

/// A whole file around `rest`: two levels [a, d], [b, d] of its first floats, one byte of the header changed.
std::string assemble(const uint8_t* data, size_t size) {
  if (size < 6) return {};
  const int64_t width = 1 + data[0] % 4, sizes[] = {1 + data[1] % 4, 1 + data[2] % 4};
  const size_t at = static_cast<size_t>(data[3] | (data[4] & 1) << 8);
  const char with = static_cast<char>(data[5]);
  data += 6;
  size -= 6;
  std::string payload(static_cast<size_t>((sizes[0] + sizes[1]) * width * 4), 0);
  std::memcpy(payload.data(), data, size < payload.size() ? size : payload.size());
  uint64_t print = fnv(0xcbf29ce484222325u, &width, 8);
  size_t offset = 0;
  for (int64_t c : sizes) {
    const size_t bytes = static_cast<size_t>(c * width * 4);
    print = fnv(fnv(print, &c, 8), payload.data() + offset, bytes);
    offset += bytes;
  }
  char header[400];
  const long long d = width, a = sizes[0], b = sizes[1];
  const int length =
      std::snprintf(header, sizeof header,
                    "{\"__metadata__\":{\"fingerprint\":\"%016llx\",\"format\":\"hisac.codebook\",\"version\":\"1\"},"
                    "\"centers.0\":{\"dtype\":\"F32\",\"shape\":[%lld,%lld],\"data_offsets\":[0,%lld]},"
                    "\"centers.1\":{\"dtype\":\"F32\",\"shape\":[%lld,%lld],\"data_offsets\":[%lld,%lld]}}",
                    static_cast<unsigned long long>(print), a, d, a * d * 4, b, d, a * d * 4, (a + b) * d * 4);
  if (at < static_cast<size_t>(length)) header[at] = with;
  const uint64_t count = static_cast<uint64_t>(length);
  return std::string(reinterpret_cast<const char*>(&count), 8) + std::string(header, static_cast<size_t>(length)) +
         payload;
}

hisac::Status view(const std::byte* bytes, size_t size, hisac::Codebook* out, std::byte** scratch) {
  const hisac::Array<const std::byte, 1> image{bytes, {static_cast<int64_t>(size)}};
  const size_t need = hisac::Codebook::view_scratch(image);
  *scratch = static_cast<std::byte*>(std::aligned_alloc(64, need ? need : 64));
  return hisac::Codebook::view(image, {*scratch, {static_cast<int64_t>(need)}}, out);
}

/// The codebook as an image, and with `change` in one byte, which `at` chooses.
void check_image(const hisac::Codebook& book, uint8_t at, uint8_t change) {
  const auto image = book.image();
  const size_t size = static_cast<size_t>(image.shape[0]);
  std::byte *const copy = static_cast<std::byte*>(std::aligned_alloc(64, size)), *scratch;
  std::memcpy(copy, image.data, size);
  {
    hisac::Codebook back;
    CHECK(view(copy, size, &back, &scratch).ok());
    CHECK(back.fingerprint() == book.fingerprint() && back.image().data == copy);
    CHECK(back.temperature() == book.temperature() && !back.report() == !book.report());
  }
  std::free(scratch);
  if (change) {
    copy[size * at / 256] ^= std::byte{change};
    hisac::Codebook none;
    CHECK(view(copy, size, &none, &scratch).code() == hisac::Code::corrupt_file && none.empty());
    std::free(scratch);
  }
  std::free(copy);
}

/// Any bytes as an image.
void check_bytes(const uint8_t* data, size_t size) {
  std::byte *const copy = static_cast<std::byte*>(std::aligned_alloc(64, (size + 64) / 64 * 64)), *scratch;
  std::memcpy(copy, data, size);
  hisac::Codebook book;
  const hisac::Status status = view(copy, size, &book, &scratch);
  CHECK(status.ok() || status.code() == hisac::Code::corrupt_file);
  std::free(scratch);
  std::free(copy);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  check_bytes(data, size);
  const std::string bytes = data[0] % 2 ? assemble(data + 1, size - 1) : std::string(data + 1, data + size);
  char* const exact = static_cast<char*>(std::malloc(bytes.size() ? bytes.size() : 1));
  std::memcpy(exact, bytes.data(), bytes.size());
  hisac::Codebook book;
  const hisac::Status status = hisac::Codebook::parse(exact, bytes.size(), &book);
  std::free(exact);
  if (!status.ok()) {
    CHECK(status.code() == hisac::Code::corrupt_file);
    CHECK(std::strncmp(status.what(), "codebook file: ", 15) == 0);
    CHECK(book.empty());
    return 0;
  }
  CHECK(book.levels() >= 1 && book.levels() <= hisac::kMaxLevels && book.width() >= 1);
  for (int l = 0; l < book.levels(); ++l)
    for (int64_t i = 0; i < book.size(l) * book.width(); ++i) CHECK(std::isfinite(book.centers(l)[i]));
  std::vector<std::byte> out(book.file_size());
  CHECK(book.serialize({out.data(), {static_cast<int64_t>(out.size())}}).ok());
  hisac::Codebook back;
  CHECK(hisac::Codebook::parse(out.data(), out.size(), &back).ok());
  CHECK(back.fingerprint() == book.fingerprint());
  std::vector<std::byte> again(back.file_size());
  CHECK(back.serialize({again.data(), {static_cast<int64_t>(again.size())}}).ok());
  CHECK(again == out);
  check_image(book, data[size / 2], data[size - 1]);
  return 0;
}
