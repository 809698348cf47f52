// SPDX-License-Identifier: Apache-2.0
// A codebook as safetensors: 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes.
//
//   {"__metadata__":{"fingerprint":"<16 hex digits>","format":"hisac.codebook","version":"1"},
//    "centers.0":{"dtype":"F32","shape":[C,D],"data_offsets":[begin,end]}, ...}
//
// Files are hostile: the parser takes the strict subset of JSON that the format needs (objects, strings without escapes
// other than \" and \\, unsigned integers, arrays of them), checks every bound before use, and the fingerprint last. A
// file's head is read and checked before memory is asked for its payload.
//
// A file is written aside, as .hisac-<16 hex digits>.part in the target's folder, and renamed. Its writer holds a lock
// of it (flock), which ends with the process: what nobody holds is left of one that was killed, and the next save into
// the folder removes it.
#include <cerrno>
#include <charconv>
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

#include "codebook/body.h"
#include "codebook/checks.h"

namespace hisac {
namespace {

constexpr size_t kMostHeader = 1 << 20, kMostPath = 4096;

Status corrupt(const char* what) noexcept { return Status::error(Code::corrupt_file, "codebook file: %s", what); }

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
  int levels = 0;
  bool format = false, fingerprint = false, level[kMaxLevels] = {};
  char version_text[32] = {};
  uint64_t print = 0;
  uint64_t shape[kMaxLevels][2] = {}, range[kMaxLevels][2] = {};
};

bool is_hex16(std::string_view text) noexcept {
  return text.size() == 16 && text.find_first_not_of("0123456789abcdef") == text.npos;
}

Status parse_metadata(Parser& in, Header* h) noexcept {
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
      std::memset(h->version_text, 0, sizeof h->version_text);
      for (size_t i = 0; i < value.size() && i < 20; ++i)  // for the message, so plain ASCII
        h->version_text[i] = value[i] >= ' ' && value[i] <= '~' ? value[i] : '?';
    } else if (key == "fingerprint") {
      if (!is_hex16(value)) return corrupt("metadata fingerprint expected 16 hex digits");
      std::from_chars(value.data(), value.data() + value.size(), h->print, 16);
      h->fingerprint = true;
    }
  } while (in.take(','));
  in.expect('}');
  return {};
}

Status parse_tensor(Parser& in, std::string_view name, Header* h) noexcept {
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

Status parse_header(const char* begin, const char* end, Header* h) noexcept {
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
  if (!h->format || !h->fingerprint || !h->version_text[0])
    return corrupt("metadata expected format, version and fingerprint");
  if (std::strcmp(h->version_text, "1") != 0)
    return Status::error(Code::corrupt_file, "codebook file: version expected 1, got %s", h->version_text);
  return {};
}

/// text [length] -> the header of a file whose payload has so many bytes.
Status read_header(const char* text, uint64_t length, uint64_t payload, Header* h) noexcept {
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
  return at == payload ? Status() : corrupt("bytes left over after the last tensor");
}

/// data: the payload.
Status assemble(const Header& h, const void* data, Codebook* out) noexcept {
  Array<const float, 2> centers[kMaxLevels];
  for (int l = 0; l < h.levels; ++l)
    centers[l] = {static_cast<const float*>(data) + h.range[l][0] / 4,
                  {static_cast<int64_t>(h.shape[l][0]), static_cast<int64_t>(h.shape[l][1])}};
  Codebook book;
  const Status status = Codebook::build(centers, h.levels, &book);
  if (status.code() == Code::out_of_memory) return status;
  if (!status.ok()) return Status::error(Code::corrupt_file, "codebook file: %s", status.what());
  if (book.fingerprint() != h.print)
    return Status::error(Code::corrupt_file,
                         "codebook file: fingerprint expected %016" PRIx64 ", the centers have %016" PRIx64, h.print,
                         book.fingerprint());
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
  if (length > kMostHeader || length > size - 8) return corrupt("the header is longer than the file, or than 1 MiB");
  Header h;
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
  char text[2048];
  uint64_t length = 0;
  const auto add = [&](const char* format, auto... args) {
    length += static_cast<uint64_t>(std::snprintf(text + length, sizeof text - length, format, args...));
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
  while (length % 8) add("%s", " ");
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
    return Status::error(Code::invalid_argument, "serialize: out expected %zu bytes, got %" PRId64, need, out.shape[0]);
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
