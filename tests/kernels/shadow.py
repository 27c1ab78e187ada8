"""Triton's interpreter as a detector of races between CTAs and between launches.

Both leave every result right here, where one CTA runs after the other. So each load, store and
atomic of a CTA is checked against shadow memory, which knows for every byte who wrote it last and
who has read it:

bounds    an address must lie inside one of the tensors that the launch was given
CTAs      if two CTAs of a launch touch a byte and one of them writes it, an atomic must order them:
          a release of the one, then an acquire of the other (vector clocks)
launches  with programmatic dependent launch a CTA may run while earlier launches do. Before its
          `wait_for_producer` it must not store anything, and it may read a byte only if the launch
          that wrote it is certainly done. It must wait at some time.

A launch is certainly done if a launch after it has waited for it, in all its CTAs, before it
released the next one. The CTAs of a launch run in a shuffled order.

Source of vector clocks: https://doi.org/10.1145/359545.359563
"""

import importlib
import pkgutil
import random
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

import mistral_kernels


class Events:
    """For each byte of a storage the last event of one kind: its launch, CTA and clock."""

    def __init__(self, size: int):
        self.launch = np.full(size, -1, np.int32)  # -1: there was none
        self.cta = np.zeros(size, np.int32)
        self.clock = np.zeros(size, np.int32)


class Shadow:
    """The shadow of one storage, which begins at `start`."""

    def __init__(self, start: int, size: int):
        self.start = start
        self.size = size
        self.written = Events(size)
        self.read = Events(size)
        self.is_shared = np.zeros(size, bool)  # several CTAs of the last launch that read have


class View(NamedTuple):
    """The addresses of a tensor that a launch was given."""

    start: int
    end: int
    name: str


class Detector:
    """Watches all launches from now on, until `patch` is undone.

    problems  (what, which kernel) -> how often
    examples  the first of each, in words
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        self.problems: Counter[tuple[str, str]] = Counter()
        self.examples: dict[tuple[str, str], str] = {}
        self.launches: Counter[str] = Counter()  # by the name of the kernel
        self._order = random.Random(0)
        self._shadows: dict[int, Shadow] = {}
        self._launch = 0
        self._done = -1  # the last launch that is done even if a CTA has not waited
        self._watch(patch)

    def mark_done(self) -> None:
        """All launches so far are done: PyTorch's own work follows them on the stream."""
        self._done = self._launch - 1

    # The interpreter's events

    def _watch(self, patch: pytest.MonkeyPatch) -> None:
        builder = interpreter.interpreter_builder
        run = interpreter.GridExecutor.__call__
        load = builder.create_masked_load
        store = builder.create_masked_store
        atomic = builder.create_atomic_rmw
        set_size = builder.set_grid_dim
        set_place = builder.set_grid_idx

        def watched_run(executor, *arguments, **options):
            self._begin(executor, arguments, bool(options.get("launch_pdl")))
            run(executor, *arguments, **options)
            self._end()

        def watched_size(*size):
            set_size(*size)
            places = [tuple(map(int, place)) for place in np.ndindex(*size)]
            self._order.shuffle(places)
            self._places = iter(places)
            self._clocks = np.eye(len(places), dtype=np.int32)  # [cta, what it knows of each]
            self._cta = -1

        def watched_place(*_):
            self._begin_cta()
            set_place(*next(self._places))

        def watched_load(pointers, mask, *rest):
            self._read(*_addresses(pointers, mask))
            return load(pointers, mask, *rest)

        def watched_store(pointers, value, mask, *rest):
            self._write(*_addresses(pointers, mask))
            return store(pointers, value, mask, *rest)

        def watched_atomic(kind, pointer, value, mask, order, scope):
            self._order_by(*_addresses(pointer, mask), str(order))
            return atomic(kind, pointer, value, mask, order, scope)

        patch.setattr(interpreter.GridExecutor, "__call__", watched_run)
        patch.setattr(builder, "set_grid_dim", watched_size)
        patch.setattr(builder, "set_grid_idx", watched_place)
        patch.setattr(builder, "create_masked_load", watched_load)
        patch.setattr(builder, "create_masked_store", watched_store)
        patch.setattr(builder, "create_atomic_rmw", watched_atomic)
        for info in pkgutil.walk_packages(mistral_kernels.__path__, "mistral_kernels."):
            if ".cpu" in info.name:
                continue
            module = importlib.import_module(info.name)
            for name, event in {
                "wait_for_producer": self._wait,
                "release_consumer": self._release,
            }.items():
                if name in vars(module):
                    patch.setattr(module, name, event)

    def _begin(self, executor: Any, arguments: Any, is_early: bool) -> None:
        """A launch."""
        self.name = executor.fn.__name__
        self.launches[self.name] += 1
        self._is_early = is_early
        self._released_early = False
        self._locations: dict[int, np.ndarray] = {}  # address of an atomic -> what it publishes
        self._views = []
        for name, tensor in zip(executor.arg_names, arguments):
            if not isinstance(tensor, torch.Tensor):
                continue
            start = tensor.data_ptr()
            self._views.append(View(start, start + tensor.nbytes, name))
            memory = tensor.untyped_storage()
            shadow = self._shadows.get(memory.data_ptr())
            if shadow is None or shadow.size != memory.nbytes():
                self._shadows[memory.data_ptr()] = Shadow(memory.data_ptr(), memory.nbytes())

    def _begin_cta(self) -> None:
        if self._cta >= 0:
            self._end_cta()
        self._cta += 1
        self._has_waited = not self._is_early

    def _end_cta(self) -> None:
        if not self._has_waited:
            self._report("a CTA does not wait")

    def _end(self) -> None:
        self._end_cta()
        # The next launch begins when this one has released it. If all CTAs had waited by then, all
        # launches before this one are done.
        if not self._released_early:
            self._done = self._launch - 1
        self._launch += 1

    def _wait(self, arch: int) -> None:
        self._has_waited = True

    def _release(self, arch: int) -> None:
        if not self._has_waited:
            self._released_early = True

    # Checks

    def _read(self, addresses: np.ndarray, size: int) -> None:
        for shadow, at in self._bytes(addresses, size):
            self._check("a read of an unordered write", shadow, shadow.written, at)
            by_others = (shadow.read.launch[at] == self._launch) & (
                shadow.read.cta[at] != self._cta
            )
            is_first = shadow.read.launch[at] != self._launch
            shadow.is_shared[at] = ~is_first & (shadow.is_shared[at] | by_others)
            self._note(shadow.read, at)

    def _write(self, addresses: np.ndarray, size: int) -> None:
        if self._is_early and not self._has_waited:
            self._report("a store before the wait")
        for shadow, at in self._bytes(addresses, size):
            self._check("a write over an unordered write", shadow, shadow.written, at)
            self._check("a write over an unordered read", shadow, shadow.read, at)
            if (shadow.is_shared[at] & (shadow.read.launch[at] == self._launch)).any():
                self._report("a write over reads of several CTAs", self._name_of(shadow))
            self._note(shadow.written, at)

    def _order_by(self, addresses: np.ndarray, size: int, order: str) -> None:
        """An atomic: acquire what its address publishes, release what this CTA knows."""
        if self._is_early and not self._has_waited:
            self._report("an atomic before the wait")
        self._bytes(addresses, size)  # checks the bounds
        mine = self._clocks[self._cta]
        for address in addresses.tolist():
            published = self._locations.setdefault(address, np.zeros_like(mine))
            if "ACQUIRE" in order.upper():
                np.maximum(mine, published, out=mine)
            if "RELEASE" in order.upper():
                np.maximum(published, mine, out=published)
        mine[self._cta] += 1

    def _bytes(self, addresses: np.ndarray, size: int) -> list[tuple[Shadow, np.ndarray]]:
        """The places of some elements in their shadows; a problem for those out of bounds."""
        inside = np.zeros(len(addresses), bool)
        for view in self._views:
            inside |= (addresses >= view.start) & (addresses + size <= view.end)
        if not inside.all():
            first = int(addresses[~inside][0])
            near = min(self._views, key=lambda view: abs(first - view.start))
            self._report("out of bounds", f"byte {first - near.start} of {near.name}")
        places = []
        for shadow in self._shadows.values():
            mine = addresses[inside] - shadow.start
            mine = mine[(mine >= 0) & (mine < shadow.size)]
            if len(mine):
                places.append((shadow, (mine[:, None] + np.arange(size)).reshape(-1)))
        return places

    def _check(self, what: str, shadow: Shadow, events: Events, at: np.ndarray) -> None:
        """A problem if one of these events may still be going on."""
        launch = events.launch[at]
        cta = events.cta[at]
        is_ours = launch == self._launch
        last_done = self._launch - 1 if self._has_waited else self._done
        known = self._clocks[self._cta][np.where(is_ours, cta, 0)] >= events.clock[at]
        is_done = np.where(is_ours, known, launch <= last_done)
        if not is_done.all():
            other = int(launch[~is_done][0]) - self._launch
            self._report(what, f"of {self._name_of(shadow)} by launch {other:+}")

    def _note(self, events: Events, at: np.ndarray) -> None:
        events.launch[at] = self._launch
        events.cta[at] = self._cta
        events.clock[at] = self._clocks[self._cta, self._cta]

    def _name_of(self, shadow: Shadow) -> str:
        """Which of the launch's tensors are in a storage."""
        end = shadow.start + shadow.size
        names = {view.name for view in self._views if shadow.start <= view.start < end}
        return "/".join(sorted(names))

    def _report(self, what: str, example: str = "") -> None:
        self.problems[what, self.name] += 1
        self.examples.setdefault((what, self.name), example)


def _addresses(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
    """The addresses that an access touches, each once, and the size of an element in bytes."""
    all_of_them = np.asarray(pointers.data).reshape(-1).astype(np.int64)
    chosen = np.broadcast_to(np.asarray(mask.data).reshape(-1).astype(bool), all_of_them.shape)
    return np.unique(all_of_them[chosen]), max(1, pointers.get_element_ty().primitive_bitwidth // 8)
