// SPDX-License-Identifier: Apache-2.0
// The global hierarchical codebook (HiSAC, arXiv 2602.21009): L levels of codewords and the tree of all code prefixes.
#pragma once
#include "array.h"
#include "context.h"
#include "status.h"

namespace hisac {

constexpr int kMaxLevels = 8;

/// Immutable; any number of threads may share one. A leaf is a full code (c_1 .. c_L); its number is the mixed-radix
/// number of its codes, ((c_1 C_2 + c_2) C_3 + c_3) ...; a parent's number is its child's, divided by the child level's
/// size. A leaf's prototype is the sum of the codewords on the path to it.
///
/// build, parse, load and save allocate; no other call does. build, parse and load replace *out even if other threads
/// read it: load into a new Codebook, and then let the threads see that one. After an error *out is unchanged. Of an
/// empty Codebook, levels, width, fingerprint and file_size are 0; the other accessors are undefined.
class Codebook {
 public:
  Codebook() noexcept = default;
  ~Codebook();
  Codebook(Codebook&& other) noexcept : body_(other.body_) { other.body_ = nullptr; }
  Codebook& operator=(Codebook&& other) noexcept;

  /// centers: `levels` arrays [C_l, D] of finite values. There are 1 to 8 levels, C_l and D are 1 to 2^20 each, and the
  /// product of the C_l is at most 2^64.
  static Status build(const Array<const float, 2>* centers, int levels, Codebook* out) noexcept;

  /// safetensors: tensors "centers.0" .. (F32), metadata format, version and fingerprint (checked). `save` writes
  /// aside, in the same folder, and renames: readers see the old file or the new one, which keeps the old one's mode
  /// and, where it may, its owner and group. If `path` is a symbolic link, the link stays and the file that it names is
  /// replaced. load and save refuse a file that is not a regular one. save removes from the folder what killed writers
  /// have left there (.hisac-<16 hex digits>.part).
  static Status load(const char* path, Codebook* out) noexcept;
  static Status parse(const void* bytes, size_t size, Codebook* out) noexcept;
  Status save(const char* path) const noexcept;
  size_t file_size() const noexcept;
  Status serialize(Array<std::byte, 1> out) const noexcept;

  bool empty() const noexcept { return body_ == nullptr; }
  int levels() const noexcept;
  int64_t width() const noexcept;                      // D
  int64_t size(int level) const noexcept;              // C_l
  const float* centers(int level) const noexcept;      // [C_l, D]
  uint64_t fingerprint() const noexcept;               // FNV-1a of D, then of each level C_l and its centers
  bool valid(const int32_t* codes) const noexcept;     // [L]: every level in range
  uint64_t leaf(const int32_t* codes) const noexcept;  // [L], valid: the leaf's number
  void prototype(const int32_t* codes, float* out) const noexcept;  // [L] -> [D]; zero for an invalid code

  struct Body;
  const Body& body() const noexcept { return *body_; }  // the kernels' packed form; src/codebook/body.h

 private:
  Body* body_ = nullptr;
};

/// codes [n, L] -> leaf numbers [n], -1 for an invalid code. An error where the leaves do not fit in int64.
Status leaves(const Codebook& book, Array<const int32_t, 2> codes, Array<int64_t, 1> out) noexcept;

/// codes [n, L] -> prototypes [n, D]: the codewords added from the root down; zero for an invalid code.
Status code_prototypes(const Context& context, const Codebook& book, Array<const int32_t, 2> codes,
                       Array<float, 2> out) noexcept;

/// The codebook as the verbs read it on a GPU. Fill it once on the host, copy it to the device by any means, aligned to
/// 64 there, and name it in Context::codebook_image. The same bytes on every machine.
size_t codebook_image_size(const Codebook& book) noexcept;
Status codebook_image(const Codebook& book, Array<std::byte, 1> out) noexcept;

}  // namespace hisac
