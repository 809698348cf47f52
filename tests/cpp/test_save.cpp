// SPDX-License-Identifier: Apache-2.0
// Codebooks on disk: a failed save leaves no part of a file and the old file as it was; a killed one's part goes with
// the next into its folder; modes and links stay; a failed load says why.
#include <doctest/doctest.h>

#include <dlfcn.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>
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

std::function<void(mode_t)> on_sync;  // told of every fsync's kind and mode
const char* random_bytes = nullptr;   // what getentropy gives next, where it is set

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

mode_t mode_of(const fs::path& path) {
  struct stat info;
  REQUIRE(::lstat(path.c_str(), &info) == 0);
  return info.st_mode & 07777;
}

/// A child that saves to path; `act` is done in its first fsync, when all is written.
template <class Act>
pid_t saving(const Codebook& book, const std::string& path, Act act) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(60);
    on_sync = [&](mode_t) {
      on_sync = nullptr;
      act();
    };
    ::_exit(book.save(path.c_str()).ok() ? 0 : 1);
  }
  return child;
}

}  // namespace

// what a save calls comes here first
extern "C" int fsync(int file) {
  static const auto real = reinterpret_cast<int (*)(int)>(::dlsym(RTLD_NEXT, "fsync"));
  struct stat info;
  if (on_sync && ::fstat(file, &info) == 0) on_sync(info.st_mode);
  return real(file);
}
extern "C" int getentropy(void* out, size_t size) {
  static const auto real = reinterpret_cast<int (*)(void*, size_t)>(::dlsym(RTLD_NEXT, "getentropy"));
  if (!random_bytes || size != 8) return real(out, size);
  std::memcpy(out, random_bytes, 8);
  random_bytes = nullptr;
  return 0;
}

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

TEST_CASE("save keeps the mode of the file that it replaces, from its first byte on") {
  const Directory directory;
  const std::string path = directory.path / "book";
  const mode_t mask = ::umask(022);
  REQUIRE(some(1).save(path.c_str()).ok());
  CHECK(mode_of(path) == 0644);
  for (mode_t mode : {0600u, 0640u, 0664u, 0400u, 0777u}) {
    REQUIRE(::chmod(path.c_str(), mode) == 0);
    REQUIRE(some(2).save(path.c_str()).ok());
    CHECK(mode_of(path) == mode);
  }
  ::umask(mask);
  if (::chown(path.c_str(), 1, 2) == 0) {  // the superuser's save leaves a user's file to the user
    REQUIRE(some(3).save(path.c_str()).ok());
    struct stat info;
    REQUIRE(::stat(path.c_str(), &info) == 0);
    CHECK(info.st_uid == 1);
    CHECK(info.st_gid == 2);
  }
  CHECK(directory.names() == std::vector<std::string>{"book"});
}

TEST_CASE("save over a symbolic link replaces what it names") {
  const Directory directory;
  fs::create_directory(directory.path / "d");
  const std::string target = directory.path / "d" / "book";
  REQUIRE(some(1).save(target.c_str()).ok());
  const fs::path relative = directory.path / "relative", chain = directory.path / "chain",
                 absolute = directory.path / "d" / "absolute", dangling = directory.path / "dangling";
  fs::create_symlink("d/book", relative);
  fs::create_symlink("d/../relative", chain);
  fs::create_symlink(target, absolute);
  fs::create_symlink("d/new", dangling);
  uint64_t seed = 2;
  for (const fs::path& link : {relative, chain, absolute, dangling}) {
    CAPTURE(link.string());
    const Codebook book = some(seed++);
    REQUIRE(book.save(link.c_str()).ok());
    CHECK(fs::is_symlink(link));
    Codebook back;
    REQUIRE(Codebook::load((link == dangling ? directory.path / "d" / "new" : fs::path(target)).c_str(), &back).ok());
    CHECK(back.fingerprint() == book.fingerprint());
  }
  const fs::path round = directory.path / "round", lost = directory.path / "lost", folder = directory.path / "folder";
  fs::create_symlink("round", round);
  fs::create_symlink("none/book", lost);
  fs::create_symlink("d", folder);
  fails(some(1).save(round.c_str()), "write " + round.string() + ": Too many levels of symbolic links");
  fails(some(1).save(lost.c_str()), "write " + lost.string() + ": No such file or directory");
  fails(some(1).save(folder.c_str()), "write " + folder.string() + ": Is a directory");
  const std::string in_folder = folder / "book";  // the folder's part of a path may be a link, as ever
  CHECK(some(1).save(in_folder.c_str()).ok());
}

TEST_CASE("save replaces regular files only") {
  const Directory directory;
  const std::string pipe = directory.path / "pipe", link = directory.path / "link", node = directory.path / "socket",
                    device = directory.path / "device";
  const std::string expected = ": expected a regular file, got a ";
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  fs::create_symlink("pipe", link);
  for (const std::string& path : {pipe, link}) fails(some(1).save(path.c_str()), "write " + path + expected + "pipe");
  const int socket = ::socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  node.copy(name.sun_path, sizeof name.sun_path - 1);
  REQUIRE(::bind(socket, reinterpret_cast<const sockaddr*>(&name), sizeof name) == 0);
  fails(some(1).save(node.c_str()), "write " + node + expected + "socket");
  ::close(socket);
  if (::mknod(device.c_str(), S_IFCHR | 0600, ::makedev(1, 3)) == 0)  // a superuser's, where that is allowed
    fails(some(1).save(device.c_str()), "write " + device + expected + "device");
  CHECK(fs::is_fifo(pipe));
  CHECK(fs::is_symlink(link));
  CHECK(fs::is_socket(node));
}

TEST_CASE("save writes into no file or link that is there already") {
  const Directory directory;
  const std::string path = directory.path / "book", victim = directory.path / "victim";
  std::ofstream(victim) << "mine";
  const std::string name = directory.path / ".hisac-6867666564636261.part";  // abcdefgh, as a number
  fs::create_symlink(victim, name);
  random_bytes = "abcdefgh";
  REQUIRE(some(1).save(path.c_str()).ok());
  CHECK(random_bytes == nullptr);
  CHECK(content(victim) == "mine");
  CHECK(fs::is_symlink(name));
}

TEST_CASE("the part of a save that was killed goes with the next into its folder, nothing else does") {
  const Directory directory;
  const std::string path = directory.path / "book";
  const auto others = {".hisac-.part",
                       ".hisac-0123456789abcdef.part.x",
                       ".hisac-0123456789abcdeg.part",
                       ".hisac-0123456789abcdef0.part",
                       ".hisac-0123456789abcde.part",
                       ".hisac-0123456789ABCDEF.part",
                       ".hisac-1-0123456789abcdef.part",
                       "hisac-0123456789abcdef.part",
                       "book.0123456789abcdef.part"};
  for (const char* other : others) std::ofstream(directory.path / other) << "mine";
  fs::create_directory(directory.path / ".hisac-0123456789abcde0.part");
  fs::create_symlink(".hisac-.part", directory.path / ".hisac-0123456789abcde1.part");
  const std::string stranger = directory.path / ".hisac-0123456789abcde2.part";
  std::ofstream(stranger) << "theirs";
  if (::chown(stranger.c_str(), 1, 1) != 0) fs::remove(stranger);  // the superuser alone can give a file away
  const size_t before = directory.names().size();
  for (int round = 0; round < 3; ++round) {
    int status = 0;
    const std::string target = directory.path / ("book" + std::to_string(round));
    ::waitpid(saving(some(1, 200), target, [] { ::raise(SIGKILL); }), &status, 0);
    CHECK(WIFSIGNALED(status));
  }
  CHECK(directory.names().size() == before + 1);  // each has removed the one before it
  REQUIRE(some(2).save(path.c_str()).ok());
  CHECK(directory.names().size() == before + 1);
  CHECK(fs::exists(path));
}

TEST_CASE("the part of a save that goes on is not removed by another") {
  const Directory directory;
  const std::string path = directory.path / "book";
  const Codebook slow = some(1, 200), quick = some(2);
  int status = 0;
  const pid_t child = saving(slow, path, [] { ::raise(SIGSTOP); });
  REQUIRE(::waitpid(child, &status, WUNTRACED) == child);
  REQUIRE(WIFSTOPPED(status));
  CHECK(quick.save(path.c_str()).ok());
  CHECK(directory.names().size() == 2);
  ::kill(child, SIGCONT);
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  Codebook back;
  REQUIRE(Codebook::load(path.c_str(), &back).ok());
  CHECK(back.fingerprint() == slow.fingerprint());
  CHECK(directory.names() == std::vector<std::string>{"book"});
}

TEST_CASE("save syncs the file, private like the old one, then the folder") {
  const Directory directory;
  const std::string path = directory.path / "book";
  std::ofstream(path) << "old";
  REQUIRE(::chmod(path.c_str(), 0600) == 0);
  std::vector<std::string> seen;
  on_sync = [&](mode_t mode) {
    const std::string kind = S_ISDIR(mode) ? "folder" : (mode & 07777) == 0600 ? "file 0600" : "file";
    seen.push_back(kind + (content(path) == "old" ? ", old" : ", new"));
  };
  const Status status = some(1).save(path.c_str());
  on_sync = nullptr;
  CHECK(status.ok());
  CHECK(seen == std::vector<std::string>{"file 0600, old", "folder, new"});
}

TEST_CASE("load what is not there, a directory, a device, a pipe, an empty file") {
  const Directory directory;
  Codebook book = some(4);
  const uint64_t before = book.fingerprint();
  const std::string none = directory.path / "none", pipe = directory.path / "pipe", empty = directory.path / "empty";
  fails(Codebook::load(none.c_str(), &book), "open " + none + ": No such file or directory");
  fails(Codebook::load(directory.path.c_str(), &book), "read " + directory.path.string() + ": Is a directory");
  fails(Codebook::load("/dev/null", &book), "read /dev/null: expected a regular file, got a device");
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  fails(Codebook::load(pipe.c_str(), &book),
        "read " + pipe + ": expected a regular file, got a pipe");  // without waiting
  std::ofstream(empty).flush();
  const Status status = Codebook::load(empty.c_str(), &book);
  CHECK(std::string(status.what()) == "codebook file: expected at least 8 bytes");
  CHECK(book.fingerprint() == before);
}
