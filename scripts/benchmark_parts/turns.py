"""One case at a time: all contestants are opened, and then take turns on the same machine."""

import copy
import dataclasses
import gc
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

import mistral
from benchmark_parts import machine, sizes
from benchmark_parts.contestants import Contestant, LlamaCppContestant, Ours, Theirs
from benchmark_parts.formats import packed_bytes
from benchmark_parts.llama_cpp_peer import library
from benchmark_parts.peers import GGUFFile, transformers_model
from benchmark_parts.sizes import Case
from mistral.quantization.packed import Packed

# Those that regroup the weights first: later contestants share the regrouped ones.
NAMES = (
    "kernels",
    "kernels-pdl",
    "cpu",
    "compile",
    "eager",
    "transformers",
    "transformers-compiled",
    "llama.cpp",
)


# These compile for minutes, as Python code that a signal can interrupt.
SLOW_STARTERS = ("compile", "transformers-compiled")
_OUT_OF_TIME = "left out: the time limit was reached"
_REGROUPING = {"kernels", "kernels-pdl", "cpu"}  # these keep packed weights in another order


class OutOfTime(BaseException):
    """The time is up. Not an Exception: an engine takes those for failures of its own kernels."""


class Field:
    """Opens the contestants in `names`; peers' models are built when the first of them asks.

    file  the GGUF that the model was loaded from; None: llama.cpp gets one that is written for it
    """

    def __init__(self, model: mistral.Mistral, names: Sequence[str], file: Path | None = None):
        self.model = model
        self._given = file
        self._packed = any(isinstance(module, Packed) for module in model.modules())
        # Others need a copy of their own of what was regrouped.
        apart = self._packed and bool(_REGROUPING & {*names}) and len(names) > 1
        self._others = copy.deepcopy(model) if apart else model
        self._theirs: dict[int | None, torch.nn.Module] = {}  # by window

    @cached_property
    def _file(self) -> GGUFFile:
        return GGUFFile(self._others)

    def open(self, name: str, case: Case, prompts: Tensor) -> Contestant:
        """A new contestant. Raises whatever it raises."""
        if name.startswith("transformers"):
            if self._packed:
                raise ValueError("it does not multiply packed weights")
            return Theirs(
                self._transformers(case), case, prompts, compiled=name.endswith("compiled")
            )
        if name == "llama.cpp":
            library()  # it fails here, before a file is written for it
            path = str(self._given) if self._given else self._file.path
            return LlamaCppContestant(path, case, prompts)
        return Ours(name, self.model if name in _REGROUPING else self._others, case, prompts)

    def _transformers(self, case: Case) -> torch.nn.Module:
        """Has a window only if it hides a token: transformers' caches of a window are slower."""
        window = self.model.config.sliding_window
        if window and case.context + case.tokens + 2 <= window:
            window = None
        if window not in self._theirs:
            self._theirs[window] = transformers_model(self.model, window)
        return self._theirs[window]


@dataclasses.dataclass
class Row:
    """What one contestant did in one case, or why it did not."""

    engine: str
    case: Case
    note: str = ""
    failed: str = ""
    peak_bytes: int | None = None  # weights included; known on a GPU
    reserved_bytes: int | None = None  # the most that PyTorch reserved on the GPU until then
    # of the GPU, after the first turn
    state: dict[str, float] = dataclasses.field(default_factory=dict)
    prefills: list[float] = dataclasses.field(default_factory=list)  # seconds
    decodes: list[float] = dataclasses.field(default_factory=list)

    def result(self, model: mistral.Mistral, bandwidth: float, rate: float) -> dict:
        """The row as JSON. The quickest turn counts: other work only slows a turn down."""
        case = self.case
        facts = {
            "engine": self.engine,
            "batch": case.batch,
            "context": case.context,
            "new_tokens": case.tokens,
            "chunk": case.chunk,
        }
        if self.failed:
            return facts | {"failed": self.failed}
        facts |= {"turns": len(self.decodes)}
        decode = case.batch * case.tokens / min(self.decodes)
        prefill = case.batch * case.context / min(self.prefills)
        return facts | {
            "note": self.note,
            "decode_tokens_per_s": round(decode, 2),
            "decode_median": round(case.batch * case.tokens / statistics.median(self.decodes), 2),
            "decode_of_roof": round(decode / sizes.decode_roof(model, case, bandwidth), 4),
            "ms_per_step": round(1e3 * min(self.decodes) * case.chunk / case.tokens, 4),
            "prefill_tokens_per_s": round(prefill, 1),
            "prefill_median": round(
                case.batch * case.context / statistics.median(self.prefills), 1
            ),
            "prefill_of_roof": round(prefill / sizes.prefill_roof(model, case, bandwidth, rate), 4),
            "first_token_s": round(min(self.prefills), 5),
            "peak_bytes": self.peak_bytes,
            "reserved_bytes": self.reserved_bytes,
            **self.state,
        }


class TimeLimit:
    """So many seconds from now; None: any number."""

    def __init__(self, seconds: float | None):
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, 0 or more."""
        return max(self._end - time.monotonic(), 0.0)

    def share(self, of: int) -> "TimeLimit":
        """A part of what is left, for the next of so many."""
        return TimeLimit(None if self._end == math.inf else self.left() / of)

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Interrupt what runs inside when the time is up, by OutOfTime.

        Only in the main thread, and not on Windows: elsewhere it runs to its end.
        """
        is_main = threading.current_thread() is threading.main_thread()
        if self._end == math.inf or not is_main or not hasattr(signal, "setitimer"):
            yield
            return

        def interrupt(number: int, frame: FrameType | None) -> None:
            if _is_called_by_pytorch(frame):
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                return
            raise OutOfTime(_OUT_OF_TIME)

        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, max(self.left(), 1e-3))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _is_called_by_pytorch(frame: FrameType | None) -> bool:
    """Whether an exception would pass through PyTorch's dispatcher, which may abort the process.

    torch.compile traces with tensors whose operations are Python code.
    """
    while frame is not None:
        if frame.f_code.co_name == "__torch_dispatch__":
            return True
        frame = frame.f_back
    return False


@torch.inference_mode()
def run_case(
    field: Field,
    names: Sequence[str],
    case: Case,
    repeats: int,
    limit: TimeLimit,
    say: Callable,
) -> list[Row]:
    """Measure all contestants in one case. One that fails has a row that says so.

    When the time is up there are fewer turns; who has had none is left out, which its row says.
    """
    device = field.model.device
    vocabulary = field.model.config.vocab_size
    # Ids that are text for every contestant, also with the small vocabulary of the GGUF file.
    prompts = torch.randint(300, min(vocabulary, 500), (case.batch, case.context), device=device)
    rows = {name: Row(name, case) for name in names}
    contestants: dict[str, Contestant] = {}
    for name, row in rows.items():
        say(f"{case}: {name} ...")
        _attempt(
            row, lambda row=row: contestants.update({row.engine: _open(field, row, prompts)}), limit
        )
    for turn in range(repeats):
        for name in list(contestants) if turn % 2 else list(contestants)[::-1]:
            row = rows[name]
            contestant = contestants[name]
            if row.decodes and not limit.left():
                continue  # the turns before count
            _attempt(
                row, lambda row=row, contestant=contestant: _turn(row, contestant, device), limit
            )
            if row.failed:
                del contestants[name]
    contestants.clear()
    _clean_up(device)
    return list(rows.values())


def _open(field: Field, row: Row, prompts: Tensor) -> Contestant:
    """Open a contestant and run it once, to warm compilers and caches up; notes peak memory."""
    device = field.model.device
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    contestant = field.open(row.engine, row.case, prompts)
    if on_gpu:  # without the peak of opening: the kernels' trial runs the model itself
        torch.cuda.reset_peak_memory_stats(device)
    contestant.prefill()
    _continue(contestant, row.case)
    machine.synchronize(device)
    row.note = contestant.note
    if on_gpu and row.engine != "llama.cpp":  # PyTorch's counters do not see llama.cpp
        weights = sum(parameter.nbytes for parameter in field.model.parameters())
        weights += packed_bytes(field.model, embedding=True)
        row.peak_bytes = torch.cuda.max_memory_allocated(device) - before + weights
        row.reserved_bytes = torch.cuda.max_memory_reserved(device)
    return contestant


def _turn(row: Row, contestant: Contestant, device: torch.device) -> None:
    prefill = machine.seconds(device, contestant.prefill)
    decode = machine.seconds(device, lambda: _continue(contestant, row.case))
    row.prefills.append(prefill)
    row.decodes.append(decode)
    row.state = row.state or machine.gpu_state(device)  # warm from the first turn


def _continue(contestant: Contestant, case: Case) -> None:
    if case.chunk == 1:
        contestant.generate(case.tokens)
        return
    for at in range(0, case.tokens, case.chunk):
        contestant.score(range(300 + at, 300 + at + min(case.chunk, case.tokens - at)))


def _attempt(row: Row, work: Callable[[], object], limit: TimeLimit) -> None:
    """Do it within the limit; a row that has turns already keeps them if the time is up."""
    try:
        if not limit.left():
            raise OutOfTime(_OUT_OF_TIME)
        with limit.enforced():
            work()
    except OutOfTime as error:
        row.failed = "" if row.decodes else str(error)
        error.__traceback__ = None
    except Exception as error:  # a peer may fail in any way; that is a result
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        row.failed = f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"[:200]
        error.__traceback__ = None  # it would keep the failed contestant's memory alive


def _clean_up(device: torch.device) -> None:
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
