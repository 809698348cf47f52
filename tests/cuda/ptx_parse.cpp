// SPDX-License-Identifier: Apache-2.0
// PTX text to instructions. An instruction is known where its first word and the rest of its name match a row below;
// what its modifiers mean is then looked up word by word.
#include <cstdio>
#include <fstream>
#include <regex>
#include <sstream>
#include <utility>

#include "ptx.h"

namespace ptx {

void refuse(const std::string& what, const char* file, int line) {
  std::fprintf(stderr, "ptx: %s at %s:%d\n", what.c_str(), file, line);
  std::_Exit(70);
}

std::string read(const std::string& path) {
  std::ifstream in(path);
  if (!in) refuse("no such file", path.c_str(), 0);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

namespace {

/// What an instruction's name says; false where it is unknown.
bool named(const std::string& name, Instruction* out) {
  static std::unordered_map<std::string, Instruction> known;
  const auto seen = known.find(name);
  if (seen != known.end()) {
    *out = seen->second;
    return true;
  }
  std::vector<std::string> words;
  std::stringstream stream(name);
  for (std::string w; std::getline(stream, w, '.');) words.push_back(w);
  out->run = meaning(words[0], name.size() > words[0].size() ? name.substr(words[0].size() + 1) : "");
  if (!out->run) return false;
  static const std::regex types("(pred)|([busf]|bf)(8|16|32|64)(x2)?"), roundings("r[nzmp]i?"),
      spaces("global|shared|local|param|const");
  bool typed = false;
  for (const std::string& w : words) {
    std::smatch match;
    if (std::regex_match(w, match, types)) {
      const bool predicate = match[1].matched;
      out->from.kind = predicate ? 'b' : w[1] == 'f' ? 'h' : w[0];
      out->from.bytes = static_cast<uint8_t>(predicate ? 1 : std::stoi(match[3]) / 8);
      out->from.pair = match[4].matched;
      if (!std::exchange(typed, true)) out->type = out->from;
    }
    if (std::regex_match(w, roundings)) out->rounding = word(w.data(), w.size());
    if (std::regex_match(w, spaces)) out->space = w[0];
    if (w == "v2" || w == "v4") out->vector = static_cast<uint8_t>(w[1] - '0');
    out->ftz |= w == "ftz";
    out->sat |= w == "sat";
    out->words.push_back(word(w.data(), w.size()));
  }
  known[name] = *out;
  return true;
}

size_t bytes_of(const std::string& type) {  // .b32; predicates have none
  return type == ".pred" ? 0 : static_cast<size_t>(std::stoi(type.substr(type.find_first_of("0123456789")))) / 8;
}
size_t aligned(size_t n, size_t to) { return (n + to - 1) / to * to; }

class Parser {
 public:
  Parser(Module& module, const std::string& text) : m_(module), text_(text) {}

  void run() {
    for (const auto& [name, slot] : {std::pair("%tid.x", kThread),
                                     {"%ntid.x", kThreads},
                                     {"%ctaid.x", kBlock},
                                     {"%nctaid.x", kBlocks},
                                     {"%laneid", kLane},
                                     {"_", kSink}})
      names_[name].slot = slot;
    while (!at_end()) statement();
    m_.static_shared = aligned(m_.static_shared, 128);
  }

 private:
  [[noreturn]] void fail(const std::string& what) { refuse(what, m_.file.c_str(), line_of(at_)); }

  /// For places that come one after another.
  int line_of(size_t place) {
    for (; counted_ < place; ++counted_) line_ += text_[counted_] == '\n';
    return line_;
  }
  void skip() {
    for (; at_ < text_.size(); ++at_) {
      if (text_.compare(at_, 2, "//") == 0) at_ = std::min(text_.find('\n', at_), text_.size() - 1);
      if (!std::isspace(static_cast<unsigned char>(text_[at_]))) return;
    }
  }
  bool at_end() {
    skip();
    return at_ == text_.size();
  }
  bool take(char c) {
    if (at_end() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  /// Text up to one of `stops`, spaces at its ends cut.
  std::string until(const char* stops) {
    skip();
    const size_t end = text_.find_first_of(stops, at_);
    if (end == std::string::npos) fail("the text ends early");
    const size_t begin = std::exchange(at_, end);
    return trimmed(text_.substr(begin, end - begin));
  }
  static std::string trimmed(const std::string& s) {
    const size_t a = s.find_first_not_of(" \t\n"), b = s.find_last_not_of(" \t\n");
    return a == std::string::npos ? "" : s.substr(a, b - a + 1);
  }

  // ---- the module

  void statement() {
    const std::string word = until(" \t\n");
    if (word == ".version" || word == ".target" || word == ".address_size") {
      until("\n");
    } else if (word == ".entry" || word == ".func") {
      function();
    } else if (word == ".global" || word == ".const" || word == ".shared") {
      variable(word, std::exchange(extern_, false));
    } else if (word == ".extern") {
      extern_ = true;
    } else if (word != ".visible" && word != ".weak") {
      fail("unknown directive " + word);
    }
  }

  struct Declared {
    std::string name, type;
    size_t bytes = 0, alignment = 1;
  };
  /// [.align n] .type [.ptr ...] name[n]
  Declared declared(const std::string& text) {
    Declared d;
    std::stringstream in(std::regex_replace(text, std::regex("\\[| *\\]"), " "));
    size_t count = 1;
    for (std::string w; in >> w;) {
      if (w == ".align") {
        size_t n = 1;
        in >> n;
        if (d.type.empty()) d.alignment = n;  // that of .ptr is another's
      } else if (w[0] == '.') {
        if (std::isdigit(static_cast<unsigned char>(w.back()))) d.type = w;
      } else if (std::isdigit(static_cast<unsigned char>(w[0]))) {
        count *= std::stoul(w);
      } else {
        d.name = w;
      }
    }
    if (d.type.empty() || d.name.empty()) fail("a declaration that is not understood: " + text);
    d.bytes = count * bytes_of(d.type);
    d.alignment = std::max(d.alignment, bytes_of(d.type));
    return d;
  }

  void variable(const std::string& space, bool is_extern) {
    const Declared d = declared(until("=;"));
    Operand& o = names_[d.name] = {};
    if (space == ".shared") {
      if (is_extern) {
        o.slot = kDynamic;
      } else {
        m_.static_shared = aligned(m_.static_shared, d.alignment);
        o.offset = kShared + m_.static_shared;
        m_.static_shared += d.bytes;
      }
    } else {
      if (is_extern || d.alignment > 16) fail("a variable that is not defined here: " + d.name);
      m_.memory.emplace_back(d.bytes / 16 + 1);
      auto* const bytes = reinterpret_cast<unsigned char*>(m_.memory.back().data());
      o.offset = reinterpret_cast<uintptr_t>(bytes);
      (space == ".const" ? m_.constants : m_.globals).push_back({o.offset, o.offset + d.bytes});
      if (take('=')) {
        const bool list = take('{');
        const size_t each = bytes_of(d.type);
        std::stringstream values(until(list ? "}" : ";"));
        size_t i = 0;
        for (std::string v; std::getline(values, v, ','); i += each) {
          const uint64_t value = number(trimmed(v));
          if (i + each > d.bytes) fail("too many values for " + d.name);
          std::memcpy(bytes + i, &value, each);
        }
        if (list) take('}');
      }
    }
    if (!take(';')) fail("a variable that does not end: " + d.name);
  }

  // ---- a function

  void parameters(std::vector<Variable>* out) {
    if (!take('(')) return;
    while (!take(')')) {
      out->push_back(place(until(",)")));
      take(',');
    }
  }
  /// A variable of the frame.
  Variable place(const std::string& text) {
    const Declared d = declared(text);
    if (d.alignment > 16) fail("an alignment beyond 16 in a frame: " + d.name);
    f_->frame_bytes = aligned(f_->frame_bytes, d.alignment);
    Operand& o = names_[d.name] = {};
    o.slot = kFrame;
    o.offset = f_->frame_bytes;
    f_->frame_bytes += d.bytes;
    return {static_cast<size_t>(o.offset), d.bytes};
  }

  void function() {
    extern_ = false;
    Function parsed;
    f_ = &parsed;
    const auto outer = names_;
    labels_.clear();
    jumps_.clear();
    parameters(&parsed.results);
    parsed.name = until("(;{ \t\n");
    Function& kept = m_.functions[parsed.name];  // calls, its own too, know this address
    parameters(&parsed.parameters);
    until("{;");  // .maxntid and the like
    parsed.defined = take('{');
    for (int depth = parsed.defined; depth > 0;) {
      if (at_end()) fail("a function that does not end: " + parsed.name);
      if (take('{'))
        ++depth;
      else if (take('}'))
        --depth;
      else
        line();
    }
    if (!parsed.defined) take(';');
    for (const auto& [index, label] : jumps_) {
      if (!labels_.count(label)) refuse("no label " + label, m_.file.c_str(), parsed.code[index].line);
      parsed.code[index].target = labels_[label];
    }
    names_ = outer;
    if (parsed.defined || !kept.defined) kept = std::move(parsed);
  }

  void line() {
    skip();
    const size_t begin = at_;
    const std::string label = until(";:\n");
    if (label.compare(0, 5, ".loc ") == 0) return;
    if (take(':') && text_[at_] != ':') {  // ld.global.L2::128B
      labels_[label] = f_->code.size();
      return;
    }
    at_ = begin;
    const int line = line_of(begin);
    const std::string s = until(";");
    const std::string word = s.substr(0, s.find_first_of(" \t")), rest = trimmed(s.substr(word.size()));
    if (word[0] != '.') {
      instruction(s, line);
    } else if (word == ".reg") {
      registers(rest);
    } else if (word == ".local" || word == ".param") {
      place(rest);
    } else if (word == ".shared") {
      at_ = begin + word.size();
      return variable(word, false);
    } else if (word == ".pragma") {
      const std::string kUsed = "\"used_bytes_mask ";
      if (rest.compare(0, kUsed.size(), kUsed) == 0) used_ = std::stoull(rest.substr(kUsed.size()), nullptr, 0);
    } else {
      fail("unknown directive " + word);
    }
    take(';');
  }

  /// .b32 %r<122>, or names one by one
  void registers(const std::string& text) {
    const size_t space = text.find_first_of(" \t");
    const std::string type = text.substr(0, space);
    const size_t bits = bytes_of(type) * 8;
    const auto add = [&](const std::string& name) {
      Operand& o = names_[name] = {};
      o.slot = static_cast<uint32_t>(f_->registers++);
      o.mask = type == ".pred" ? 1 : bits >= 64 ? ~0ull : (1ull << bits) - 1;
    };
    for (const std::string& name : split(text.substr(space))) {
      const size_t angle = name.find('<');
      if (angle == std::string::npos)
        add(name);
      else
        for (int i = 0, n = std::stoi(name.substr(angle + 1)); i < n; ++i)
          add(name.substr(0, angle) + std::to_string(i));
    }
  }

  /// At commas outside of brackets.
  static std::vector<std::string> split(const std::string& s) {
    std::vector<std::string> out;
    size_t begin = 0;
    int depth = 0;
    for (size_t i = 0; i <= s.size(); ++i) {
      if (i < s.size()) depth += (std::strchr("{[(", s[i]) != nullptr) - (std::strchr("}])", s[i]) != nullptr);
      if (i < s.size() && (s[i] != ',' || depth)) continue;
      if (!trimmed(s.substr(begin, i - begin)).empty()) out.push_back(trimmed(s.substr(begin, i - begin)));
      begin = i + 1;
    }
    return out;
  }

  uint64_t number(const std::string& s) {
    const bool hex_float = s.size() > 2 && s[0] == '0' && std::strchr("fFdD", s[1]);
    char* end = nullptr;
    const uint64_t value = hex_float     ? std::strtoull(s.c_str() + 2, &end, 16)
                           : s[0] == '-' ? static_cast<uint64_t>(std::strtoll(s.c_str(), &end, 0))
                                         : std::strtoull(s.c_str(), &end, 0);
    if (end == s.c_str() || (*end && std::strcmp(end, "U") != 0)) fail("unknown operand " + s);
    return value;
  }

  Operand operand(const std::string& text) {
    if (text[0] == '!') {
      Operand o = operand(text.substr(1));
      o.negated = true;
      return o;
    }
    const size_t plus = text.find('+');
    const std::string base = trimmed(text.substr(0, plus));
    Operand o;
    const auto it = names_.find(base);
    if (it != names_.end())
      o = it->second;
    else
      o.offset = number(base);
    if (plus != std::string::npos) o.offset += number(trimmed(text.substr(plus + 1)));
    return o;
  }

  void operands(const std::string& text, Instruction* i) {
    bool first = true;
    for (const std::string& s : split(text)) {
      const bool group = s[0] == '{' || s[0] == '(';
      std::string inner = group || s[0] == '[' ? s.substr(1, s.size() - 2) : s;
      const size_t bar = inner.find('|');
      if (bar != std::string::npos) inner[bar] = ',';
      const auto parts = split(inner);
      for (const std::string& part : parts) i->operands.push_back(operand(part));
      if (first) i->left = static_cast<uint8_t>(parts.size());
      first = false;
    }
  }

  void instruction(std::string s, int first_line) {
    Instruction i;
    std::string guard;
    if (s[0] == '@') {
      const size_t space = s.find_first_of(" \t");
      guard = s.substr(1, space - 1);
      s = trimmed(s.substr(space));
    }
    const size_t space = std::min(s.find_first_of(" \t\n"), s.size());
    std::string rest = trimmed(s.substr(space));
    if (!named(s.substr(0, space), &i)) refuse("unknown instruction " + s, m_.file.c_str(), first_line);
    i.line = first_line;
    i.text = s;
    i.guarded = !guard.empty();
    if (i.guarded) i.guard = operand(guard);
    i.used = used_;
    used_ = ~0ull;
    if (i.words[0] == "bra"_w) {
      jumps_.push_back({f_->code.size(), rest});
    } else if (i.words[0] == "call"_w) {
      auto parts = split(rest);
      const size_t name = !parts.empty() && parts[0][0] == '(';
      if (parts.size() <= name || !m_.functions.count(parts[name])) fail("a call of something unknown: " + s);
      i.callee = &m_.functions[parts[name]];
      parts.erase(parts.begin() + static_cast<long>(name));
      rest.clear();
      for (const std::string& p : parts) rest += (rest.empty() ? "" : ",") + p;
      operands(rest, &i);
      if (!name) i.left = 0;
    } else {
      operands(rest, &i);
    }
    f_->code.push_back(std::move(i));
  }

  Module& m_;
  const std::string& text_;
  size_t at_ = 0, counted_ = 0;
  int line_ = 1;
  bool extern_ = false;
  uint64_t used_ = ~0ull;
  Function* f_ = nullptr;
  std::unordered_map<std::string, Operand> names_;
  std::unordered_map<std::string, size_t> labels_;
  std::vector<std::pair<size_t, std::string>> jumps_;  // instruction, label
};

}  // namespace

Module::Module(std::string name, const std::string& text) : file(std::move(name)) { Parser(*this, text).run(); }

}  // namespace ptx
