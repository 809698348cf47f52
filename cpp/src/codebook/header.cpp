// SPDX-License-Identifier: Apache-2.0
#include "codebook/header.h"

#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string_view>
#include <system_error>

namespace hisac {
namespace {

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

  std::string_view string() noexcept {
    expect('"');
    const char* const begin = p_;
    while (!failed_ && p_ < end_ && *p_ != '"') {
      if (static_cast<unsigned char>(*p_) < 0x20) failed_ = true;
      p_ += *p_ == '\\' && p_ + 1 < end_ ? 2 : 1;
    }
    if (failed_ || p_ >= end_) return failed_ = true, std::string_view();
    return {begin, static_cast<size_t>(p_++ - begin)};
  }

  uint64_t number() noexcept {
    skip();
    uint64_t value = 0;
    const auto [next, error] = std::from_chars(p_, end_, value);
    if (error != std::errc() || next - p_ > 18) failed_ = true;  // sums and products of such numbers do not wrap
    p_ = next;
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

/// A header, and which parts of it have come.
struct Parsed : FileHeader {
  bool format = false, has_fingerprint = false, level[kMaxLevels] = {};
  std::string_view version, fit;
};

/// As many numbers as there are in the text, none of them negative or infinite, a space between any two. Their count; 0
/// where the text is anything else.
int take_numbers(std::string_view text, double* out, int most) noexcept {
  const char *p = text.data(), *const end = p + text.size();
  for (int n = 0; n < most; ++p) {
    const auto [next, error] = std::from_chars(p, end, out[n]);
    if (error != std::errc() || !(out[n] >= 0) || !std::isfinite(out[n])) return 0;
    ++n;
    if (next == end) return n;
    if (*next != ' ') return 0;
    p = next;
  }
  return 0;
}

Status parse_metadata(Parser& in, Parsed* h) noexcept {
  in.expect('{');
  if (in.take('}')) return {};
  do {
    const std::string_view key = in.string();
    in.expect(':');
    const std::string_view value = in.string();
    if (in.failed()) return corrupt("the metadata is not a map of strings");
    if (key == "format") {
      if (value != "hisac.codebook") return corrupt("metadata format expected hisac.codebook, got another");
      h->format = true;
    } else if (key == "version") {
      h->version = value;
    } else if (key == "fingerprint") {
      if (!is_hex16(value)) return corrupt("metadata fingerprint expected 16 hex digits");
      std::from_chars(value.data(), value.data() + value.size(), h->fingerprint, 16);
      h->has_fingerprint = true;
    } else if (key == "temperature") {
      double temperature;
      if (!take_numbers(value, &temperature, 1) || temperature > double(std::numeric_limits<float>::max()))
        return corrupt("metadata temperature expected a number of float32");
      h->temperature = static_cast<float>(temperature);
    } else if (key == "fit") {
      h->fit = value;
    }
  } while (in.take(','));
  in.expect('}');
  return {};
}

Status parse_tensor(Parser& in, std::string_view name, Parsed* h) noexcept {
  if (name.size() != 9 || std::memcmp(name.data(), "centers.", 8) != 0 || name[8] < '0' || name[8] >= '0' + kMaxLevels)
    return corrupt("tensors expected centers.0 to centers.7, got another name");
  const int l = name[8] - '0';
  if (h->level[l]) return corrupt("a tensor appears twice");
  bool dtype = false, shape = false, range = false;
  in.expect('{');
  do {
    const std::string_view key = in.string();
    in.expect(':');
    if (key == "dtype") {
      dtype = in.string() == "F32";
      if (!dtype) return corrupt("a tensor's dtype expected F32");
    } else if (key == "shape") {
      in.pair(h->shape[l]);
      shape = true;
    } else if (key == "data_offsets") {
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

Status parse_header(const char* begin, const char* end, Parsed* h) noexcept {
  Parser in(begin, end);
  in.expect('{');
  if (in.failed()) return corrupt("the header is no JSON object");
  do {
    const std::string_view name = in.string();
    in.expect(':');
    if (in.failed()) break;
    HISAC_TRY(name == "__metadata__" ? parse_metadata(in, h) : parse_tensor(in, name, h));
  } while (!in.failed() && in.take(','));
  in.expect('}');
  if (in.failed() || !in.at_end()) return corrupt("the header is not the JSON that the format needs");
  if (!h->format || !h->has_fingerprint || h->version.empty())
    return corrupt("metadata expected format, version and fingerprint");
  if (h->version == "1") return {};
  char text[21] = {};  // plain ASCII
  for (size_t i = 0; i < h->version.size() && i < 20; ++i)
    text[i] = h->version[i] >= ' ' && h->version[i] <= '~' ? h->version[i] : '?';
  return Status::error(Code::corrupt_file, "codebook file: version expected 1, got %s", text);
}

/// The report, if one has come.
Status take_report(Parsed* h) noexcept {
  double numbers[2 + 3 * kMaxLevels];
  if (!h->fit.data()) return {};
  const int count = take_numbers(h->fit, numbers, 2 + 3 * kMaxLevels);
  if (!count) return corrupt("metadata fit expected numbers");
  bool right = count == 2 + 3 * h->levels;
  const double* next = numbers;
  const auto whole = [&](auto most) {
    const double n = right ? *next++ : 0;
    right = right && n <= static_cast<double>(most) && n == std::floor(n);
    return right ? static_cast<decltype(most)>(n) : 0;
  };
  constexpr int64_t kMost = int64_t{1} << 53;
  h->report.rows = whole(kMost);
  h->report.left_out = whole(kMost);
  for (int l = 0; l < h->levels; ++l) {
    h->report.iterations[l] = whole(std::numeric_limits<int32_t>::max());
    h->report.error[l] = right ? *next++ : 0;
    h->report.unused[l] = whole(kMost);
  }
  if (right && h->report.rows > 0) return {};
  return corrupt("metadata fit expected rows, left_out, and for each level iterations, error, unused");
}

}  // namespace

bool is_hex16(std::string_view text) noexcept {
  return text.size() == 16 && text.find_first_not_of("0123456789abcdef") == text.npos;
}

Status read_header(const char* text, uint64_t length, uint64_t payload, FileHeader* out) noexcept {
  Parsed parsed;
  Parsed* const h = &parsed;
  HISAC_TRY(parse_header(text, text + length, h));
  while (h->levels < kMaxLevels && h->level[h->levels]) ++h->levels;
  for (int l = h->levels; l < kMaxLevels; ++l)
    if (h->level[l]) return corrupt("a level is missing");
  if (h->levels == 0) return corrupt("no level");
  uint64_t at = 0;
  for (int l = 0; l < h->levels; ++l) {
    const uint64_t rows = h->shape[l][0], width = h->shape[l][1];
    if (rows < 1 || rows > (1 << 20) || width < 1 || width > (1 << 20) || h->range[l][0] != at ||
        h->range[l][1] != at + rows * width * 4 || h->range[l][1] > payload)
      return corrupt("a tensor's shape and data_offsets do not fit the file");
    at = h->range[l][1];
  }
  if (at != payload) return corrupt("bytes left over after the last tensor");
  HISAC_TRY(take_report(h));
  *out = *h;
  return {};
}

uint64_t write_header(const Codebook& book, char* out) noexcept {
  uint64_t length = 0;
  const auto add = [&](const char* format, auto... args) {
    length += static_cast<uint64_t>(std::snprintf(out + length, kMostHeader - length, format, args...));
  };
  const auto add_number = [&](double x) {  // the shortest text that reads back as the same number, in any locale
    length = static_cast<uint64_t>(std::to_chars(out + length, out + kMostHeader, x).ptr - out);
  };
  add("{\"__metadata__\":{\"fingerprint\":\"%016" PRIx64 "\",\"format\":\"hisac.codebook\",\"version\":\"1\"",
      book.fingerprint());
  if (book.temperature() > 0) {
    add("%s", ",\"temperature\":\"");
    add_number(double(book.temperature()));
    add("%s", "\"");
  }
  if (const FitReport* const report = book.report()) {
    add(",\"fit\":\"%" PRId64 " %" PRId64, report->rows, report->left_out);
    for (int l = 0; l < book.levels(); ++l) {
      add(" %d ", report->iterations[l]);
      add_number(report->error[l]);
      add(" %" PRId64, report->unused[l]);
    }
    add("%s", "\"");
  }
  add("%s", "}");
  int64_t begin = 0;
  for (int l = 0; l < book.levels(); ++l) {
    const int64_t end = begin + book.size(l) * book.width() * 4;
    add(",\"centers.%d\":{\"dtype\":\"F32\",\"shape\":[%" PRId64 ",%" PRId64 "],\"data_offsets\":[%" PRId64 ",%" PRId64
        "]}",
        l, book.size(l), book.width(), begin, end);
    begin = end;
  }
  add("%s", "}");
  while (length % 8) add("%s", " ");
  return length;
}

}  // namespace hisac
