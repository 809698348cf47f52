// SPDX-License-Identifier: Apache-2.0
// A codebook as safetensors: 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes.
//
//   {"__metadata__":{"fingerprint":"<16 hex digits>","format":"hisac.codebook","version":"1"},
//    "centers.0":{"dtype":"F32","shape":[C,D],"data_offsets":[begin,end]}, ...}
//
// Files are hostile: the parser takes the strict subset of JSON that the format needs (objects, strings without escapes
// other than \" and \\, unsigned integers, arrays of them), checks every bound before use, and the fingerprint last.
#include <atomic>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "codebook/body.h"
#include "codebook/checks.h"

namespace hisac {
namespace {

constexpr size_t kMostHeader = 1 << 20;

Status corrupt(const char* what) noexcept { return Status::error(Code::corrupt_file, "codebook file: %s", what); }

struct Text {
  const char* data = nullptr;
  size_t size = 0;
  bool is(const char* s) const noexcept { return std::strlen(s) == size && std::memcmp(s, data, size) == 0; }
};

/// Walks the header; every read is bounded, the first mistake sets `failed`.
class Parser {
 public:
  Parser(const char* p, const char* end) noexcept : p_(p), end_(end) {}
  bool failed() const noexcept { return failed_; }

  bool take(char c) noexcept {
    skip();
    if (p_ < end_ && *p_ == c) return ++p_, true;
    return false;
  }
  void expect(char c) noexcept {
    if (!take(c)) failed_ = true;
  }
  bool at_end() noexcept { return skip(), p_ == end_; }

  Text string() noexcept {
    expect('"');
    const char* const begin = p_;
    while (!failed_ && p_ < end_ && *p_ != '"') {
      if (static_cast<unsigned char>(*p_) < 0x20) failed_ = true;
      p_ += *p_ == '\\' && p_ + 1 < end_ ? 2 : 1;
    }
    if (failed_ || p_ >= end_) return failed_ = true, Text{};
    return {begin, static_cast<size_t>(p_++ - begin)};
  }

  uint64_t number() noexcept {
    skip();
    const char* const begin = p_;
    uint64_t value = 0;
    for (; p_ < end_ && *p_ >= '0' && *p_ <= '9'; ++p_) {
      if (p_ - begin >= 18) return failed_ = true, 0;
      value = value * 10 + static_cast<uint64_t>(*p_ - '0');
    }
    if (p_ == begin) failed_ = true;
    return value;
  }

  void pair(uint64_t out[2]) noexcept {
    expect('[');
    out[0] = number();
    expect(',');
    out[1] = number();
    expect(']');
  }

 private:
  void skip() noexcept {
    while (p_ < end_ && (*p_ == ' ' || *p_ == '\n' || *p_ == '\t' || *p_ == '\r')) ++p_;
  }
  const char *p_, *end_;
  bool failed_ = false;
};

struct Header {
  bool format = false, version = false, fingerprint = false, level[kMaxLevels] = {};
  char version_text[32] = {};
  uint64_t print = 0;
  uint64_t shape[kMaxLevels][2] = {}, range[kMaxLevels][2] = {};
};

bool hex(Text text, uint64_t* out) noexcept {
  if (text.size != 16) return false;
  uint64_t value = 0;
  for (size_t i = 0; i < 16; ++i) {
    const char c = text.data[i];
    const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
    if (digit < 0) return false;
    value = value << 4 | static_cast<uint64_t>(digit);
  }
  *out = value;
  return true;
}

Status parse_metadata(Parser& in, Header* h) noexcept {
  in.expect('{');
  if (in.take('}')) return {};
  do {
    const Text key = in.string();
    in.expect(':');
    const Text value = in.string();
    if (in.failed()) return corrupt("the metadata is not a map of strings");
    if (key.is("format")) {
      if (!value.is("hisac.codebook")) return corrupt("metadata format expected hisac.codebook, got another");
      h->format = true;
    } else if (key.is("version")) {
      h->version = value.is("1");
      std::memset(h->version_text, 0, sizeof h->version_text);
      for (size_t i = 0; i < value.size && i < 20; ++i)  // for the message, so plain ASCII
        h->version_text[i] = value.data[i] >= ' ' && value.data[i] <= '~' ? value.data[i] : '?';
    } else if (key.is("fingerprint")) {
      if (!hex(value, &h->print)) return corrupt("metadata fingerprint expected 16 hex digits");
      h->fingerprint = true;
    }
  } while (in.take(','));
  in.expect('}');
  return {};
}

Status parse_tensor(Parser& in, Text name, Header* h) noexcept {
  if (name.size != 9 || std::memcmp(name.data, "centers.", 8) != 0 || name.data[8] < '0' ||
      name.data[8] >= '0' + kMaxLevels)
    return corrupt("tensors expected centers.0 to centers.7, got another name");
  const int l = name.data[8] - '0';
  if (h->level[l]) return corrupt("a tensor appears twice");
  bool dtype = false, shape = false, range = false;
  in.expect('{');
  do {
    const Text key = in.string();
    in.expect(':');
    if (key.is("dtype")) {
      dtype = in.string().is("F32");
      if (!dtype) return corrupt("a tensor's dtype expected F32");
    } else if (key.is("shape")) {
      in.pair(h->shape[l]);
      shape = true;
    } else if (key.is("data_offsets")) {
      in.pair(h->range[l]);
      range = true;
    } else {
      return corrupt("a tensor has an unknown field");
    }
  } while (!in.failed() && in.take(','));
  in.expect('}');
  if (in.failed() || !dtype || !shape || !range) return corrupt("a tensor needs dtype, shape [C, D] and data_offsets");
  h->level[l] = true;
  return {};
}

Status parse_header(const char* begin, const char* end, Header* h) noexcept {
  Parser in(begin, end);
  in.expect('{');
  if (in.failed()) return corrupt("the header is no JSON object");
  do {
    const Text name = in.string();
    in.expect(':');
    if (in.failed()) break;
    HISAC_TRY(name.is("__metadata__") ? parse_metadata(in, h) : parse_tensor(in, name, h));
  } while (!in.failed() && in.take(','));
  in.expect('}');
  if (in.failed() || !in.at_end()) return corrupt("the header is not the JSON that the format needs");
  if (!h->format || !h->fingerprint || !h->version_text[0])
    return corrupt("metadata expected format, version and fingerprint");
  if (!h->version)
    return Status::error(Code::corrupt_file, "codebook file: version expected 1, got %s", h->version_text);
  return {};
}

Status os_error(const char* what, const char* path) noexcept {
  return Status::error(Code::io_error, "codebook file: cannot %s %.120s: %s", what, path, std::strerror(errno));
}

size_t header_text(const Codebook& book, char* out, size_t size) noexcept {
  size_t at = 0;
  const auto add = [&](const char* format, auto... args) {
    at += static_cast<size_t>(std::snprintf(out ? out + at : nullptr, out ? size - at : 0, format, args...));
  };
  add("{\"__metadata__\":{\"fingerprint\":\"%016" PRIx64 "\",\"format\":\"hisac.codebook\",\"version\":\"1\"}",
      book.fingerprint());
  int64_t begin = 0;
  for (int l = 0; l < book.levels(); ++l) {
    const int64_t end = begin + book.size(l) * book.width() * 4;
    add(",\"centers.%d\":{\"dtype\":\"F32\",\"shape\":[%" PRId64 ",%" PRId64 "],\"data_offsets\":[%" PRId64 ",%" PRId64
        "]}",
        l, book.size(l), book.width(), begin, end);
    begin = end;
  }
  add("%s", "}");
  while (at % 8) add("%s", " ");
  return at;
}

size_t payload(const Codebook& book) noexcept {
  int64_t floats = 0;
  for (int l = 0; l < book.levels(); ++l) floats += book.size(l) * book.width();
  return static_cast<size_t>(floats) * 4;
}

}  // namespace

Status Codebook::parse(const void* bytes, size_t size, Codebook* out) noexcept {
  const char* const p = static_cast<const char*>(bytes);
  uint64_t length = 0;
  if (size < 8) return corrupt("expected at least 8 bytes");
  std::memcpy(&length, p, 8);
  if (length > kMostHeader || length > size - 8) return corrupt("the header is longer than the file, or than 1 MiB");
  Header h;
  HISAC_TRY(parse_header(p + 8, p + 8 + length, &h));
  int levels = 0;
  while (levels < kMaxLevels && h.level[levels]) ++levels;
  for (int l = levels; l < kMaxLevels; ++l)
    if (h.level[l]) return corrupt("a level is missing");
  if (levels == 0) return corrupt("no level");
  const char* const data = p + 8 + length;
  const uint64_t have = size - 8 - length;
  uint64_t at = 0;
  for (int l = 0; l < levels; ++l) {
    const uint64_t rows = h.shape[l][0], width = h.shape[l][1];
    if (rows < 1 || rows > (1 << 20) || width < 1 || width > (1 << 20) || h.range[l][0] != at ||
        h.range[l][1] != at + rows * width * 4 || h.range[l][1] > have)
      return corrupt("a tensor's shape and data_offsets do not fit the file");
    at = h.range[l][1];
  }
  if (at != have) return corrupt("bytes left over after the last tensor");
  float* const copy = static_cast<float*>(std::malloc(at));  // the payload may be unaligned
  if (!copy) return Status::error(Code::out_of_memory, "codebook file: out of memory for %" PRIu64 " bytes", at);
  std::memcpy(copy, data, at);
  Array<const float, 2> centers[kMaxLevels];
  for (int l = 0; l < levels; ++l)
    centers[l] = {copy + h.range[l][0] / 4, {static_cast<int64_t>(h.shape[l][0]), static_cast<int64_t>(h.shape[l][1])}};
  Codebook book;
  const Status status = build(centers, levels, &book);
  std::free(copy);
  if (status.code() == Code::out_of_memory) return status;
  if (!status.ok()) return Status::error(Code::corrupt_file, "codebook file: %s", status.what());
  if (book.fingerprint() != h.print)
    return Status::error(Code::corrupt_file,
                         "codebook file: fingerprint expected %016" PRIx64 ", the centers have %016" PRIx64, h.print,
                         book.fingerprint());
  *out = static_cast<Codebook&&>(book);
  return {};
}

size_t Codebook::file_size() const noexcept { return body_ ? 8 + header_text(*this, nullptr, 0) + payload(*this) : 0; }

Status Codebook::serialize(Array<std::byte, 1> out) const noexcept {
  HISAC_TRY(check_book("serialize", this));
  const size_t need = file_size();
  if (out.shape[0] < 0 || static_cast<size_t>(out.shape[0]) != need)
    return Status::error(Code::invalid_argument, "serialize: out expected %zu bytes, got %" PRId64, need, out.shape[0]);
  char* p = reinterpret_cast<char*>(out.data);
  char text[2048];
  const uint64_t length = header_text(*this, text, sizeof text);
  std::memcpy(p, &length, 8);
  std::memcpy(p + 8, text, length);
  p += 8 + length;
  for (int l = 0; l < levels(); ++l) {
    const size_t bytes = static_cast<size_t>(size(l) * width()) * 4;
    std::memcpy(p, centers(l), bytes);
    p += bytes;
  }
  return {};
}

Status Codebook::load(const char* path, Codebook* out) noexcept {
  const int file = ::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return os_error("open", path);
  struct stat info;
  const bool known = ::fstat(file, &info) == 0;
  if (!known || !S_ISREG(info.st_mode)) {
    if (known) errno = S_ISDIR(info.st_mode) ? EISDIR : EINVAL;
    const Status status = os_error("read", path);
    ::close(file);
    return status;
  }
  const size_t size = static_cast<size_t>(info.st_size);
  char* const bytes = static_cast<char*>(std::malloc(size ? size : 1));
  size_t at = 0;
  bool failed = false;
  while (bytes && at < size) {
    const ssize_t got = ::read(file, bytes + at, size - at);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      failed = got < 0;
      break;
    }
    at += static_cast<size_t>(got);
  }
  Status status = failed ? os_error("read", path) : Status();
  ::close(file);
  if (!bytes) status = Status::error(Code::out_of_memory, "codebook file: out of memory for %zu bytes", size);
  if (status.ok()) status = parse(bytes, at, out);
  std::free(bytes);
  return status;
}

Status Codebook::save(const char* path) const noexcept {
  HISAC_TRY(check_book("save", this));
  const size_t size = file_size();
  static std::atomic<unsigned> serial{0};  // threads may save to one path at once
  char aside[4096];
  if (std::snprintf(aside, sizeof aside, "%s.%ld.%u.part", path, static_cast<long>(::getpid()), serial++) >=
      static_cast<int>(sizeof aside)) {
    errno = ENAMETOOLONG;
    return os_error("write", path);
  }
  std::byte* const bytes = static_cast<std::byte*>(std::malloc(size));
  if (!bytes) return Status::error(Code::out_of_memory, "codebook file: out of memory for %zu bytes", size);
  Status status = serialize({bytes, {static_cast<int64_t>(size)}});
  const int file = status.ok() ? ::open(aside, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666) : -1;
  bool ok = file >= 0;
  for (size_t at = 0; ok && at < size;) {
    const ssize_t put = ::write(file, bytes + at, size - at);
    if (put < 0 && errno == EINTR) continue;
    ok = put > 0;
    at += ok ? static_cast<size_t>(put) : 0;
  }
  ok = ok && ::fsync(file) == 0;
  if (file >= 0) ok = ::close(file) == 0 && ok;
  ok = ok && ::rename(aside, path) == 0;
  std::free(bytes);
  if (!status.ok() || ok) return status;
  status = os_error("write", path);
  if (file >= 0) ::unlink(aside);
  return status;
}

}  // namespace hisac
