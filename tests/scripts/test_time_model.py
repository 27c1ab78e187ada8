"""The model of a multiprocessor, on programs whose time is known."""

import pytest

pytest.importorskip("triton")  # whose disassembler it uses

import time_model
from time_model import Instruction, program, resident, seconds


def one(kind="", size=0.0, wait=0, sets=7, stall=1, pipe="other", occupies=1):
    """An instruction; `wait` and `sets`: scoreboards."""
    return Instruction(
        text=kind, stall=stall, wait=wait, sets=sets, frees=7, pipe=pipe, occupies=occupies,
        kind=kind, size=size,
    )  # fmt: skip


def clocks(warp, CTAs=1, warps=1, residents=1):
    """Of the first multiprocessor, without the start of its first CTA."""
    alone = CTAs * time_model.PROCESSORS
    return seconds(warp, alone, warps, residents) * time_model.CLOCK - time_model._START


def test_a_control_code_is_read():
    # Stall 4, no yield, sets scoreboard 2, frees none, waits for 0 and 3
    code = 4 | 2 << 5 | 7 << 8 | 0b001001 << 11
    load = time_model._instruction("@!P0 LDG.E.EF.128 R4, desc[UR4][R2.64]", code)
    assert (load.stall, load.sets, load.frees, load.wait) == (4, 2, 7, 0b001001)
    assert (load.kind, load.size, load.pipe) == ("weights", 512, "memory")
    assert time_model._kind("LDG.E.128") == ("inputs", 0)
    assert time_model._instruction("I2FP.F32.U32 R1, R2", 0).pipe == "integer"
    assert time_model._instruction("I2F.U16 R1, R2", 0).pipe == "convert"


def test_instructions_take_turns_on_their_scheduler_and_their_pipe():
    assert clocks([one()] * 100) == 100
    assert clocks([one()] * 100, warps=4) == 100  # each has a scheduler of its own
    assert clocks([one()] * 100, warps=8) == pytest.approx(200, abs=2)
    assert clocks([one(pipe="tensor", occupies=8)] * 100) == pytest.approx(800, abs=8)


def test_a_use_waits_for_the_scoreboard_of_its_load_and_no_other():
    load = one("weights", 512, sets=1)
    slow = clocks([load, one(wait=0b10)])
    assert slow > time_model._MEMORY
    assert clocks([load, one(wait=0b01)]) == 2


def test_many_bytes_take_as_long_as_the_memory_needs():
    loads = [one("weights", 512, sets=k % 6) for k in range(600)] + [one(wait=0b111111)]
    spread = clocks(loads, CTAs=8, residents=8)
    a_clock = time_model.BANDWIDTH / time_model.PROCESSORS / time_model.CLOCK
    assert spread == pytest.approx(8 * 600 * 512 / a_clock + time_model._MEMORY, rel=0.02)


def test_the_first_loop_has_its_rounds():
    before, body, after = one("weights", 512), one(), one(wait=0b10)
    assert program([before, body, after], [(1, 2)], rounds=3) == [before, *[body] * 3, after]
    assert program([before, body], [], rounds=3) == [before, body]


def test_warps_meet_at_a_barrier_and_a_cta_follows_another():
    fast = [one("barrier"), one()]
    assert clocks(fast, warps=8) < 30
    after = clocks([one()] * 100, CTAs=2, residents=1)
    assert after == pytest.approx(200 + time_model._START, abs=2)


def test_registers_and_shared_memory_limit_the_ctas():
    assert [resident(r, 4, 2048) for r in (84, 109, 128, 129, 168)] == [5, 4, 4, 3, 3]
    assert resident(128, 8, 4096) == 2
    assert resident(64, 4, 61440) == 3
