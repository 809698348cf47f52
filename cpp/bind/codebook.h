// SPDX-License-Identifier: Apache-2.0
// hisac._core.Codebook: its files and its image.
#pragma once
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cerrno>

#include "arrays.h"
#include "runtime.h"

namespace hisac::bind {

using nb::literals::operator""_a;

inline void make_codebook(Codebook* self, const std::vector<View>& centers, float temperature) {
  Call call("Codebook", kOnlyCpu);
  std::vector<Array<const float, 2>> levels;
  for (const View& c : centers) levels.push_back(array<const float, 2>(c, call, "centers", "float32 [C, D]"));
  Codebook book;
  raise(Codebook::build(levels.data(), static_cast<int>(levels.size()), &book, nullptr, temperature));
  new (self) Codebook(std::move(book));
}

// The bytes of a path, as the system has it: it need not be UTF-8.
inline Codebook load_codebook(nb::bytes path) {
  Codebook book;
  int os_error = 0;
  const Status status = without_gil([&] {
    errno = 0;
    const Status done = Codebook::load(path.c_str(), &book);
    os_error = errno;
    return done;
  });
  raise(status, os_error);
  return book;
}

inline void save_codebook(const Codebook& book, nb::bytes path) {
  errno = 0;
  const Status status = book.save(path.c_str());
  raise(status, errno);
}

inline Codebook parse_codebook(nb::bytes bytes) {
  Codebook book;
  raise(Codebook::parse(bytes.c_str(), bytes.size(), &book));
  return book;
}

inline nb::bytes serialize_codebook(const Codebook& book) {
  std::string bytes(book.file_size(), '\0');
  raise(book.serialize({reinterpret_cast<std::byte*>(bytes.data()), {static_cast<int64_t>(bytes.size())}}));
  return nb::bytes(bytes.data(), bytes.size());
}

inline Codebook view_image(Lent image, Lent scratch) {
  Call call("Codebook", kOnlyCpu);
  const auto bytes = array<const uint8_t, 1>(image, call, "image", "uint8 [any]");
  const auto memory = array<uint8_t, 1>(scratch, call, "scratch", "uint8 [any]");
  Codebook book;
  raise(Codebook::view({reinterpret_cast<const std::byte*>(bytes.data), {bytes.shape[0]}},
                       {reinterpret_cast<std::byte*>(memory.data), {memory.shape[0]}}, &book));
  return book;
}

inline size_t view_scratch(Lent image) {
  Call call("Codebook", kOnlyCpu);
  const auto bytes = array<const uint8_t, 1>(image, call, "image", "uint8 [any]");
  return Codebook::view_scratch({reinterpret_cast<const std::byte*>(bytes.data), {bytes.shape[0]}});
}

/// (of(0), .., of(L - 1))
template <class F>
nb::tuple each_level(const Codebook& book, F of) {
  nb::list found;
  for (int l = 0; l < book.levels(); ++l) found.append(of(l));
  return nb::tuple(found);
}

inline nb::tuple sizes_of(const Codebook& book) {
  return each_level(book, [&](int l) { return book.size(l); });
}

/// The image, where it lies.
inline nb::object image_of(nb::handle self) {
  const Array<const std::byte, 1> image = nb::cast<const Codebook&>(self).image();
  const size_t size = static_cast<size_t>(image.shape[0]);
  return nb::cast(nb::ndarray<nb::numpy, const uint8_t>(image.data, 1, &size, self));
}

/// The centers, where they lie.
inline nb::tuple centers_of(nb::handle self) {
  const auto& book = nb::cast<const Codebook&>(self);
  return each_level(book, [&](int l) {
    const size_t shape[] = {static_cast<size_t>(book.size(l)), static_cast<size_t>(book.width())};
    return nb::cast(nb::ndarray<nb::numpy, const float>(book.centers(l), 2, shape, self));
  });
}

inline nb::object report_of(const Codebook& book) {
  const FitReport* const report = book.report();
  if (!report) return nb::none();
  const auto each = [&](const auto* of) { return each_level(book, [=](int l) { return of[l]; }); };
  return nb::make_tuple(report->rows, report->left_out, each(report->iterations), each(report->error),
                        each(report->unused));
}

inline void add_codebook(nb::module_& m) {
  nb::class_<Codebook>(m, "Codebook", nb::dynamic_attr())
      .def("__init__", make_codebook, "centers"_a, "temperature"_a = 0.f)
      .def_static("view", view_image, "image"_a, "scratch"_a, nb::keep_alive<0, 1>(), nb::keep_alive<0, 2>())
      .def_static("view_scratch", view_scratch, "image"_a)
      .def_static("load", load_codebook, "path"_a)
      .def_static("parse", parse_codebook, "data"_a)
      .def("save", save_codebook, "path"_a)
      .def("serialize", serialize_codebook)
      .def_prop_ro("sizes", sizes_of, nb::sig("def sizes(self) -> tuple[int, ...]"))
      .def_prop_ro("levels", &Codebook::levels)
      .def_prop_ro("width", &Codebook::width)
      .def_prop_ro("fingerprint", &Codebook::fingerprint)
      .def_prop_ro("temperature", &Codebook::temperature)
      .def_prop_ro("report", report_of,
                   nb::sig("def report(self) -> tuple[int, int, tuple[int, ...], tuple[float, ...], tuple[int, ...]] | "
                           "None"))
      .def_prop_ro("centers", centers_of,
                   nb::sig("def centers(self) -> tuple[numpy.typing.NDArray[numpy.float32], ...]"))
      .def_prop_ro("image", image_of, nb::sig("def image(self) -> numpy.typing.NDArray[numpy.uint8]"));
}

}  // namespace hisac::bind
