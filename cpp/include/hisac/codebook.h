// SPDX-License-Identifier: Apache-2.0
// The global hierarchical codebook (HiSAC, arXiv 2602.21009): L levels of codewords and the tree of all code prefixes.
#pragma once
#include "array.h"
#include "context.h"
#include "status.h"

namespace hisac {

constexpr int kMaxLevels = 8;

/// What `fit` saw (hisac/fit.h).
struct FitReport {
  int64_t rows = 0, left_out = 0;       // rows that took part; rows that did not
  int32_t iterations[kMaxLevels] = {};  // rounds until nothing moved, or the most allowed
  double error[kMaxLevels] = {};        // mean squared distance of a row to its quantisation after the level
  int64_t unused[kMaxLevels] = {};      // codes that no row has
};

/// The default temperature of a codebook that `fit` made is this times the mean squared distance of a row to its leaf,
/// the last error of the report. So it follows the scale of x.
constexpr double kTemperatureOfError = 0.05;

/// Immutable; any number of threads may share one. A leaf is a full code (c_1 .. c_L); its number is the mixed-radix
/// number of its codes, ((c_1 C_2 + c_2) C_3 + c_3) ...; a parent's number is its child's, divided by the child level's
/// size. A leaf's prototype is the sum of the codewords on the path to it.
///
/// A codebook is bytes: its image holds the centers and what stands beside them, in one piece and without pointers, the
/// same bytes on every machine. `view` makes a Codebook of an image that lies anywhere, in a mapped file or in memory
/// that processes share.
///
/// build, parse, load and save allocate; no other call does. build, parse, load and view replace *out even if other
/// threads read it: load into a new Codebook, and then let the threads see that one. After an error *out is unchanged.
/// Of an empty Codebook, levels, width, fingerprint, temperature and file_size are 0, and image and report are null;
/// the other accessors are undefined.
class Codebook {
 public:
  Codebook() noexcept = default;
  ~Codebook();
  Codebook(Codebook&& other) noexcept { *this = static_cast<Codebook&&>(other); }
  Codebook& operator=(Codebook&& other) noexcept;

  /// centers: `levels` arrays [C_l, D] of finite values. There are 1 to 8 levels, C_l and D are 1 to 2^20 each, and the
  /// product of the C_l is at most 2^64. report: of the fit that made them, or null. temperature: the default of
  /// `route`, finite; 0: the one that follows from the report, or none without a report.
  static Status build(const Array<const float, 2>* centers, int levels, Codebook* out,
                      const FitReport* report = nullptr, float temperature = 0) noexcept;

  /// The image: a head with fingerprint, sizes, checksum, temperature and report; each level's centers, aligned to 64;
  /// what the verbs read on a GPU. Aligned to 64, and there as long as the codebook.
  Array<const std::byte, 1> image() const noexcept;
  /// A codebook of an image [any] at an address that is a multiple of 64. It packs the centers for this processor into
  /// `scratch`, which has at least view_scratch(image) bytes and is aligned to 64. Both stay the caller's and have to
  /// live as long as *out. The checksum, the fingerprint and every size are checked: Code::corrupt_file.
  static Status view(Array<const std::byte, 1> image, Array<std::byte, 1> scratch, Codebook* out) noexcept;
  /// 0 where the head is not that of an image.
  static size_t view_scratch(Array<const std::byte, 1> image) noexcept;

  /// safetensors: tensors "centers.0" .. (F32), metadata format, version and fingerprint (checked), and temperature and
  /// report where there are any. `save` writes aside, in the same folder, and renames: readers see the old file or the
  /// new one, which keeps the old one's mode and, where it may, its owner and group. If `path` is a symbolic link, the
  /// link stays and the file that it names is replaced. load and save refuse a file that is not a regular one. save
  /// removes from the folder what killed writers have left there (.hisac-<16 hex digits>.part).
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
  float temperature() const noexcept;                  // the default of `route`; 0: none
  const FitReport* report() const noexcept;            // null: none
  bool valid(const int32_t* codes) const noexcept;     // [L]: every level in range
  uint64_t leaf(const int32_t* codes) const noexcept;  // [L], valid: the leaf's number
  void prototype(const int32_t* codes, float* out) const noexcept;  // [L] -> [D]; zero for an invalid code

  struct Body;
  const Body& body() const noexcept { return *body_; }  // the kernels' packed form; src/codebook/body.h

 private:
  Body* body_ = nullptr;    // at the start of the scratch
  void* memory_ = nullptr;  // scratch and image, where they are its own
};

/// codes [n, L] -> leaf numbers [n], -1 for an invalid code. An error where the leaves do not fit in int64.
Status leaves(const Codebook& book, Array<const int32_t, 2> codes, Array<int64_t, 1> out) noexcept;

/// codes [n, L] -> prototypes [n, D]: the codewords added from the root down; zero for an invalid code.
Status code_prototypes(const Context& context, const Codebook& book, Array<const int32_t, 2> codes,
                       Array<float, 2> out) noexcept;

}  // namespace hisac
