// SPDX-License-Identifier: Apache-2.0
// hisac._core.UserState: a state and its memory. Calls keep Python's lock: they take microseconds, and so no two change
// a state at once.
#include <nanobind/stl/function.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include "runtime.h"

namespace hisac::bind {
namespace {

using nb::literals::operator""_a;
using Fields = nb::typed<nb::tuple, nb::object, nb::ellipsis>;

/// Memory of whole lines, and the state in it.
struct Owned {
  Scratch memory;
  UserState state;

  Array<std::byte, 1> take(size_t bytes) { return memory.take(bytes); }
};

/// call(context) with so much scratch, on this thread.
template <class F>
void serially(size_t bytes, F call) {
  static thread_local Scratch scratch;
  Context context;
  context.workspace = scratch.take(bytes);
  raise(call(context));
}

DType type_of(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "int8") return DType::int8;
  wrong_value("to_bytes", "dtype", "'float32', 'bfloat16' or 'int8'", "'" + name + "'");
}

/// The tables of items and the events of one call.
struct Given {
  Call call;
  View x, v, codes, x_scale, ids, weights, times, positions;
  StateItems items;
  StateEvents events;

  Given(const char* verb, Fields tables, uint64_t model_tag) : call(verb, kOnlyCpu) {
    x = nb::cast<View>(tables[0]);
    v = nb::cast<View>(tables[1]);
    codes = nb::cast<View>(tables[2]);
    x_scale = nb::cast<View>(tables[3]);
    if (!x.none) items.x = rows(x, call, "x", 2, "float32, bfloat16, float16 or int8 [items, D]", true);
    items.v = rows(v, call, "v", 2, "float32, bfloat16 or float16 [items, V]");
    items.codes = array<const int32_t, 2>(codes, call, "codes", "int32 [items, L]");
    items.x_scale = array<const float, 1>(x_scale, call, "x_scale", "float32 [1] or [items]", true);
    items.model_tag = model_tag;
  }
  void read(Fields given) {
    ids = nb::cast<View>(given[0]);
    weights = nb::cast<View>(given[1]);
    times = nb::cast<View>(given[2]);
    positions = nb::cast<View>(given[3]);
    events.ids = bind::ids(ids, call, "ids", "int32 or int64 [n]");
    events.weights = array<const float, 1>(weights, call, "weights", "float32 [n]", true);
    events.times = array<const int64_t, 1>(times, call, "times", "int64 [n]", true);
    events.positions = array<const int64_t, 1>(positions, call, "positions", "int64 [n]", true);
  }
};

void make(Owned* self, const Codebook& book, int64_t width, int64_t leaves, int64_t ring, int64_t half_life,
          bool mean_x, uint64_t model_tag, uint64_t weighting) {
  StateParams params{leaves, ring, width, half_life, mean_x, model_tag, weighting};
  Owned made;
  raise(UserState::create(book, params, made.take(UserState::bytes(book, params)), &made.state));
  new (self) Owned(std::move(made));
}

/// A state of bytes, with all its room where it can be written to.
Owned parse(nb::bytes bytes) {
  Owned given, made;
  const auto memory = given.take(std::max<size_t>(bytes.size(), 1));
  std::memcpy(memory.data, bytes.c_str(), bytes.size());
  raise(UserState::parse({memory.data, {static_cast<int64_t>(bytes.size())}}, &given.state));
  const DType type = given.state.type();
  const int64_t room = type == DType::float32 ? given.state.params().leaves : given.state.room();
  const auto whole = made.take(given.state.serialised_bytes(type, room));
  raise(given.state.serialise(type, room, whole));
  raise(UserState::parse(whole, &made.state));
  return made;
}

nb::bytes serialise(const Owned& self, const std::string& dtype) {
  const DType type = type_of(dtype);
  const int64_t room = self.state.leaves();
  Scratch scratch;
  const size_t size = self.state.serialised_bytes(type, room);
  const auto out = scratch.take(size);
  raise(self.state.serialise(type, room, out));
  return nb::bytes(out.data, size);
}

void append(Owned& self, const Codebook& book, Fields items, Fields events, int64_t latest, uint64_t model_tag) {
  Given in("append", items, model_tag);
  in.read(events);
  in.events.latest = latest;
  serially(self.state.workspace(), [&](const Context& c) { return self.state.append(c, book, in.items, in.events); });
}

void expire(Owned& self, const Codebook& book, Fields items, int64_t now, int64_t age, int64_t least,
            uint64_t model_tag) {
  const Given in("expire", items, model_tag);
  serially(self.state.workspace(),
           [&](const Context& c) { return self.state.expire(c, book, in.items, now, age, least); });
}

void forget(Owned& self, const Codebook& book, Fields items, Lent gone, nb::object kept, bool whole,
            uint64_t model_tag) {
  Given in("forget", items, model_tag);
  const Ids which = ids(gone, in.call, "ids", "int32 or int64 [n]");
  StateKept source;
  source.whole = whole;
  if (!kept.is_none()) {
    in.read(nb::cast<Fields>(kept));
    source.rows = &in.events;
  }
  serially(self.state.workspace(),
           [&](const Context& c) { return self.state.forget(c, book, in.items, which, source); });
}

void merge(Owned& self, const Codebook& book, const Owned& other, Fields items, uint64_t model_tag) {
  const Given in("merge", items, model_tag);
  serially(self.state.workspace(), [&](const Context& c) { return self.state.merge(c, book, in.items, other.state); });
}

std::tuple<Owned, int64_t, int64_t> migrate(const Owned& self, const Codebook& from, const Codebook& to) {
  Owned made;
  StateLoss loss;
  const auto memory = made.take(UserState::bytes(to, self.state.params()));
  serially(self.state.migrate_workspace({}, to),
           [&](const Context& c) { return self.state.migrate(c, from, to, memory, &made.state, &loss); });
  return {std::move(made), loss.leaves, loss.votes};
}

/// A copy for NumPy; None of null.
template <class T>
nb::object copied(const T* data, std::initializer_list<int64_t> shape) {
  if (!data) return nb::none();
  size_t sizes[2];
  std::copy(shape.begin(), shape.end(), sizes);
  return nb::cast(nb::ndarray<nb::numpy, const T>(data, shape.size(), sizes), nb::rv_policy::copy);
}

/// (x, v, codes, slots of x, slots of v, x_scale, bias, spread, votes); x of bfloat16 as its bits.
Fields sums(const Owned& self, const Codebook& book, int64_t now) {
  Scratch scratch;
  Histories h;
  raise(self.state.sums(book, now, false, scratch.take(self.state.sums_bytes(book, false) + 64), &h));
  const int64_t n = h.codes.shape[0];
  nb::object x = nb::none();
  if (h.x.dtype == DType::float32) x = copied(static_cast<const float*>(h.x.data), {n, h.x.width});
  if (h.x.dtype == DType::bfloat16) x = copied(static_cast<const uint16_t*>(h.x.data), {n, h.x.width});
  if (h.x.dtype == DType::int8) x = copied(static_cast<const int8_t*>(h.x.data), {n, h.x.width});
  return nb::make_tuple(
      x, copied(static_cast<const float*>(h.v.data), {n, h.v.width}), copied(h.codes.data, {n, book.levels()}),
      copied(static_cast<const int32_t*>(h.x_ids.data), {n}), copied(static_cast<const int32_t*>(h.v_ids.data), {n}),
      copied(h.x_scale.data, {n}), copied(h.bias.data, {n}), copied(h.spread.data, {n}),
      copied(static_cast<const int64_t*>(h.weights.data), {n}));
}

Fields recent(const Owned& self, int64_t now) {
  const int64_t n = self.state.ring();
  std::vector<int64_t> rows(static_cast<size_t>(n) + 1), times(rows.size());
  std::vector<float> share(rows.size());
  float table;
  raise(self.state.recent({{rows.data(), {n}}, {times.data(), {n}}, {share.data(), {n}}}, &table, now));
  return nb::make_tuple(copied(rows.data(), {n}), copied(times.data(), {n}), copied(share.data(), {n}), table);
}

Fields stats(const Owned& self, const Codebook& book, nb::object agents, nb::object before) {
  View codes[2], count[2];
  Agents given[2];
  const nb::object* const both[] = {&agents, &before};
  const Agents* at[2] = {};
  for (int i = 0; i < 2; ++i) {
    if (both[i]->is_none()) continue;
    Call call("stats", kOnlyCpu);
    const auto fields = nb::cast<nb::tuple>(*both[i]);
    codes[i] = nb::cast<View>(fields[0]);
    count[i] = nb::cast<View>(fields[1]);
    const auto of_codes = array<const int32_t, 3>(codes[i], call, "agents' codes", "int32 [1, M, L]");
    const auto of_count = array<const int32_t, 1>(count[i], call, "agents' count", "int32 [1]");
    given[i].codes.data = const_cast<int32_t*>(of_codes.data);  // which are read
    given[i].count.data = const_cast<int32_t*>(of_count.data);
    std::copy_n(of_codes.shape, 3, given[i].codes.shape);
    given[i].count.shape[0] = of_count.shape[0];
    given[i].fingerprint = nb::cast<uint64_t>(fields[2]);
    at[i] = &given[i];
  }
  StateStats s;
  raise(self.state.stats(book, at[0], at[1], &s));
  return nb::make_tuple(s.leaves, s.ring, s.seen, s.votes, s.absent_share, s.dropped_leaves, s.dropped_votes, s.outside,
                        s.churn);
}

}  // namespace

void add_state(nb::module_& m) {
  const auto lock = nb::lock_self();
  const auto number = [](auto get) { return [get](const Owned& self) { return (self.state.*get)(); }; };
  nb::class_<Owned>(m, "UserState")
      .def("__init__", make, "book"_a, "width"_a, "leaves"_a, "ring"_a, "half_life"_a, "mean_x"_a, "model_tag"_a,
           "weighting"_a)
      .def_static("parse", parse, "data"_a)
      .def("serialise", serialise, "dtype"_a, lock)
      .def("append", append, "book"_a, "items"_a, "events"_a, "latest"_a, "model_tag"_a, lock)
      .def("expire", expire, "book"_a, "items"_a, "now"_a, "age"_a, "least"_a, "model_tag"_a, lock)
      .def("forget", forget, "book"_a, "items"_a, "ids"_a, "kept"_a.none(), "whole"_a, "model_tag"_a, lock)
      .def("merge", merge, "book"_a, "other"_a, "items"_a, "model_tag"_a, lock)
      .def("migrate", migrate, "book"_a, "to"_a, lock)
      .def("sums", sums, "book"_a, "now"_a, lock)
      .def("recent", recent, "now"_a, lock)
      .def("stats", stats, "book"_a, "agents"_a.none(), "before"_a.none(), lock)
      .def("params",
           [](const Owned& self) -> Fields {
             const StateParams p = self.state.params();
             return nb::make_tuple(p.width, p.leaves, p.ring, p.half_life, p.mean_x, p.model_tag, p.weighting);
           })
      .def_prop_ro("nbytes", number(&UserState::size))
      .def_prop_ro("fingerprint", number(&UserState::fingerprint))
      .def_prop_ro("options", number(&UserState::options))
      .def_prop_ro("epoch", number(&UserState::epoch))
      .def_prop_ro("position", number(&UserState::position))
      .def_prop_ro("revision", number(&UserState::revision))
      .def_prop_ro("migrated", number(&UserState::migrated))
      .def_prop_ro("dtype", [](const Owned& self) {
        const DType type = self.state.type();
        return type == DType::float32 ? "float32" : type == DType::int8 ? "int8" : "bfloat16";
      });
}

}  // namespace hisac::bind
