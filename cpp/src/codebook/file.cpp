// SPDX-License-Identifier: Apache-2.0
// A codebook as safetensors: 8 bytes of header length (little-endian), the header (codebook/header.h), then the
// tensors' bytes. The fingerprint is checked last. A file's head is read and checked before memory is asked for its
// payload.
//
// A file is written aside, as .hisac-<16 hex digits>.part in the target's folder, and renamed. Its writer holds a lock
// of it (flock), which ends with the process: what nobody holds is left of one that was killed, and the next save into
// the folder removes it.
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "codebook/checks.h"
#include "codebook/header.h"

namespace hisac {
namespace {

constexpr size_t kLongestHeader = 1 << 20, kMostPath = 4096;

/// data: the payload.
Status assemble(const FileHeader& h, const void* data, Codebook* out) noexcept {
  Array<const float, 2> centers[kMaxLevels];
  for (int l = 0; l < h.levels; ++l)
    centers[l] = {static_cast<const float*>(data) + h.range[l][0] / 4,
                  {static_cast<int64_t>(h.shape[l][0]), static_cast<int64_t>(h.shape[l][1])}};
  Codebook book;
  const Status status = Codebook::build(centers, h.levels, &book, h.report.rows ? &h.report : nullptr, h.temperature);
  if (status.code() == Code::out_of_memory) return status;
  if (!status.ok()) return Status::error(Code::corrupt_file, "codebook file: %s", status.what());
  if (book.fingerprint() != h.fingerprint)
    return Status::error(Code::corrupt_file,
                         "codebook file: fingerprint expected %016" PRIx64 ", the centers have %016" PRIx64,
                         h.fingerprint, book.fingerprint());
  *out = static_cast<Codebook&&>(book);
  return {};
}

struct Bytes {
  explicit Bytes(uint64_t n) noexcept : data(static_cast<char*>(std::malloc(n ? n : 1))), size(n) {}
  ~Bytes() { std::free(data); }
  Status check() const noexcept {
    if (data) return {};
    return Status::error(Code::out_of_memory, "codebook file: out of memory for %" PRIu64 " bytes", size);
  }
  char* const data;
  const uint64_t size;
};

/// A codebook from `size` bytes, of which take(data, count) copies the next.
template <class Take>
Status read_book(uint64_t size, Take take, Codebook* out) noexcept {
  uint64_t length = 0;
  if (size < 8) return corrupt("expected at least 8 bytes");
  HISAC_TRY(take(&length, 8));
  if (length > kLongestHeader || length > size - 8) return corrupt("the header is longer than the file, or than 1 MiB");
  FileHeader h;
  {
    const Bytes text(length);
    HISAC_TRY(text.check());
    HISAC_TRY(take(text.data, length));
    HISAC_TRY(read_header(text.data, length, size - 8 - length, &h));
  }
  const Bytes data(size - 8 - length);
  HISAC_TRY(data.check());
  HISAC_TRY(take(data.data, data.size));
  return assemble(h, data.data, out);
}

/// sink(data, bytes) takes a file's parts in order, until it returns false.
template <class Sink>
bool emit(const Codebook& book, Sink sink) noexcept {
  char text[kMostHeader];
  const uint64_t length = write_header(book, text);
  if (!sink(&length, sizeof length) || !sink(text, length)) return false;
  for (int l = 0; l < book.levels(); ++l)
    if (!sink(book.centers(l), static_cast<size_t>(book.size(l) * book.width()) * 4)) return false;
  return true;
}

// ---- the file system; errno stays that of the failure

struct File {
  ~File() {
    const int error = errno;
    if (fd >= 0) ::close(fd);
    errno = error;
  }
  const int fd;
};

Status os_error(const char* what, const char* path) noexcept {
  return Status::error(Code::io_error, "codebook file: cannot %s %.120s: %s", what, path, std::strerror(errno));
}

Status check_regular(mode_t mode, const char* what, const char* path) noexcept {
  if (S_ISREG(mode)) return {};
  errno = S_ISDIR(mode) ? EISDIR : EINVAL;
  if (S_ISDIR(mode)) return os_error(what, path);
  return Status::error(Code::io_error, "codebook file: cannot %s %.120s: expected a regular file, got a %s", what, path,
                       S_ISFIFO(mode)   ? "pipe"
                       : S_ISSOCK(mode) ? "socket"
                                        : "device");
}

Status read(int file, void* out, size_t size, const char* path) noexcept {
  for (size_t at = 0; at < size;) {
    const ssize_t got = ::read(file, static_cast<char*>(out) + at, size - at);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return os_error("read", path);
    if (got == 0) return corrupt("the file became shorter while it was read");
    at += static_cast<size_t>(got);
  }
  return {};
}

bool write(int file, const void* data, size_t size) noexcept {
  for (size_t at = 0; at < size;) {
    const ssize_t put = ::write(file, static_cast<const char*>(data) + at, size - at);
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) return false;
    at += static_cast<size_t>(put);
  }
  return true;
}

/// target [kMostPath]: the file that `path` names through symbolic links; it need not be there.
bool follow(const char* path, char* target) noexcept {
  size_t at = 0, length = std::strlen(path);
  char link[kMostPath];
  for (int links = 0; links <= 40; ++links) {
    if (at + length >= kMostPath) return errno = ENAMETOOLONG, false;
    std::memcpy(target + at, links ? link : path, length);
    target[at + length] = 0;
    const ssize_t got = ::readlink(target, link, sizeof link);
    if (got < 0) return true;
    struct stat info;  // asked, so that the kernel may refuse to follow another user's link
    if (::stat(target, &info) != 0 && errno != ENOENT) return false;
    length = static_cast<size_t>(got);
    const char* const slash = std::strrchr(target, '/');
    at = link[0] == '/' || !slash ? 0 : static_cast<size_t>(slash + 1 - target);
  }
  return errno = ELOOP, false;
}

bool is_part(std::string_view name) noexcept {
  return name.size() == 28 && name.substr(0, 7) == ".hisac-" && is_hex16(name.substr(7, 16)) &&
         name.substr(23) == ".part";
}

/// Removes what killed writers have left in the folder: of this user, and locked by nobody.
void sweep(const char* folder) noexcept {
  DIR* const all = ::opendir(folder);
  if (!all) return;
  const int at = ::dirfd(all);
  while (const dirent* const entry = ::readdir(all)) {
    struct stat info;
    if (!is_part(entry->d_name) || ::fstatat(at, entry->d_name, &info, AT_SYMLINK_NOFOLLOW) != 0 ||
        !S_ISREG(info.st_mode) || info.st_uid != ::geteuid())
      continue;
    const File part{::openat(at, entry->d_name, O_WRONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC)};
    if (part.fd >= 0 && ::flock(part.fd, LOCK_EX | LOCK_NB) == 0) ::unlinkat(at, entry->d_name, 0);
  }
  ::closedir(all);
}

/// A new file in the folder, locked; its path in part [kMostPath]. -1 where there is none.
int create_part(const char* folder, mode_t mode, char* part) noexcept {
  for (int attempt = 0; attempt < 100; ++attempt) {
    uint64_t random;
    if (::getentropy(&random, sizeof random) != 0) return -1;
    if (std::snprintf(part, kMostPath, "%s/.hisac-%016" PRIx64 ".part", folder, random) >= static_cast<int>(kMostPath))
      return errno = ENAMETOOLONG, -1;
    const int file = ::open(part, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
    if (file < 0 && errno == EEXIST) continue;
    if (file < 0) return -1;
    struct stat info;
    const bool held = ::flock(file, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
    if (!held && ::fstat(file, &info) == 0 && info.st_nlink > 0) return file;
    ::close(file);  // another save has just swept it
    ::unlink(part);
  }
  return -1;
}

/// Owner, group and mode of the file that is replaced, as far as this user may; a group that has to change gets no more
/// than others.
void keep_mode(int file, const struct stat& old) noexcept {
  mode_t mode = old.st_mode & 0777;
  if (::fchown(file, old.st_uid, old.st_gid) != 0 && ::fchown(file, static_cast<uid_t>(-1), old.st_gid) != 0)
    mode &= ~mode_t{070} | (mode & 07) << 3;
  (void)::fchmod(file, mode);
}

/// False where the folder's entry may be lost; what cannot be synced is as good as it gets.
bool sync_folder(const char* folder) noexcept {
  const File file{::open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
  return file.fd < 0 || ::fsync(file.fd) == 0 || errno != EIO;
}

}  // namespace

Status Codebook::parse(const void* bytes, size_t size, Codebook* out) noexcept {
  const char* p = static_cast<const char*>(bytes);
  const auto take = [&](void* data, size_t count) {
    std::memcpy(data, p, count);
    p += count;
    return Status();
  };
  return read_book(size, take, out);
}

size_t Codebook::file_size() const noexcept {
  size_t total = 0;
  if (body_) emit(*this, [&](const void*, size_t bytes) { return total += bytes, true; });
  return total;
}

Status Codebook::serialize(Array<std::byte, 1> out) const noexcept {
  HISAC_TRY(check_book("serialize", this));
  const size_t need = file_size();
  if (out.shape[0] < 0 || static_cast<size_t>(out.shape[0]) != need)
    return invalid("serialize: out expected %zu bytes, got %" PRId64, need, out.shape[0]);
  std::byte* p = out.data;
  emit(*this, [&](const void* data, size_t bytes) {
    std::memcpy(p, data, bytes);
    return p += bytes, true;
  });
  return {};
}

Status Codebook::load(const char* path, Codebook* out) noexcept {
  const File file{::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  struct stat info;
  if (file.fd < 0) return os_error("open", path);
  if (::fstat(file.fd, &info) != 0) return os_error("read", path);
  HISAC_TRY(check_regular(info.st_mode, "read", path));
  const auto take = [&](void* data, size_t count) { return read(file.fd, data, count, path); };
  return read_book(static_cast<uint64_t>(info.st_size), take, out);
}

Status Codebook::save(const char* path) const noexcept {
  HISAC_TRY(check_book("save", this));
  char target[kMostPath], folder[kMostPath], part[kMostPath];
  if (!follow(path, target)) return os_error("write", path);
  const char* const slash = std::strrchr(target, '/');
  std::snprintf(folder, sizeof folder, "%.*s.", slash ? static_cast<int>(slash + 1 - target) : 0, target);
  struct stat old;
  const bool replaces = ::lstat(target, &old) == 0;
  if (replaces) HISAC_TRY(check_regular(old.st_mode, "write", path));
  sweep(folder);
  const File file{create_part(folder, replaces ? 0600 : 0666, part)};
  if (file.fd < 0) return os_error("write", path);
  bool done = emit(*this, [&](const void* data, size_t bytes) { return write(file.fd, data, bytes); });
  if (done && replaces) keep_mode(file.fd, old);
  done = done && ::fsync(file.fd) == 0 && ::rename(part, target) == 0;
  if (done && sync_folder(folder)) return {};
  const int error = errno;
  if (!done) ::unlink(part);
  errno = error;
  return os_error("write", path);
}

}  // namespace hisac
