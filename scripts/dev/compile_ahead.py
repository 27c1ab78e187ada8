"""Compile a kernel for a GPU that is not there, and analyse the result.

`triton.compile` needs no GPU if it is given a target; the assembler and disassembler come with
Triton's wheel. A launch would see that pointers and strides are multiples of 16; here a hint must
say so, or loads would not be 16 bytes wide.
"""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mistral import Config
from mistral_kernels.decode import attention as decode_attention
from mistral_kernels.decode import embed, gate_up, head, many_rows, projection, qkv
from mistral_kernels.decode.matvec import DENSE
from mistral_kernels.packed import dequantize, joint_linear, short_linear
from mistral_kernels.portable import TRITON_DTYPES, Launch, arch_for
from mistral_kernels.prefill import attention as prefill_attention
from mistral_kernels.prefill import pointwise as prefill_pointwise
from mistral_kernels.prefill import short_attention
from mistral_kernels.sample import kernel as sampling

# Numbers of elements that are multiples of 16, as a head's size is.
_STRIDES = ("stride", "q_stride", "k_stride", "v_stride", "kv_stride", "gate_stride", "up_stride")
# The types of arguments, by name; any other points to elements of the weights' dtype.
_TYPES = (
    dict.fromkeys(
        ("residual", "sums", "cos", "sin", "frequencies", "logits", "scores", "floats"), "*fp32"
    )
    | dict.fromkeys(("partial_outputs", "stats"), "*fp32")
    | dict.fromkeys(("tokens", "positions", "slots", "starts", "lengths"), "*i64")
    | dict.fromkeys(("integers", "counts", "ids", "answers"), "*i64")
    | dict.fromkeys(("eps", "gain", "scale", "attention_factor"), "fp32")
    | dict.fromkeys(
        ("ring_size", "num_slots", "window", "T", "out_features", "rows", "q_rows", "k_rows"), "i32"
    )
    | dict.fromkeys(("second_at", "third_at", "rounds"), "i32")
    | dict.fromkeys(_STRIDES, "i32")
    | dict.fromkeys(("allowed", "seen"), "*i1")
    | dict.fromkeys(("product", "q_product", "k_product", "v_product"), "*fp32")
    | dict.fromkeys(("gate_product", "up_product"), "*fp32")
    | {"counters": "*i32", "inverse": "*fp32"}
)
# Of the model's dtype, which differs from that of the inputs of packed weights.
_MODELS = ("q", "keys", "values", "norm", "inputs", "outputs")
# The constants that name types of weights, and the matrices of that type; packed ones are bytes.
KINDS = {"KIND": ("weight", "gate_proj", "up_proj", "table")} | {
    name: (matrix,)
    for name, matrix in (
        *zip(qkv.KIND_NAMES, ("q_proj", "k_proj", "v_proj")),
        *zip(joint_linear.KIND_NAMES, ("first", "second", "third")),
    )
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_LABEL = re.compile(r"^\s*(\.L_x?_?\S+):")


@dataclass(frozen=True)
class _Compiled:
    """One kernel as a GPU would run it."""

    registers: int  # per thread
    spilled: int  # bytes per thread that did not fit into registers
    shared: int  # bytes of shared memory per CTA
    cubin: bytes
    sass: list[str]  # the instructions with their operands
    loops: list[tuple[int, int]]  # first and last + 1 instruction of each loop
    # kWidth of the operands of `tl.dot`: 2 if 16-bit values come straight from memory
    operand_widths: set[int]

    def count(self, prefix: str, start: int = 0, end: int | None = None) -> int:
        """How many instructions begin with `prefix`."""
        return sum(line.startswith(prefix) for line in self.sass[start:end])


class _Task(NamedTuple):
    """One kernel and its launch."""

    kernel: Any
    launch: Launch


def decode_kernels(
    config: Config,
    dtype: torch.dtype,
    batch: int,
    capability: int,
    kind: str = DENSE,
    larger: str | None = None,
) -> dict[str, _Task]:
    """The kernels of one decode step of such a model, by name.

    kind    the type of the matrices; for a ggml type, dtype is that of their inputs
    larger  the type of v_proj, of "down" and of the head (Q6_K in a Q4_K_M file); None: `kind`
    """
    more = larger or kind
    D = config.hidden_size
    F = config.intermediate_size
    V = config.vocab_size
    H = config.head_dim
    N = config.num_attention_heads
    K = config.num_key_value_heads
    arch = arch_for(capability)
    how = (dtype, arch)
    return {
        "embed": _Task(embed.embed_kernel, embed.launch(batch, D, H, arch, kind)),
        "qkv": _Task(qkv.qkv_kernel, qkv.launch(batch, D, N, K, H, *how, (kind, kind, more))),
        "attention": _Task(
            decode_attention.decode_attention_kernel, decode_attention.launch(batch, N, K, H, *how)
        ),
        "attention ahead": _Task(
            decode_attention.decode_attention_kernel,
            decode_attention.launch(batch, N, K, H, *how, ahead=True),
        ),
        "output": _Task(
            projection.projection_kernel, projection.launch(batch, D, N * H, *how, kind)
        ),
        "gate_up": _Task(gate_up.gate_up_kernel, gate_up.launch(batch, D, F, *how, kind)),
        "down": _Task(projection.projection_kernel, projection.launch(batch, D, F, *how, more)),
        "head": _Task(head.head_kernel, head.launch(batch, D, V, *how, more)),
    }


def short_kernels(
    config: Config,
    dtype: torch.dtype,
    T: int,
    capability: int,
    kind: str,
    larger: str | None = None,
) -> dict[str, _Task]:
    """The kernels that multiply T rows of a short chunk with a model's packed matrices, by name.

    The other arguments are those of `decode_kernels`. All matrices as wide as up_proj run the code
    of "short up".
    """
    D = config.hidden_size
    F = config.intermediate_size
    V = config.vocab_size
    more = larger or kind
    how = (dtype, arch_for(capability))
    kernel = short_linear.short_linear_kernel
    launch = short_linear.launch
    joint = joint_linear.joint_linear_kernel
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    return {
        "scale": _Task(short_linear.scale_rows_kernel, short_linear.scale_launch(T, F)),
        "short qkv": _Task(joint, joint_linear.launch(T, D, heads, *how, (kind, kind, more))),
        "short gate up": _Task(joint, joint_linear.launch(T, D, 2 * F, *how, (kind, kind))),
        "short up": _Task(kernel, launch(T, D, F, *how, kind)),
        "short down": _Task(kernel, launch(T, F, D, *how, more)),
        "short head": _Task(kernel, launch(T, D, V, *how, more)),
    }


def many_rows_kernels(
    config: Config,
    dtype: torch.dtype,
    batch: int,
    capability: int,
    kind: str = DENSE,
    larger: str | None = None,
) -> dict[str, _Task]:
    """The kernels of a step of more than 16 rows that have none of fewer, by name.

    The arguments are those of `decode_kernels`. Plain matrices are those of which the bits are
    kept.
    """
    D = config.hidden_size
    F = config.intermediate_size
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    more = larger or kind
    how = (dtype, arch_for(capability))
    kernel = short_linear.short_linear_kernel
    launch = short_linear.launch
    tasks = {}
    if kind != DENSE:
        both = joint_linear.launch(batch, D, 2 * F, *how, (kind, kind), scaled=False)
        tasks["rows gate up"] = _Task(joint_linear.joint_linear_kernel, both)
    return tasks | {
        "rows up": _Task(kernel, launch(batch, D, F, *how, kind, scaled=False)),
        "rows down": _Task(kernel, launch(batch, F, D, *how, more, scaled=False)),
        "normalise": _Task(many_rows.normalise_kernel, many_rows.normalise_launch(batch, D)),
        "rotate store": _Task(
            many_rows.rotate_store_kernel, many_rows.rotate_store_launch(batch, *heads, joined=True)
        ),
        "add": _Task(many_rows.add_kernel, many_rows.add_launch(batch, D)),
        "silu": _Task(many_rows.silu_kernel, many_rows.silu_launch(batch, F, joined=True)),
    }


def prefill_kernels(
    config: Config, dtype: torch.dtype, tokens: int, capability: int
) -> dict[str, _Task]:
    """The kernels of a prompt in such a model, by name.

    The matrix products between them are cuBLAS's.
    """
    F = config.intermediate_size
    H = config.head_dim
    N = config.num_attention_heads
    K = config.num_key_value_heads
    attention = prefill_attention.launch(1, tokens, N, K, H, dtype, arch_for(capability))
    return {
        "rotate": _Task(
            prefill_pointwise.rotate_chunk_kernel, prefill_pointwise.rotate_launch(tokens, N, K, H)
        ),
        "store": _Task(
            prefill_pointwise.store_chunk_kernel, prefill_pointwise.store_launch(tokens, K, H)
        ),
        "prefill": _Task(prefill_attention.prefill_attention_kernel, attention),
        "swiglu": _Task(
            prefill_pointwise.swiglu_kernel, prefill_pointwise.swiglu_launch(tokens, F)
        ),
    }


def short_attention_kernel(
    config: Config, dtype: torch.dtype, tokens: int, capability: int
) -> _Task:
    """The attention of a few new tokens in such a model."""
    N = config.num_attention_heads
    K = config.num_key_value_heads
    H = config.head_dim
    shape = short_attention.launch(
        1, tokens, N, K, H, dtype, arch_for(capability), decode_attention.num_splits(1, K)
    )
    return _Task(short_attention.short_attention_kernel, shape)


def unpack_kernel(config: Config, kind: str, chosen: bool = False) -> _Task:
    """The kernel that unpacks up_proj, packed as `kind`, or chosen rows of it, for cuBLAS."""
    shape = config.intermediate_size, config.hidden_size
    return _Task(dequantize.unpack_kernel, dequantize.launch(*shape, kind, chosen))


def sample_kernel(config: Config, batch: int, capability: int) -> _Task:
    """The kernel that samples the next ids."""
    return _Task(
        sampling.sample_kernel, sampling.launch(batch, config.vocab_size, arch_for(capability))
    )


def compile_ahead(
    task: _Task, dtype: torch.dtype, capability: int, model_dtype: torch.dtype | None = None
) -> _Compiled:
    """Compile a kernel for weights of `dtype` and compute capability `capability` (80, 90, 120).

    model_dtype  of the cache and the norms; None: `dtype`. For packed weights `dtype` is that of
                 their inputs.

    Raises ValueError if TRITON_INTERPRET=1 has replaced the compiler.
    """
    kernel, launch = task
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError(
            "TRITON_INTERPRET=1 replaces Triton's compiler: unset it to compile ahead of time"
        )
    names = kernel.arg_names
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    act = "*" + TRITON_DTYPES[dtype]
    packed = [
        n
        for kind, matrices in KINDS.items()
        if launch.constants.get(kind, DENSE) != DENSE
        for n in matrices
    ]
    types = (
        _TYPES
        | dict.fromkeys(_MODELS, "*" + TRITON_DTYPES[model_dtype or dtype])
        | dict.fromkeys(packed, "*u8")
    )
    signature = {n: "constexpr" if n in launch.constants else types.get(n, act) for n in names}
    hints = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n in _STRIDES
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=launch.options
    )
    listing, usage = _disassemble(compiled.asm["cubin"])
    sass, loops = _parse_sass(listing)
    found = re.search(r"REG:(\d+)\s+STACK:(\d+).*?LOCAL:(\d+)", usage)
    registers, stack, local = (int(group) for group in found.groups())
    # Declared arrays are on the stack too (the cosine of a huge angle has one), and are not spills.
    declared = sum(
        8 * -(-int(size) // 8) for size in re.findall(r"\.local .*\[(\d+)\];", compiled.asm["ptx"])
    )
    spilled = max(0, stack + local - declared)
    widths = {int(width) for width in re.findall(r"kWidth = (\d+)", compiled.asm["ttgir"])}
    return _Compiled(
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        cubin=compiled.asm["cubin"],
        sass=sass,
        loops=loops,
        operand_widths=widths,
    )


def instructions_per_weight(compiled: _Compiled, launch: Launch) -> float | None:
    """Instructions that a thread executes, start and end included, per weight that it handles.

    None for kernels that are not a matrix-vector product, for float32, which the tensor cores do
    not take, and if two types of weights have a branch each.
    """
    constants = launch.constants
    kinds = {launch.constants[name] for name in KINDS if name in launch.constants}
    if "COLUMNS" not in constants or not compiled.count("HMMA") or len(kinds) > 1:
        return None
    weights = 16 * constants["COLUMNS"] / (32 * constants["WARPS"])
    columns = constants["COLUMNS"]
    if kinds != {DENSE}:  # warps take whole groups, and all of them as many
        columns = -(-columns // (1024 * constants["WARPS"])) * 1024 * constants["WARPS"]
    # One HMMA takes 8 weights a lane to 8 columns.
    multiplications = 16 * columns / (32 * constants["WARPS"]) / 8 * (constants["M"] / 8)
    executed = len(compiled.sass)
    done = compiled.count("HMMA")
    for start, end in compiled.loops:
        if inside := compiled.count("HMMA", start, end):
            executed += (end - start) * (multiplications - done) / inside
    return executed / weights


def _parse_sass(listing: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions of a disassembly, without the padding at its end, and the loops' ranges."""
    sass = []
    labels = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(sass)
        elif instruction := _INSTRUCTION.match(line):
            sass.append(instruction[1] + instruction[2])
    loops = []
    for i, line in enumerate(sass):
        to = re.search(r"`\((\S+?)\)", line) if line.startswith("BRA") else None
        # A jump to itself or nearly so is the end of the program.
        if to and labels.get(to[1], i) < i - 2:
            loops.append((labels[to[1]], i + 1))
    while sass and sass[-1].startswith(("NOP", "BRA")):
        sass.pop()
    return sass, loops


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """The listing of a compiled kernel and its use of resources."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tools = ([TOOLS / "nvdisasm", "-c"], [TOOLS / "cuobjdump", "-res-usage"])
        runs = [
            subprocess.run([*tool, file.name], capture_output=True, text=True, check=True)
            for tool in tools
        ]
    return runs[0].stdout, runs[1].stdout + runs[1].stderr
