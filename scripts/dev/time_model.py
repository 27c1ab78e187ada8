"""How long a kernel takes on an H200, predicted from its instructions; nothing is measured.

A model of one multiprocessor, the one with the most CTAs: four schedulers issue one instruction of
a warp each clock, in the order of the program. What an instruction waits for is in its control
code, as ptxas wrote it: a number of clocks, and which of six scoreboards must be clear. A load
clears its scoreboard when its bytes are there, after its share of the memory's bandwidth and a
latency. Inputs come from L2 for the first CTAs, then from L1.

What the model lacks: cache misses of inputs, conflicts in shared memory, clocks that drop, and what
the memory does beyond 4.3 TB/s and 0.4 us. So only differences of some per cent between two
versions of a kernel mean something.
"""

import heapq
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from compile_ahead import TOOLS

CLOCK = 1.98e9
BANDWIDTH = 4.3e12  # bytes/s
PROCESSORS = 132
_MEMORY = 790  # clocks from a load's turn to its bytes: 0.4 us
_L2 = 280
_L1 = 45
_SHORT = 30  # other instructions that clear a scoreboard
_START = 300  # of a CTA
_REGISTERS = 65536
_SHARED = 233472  # bytes
_INPUTS = 40  # loads of a warp that find L1 cold

_CODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);\s*/\* 0x[0-9a-f]+ \*/")
_CONTROL = re.compile(r"^\s*/\* 0x([0-9a-f]+) \*/")
_LABEL = re.compile(r"^(\.L_\S+):")
_JUMP = re.compile(r"`\((\.L_\S+?)\)")
# Of what begins an instruction: its pipe, and for how many clocks a warp occupies it
_PIPES = (
    (("HMMA",), "tensor", 8),
    (("LDG", "STG", "LDS", "STS", "LDSM", "ATOM", "SHFL"), "memory", 2),
    (("IMAD", "HFMA2", "HADD2", "HMUL2"), "multiply", 2),
    (("FFMA", "FADD", "FMUL"), "add", 1),
    (("I2FP", "F2FP"), "integer", 2),
    (("I2F", "F2I", "F2F", "MUFU"), "convert", 8),
    (("LOP3", "SHF", "PRMT", "IADD3", "SEL", "ISETP", "LEA", "MOV", "VIADD", "FSEL"), "integer", 2),
    (("FMNMX", "FSETP", "IMNMX", "VIMNMX", "P2R", "R2P", "SGXT", "PLOP3"), "integer", 2),
)


@dataclass(frozen=True)
class Instruction:
    """One instruction, with what its control code says.

    wait   a bit for each scoreboard that must be clear
    sets   the scoreboard that it occupies until its result is there; 7: none
    frees  the same, until its operands are read
    kind   "weights" or "inputs" (loads), "barrier" or ""
    size   bytes of a warp's load of weights
    """

    text: str
    stall: int
    wait: int
    sets: int
    frees: int
    pipe: str
    occupies: int
    kind: str
    size: float


def instructions(cubin: bytes) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """Those of a kernel, and the first and last + 1 of each loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "nvdisasm", "-c", "-hex", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    labels = {}
    text = ""
    for line in listing.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(found)
        elif code := _CODE.match(line):
            text = code[1]
        elif text and (control := _CONTROL.match(line)):
            found.append(_instruction(text, int(control[1], 16) >> 41))
            text = ""
    loops = []
    for at, one in enumerate(found):
        to = _JUMP.search(one.text) if "BRA" in one.text else None
        # A jump to itself or nearly so is the end of the program.
        if to and labels.get(to[1], at) < at - 2:
            loops.append((labels[to[1]], at + 1))
    return found, loops


def _instruction(text: str, control: int) -> Instruction:
    name = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
    pipe, occupies = "other", 1
    for prefixes, its_pipe, clocks in _PIPES:
        if name.startswith(prefixes):
            pipe, occupies = its_pipe, clocks
            break
    kind, size = _kind(name)
    return Instruction(
        text=text,
        stall=max(control & 15, 1),
        wait=control >> 11 & 63,
        sets=control >> 5 & 7,
        frees=control >> 8 & 7,
        pipe=pipe,
        occupies=occupies,
        kind=kind,
        size=size,
    )


def _kind(name: str) -> tuple[str, float]:
    width = 16 if ".128" in name else 8 if ".64" in name else 4
    if name.startswith("LDG"):
        return ("weights", 32 * width) if ".EF" in name else ("inputs", 0)
    return "barrier" if name.startswith("BAR") else "", 0


def program(
    made: Sequence[Instruction], loops: Sequence[tuple[int, int]], rounds: int = 1
) -> list[Instruction]:
    """What a warp executes, if the first loop has so many rounds."""
    made = list(made)
    while made and made[-1].text.startswith(("NOP", "BRA")):
        made.pop()
    if not loops:
        return made
    start, end = loops[0]
    return made[:start] + rounds * made[start:end] + made[end:]


def resident(registers: int, warps: int, shared: int) -> int:
    """How many CTAs share a multiprocessor."""
    a_warp = -(-registers // 8) * 8 * 32
    by_registers = _REGISTERS // 4 // a_warp * 4 // warps
    return max(1, min(by_registers, _SHARED // (shared + 1024), 64 // warps))


def seconds(warp: list[Instruction], CTAs: int, warps: int, residents: int) -> float:
    """What a kernel of so many CTAs takes, all of whose warps execute the same."""
    mine = -(-CTAs // PROCESSORS)
    # The others have fewer CTAs, and leave it more of the bandwidth.
    bytes_a_clock = BANDWIDTH / CTAs * mine / CLOCK
    return _Processor(warp, mine, warps, residents, bytes_a_clock).clocks() / CLOCK


class _Warp:
    """Where a warp is, and when what it waits for is there."""

    def __init__(self, CTA: int, number: int):
        self.CTA = CTA
        self.scheduler = number % 4
        self.at = 0
        self.clear = [0.0] * 8  # by scoreboard; the last two are none
        self.inputs = 0  # loads of them


class _Processor:
    """One multiprocessor."""

    def __init__(
        self,
        warp: list[Instruction],
        CTAs: int,
        warps: int,
        residents: int,
        bytes_a_clock: float,
    ):
        self._program = warp
        self._CTAs = CTAs
        self._warps = warps
        self._residents = residents
        self._bytes_a_clock = bytes_a_clock
        self._free = [0.0] * 4  # when each scheduler can issue again
        self._pipes: dict[tuple[int, str], float] = defaultdict(float)
        self._memory = 0.0  # when it has sent all that it was asked for
        self._loads = 0.0  # when the next load can be issued
        self._started = 0
        self._left: Counter[int] = Counter()  # warps of a CTA that have not ended
        # At a barrier: when each warp of a CTA has come, by CTA and place in the program
        self._met: dict[tuple[int, int], list[tuple[float, _Warp]]] = defaultdict(list)
        self._queue: list[tuple[float, int, _Warp]] = []
        self._pushed = 0

    def clocks(self) -> float:
        """Until all CTAs are done."""
        end = 0.0
        for _ in range(min(self._residents, self._CTAs)):
            self._start(0.0)
        while self._queue:
            now, _, warp = heapq.heappop(self._queue)
            if warp.at < len(self._program):
                self._step(now, warp)
                continue
            end = max(end, now)
            self._left[warp.CTA] -= 1
            if self._left[warp.CTA] == 0 and self._started < self._CTAs:
                self._start(now)
        return end

    def _start(self, now: float) -> None:
        CTA = self._started
        self._started += 1
        self._left[CTA] = self._warps
        for number in range(self._warps):
            self._push(now + _START, _Warp(CTA, CTA * self._warps + number))

    def _push(self, time: float, warp: _Warp) -> None:
        self._pushed += 1
        heapq.heappush(self._queue, (time, self._pushed, warp))

    def _step(self, now: float, warp: _Warp) -> None:
        """Issue a warp's next instruction, or come back when that is possible."""
        one = self._program[warp.at]
        pipe = warp.scheduler, one.pipe
        boards = [warp.clear[i] for i in range(6) if one.wait >> i & 1]
        time = max(now, *boards, self._free[warp.scheduler], self._pipes[pipe])
        if time > now + 1e-9:
            self._push(time, warp)
            return
        self._free[warp.scheduler] = now + 1
        self._pipes[pipe] = now + one.occupies
        if one.kind == "barrier":
            self._meet(now + one.stall, warp)
            return
        warp.clear[one.sets] = max(warp.clear[one.sets], self._result(now, warp, one))
        warp.clear[one.frees] = max(warp.clear[one.frees], now + 20)
        warp.at += 1
        self._push(now + one.stall, warp)

    def _result(self, now: float, warp: _Warp, one: Instruction) -> float:
        """When an instruction's result is there."""
        if one.kind not in ("weights", "inputs"):
            return now + _SHORT
        self._loads = max(self._loads, now) + 4
        if one.kind == "inputs":
            warp.inputs += 1
            is_first = warp.CTA in range(self._residents)
            return self._loads + (_L2 if is_first and warp.inputs <= _INPUTS else _L1)
        self._memory = max(self._loads, self._memory) + one.size / self._bytes_a_clock
        return self._memory + _MEMORY

    def _meet(self, now: float, warp: _Warp) -> None:
        """Wait for the other warps of the CTA."""
        there = self._met[warp.CTA, warp.at]
        there.append((now, warp))
        if len(there) < self._warps:
            return
        time = max(came for came, _ in there) + 10
        for _, other in self._met.pop((warp.CTA, warp.at)):
            other.at += 1
            self._push(time, other)
