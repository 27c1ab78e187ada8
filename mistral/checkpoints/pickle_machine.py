"""A stack machine for the pickles of `torch.save`: it builds descriptions of tensors, nothing else.

A pickle is a program that pushes values, calls functions by name and remembers results. Python's
own machine runs all of it, and PyTorch's restricted one still obeys a kilobyte that asks for
gigabytes. This one has the instructions that a dictionary of tensors needs, and calls nothing: each
function that a pickle may name is a few lines here. An instruction adds at most one object, and no
method of a built object is used, so the number of instructions bounds time and memory.

Source: Python's `pickletools`; PyTorch's torch/_utils.py and torch/serialization.py,
https://github.com/pytorch/pytorch
"""

import pickletools
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from mistral.errors import one_line

_MAX_STEPS = 200_000  # a 7B has 10,000
_MAX_AXES = 8
_MAX_NUMBER = 1 << 48
_DAMAGED = "its pickle is damaged; download it again"

_ORDERED_DICT = "collections.OrderedDict"
_REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
_ALLOWED = {_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER, *_STORAGES}
_OTHER_TENSORS = {
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass, as torchao's quantized ones are",
    "torch._tensor._rebuild_from_type_v2": "a tensor subclass, as torchao's quantized ones are",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values (meta)",
    "torch._utils._rebuild_tensor_v3": "a tensor of a rare dtype, such as float8",
}


@dataclass(frozen=True)
class Storage:
    """A stored run of values: its key in the file, their dtype and number."""

    key: str
    dtype: torch.dtype
    num_values: int


@dataclass(frozen=True)
class View:
    """A tensor: some of the values of a storage. Offset and strides count values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """A function or a class that the pickle names."""

    text: str


class _RefusedError(ValueError):
    """The pickle is not that of plain tensors."""


class PickleMachine:
    """Runs the pickles of one file. `storages` has the storages that they mention, by key."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}
        self._steps = 0
        self._instructions = {
            **dict.fromkeys(("PROTO", "STOP"), lambda _: None),
            **dict.fromkeys(("NONE", "BININT", "BININT1", "BININT2", "LONG1"), self._push),
            "BINUNICODE": self._push_text,
            "NEWTRUE": lambda _: self._push(True),
            "NEWFALSE": lambda _: self._push(False),
            "EMPTY_DICT": lambda _: self._push({}),
            "EMPTY_LIST": lambda _: self._push([]),
            "EMPTY_TUPLE": lambda _: self._push(()),
            "TUPLE1": lambda _: self._push(tuple(self._pop(1))),
            "TUPLE2": lambda _: self._push(tuple(self._pop(2))),
            "TUPLE3": lambda _: self._push(tuple(self._pop(3))),
            "TUPLE": lambda _: self._push(tuple(self._pop_to_mark())),
            "APPEND": lambda _: self._append(self._pop(1)),
            "APPENDS": lambda _: self._append(self._pop_to_mark()),
            "SETITEM": lambda _: self._set_items(self._pop(2)),
            "SETITEMS": lambda _: self._set_items(self._pop_to_mark()),
            "BUILD": lambda _: self._set_attributes(),
            "MARK": lambda _: self._marks.append(len(self._stack)),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._remember),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda i: self._push(self._memo[i])),
            "GLOBAL": self._push_name,
            "REDUCE": lambda _: self._call(),
            "BINPERSID": lambda _: self._push_storage(),
        }

    def run(self, pickle: BinaryIO) -> Any:
        """What the next pickle of a file builds: str, int, bool, None, tuple, list, dict, View.

        Raises ValueError for a pickle that is damaged, too long, or needs anything else.
        """
        self._stack.clear()
        self._marks.clear()
        self._memo.clear()
        try:
            for instruction, argument, _ in pickletools.genops(pickle):
                self._steps += 1
                _require(self._steps <= _MAX_STEPS, "its pickle is longer than any Mistral's")
                do = self._instructions.get(instruction.name)
                _require(do is not None, f"its pickle holds more than tensors ({instruction.name})")
                do(argument)
            _require(len(self._stack) == 1 and not self._marks, _DAMAGED)
            return self._stack.pop()
        except _RefusedError:
            raise
        # pickletools', an empty stack, a memory cell without a value
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(_DAMAGED) from error

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _push_text(self, text: str) -> None:
        text.encode()  # ValueError for half a character, which nothing could print
        self._stack.append(text)

    def _pop(self, count: int) -> list[Any]:
        values = self._stack[-count:]
        _require(len(values) == count, _DAMAGED)
        del self._stack[-count:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        height = self._marks.pop()
        values = self._stack[height:]
        del self._stack[height:]
        return values

    def _remember(self, cell: int) -> None:
        self._memo[cell] = self._stack[-1]

    def _append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        _require(type(target) is list, _DAMAGED)
        target.extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        keys = values[::2]
        _require(type(target) is dict and len(values) % 2 == 0, _DAMAGED)
        _require(all(type(key) is str for key in keys), "it has a key that is not a string")
        target.update(zip(keys, values[1::2]))

    def _set_attributes(self) -> None:
        """A state dict has one attribute, the versions of the modules: nothing to keep."""
        self._stack.pop()
        _require(type(self._stack[-1]) is dict, "its pickle holds more than tensors (BUILD)")

    def _push_name(self, name: str) -> None:
        name = name.replace(" ", ".")  # pickletools puts a space between module and name
        if name not in _ALLOWED:
            key = next(
                (value for value in reversed(self._stack) if type(value) is str), "its pickle"
            )
            what = _OTHER_TENSORS.get(name, "more than a plain tensor")
            raise _RefusedError(f"{one_line(key, 100)} is {what} ({one_line(name, 100)})")
        self._push(_Name(name))

    def _call(self) -> None:
        function, arguments = self._pop(2)
        _require(type(function) is _Name and type(arguments) is tuple, _DAMAGED)
        if function.text == _ORDERED_DICT and not arguments:
            self._push({})
        elif function.text == _REBUILD_TENSOR:
            self._push(_view(arguments))
        elif function.text == _REBUILD_PARAMETER and arguments and type(arguments[0]) is View:
            self._push(arguments[0])
        else:
            raise _RefusedError(f"its pickle calls {function.text} as torch.save does not")

    def _push_storage(self) -> None:
        """("storage", type, key, device, number of values), with None at the end in old files."""
        place = self._stack.pop()
        _require(type(place) is tuple and len(place) in (5, 6), _DAMAGED)
        word, kind, key, _, num_values = place[:5]
        _require(type(word) is str and word == "storage", _DAMAGED)
        _require(type(kind) is _Name and kind.text in _STORAGES, _DAMAGED)
        _require(type(key) is str and _is_size(num_values), _DAMAGED)
        _require(place[5:] in ((), (None,)), "it has a view of a storage, a form of 2017")
        storage = Storage(key, _STORAGES[kind.text], num_values)
        _require(self.storages.setdefault(key, storage) == storage, _DAMAGED)
        self._push(storage)


def _view(arguments: tuple[Any, ...]) -> View:
    """Storage, offset, shape, strides; then requires_grad, hooks and perhaps flags."""
    _require(len(arguments) in (6, 7), _DAMAGED)
    storage, offset, shape, strides = arguments[:4]
    _require(type(storage) is Storage and _is_size(offset), _DAMAGED)
    for sizes in (shape, strides):
        _require(type(sizes) is tuple and len(sizes) <= _MAX_AXES, _DAMAGED)
        _require(all(map(_is_size, sizes)), _DAMAGED)
    _require(len(shape) == len(strides), _DAMAGED)
    _require(not any(arguments[6:]), "it has a tensor that is negated when it is read")
    return View(storage, offset, shape, strides)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_NUMBER


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise _RefusedError(problem)
