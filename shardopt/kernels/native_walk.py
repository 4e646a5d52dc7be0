"""The same comparisons in one native call, which take a quarter of a microsecond a DTensor instead of more than one.

csrc/walk.h uses functions of CPython's stable ABI and of torch's C shim. What it must know beyond them, in which word a
tensor's object keeps its implementation and that its storage, is looked up in living tensors; where it is not found,
or there is no compiler, steps are compared in Python.
"""

import ctypes
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from types import MemberDescriptorType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shardopt.kernels import cpu
from shardopt.kernels.cache import NoCompiler
from shardopt.kernels.walk import Walk

PYTHON = (
    "PyObject_GetAttr", "Py_IncRef", "Py_DecRef", "PyObject_RichCompareBool", "PyDict_Next", "PyList_Size",
    "PyList_GetItem",
)  # fmt: skip
TORCH = ("data_ptr", "numel", "dtype", "layout")
SEEN = 5  # places that only the native code fills in
GRAD = sys.intern("grad")
SOURCE = cpu.Source("walk", "look at a repeated step")


class NoWalk(Exception):
    """Why steps are compared in Python here."""


def native(walk: Walk) -> Walk:
    """The same walk, native where it can be."""
    try:
        return NativeWalk(walk) if walk.possible else walk
    except (NoWalk, NoCompiler, AttributeError):  # the last: a dtype that the shim does not name
        return walk


def dtype_code(shim: Any, dtype: torch.dtype) -> int:
    """Torch's number of a dtype."""
    return int(getattr(shim, f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}")())


def address_of(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def words_at(address: int, count: int) -> list[int]:
    return list((ctypes.c_uint64 * count).from_address(address))


@cache
def layout() -> tuple[int, int]:
    """(which word of a tensor's object is the address of its implementation, which of that the storage). NoWalk where
    not all of some tensors agree."""
    tensors = [torch.empty(n) for n in (0, 1, 7)] + [nn.Parameter(torch.empty(3, 2)), torch.empty(9)[2:]]
    objects = [words_at(id(t), Tensor.__basicsize__ // 8) for t in tensors]
    if any(words[1] != id(type(t)) for t, words in zip(tensors, objects)):
        raise NoWalk("objects are not laid out as CPython's are")
    impls, storages = [t._cdata for t in tensors], [t.untyped_storage()._cdata for t in tensors]
    inside = [words_at(impl, 8) for impl in impls]  # of two hundred bytes
    return only(places(objects, impls)), only(places(inside, storages))


def places(words: Sequence[Sequence[int]], wanted: Sequence[int]) -> Iterator[int]:
    """Which word is the wanted one in every row."""
    return (i for i, found in enumerate(zip(*words)) if list(found) == list(wanted))


def only(found: Iterable[int]) -> int:
    """The one that there is. NoWalk where there are none or several."""
    several = list(found)
    if len(several) != 1:
        raise NoWalk("tensors are not laid out as they are elsewhere")
    return several[0]


def slots(dtensors: Sequence[Any]) -> list[int]:
    """Which words of a DTensor's object are its local tensor and its spec. NoWalk where they are kept elsewhere."""
    found = []
    for name in ("_local_tensor", "_spec"):
        members = {getattr(type(x), name, None) for x in dtensors}
        if len(members) != 1 or not isinstance(next(iter(members)), MemberDescriptorType):
            raise NoWalk("DTensors keep their parts elsewhere")
        words = words_at(id(dtensors[0]), type(dtensors[0]).__basicsize__ // 8)
        found.append(only(i for i, word in enumerate(words) if word == id(getattr(dtensors[0], name))))
    return found


@cache
def functions() -> tuple[list[int], Any]:
    """(the structs `Python` and `Torch` of csrc/walk.h as words, functions of torch's shim)."""
    if platform.python_implementation() != "CPython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise NoWalk("another interpreter")
    try:
        shim = ctypes.CDLL(torch._C.__file__)
        asked = [address_of(getattr(shim, f"aoti_torch_get_{name}")) for name in TORCH]
        asked.append(address_of(shim.aoti_torch_is_contiguous))
        strided = shim.aoti_torch_layout_strided()
    except (AttributeError, OSError) as error:
        raise NoWalk(str(error)) from None
    python = [address_of(getattr(ctypes.pythonapi, name)) for name in PYTHON]
    return [*python, id(GRAD), id(None), *asked, strided, *layout()], shim


@cache
def library() -> Any:
    """The C function. NoCompiler where it cannot be had."""
    function = cpu.library(SOURCE, loader=ctypes.PyDLL).shardopt_walk
    function.argtypes = [ctypes.c_void_p, ctypes.py_object, ctypes.py_object]
    return function


class NativeWalk(Walk):
    """A walk whose rows are addresses of objects, which the lists of the one that it is made from keep alive."""

    def __init__(self, walk: Walk) -> None:
        """NoWalk or NoCompiler where it is not possible here."""
        vars(self).update(vars(walk))
        words, shim = functions()
        self.function = library()
        gradients: list[Any] = [p.grad for p in self.stepped]
        inside = [getattr(g, "_local_tensor", g) for g in gradients]
        self.types = [[type(x) for x in row] for row in (gradients, inside)]  # kept alive
        columns: list[Iterable[int]] = [map(id, self.stepped), map(id, self.locals), self.addresses]
        columns += [map(id, self.specs) if self.specs else [0] * len(gradients)]
        columns += [map(id, row) for row in self.types]
        columns += [[dtype_code(shim, dtype) for dtype in self.dtypes], self.sizes]
        rows = table([*columns, *[[0] * len(gradients)] * SEEN])
        stored = table([map(id, self.states), map(len, self.states)])
        parts = table([map(id, self.parts), map(id, self.held), self.homes])
        self.found = np.zeros(len(gradients), dtype=np.int64)
        every, idle = (table([map(id, some)]) for some in (self.parameters, self.idle))
        ranges = [every.ctypes.data, len(every), rows.ctypes.data, len(rows), self.found.ctypes.data]
        ranges += [idle.ctypes.data, len(idle), stored.ctypes.data, len(stored), parts.ctypes.data, len(parts)]
        members = slots([*self.stepped, *gradients, *self.sharded]) if self.specs else (0, 0)
        self.told = np.array([*words, *members, *ranges], dtype=np.int64)
        self.at = self.told.ctypes.data
        self.tables = every, rows, idle, stored, parts

    def run(self, groups: Sequence[Any], states: Any) -> np.ndarray | None:
        lists = [group["params"] for group in groups]
        if not all(type(params) is list for params in lists):
            return None
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return self.found if self.function(self.at, lists, states) else None
        except (AttributeError, RuntimeError):  # a gradient that is no DTensor any more
            return None


def table(columns: Sequence[Iterable[int]]) -> np.ndarray:
    """Columns side by side, int64."""
    return np.ascontiguousarray(np.array([list(column) for column in columns], dtype=np.int64).T)
