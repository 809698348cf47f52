// SPDX-License-Identifier: Apache-2.0
// Codebooks on disk: a failed save leaves no part of a file and the old file as it was; a failed load says why.
#include <doctest/doctest.h>

#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "support.h"

using namespace hisac;
namespace fs = std::filesystem;

namespace {

/// A directory of its own for each test, removed afterwards.
struct Directory {
  fs::path path;
  Directory() {
    std::string name = (fs::temp_directory_path() / "hisac_test_XXXXXX").string();
    REQUIRE(::mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~Directory() {
    fs::permissions(path, fs::perms::owner_all);
    fs::remove_all(path);
  }
  std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (const auto& entry : fs::directory_iterator(path)) out.push_back(entry.path().filename().string());
    std::sort(out.begin(), out.end());
    return out;
  }
};

std::string content(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

Codebook some(uint64_t seed, int64_t size = 5) {
  test::Random random(seed);
  return test::codebook(random, {size, 3}, 4);
}

void fails(const Status& status, const std::string& message) {
  CHECK(status.code() == Code::io_error);
  CHECK(std::string(status.what()) == "codebook file: cannot " + message);
}

}  // namespace

TEST_CASE("save, load, overwrite") {
  const Directory directory;
  const std::string path = directory.path / "book.safetensors";
  const Codebook a = some(1), b = some(2, 50);
  REQUIRE(a.save(path.c_str()).ok());
  Codebook back;
  REQUIRE(Codebook::load(path.c_str(), &back).ok());
  CHECK(back.fingerprint() == a.fingerprint());
  REQUIRE(b.save(path.c_str()).ok());
  REQUIRE(Codebook::load(path.c_str(), &back).ok());
  CHECK(back.fingerprint() == b.fingerprint());
  CHECK(directory.names() == std::vector<std::string>{"book.safetensors"});
}

TEST_CASE("save to a directory that is not there, or a path through a file") {
  const Directory directory;
  const std::string lost = directory.path / "none" / "book", file = directory.path / "file";
  fails(some(1).save(lost.c_str()), "write " + lost + ": No such file or directory");
  std::ofstream(file) << "x";
  const std::string through = file + "/book";
  fails(some(1).save(through.c_str()), "write " + through + ": Not a directory");
  CHECK(directory.names() == std::vector<std::string>{"file"});
}

TEST_CASE("save onto a directory removes what was written aside") {
  const Directory directory;
  const std::string path = directory.path / "book";
  fs::create_directory(path);
  fails(some(1).save(path.c_str()), "write " + path + ": Is a directory");
  CHECK(directory.names() == std::vector<std::string>{"book"});
}

TEST_CASE("save to a name too long") {
  const Directory directory;
  const std::string name = directory.path / std::string(300, 'n'), path = std::string(5000, 'p');
  CHECK(some(1).save(name.c_str()).code() == Code::io_error);
  fails(some(1).save(path.c_str()), "write " + std::string(120, 'p') + ": File name too long");
  CHECK(directory.names().empty());
}

TEST_CASE("save where the disk is full: the old file stays, no part is left") {
  const Directory directory;
  const std::string path = directory.path / "book";
  const Codebook old = some(1);
  REQUIRE(old.save(path.c_str()).ok());
  const std::string before = content(path);
  struct rlimit limit, small;
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &limit) == 0);
  small = limit;
  small.rlim_cur = 4096;
  auto* const handler = std::signal(SIGXFSZ, SIG_IGN);
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  const Status status = some(2, 5000).save(path.c_str());
  ::setrlimit(RLIMIT_FSIZE, &limit);
  std::signal(SIGXFSZ, handler);
  fails(status, "write " + path + ": File too large");
  CHECK(content(path) == before);
  CHECK(directory.names() == std::vector<std::string>{"book"});
}

TEST_CASE("save without permission" * doctest::skip(::getuid() == 0)) {
  const Directory directory;
  fs::permissions(directory.path, fs::perms::owner_read | fs::perms::owner_exec);
  const std::string path = directory.path / "book";
  fails(some(1).save(path.c_str()), "write " + path + ": Permission denied");
}

TEST_CASE("threads that save to one path leave one whole file") {
  const Directory directory;
  const std::string path = directory.path / "book";
  const Codebook books[] = {some(1, 2000), some(2, 1000), some(3, 3000)};
  for (int round = 0; round < 10; ++round) {
    std::vector<std::thread> threads;
    std::atomic<int> failed{0};
    for (const Codebook& book : books) threads.emplace_back([&] { failed += !book.save(path.c_str()).ok(); });
    for (std::thread& t : threads) t.join();
    CHECK(failed.load() == 0);
    Codebook back;
    const Status status = Codebook::load(path.c_str(), &back);
    CHECK(std::string(status.what()) == "");
    CHECK(std::any_of(books, books + 3, [&](const Codebook& b) { return b.fingerprint() == back.fingerprint(); }));
  }
  CHECK(directory.names() == std::vector<std::string>{"book"});
}

TEST_CASE("load what is not there, a directory, a device, a pipe, an empty file") {
  const Directory directory;
  Codebook book = some(4);
  const uint64_t before = book.fingerprint();
  const std::string none = directory.path / "none", pipe = directory.path / "pipe", empty = directory.path / "empty";
  fails(Codebook::load(none.c_str(), &book), "open " + none + ": No such file or directory");
  fails(Codebook::load(directory.path.c_str(), &book), "read " + directory.path.string() + ": Is a directory");
  CHECK(Codebook::load("/dev/null", &book).code() == Code::io_error);
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  CHECK(Codebook::load(pipe.c_str(), &book).code() == Code::io_error);  // and does not wait for a writer
  std::ofstream(empty).flush();
  const Status status = Codebook::load(empty.c_str(), &book);
  CHECK(std::string(status.what()) == "codebook file: expected at least 8 bytes");
  CHECK(book.fingerprint() == before);
}
