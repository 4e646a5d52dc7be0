// What a repeated step compares, object by object: through functions of CPython's stable ABI and of torch's C shim that
// the caller hands over, so that neither's headers are needed. The caller holds the GIL.
//
// Most of the time of such a look is waiting for memory, since a forward and a backward pass leave nothing of these
// objects in a cache. Hence everything is asked for some rows ahead, from where it was seen last.
#pragma once
#include "platform.h"

namespace shardopt {

struct Object;  // of Python
using Impl = void*;

// Made by shardopt/kernels/native_walk.py; 8 bytes a field.
struct Python {
  Object* (*attribute)(Object*, Object*);
  void (*keep)(Object*);
  void (*release)(Object*);
  int (*compare)(Object*, Object*, int);
  int (*next)(Object*, i64*, Object**, Object**);  // of a dict; what it gives is borrowed
  i64 (*length)(Object*);                          // of a list
  Object* (*item)(Object*, i64);                   // of a list, borrowed
  Object *grad, *none;                             // the attribute's name
};
struct Torch {
  int (*data)(const Impl*, void**);
  int (*elements)(const Impl*, i64*);
  int (*dtype)(const Impl*, i32*);
  int (*layout)(const Impl*, i32*);
  int (*contiguous)(const Impl*, bool*);
  i64 strided;            // the layout
  i64 impl, storage;      // which word of a tensor's object is its implementation, and which of that the storage
  i64 local_tensor, spec;  // which words of a DTensor's object these are
};
struct Parameter {  // that is stepped
  Object *p, *local;      // local: p itself, or of a DTensor what is here
  const void* home;       // where that lies
  Object* spec;           // of a DTensor's gradient
  Object *kind, *inside;  // types of the gradient and its local tensor
  i64 dtype, elements;    // of the gradient
  const void* seen[5];    // the last gradient, its local tensor, their implementations, the storage: they may be gone
};
struct State {
  Object* dict;
  i64 parts;
};
struct Part {  // of a state
  Object *part, *local;  // local: part itself, of a DTensor what is here
  const void* home;      // where that lies
};

struct Told {
  Python python;
  Torch torch;
  Object* const* every;  // all parameters
  i64 all;
  Parameter* stepped;
  i64 count;
  const void** found;  // addresses of their gradients
  Object* const* idle;  // without a gradient
  i64 others;
  const State* stored;
  i64 kept;
  const Part* parts;  // of all states
  i64 pieces;
};

constexpr int equal = 2;                                    // Py_EQ
constexpr i64 near = 8, far = 2 * near, farther = 3 * near;  // rows ahead: a step of a way through memory each

// A new reference, given back at the end.
struct Kept {
  const Python& python;
  Object* object;
  Kept(const Python& python, Object* of, Object* name) : python(python), object(python.attribute(of, name)) {}
  ~Kept() {
    if (object) python.release(object);
  }
  Kept(const Kept&) = delete;
};

struct Walk {
  const Python& python;
  const Torch& torch;
  const Told& told;

  static void* word(const void* of, i64 which) { return ((void* const*)of)[which]; }
  static Object* slot(const Object* of, i64 which) { return (Object*)word(of, which); }  // borrowed
  static Object* type(const Object* of) { return (Object*)word(of, 1); }
  const Impl* handle(const Object* tensor) const { return (const Impl*)tensor + torch.impl; }
  static void fetch(const void* at, int lines = 1) {
    for (int i = 0; i < lines; i++) __builtin_prefetch((const char*)at + 64 * i);
  }
  // In two strides, of a tensor that is alive: its object, then what that points to.
  void fetch_content(const Object* dict) const { fetch(word(dict, 4), 3); }
  void fetch_impl(const Object* tensor) const { fetch(*handle(tensor), 4); }
  void fetch_storage(const Object* tensor) const { fetch(word(*handle(tensor), torch.storage)); }

  bool lies(const Object* tensor, const void* home) const {
    void* data = nullptr;
    return !torch.data(handle(tensor), &data) && data == home;
  }

  // Where the gradient's elements lie, if it is what it was and so is the parameter.
  bool look(Parameter& row, const void*& found) const {
    const Kept g(python, row.p, python.grad);
    if (!g.object || type(g.object) != row.kind) return false;
    row.seen[0] = g.object, row.seen[2] = *handle(g.object);
    if (!row.spec) return elements(g.object, row, found) && lies(row.local, row.home);
    if (!alike(slot(g.object, torch.spec), row.spec)) return false;  // first: it may run anything
    Object* mine = slot(g.object, torch.local_tensor);
    if (!mine || type(mine) != row.inside || slot(row.p, torch.local_tensor) != row.local) return false;
    row.seen[1] = mine, row.seen[3] = *handle(mine);
    return elements(mine, row, found) && lies(row.local, row.home);
  }
  bool alike(Object* spec, Object* last) const {
    if (spec == last || !spec) return spec;
    python.keep(spec);
    const int found = python.compare(spec, last, equal);
    python.release(spec);
    return found == 1;
  }
  bool elements(const Object* g, Parameter& row, const void*& found) const {
    i32 layout = -1, dtype = -1;
    i64 elements = -1;
    bool contiguous = false;
    void* data = nullptr;
    const Impl* at = handle(g);
    if (torch.layout(at, &layout) || layout != torch.strided) return false;
    if (torch.dtype(at, &dtype) || dtype != row.dtype || torch.elements(at, &elements) || elements != row.elements)
      return false;
    if (torch.contiguous(at, &contiguous) || !contiguous || torch.data(at, &data)) return false;
    row.seen[4] = word(*at, torch.storage);
    found = data;
    return data || !elements;  // a tensor that wraps another has no address of its own
  }

  bool parameters() const {
    Parameter* rows = told.stepped;
    const i64 count = told.count;
    for (i64 i = 0; i < count; i++) {
      if (i + farther < count) {
        const Parameter& row = rows[i + farther];
        fetch(row.p), fetch(row.local);
        fetch(row.seen[0]), fetch(row.seen[1]), fetch(row.seen[2], 4), fetch(row.seen[3], 4), fetch(row.seen[4]);
      }
      if (i + far < count) fetch_impl(rows[i + far].p), fetch_impl(rows[i + far].local);
      if (i + near < count) fetch_storage(rows[i + near].local), fetch(word(*handle(rows[i + near].p), torch.storage + 1), 2);
      if (!look(rows[i], told.found[i])) return false;
    }
    return true;
  }

  bool idle() const {
    for (i64 i = 0; i < told.others; i++)
      if (Kept(python, told.idle[i], python.grad).object != python.none) return false;
    return true;
  }

  bool states(Object* all) const {
    const State* rows = told.stored;
    const i64 count = told.kept;
    i64 piece = 0, i = 0;
    Object *key, *value;
    for (i64 at = 0; python.next(all, &at, &key, &value); i++) {
      if (i == count || value != rows[i].dict) return false;
      if (i + farther < count) fetch(rows[i + farther].dict);
      if (i + far < count) fetch_content(rows[i + far].dict);
      const State& row = rows[i];
      const i64 end = piece + row.parts;
      Object* part;
      for (i64 in = 0; python.next(row.dict, &in, &key, &part); piece++)
        if (piece == end || !kept(piece, part)) return false;
      if (piece != end) return false;
    }
    return i == count;
  }
  // A part that is what it was, where it was.
  bool kept(i64 which, const Object* part) const {
    const Part* rows = told.parts + which;
    const i64 left = told.pieces - which;
    if (farther < left) fetch(rows[farther].part), fetch(rows[farther].local);
    if (far < left) fetch_impl(rows[far].local);
    if (near < left) fetch_storage(rows[near].local);
    if (part != rows->part) return false;
    if (part != rows->local && slot(part, torch.local_tensor) != rows->local) return false;
    return lies(rows->local, rows->home);
  }

  // The very same parameters, in lists of groups.
  bool groups(Object* lists) const {
    i64 i = 0;
    for (i64 k = 0, n = python.length(lists); k < n; k++) {
      Object* params = python.item(lists, k);
      for (i64 j = 0, m = python.length(params); j < m; j++)
        if (i == told.all || python.item(params, j) != told.every[i++]) return false;
    }
    return i == told.all;
  }
};

}  // namespace shardopt

// Whether all is as it was. lists: those of the groups' parameters. Leaves an exception of Python's where it met one.
extern "C" int shardopt_walk(const shardopt::Told* told, shardopt::Object* lists, shardopt::Object* states) {
  const shardopt::Walk walk{told->python, told->torch, *told};
  return walk.groups(lists) && walk.states(states) && walk.idle() && walk.parameters();
}
