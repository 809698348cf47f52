// SPDX-License-Identifier: Apache-2.0
// Every launch twice: as C++, then, from the same memory, as PTX. The kernel is found by the name of the function that
// is launched, in the program's own table of symbols; the arrays by the pointers among its parameters.
#include <elf.h>
#include <link.h>

#include <cstdio>
#include <map>
#include <mutex>
#include <new>
#include <sstream>

#include "../cpp/support.h"
#include "ptx.h"

namespace ptx {
namespace {

template <class T>
struct Plain {  // memory that is no array of a test
  using value_type = T;
  Plain() = default;
  template <class U>
  Plain(const Plain<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(std::malloc(n * sizeof(T))); }
  void deallocate(T* p, size_t) { std::free(p); }
  bool operator==(const Plain&) const { return true; }
  bool operator!=(const Plain&) const { return false; }
};
using Held = std::map<uintptr_t, size_t, std::less<>, Plain<std::pair<const uintptr_t, size_t>>>;

struct Arrays {
  std::mutex mutex;
  Held held;
  bool closed = false;  // to what the emulator and the interpreter allocate: stray pointers in padding may reach it
  void add(const void* p, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!closed) held[reinterpret_cast<uintptr_t>(p)] = bytes;
  }
  void remove(const void* p) {
    const std::lock_guard<std::mutex> lock(mutex);
    held.erase(reinterpret_cast<uintptr_t>(p));
  }
};
Arrays& arrays() {
  alignas(Arrays) static char memory[sizeof(Arrays)];  // never destroyed
  static Arrays* const a = new (memory) Arrays;
  return *a;
}

/// The arrays that a launch's parameters point into.
std::vector<Range> reached(const simt::Launch& launch) {
  std::vector<Range> out;
  const Held& held = arrays().held;
  for (size_t k = 0; k < launch.count; ++k)
    for (size_t i = 0; i + 8 <= launch.sizes[k]; i += 8) {
      uintptr_t address;
      std::memcpy(&address, static_cast<const char*>(launch.parameters[k]) + i, 8);
      auto array = held.upper_bound(address);
      if (array == held.begin()) continue;
      --array;
      const Range r = {array->first, array->first + array->second};
      const auto same = [&](const Range& o) { return o.begin == r.begin; };
      if (r.holds(address, 1) && std::none_of(out.begin(), out.end(), same)) out.push_back(r);
    }
  return out;
}

/// A name as every compiler would give it: its part for the unnamed namespace is the compiler's own.
std::string common(std::string name) {
  const std::string mark = "_GLOBAL__N_";
  const size_t begin = name.find(mark);
  size_t digits = begin;
  if (begin == std::string::npos) return name;
  while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1]))) --digits;
  return name.replace(digits, begin - digits + std::stoul(name.substr(digits, begin - digits)), "1_");
}

/// The program's functions by their addresses.
std::map<uintptr_t, std::string> symbols() {
  uintptr_t base = 0;
  dl_iterate_phdr([](dl_phdr_info* i, size_t, void* out) { return *static_cast<uintptr_t*>(out) = i->dlpi_addr, 1; },
                  &base);
  const std::string file = read("/proc/self/exe");
  const auto* const header = reinterpret_cast<const ElfW(Ehdr)*>(file.data());
  const auto* const sections = reinterpret_cast<const ElfW(Shdr)*>(file.data() + header->e_shoff);
  std::map<uintptr_t, std::string> out;
  for (int s = 0; s < header->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const auto* const symbol = reinterpret_cast<const ElfW(Sym)*>(file.data() + sections[s].sh_offset);
    const char* const names = file.data() + sections[sections[s].sh_link].sh_offset;
    for (size_t i = 0; i < sections[s].sh_size / sizeof *symbol; ++i)
      if ((symbol[i].st_info & 15) == STT_FUNC && symbol[i].st_value)
        out[base + symbol[i].st_value] = names + symbol[i].st_name;
  }
  return out;
}

std::deque<std::pair<std::string, std::string>> texts;  // not yet parsed
std::deque<Module> modules;

const Function& kernel_of(const void* launched, const Module** module) {
  static const std::map<uintptr_t, std::string> names = symbols();
  static std::map<std::string, std::pair<const Module*, const Function*>> kernels;
  const auto name = names.find(reinterpret_cast<uintptr_t>(launched));
  if (name == names.end()) refuse("a kernel without a symbol", "the program", 0);
  const std::string wanted = common(name->second);
  for (; !kernels.count(wanted) && !texts.empty(); texts.pop_front()) {
    modules.emplace_back(texts.front().first, texts.front().second);
    for (const auto& [key, function] : modules.back().functions) kernels[common(key)] = {&modules.back(), &function};
  }
  if (!kernels.count(wanted)) refuse("no PTX of " + name->second, "the program", 0);
  *module = kernels[wanted].first;
  return *kernels[wanted].second;
}

using Bytes = std::vector<std::byte>;
std::vector<Bytes> bytes_of(const std::vector<Range>& ranges) {
  std::vector<Bytes> out;
  for (const Range& r : ranges)
    out.emplace_back(reinterpret_cast<std::byte*>(r.begin), reinterpret_cast<std::byte*>(r.end));
  return out;
}

void launch_both(const simt::Launch& launch) {
  arrays().closed = true;
  const Module* module = nullptr;
  const Function& kernel = kernel_of(launch.kernel, &module);
  const std::vector<Range> ranges = reached(launch);
  const std::vector<Bytes> before = bytes_of(ranges);
  simt::run(launch.blocks, launch.threads, launch.shared_bytes, launch.body, launch.argument);
  const std::vector<Bytes> expected = bytes_of(ranges);
  for (size_t k = 0; k < ranges.size(); ++k)
    if (!before[k].empty()) std::memcpy(reinterpret_cast<void*>(ranges[k].begin), before[k].data(), before[k].size());
  run(*module, kernel, ranges, launch);
  for (size_t k = 0; k < ranges.size(); ++k) {
    const auto* const got = reinterpret_cast<const std::byte*>(ranges[k].begin);
    for (size_t i = 0; i < expected[k].size(); i += 4) {
      uint32_t a = 0, b = 0;
      std::memcpy(&a, got + i, std::min<size_t>(4, expected[k].size() - i));
      std::memcpy(&b, &expected[k][i], std::min<size_t>(4, expected[k].size() - i));
      const bool nan = (a & 0x7fffffff) > 0x7f800000;  // its sign is what the compiler of the C++ made of it
      if (a == b || (nan && (a ^ b) == 0x80000000u)) continue;
      std::fprintf(stderr, "ptx: %s leaves %08x, expected %08x, in byte %zu of %zu of its array %zu\n",
                   kernel.name.c_str(), a, b, i, expected[k].size(), k);
      std::_Exit(71);
    }
  }
  arrays().closed = false;
}

}  // namespace

void load_ptx(std::string name, std::string text) {
  texts.emplace_back(std::move(name), std::move(text));
  simt::instead = launch_both;
  test::on_guarded = [](const void* p, size_t bytes) { bytes ? arrays().add(p, bytes) : arrays().remove(p); };
}

void load_ptx_files(const std::string& paths) {
  std::stringstream in(paths);
  for (std::string path; std::getline(in, path, ':');) load_ptx(path.substr(path.rfind('/') + 1), read(path));
}

}  // namespace ptx

void* operator new(size_t bytes) {
  void* const p = std::malloc(bytes ? bytes : 1);
  if (!p) std::abort();
  ptx::arrays().add(p, bytes);
  return p;
}
void operator delete(void* p) noexcept {
  if (p) ptx::arrays().remove(p);
  std::free(p);
}
void operator delete(void* p, size_t) noexcept { operator delete(p); }
