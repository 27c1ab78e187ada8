"""A short run of every target; scripts/dev/fuzz.py is the long one, and writes the page."""

import os
import time
from dataclasses import replace

import pytest
import small
from fuzz_case import Target, cases, one_printable_line, run_case
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, given, settings

CASES = 20
PAGE = small.ROOT / "docs/reference/fuzzing.md"


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_target_holds_for_some_cases(name):
    target = TARGETS[name]

    @settings(
        max_examples=CASES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.cases)
    def run(case):
        run_case(target, case)

    run()


def test_the_page_lists_every_target():
    rows = [row.split(" | ") for row in PAGE.read_text().splitlines() if row.startswith("| ")][1:]
    listed = {row[0].removeprefix("| "): row[1:3] for row in rows}
    assert listed == {one.name: [one.what, one.holds or "none"] for one in TARGETS.values()}


def test_a_fault_is_seen():
    def check(case):
        if case == "raise":
            raise KeyError("not documented")
        if case == "print":
            raise ValueError("a\nb")
        if case == "spin":
            while True:
                pass
        if case == "last":
            start = time.process_time()
            while time.process_time() < start + 0.025:
                pass
        if case == "fill":
            return str(len(b"x" * 200_000_000))
        return "ended"

    target = Target("x", "", cases(lambda m: m.text()), check, (ValueError,), seconds=0.02)
    assert run_case(target, "").what == "ended"
    with pytest.raises(KeyError):
        run_case(target, "raise")
    for case, reason in (
        ("print", "not one printable line"),
        ("spin", "CPU time"),
        ("last", "it takes"),
    ):
        with pytest.raises(AssertionError, match=reason):
            run_case(target, case)
    if os.access("/proc/self/clear_refs", os.W_OK):
        with pytest.raises(AssertionError, match="it takes .* MB"):
            run_case(replace(target, seconds=5.0, megabytes=20), "fill")
    with pytest.raises(AssertionError, match="u202e"):
        one_printable_line("a\u202eb")
