// SPDX-License-Identifier: Apache-2.0
// Codebooks as bytes: what is written reads back; every corruption is refused and leaves the target as it was. What
// each refusal says is tested in tests/python/files/test_format.py.
#include <doctest/doctest.h>

#include <cstdio>
#include <limits>
#include <string>

#include "codebook/image.h"
#include "support.h"

using namespace hisac;
using test::Random;

namespace {

std::string bytes_of(const Codebook& book) {
  std::string out(book.file_size(), 0);
  REQUIRE(book.serialize({reinterpret_cast<std::byte*>(out.data()), {static_cast<int64_t>(out.size())}}).ok());
  return out;
}

/// A file of this header and payload.
std::string file(const std::string& header, const std::string& payload) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + header + payload;
}

/// [2, 1] centers 1, 2: the smallest interesting codebook, its header open to edits.
constexpr const char* kHeader =
    R"({"__metadata__":{"fingerprint":"FINGERPRINT","format":"hisac.codebook","version":"1"},)"
    R"("centers.0":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}})";

std::string payload() {
  const float centers[] = {1, 2};
  return std::string(reinterpret_cast<const char*>(centers), 8);
}

std::string fingerprint() {
  const float values[] = {1, 2};
  const Array<const float, 2> centers[] = {{values, {2, 1}}};
  Codebook book;
  REQUIRE(Codebook::build(centers, 1, &book).ok());
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(book.fingerprint()));
  return text;
}

std::vector<int32_t> codes_of(const Codebook& book, const std::vector<float>& x) {
  const int64_t n = static_cast<int64_t>(x.size()) / book.width();
  std::vector<int32_t> codes(test::size(n * book.levels()));
  test::Workspace workspace(encode_workspace({}, book));
  REQUIRE(encode({workspace.array()}, book, test::rows(x, book.width()), {codes.data(), {n, book.levels()}}).ok());
  return codes;
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  REQUIRE(at != std::string::npos);
  return text.replace(at, from.size(), to);
}

std::string header(const std::string& from = "", const std::string& to = "") {
  const std::string good = replaced(kHeader, "FINGERPRINT", fingerprint());
  return from.empty() ? good : replaced(good, from, to);
}

Status parse(const std::string& bytes, Codebook* out) {
  test::Guarded<char> exact(std::vector<char>(bytes.begin(), bytes.end()));  // one byte past the end is a finding
  return Codebook::parse(exact.data(), bytes.size(), out);
}

}  // namespace

TEST_CASE("what is written reads back, for every depth") {
  Random random(30);
  for (int levels = 1; levels <= kMaxLevels; ++levels) {
    std::vector<int64_t> sizes;
    for (int l = 0; l < levels; ++l) sizes.push_back(1 + random.below(20));
    const Codebook book = test::codebook(random, sizes, 1 + random.below(9));
    const std::string bytes = bytes_of(book);
    Codebook back;
    REQUIRE(parse(bytes, &back).ok());
    CHECK(back.fingerprint() == book.fingerprint());
    CHECK(back.levels() == levels);
    CHECK(back.width() == book.width());
    for (int l = 0; l < levels; ++l)
      CHECK(std::equal(book.centers(l), book.centers(l) + book.size(l) * book.width(), back.centers(l)));
    CHECK(bytes_of(back) == bytes);
  }
}

TEST_CASE("an image is the same bytes on every machine") {
  Random random(3);
  uint64_t hash = 0xcbf29ce484222325u;
  for (const std::byte b : test::image_of(test::codebook(random, {70, 33}, 37)))
    hash = (hash ^ static_cast<uint64_t>(b)) * 0x100000001b3u;
  CHECK(hash == 0xa5cdabb6da98f2b2u);
}

TEST_CASE("a codebook viewed in memory of the caller") {
  Random random(31);
  for (const int64_t width : {1, 4, 7, 16}) {
    const Codebook book = test::codebook(random, {5, 33}, width);
    const auto bytes = book.image();
    test::Workspace image(static_cast<size_t>(bytes.shape[0]));
    std::memcpy(image.array().data, bytes.data, static_cast<size_t>(bytes.shape[0]));
    const Array<const std::byte, 1> lent{image.array().data, {bytes.shape[0]}};
    const size_t need = Codebook::view_scratch(lent);
    test::Workspace scratch(need);
    Codebook view;
    REQUIRE(Codebook::view(lent, {scratch.array().data, {static_cast<int64_t>(need)}}, &view).ok());
    CHECK(view.image().data == lent.data);
    CHECK(view.centers(0) == reinterpret_cast<const float*>(lent.data + 512));
    CHECK(view.fingerprint() == book.fingerprint());
    CHECK(bytes_of(view) == bytes_of(book));
    const std::vector<float> x = test::uniform(random, 40 * width);
    CHECK(codes_of(view, x) == codes_of(book, x));
    Codebook moved = std::move(view);
    CHECK(view.empty());
    Codebook& same = moved;
    moved = std::move(same);
    CHECK(moved.fingerprint() == book.fingerprint());

    Codebook none;
    const auto refused = [&](Array<const std::byte, 1> from, Array<std::byte, 1> to, const char* text) {
      const Status status = Codebook::view(from, to, &none);
      CHECK(status.code() == Code::invalid_argument);
      CHECK(std::string(status.what()).find(text) != std::string::npos);
      CHECK(none.empty());
    };
    refused(lent, {scratch.array().data, {static_cast<int64_t>(need) - 1}}, "scratch expected [");
    refused(lent, {}, "scratch expected [");
    test::Workspace more(std::max(need, static_cast<size_t>(bytes.shape[0])) + 64);
    refused(lent, {more.array().data + 4, {static_cast<int64_t>(need)}}, "aligned to 64");
    std::memcpy(more.array().data + 4, bytes.data, static_cast<size_t>(bytes.shape[0]));
    refused({more.array().data + 4, {bytes.shape[0]}}, scratch.array(), "aligned to 64");
  }
}

TEST_CASE("an image whose checksum is right and whose content is not") {
  Random random(32);
  const Codebook book = test::codebook(random, {5, 3}, 4);
  const auto bytes = book.image();
  const CodebookImage layout(book);
  test::Workspace image(static_cast<size_t>(bytes.shape[0])), scratch(Codebook::view_scratch(bytes));
  const auto view = [&](auto change) {
    std::memcpy(image.array().data, bytes.data, static_cast<size_t>(bytes.shape[0]));
    ImageHead head;
    std::memcpy(&head, image.array().data, sizeof head);
    change(head, reinterpret_cast<float*>(image.array().data + layout.level[0].centers));
    std::memcpy(image.array().data, &head, sizeof head);
    seal(layout, image.array().data);
    Codebook out;
    return Codebook::view({image.array().data, {bytes.shape[0]}}, scratch.array(), &out);
  };
  CHECK(view([](ImageHead&, float*) {}).ok());
  CHECK(view([](ImageHead& head, float*) { head.temperature = 0.5f; }).ok());
  const auto refused = [&](const char* text, auto change) {
    const Status status = view(change);
    CHECK(status.code() == Code::corrupt_file);
    CHECK(std::string(status.what()) == "codebook image: Codebook: " + std::string(text));
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  refused("expected finite centers, got nan at [0, 1] of level 0", [&](ImageHead&, float* c) { c[1] = nan; });
  const char* const temperature = "temperature expected finite and > 0, or 0 for none, got nan";
  refused(temperature, [&](ImageHead& head, float*) { head.temperature = nan; });
  const char* const report = "expected the report of a fit, got another";
  refused(report, [](ImageHead& head, float*) { head.report.rows = -1; });
  refused(report, [&](ImageHead& head, float*) { head.report.rows = 1, head.report.error[1] = double(nan); });
  refused(report, [](ImageHead& head, float*) { head.report.rows = 1, head.report.unused[0] = -1; });
}

TEST_CASE("other writers' layouts of the same header are read") {
  Codebook book;
  CHECK(parse(file(header(), payload()), &book).ok());
  CHECK(parse(file(header() + "   \n\t", payload()), &book).ok());
  CHECK(parse(file(header("\"shape\":[2,1]", " \"shape\" : [ 2 , 1 ] "), payload()), &book).ok());
  CHECK(parse(file(header("\"version\":\"1\"", R"("version":"1","made by":"a \"tool\" \\")"), payload()), &book).ok());
  CHECK(parse(file(R"({"centers.0":{"data_offsets":[0,8],"shape":[2,1],"dtype":"F32"},"__metadata__":{"version":"1",)"
                   R"("format":"hisac.codebook","fingerprint":")" +
                       fingerprint() + "\"}}",
                   payload()),
              &book)
            .ok());
}

TEST_CASE("every corruption is refused and leaves the target as it was") {
  const std::string good = file(header(), payload());
  const float bad[] = {1, std::numeric_limits<float>::quiet_NaN()};
  const std::string nan(reinterpret_cast<const char*>(bad), 8);
  const auto with = [](const std::string& from, const std::string& to) { return file(header(from, to), payload()); };
  const std::string tensor = R"("centers.0":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]})";
  const struct {
    const char* what;
    std::string bytes;
  } table[] = {
      {"nothing", ""},
      {"7 bytes", good.substr(0, 7)},
      {"length only", good.substr(0, 8)},
      {"header cut", good.substr(0, 40)},
      {"payload cut", good.substr(0, good.size() - 1)},
      {"payload gone", file(header(), "")},
      {"a byte more", good + "x"},
      {"length of 2^64 - 1", std::string(8, '\xff') + good.substr(8)},
      {"length past 1 MiB", file(header() + std::string(1 << 20, ' '), payload())},
      {"length 0", file("", payload())},
      {"a list", file("[]", payload())},
      {"no members", file("{}", payload())},
      {"no closing brace", file(header().substr(0, header().size() - 1), payload())},
      {"two headers", file(header() + header(), payload())},
      {"a NUL after it", file(header() + std::string(1, 0), payload())},
      {"a control character in a name", with("centers.0", "centers\n0")},
      {"a name that ends in a backslash", file("{\"a\\", "")},
      {"a comma too many", with("[0,8]}}", "[0,8]},}")},
      {"no colon", with("\"centers.0\":", "\"centers.0\"")},
      {"another tensor", with("centers.0", "centers.x")},
      {"level 8", with("centers.0", "centers.8")},
      {"level 10", with("centers.0", "centers.10")},
      {"level 1 alone", with("centers.0", "centers.1")},
      {"no tensor", with("," + tensor, "")},
      {"a tensor twice", with(tensor, tensor + "," + tensor)},
      {"F64", with("F32", "F64")},
      {"a field unknown", with("\"dtype\"", "\"type\"")},
      {"no dtype", with(R"("dtype":"F32",)", "")},
      {"no shape", with(R"("shape":[2,1],)", "")},
      {"no data_offsets", with(R"(,"data_offsets":[0,8])", "")},
      {"one dimension", with("[2,1]", "[2]")},
      {"three dimensions", with("[2,1]", "[2,1,1]")},
      {"negative", with("[2,1]", "[-2,1]")},
      {"a fraction", with("[2,1]", "[2.0,1]")},
      {"19 digits", with("[2,1]", "[2000000000000000000,1]")},
      {"no digits", with("[2,1]", "[,1]")},
      {"no codes", with("[2,1]", "[0,1]")},
      {"no width", with("[2,1]", "[2,0]")},
      {"a shape that overflows", with("[2,1]", "[1048577,1048577]")},
      {"a large shape", with("[2,1]", "[1048576,1048576]")},
      {"a shape beyond its bytes", with("[2,1]", "[3,1]")},
      {"bytes before the tensor", with("[0,8]", "[4,8]")},
      {"bytes back to front", with("[0,8]", "[8,0]")},
      {"bytes past the file", with("[0,8]", "[0,16]")},
      {"no format", with(R"("format":"hisac.codebook",)", "")},
      {"no version", with(R"(,"version":"1")", "")},
      {"no fingerprint", with(R"("fingerprint":")" + fingerprint() + "\",", "")},
      {"empty metadata", file("{\"__metadata__\":{}," + tensor + "}", payload())},
      {"no metadata", file("{" + tensor + "}", payload())},
      {"metadata of numbers", with("\"version\":\"1\"", "\"version\":1")},
      {"another format", with("hisac.codebook", "pt")},
      {"version 2", with("\"version\":\"1\"", "\"version\":\"2\"")},
      {"a fingerprint of 15 digits", with(fingerprint(), fingerprint().substr(1))},
      {"a fingerprint in capitals", with(fingerprint(), "ABCDEFABCDEFABCD")},
      {"another fingerprint", with(fingerprint(), "0123456789abcdef")},
      {"a flipped bit", file(header(), nan.substr(0, 3) + payload().substr(3, 4) + "\x41")},
      {"NaN", file(header(), nan)},
  };
  Random random(31);
  for (const auto& row : table) {
    CAPTURE(std::string(row.what));
    Codebook book = test::codebook(random, {2}, 2);
    const uint64_t before = book.fingerprint();
    const Status status = parse(row.bytes, &book);
    CHECK(status.code() == Code::corrupt_file);
    CHECK(std::string(status.what()).rfind("codebook file: ", 0) == 0);
    CHECK(book.fingerprint() == before);
  }
}

TEST_CASE("no truncation and no single flipped bit passes") {
  const std::string good = file(header(), payload());
  Codebook book;
  for (size_t n = 0; n < good.size(); ++n) CHECK(parse(good.substr(0, n), &book).code() == Code::corrupt_file);
  int passed = 0;
  for (size_t i = 0; i < good.size() * 8; ++i) {
    std::string bad = good;
    bad[i / 8] = static_cast<char>(bad[i / 8] ^ (1 << i % 8));
    if (parse(bad, &book).ok()) ++passed;
  }
  CHECK(passed == 0);
  CHECK(book.empty());
}

TEST_CASE("a codebook moves, and moved from is empty") {
  Random random(32);
  Codebook a = test::codebook(random, {3, 2}, 4), b = test::codebook(random, {2}, 1);
  const uint64_t print = a.fingerprint();
  b = static_cast<Codebook&&>(a);
  CHECK(a.empty());
  CHECK(a.levels() == 0);
  CHECK(a.width() == 0);
  CHECK(a.fingerprint() == 0);
  CHECK(a.file_size() == 0);
  CHECK(b.fingerprint() == print);
  Codebook& self = b;
  b = static_cast<Codebook&&>(self);
  CHECK(b.fingerprint() == print);
  const Codebook c(static_cast<Codebook&&>(b));
  CHECK(c.fingerprint() == print);
}

TEST_CASE("leaves and prototypes by hand") {
  const std::vector<float> first{1, 2, 3, 4}, second{.5f, .25f, 10, 20, 0, 0};
  const Array<const float, 2> centers[] = {test::matrix(first, 2, 2), test::matrix(second, 3, 2)};
  Codebook book;
  REQUIRE(Codebook::build(centers, 2, &book).ok());
  const std::vector<int32_t> codes{0, 0, 0, 2, 1, 1, -1, 0, 0, 3, 2, 0, 1 << 30, 1 << 30};
  std::vector<int64_t> numbers(7);
  REQUIRE(leaves(book, {codes.data(), {7, 2}}, {numbers.data(), {7}}).ok());
  CHECK(numbers == std::vector<int64_t>{0, 2, 4, -1, -1, -1, -1});
  std::vector<float> sums(14);
  REQUIRE(code_prototypes({}, book, {codes.data(), {7, 2}}, {sums.data(), {7, 2}}).ok());
  CHECK(sums == std::vector<float>{1.5f, 2.25f, 1, 2, 13, 24, 0, 0, 0, 0, 0, 0, 0, 0});
}
