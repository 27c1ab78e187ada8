"""From how many rows on it is quicker to unpack a packed matrix, and to multiply by cuBLAS.

All matrices of some layers of a 7B, one after another, by both ways, each in a CUDA graph: a line
of JSON for each format and number of rows. `MAX_ROWS` (kernels/mistral_kernels/decode/matvec.py)
is where prompts change from the one to the other.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # common.py, benchmark_parts/

import common
import torch
from benchmark_parts import machine, sizes
from torch import Tensor

from mistral_kernels.packed.dequantize import Workspace
from mistral_kernels.packed.planes import Planes
from mistral_kernels.packed.short_linear import scale_rows, short_linear
from mistral_kernels.weights import matrix_of, weights_of, workspace_size

_ROWS = (1, 8, 16, 32, 48, 64)
_LAYERS = 4  # more bytes than a cache holds


def main() -> None:
    parser = common.parser(__doc__, "python scripts/dev/gpu_stages/crossover.py")
    parser.add_argument("--formats", nargs="+", default=["Q4_K_M", "Q6_K", "Q8_0"])
    parser.add_argument("--size", default="7b", choices=sizes.SIZES)
    args = parser.parse_args()
    device = torch.device("cuda", 0)
    with torch.inference_mode():
        for format in args.formats:
            model = sizes.make_model(args.size, device, torch.bfloat16, format, _LAYERS)
            weights = weights_of(model)
            workspace = Workspace(workspace_size(weights), model.dtype, device)
            matrices = [
                matrix_of(module)
                for layer in model.model.layers
                for module in (*layer.self_attn.children(), *layer.mlp.children())
            ]
            for rows in _ROWS:
                common.show_json({"format": format, "rows": rows} | both(matrices, rows, workspace))


def both(matrices: list[Planes], rows: int, workspace: Workspace) -> dict[str, float]:
    """Microseconds of all products, as they are and unpacked; or why they do not run."""
    inputs = {
        columns: torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        for columns in {matrix.columns for matrix in matrices}
    }

    def packed() -> None:
        for matrix in matrices:
            x = inputs[matrix.columns]
            short_linear(*scale_rows(x), matrix, x.new_empty(rows, matrix.rows))

    def unpacked() -> None:
        for matrix in matrices:
            workspace.linear(inputs[matrix.columns], matrix)

    line = {}
    for name, work in (("packed", packed), ("unpacked", unpacked)):
        try:
            line[f"{name}_us"] = round(1e6 * seconds(work), 1)
        except Exception as error:  # of Triton, its compiler or the driver
            line["failed"] = f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return line


def seconds(work: Callable[[], Tensor | None]) -> float:
    """The median of some replays of its graph."""
    work()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    device = torch.device("cuda", 0)
    return statistics.median(machine.seconds(device, graph.replay) for _ in range(10))


if __name__ == "__main__":
    common.run(main)
