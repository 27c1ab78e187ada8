"""Write docs/benchmarks/gpu.md from what gpu_run.py has measured.

Each section is replaced by a table of the latest lines of its kind, the first by the machine and
the versions. A section without lines stays as it is, and so does the introduction, which is written
by hand. Lines of a rehearsal are refused: nothing ran.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py, benchmark_parts/

import common
from benchmark_parts.report import write_section

from mistral.files import format_bytes

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/benchmarks/gpu.md"
_WAYS = ("packed_us", "unpacked_us")


def main() -> None:
    parser = common.parser(__doc__, "python scripts/dev/gpu_tables.py DIR/results.jsonl")
    parser.add_argument("results", type=common.path, nargs="+", help="the oldest first")
    parser.add_argument("--page", type=common.path, default=PAGE)
    args = parser.parse_args()
    stages = read(args.results)
    written = []
    for heading, table in (
        ("The machine", machine_table(stages)),
        ("Decode and prefill", speed_table(stages)),
        ("Distances from the eager model", distance_table(stages)),
        ("Kernels of one step", profile_table(stages)),
        ("Launch shapes", shape_table(stages)),
        ("Packed products, as they are and unpacked", crossover_table(stages)),
        ("Tests", test_table(stages)),
    ):
        if table:
            write_section(args.page, heading, table)
            written.append(heading)
    common.note(f"wrote {', '.join(written) or 'nothing: there are no measurements'}")


def read(paths: Iterable[Path]) -> list[dict]:
    """The lines of some runs. ValueError for a rehearsal's."""
    stages = []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            stage = json.loads(line)
            if stage.get("rehearsal"):
                raise ValueError(
                    f"{path}, line {number} is of a rehearsal: nothing ran, and nothing was "
                    "measured; run gpu_run.py on a GPU, into another folder"
                )
            stages.append(stage)
    return stages


def lines_of(stages: Sequence[dict], prefix: str) -> list[dict]:
    """What the stages with such a name have printed."""
    return [
        line
        for stage in stages
        if stage["stage"].startswith(prefix)
        for line in stage.get("results", [])
    ]


def machine_table(stages: Sequence[dict]) -> str:
    """Name and value of each fact, the latest."""
    facts = {}
    for line in lines_of(stages, "facts"):
        if "launch_gap_us" in line:
            kind = "dependent" if line["dependent"] else "plain"
            facts[f"gap between two launches of a graph, {kind}"] = f"{line['launch_gap_us']} us"
            continue
        facts |= line
    rates = {"read_bytes_per_s": "reading", "copy_bytes_per_s": "copying"}
    for key, name in rates.items():
        if key in facts:
            facts[name] = format_bytes(facts.pop(key)) + "/s"
    if "matrix_flop_per_s" in facts:
        facts["products of matrices"] = f"{facts.pop('matrix_flop_per_s') / 1e12:,.0f} TFLOP/s"
    return table(("", ""), facts.items())


def speed_table(stages: Sequence[dict]) -> str:
    """A row for each format, engine and case, the latest: tokens/s and their share of the roof."""
    rows = {}
    for prefix in ("benchmark", "rows", "contexts"):
        for stage in stages:
            name, _, format = stage["stage"].partition(" ")
            if name != prefix:
                continue
            for line in stage.get("results", []):
                if "case" not in line:
                    continue
                for result in line["results"]:
                    rows[format, result["engine"], line["case"]] = _speed(result)
    head = (
        *("format", "engine", "case", "decode, tokens/s", "median", "of roof"),
        *("prefill, tokens/s", "of roof", "SM MHz", "watts"),
    )
    return table(head, [(*key, *values) for key, values in rows.items()])


def _speed(result: dict) -> tuple[str, ...]:
    if "failed" in result:
        return (f"not measured: {result['failed']}", *[""] * 6)
    return (
        f"{result['decode_tokens_per_s']:,.1f}",
        f"{result['decode_median']:,.1f}",
        f"{result['decode_of_roof']:.0%}",
        f"{result['prefill_tokens_per_s']:,.0f}",
        f"{result['prefill_of_roof']:.0%}",
        f"{result['sm_mhz']:.0f}" if "sm_mhz" in result else "",
        f"{result['watts']:.0f}" if "watts" in result else "",
    )


def distance_table(stages: Sequence[dict]) -> str:
    """What the trial has found."""
    rows = {}
    for line in lines_of(stages, "trial"):
        if "format" not in line:
            continue
        outcome = line.get("failed")
        shown = f"{line['distance']:.2%}" if outcome is None else f"{outcome}; {line['works']}"
        rows[line["format"], str(line["batch"]), line["how"]] = (shown,)
    head = ("format", "rows", "launches", "distance of the logits")
    return table(head, [(*key, *values) for key, values in rows.items()])


def profile_table(stages: Sequence[dict]) -> str:
    """The kernels of a step that take a hundredth of it or more."""
    rows = []
    found = [line for line in lines_of(stages, "profile") if "step_s" in line]
    for line in {line["format"]: line for line in found}.values():
        total = sum(row["us"] for row in line["rows"]) or 1.0
        for row in line["rows"]:
            if row["us"] >= total / 100:
                rate = f"{row['GB_per_s']:,.0f}" if row["GB_per_s"] else ""
                values = (
                    f"{row['calls']:g}",
                    f"{row['us']:,.1f}",
                    f"{row['us'] / total:.0%}",
                    rate,
                )
                rows.append((line["format"], row["name"], *values))
    return table(("format", "kernel", "calls", "us", "share", "GB/s"), rows)


def shape_table(stages: Sequence[dict]) -> str:
    """Of each kernel the shape in use and the quickest one that computes the same."""
    groups: dict[tuple, list[dict]] = {}
    for line in lines_of(stages, "sweep"):
        if "kernel" in line:
            tokens = line["context"] if line["chunk"] == 1 else f"chunk of {line['chunk']}"
            key = line["format"], str(line["batch"]), str(tokens), line["kernel"]
            groups.setdefault(key, []).append(line)
    rows = []
    for key, lines in groups.items():
        right = [line for line in lines if "failed" not in line]
        if not right:
            rows.append((*key, "", "", f"none runs: {lines[0]['failed']}"))
            continue
        best = min(right, key=lambda line: line["us"])
        in_use = [line for line in right if not line["constants"] and not line["options"]]
        now = f"{min(line['us'] for line in in_use):.2f}" if in_use else ""
        changes = best["constants"] | best["options"] | ({"pdl": True} if best["dependent"] else {})
        shown = ", ".join(f"{name} {value}" for name, value in changes.items()) or "as it is"
        rows.append((*key, now, f"{best['us']:.2f}", shown))
    head = ("format", "rows", "tokens", "kernel", "us in use", "us at best", "shape")
    return table(head, rows)


def crossover_table(stages: Sequence[dict]) -> str:
    """Microseconds of the products of some layers, by both ways."""
    rows = {}
    for line in lines_of(stages, "crossover"):
        if "rows" in line:
            values = [f"{line[name]:,.0f}" if name in line else "" for name in _WAYS]
            rows[line["format"], line["rows"]] = (*values, line.get("failed", ""))
    head = ("format", "rows", "packed, us", "unpacked, us", "failed")
    return table(head, [(*key, *values) for key, values in rows.items()])


def test_table(stages: Sequence[dict]) -> str:
    """The counts of each run of tests, and the tests that failed; the comparisons of the soak."""
    rows = []
    for line in lines_of(stages, "soak"):
        if "steps" in line:
            right = bool(line.get("same_bits") and line.get("counters_are_zero"))
            launches = "dependent" if line["dependent"] else "plain"
            name = f"soak, {line['format']}, {launches} launches, {line['steps']} steps"
            why = "" if right else line.get("failed", "other bits, or counters that are not zero")
            rows.append((name, int(right), int(not right), 0, why))
    for stage in {stage["stage"]: stage for stage in stages if "tests" in stage["stage"]}.values():
        lines = stage.get("results", [])
        counts = next((line for line in lines if "passed" in line), {})
        failed = [f"{line['test']}: {line['failed']}" for line in lines if "test" in line]
        values = [str(counts.get(name, "")) for name in ("passed", "failed", "skipped")]
        rows.append((stage["stage"], *values, "<br>".join(failed) or stage.get("failed", "")))
    return table(("", "passed", "failed", "skipped", "which"), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown; "" without rows."""
    body = [[str(cell).replace("|", "/") for cell in row] for row in rows]
    lines = [list(head), ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if body else ""


if __name__ == "__main__":
    common.run(main)
