"""A trial of dependent launches in a process of its own, before this one depends on them.

After an illegal address, say, CUDA takes no more work from a process, whatever it asks for: a trial
in this process would take plain kernels, and every other engine, with it. A trial that hangs would
hang it. So another process tries first, with a model of the same widths and types of weights, but
one layer of each kind, and without values: what a kernel reads and writes does not depend on them.
What it compiles is on disk for this process.
"""

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from mistral import Config, Mistral
from mistral.quantization.ggml_types import GgmlType
from mistral.quantization.packed import Packed, PackedEmbedding, PackedLinear, TiedOutput

_SECONDS = 300  # compiling included
_ROOM = 80  # tokens a row


class Shape(NamedTuple):
    """What decides which kernels run, and on what sizes.

    kinds  of the packed layers, by name
    tied   whether the output matrix is the packed embedding
    """

    config: Config
    dtype: torch.dtype
    kinds: dict[str, GgmlType]
    tied: bool
    batch_size: int


def problem_apart(model: Mistral, batch_size: int) -> str | None:
    """Why kernels with dependent launch do not run in another process; None if they do."""
    paths = os.pathsep.join(filter(None, sys.path))
    try:
        run = subprocess.run(
            [sys.executable, "-m", "mistral_kernels.apart", str(model.device.index or 0)],
            input=pickle.dumps(shape_of(model, batch_size)),
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"a trial in another process took more than {_SECONDS} s"
    except OSError as error:
        return f"another process, for a trial, cannot be started: {error}"
    if run.returncode == 0:
        return None
    lines = run.stderr.decode(errors="replace").strip().splitlines()
    reason = lines[-1][:300] if lines else f"it ended with {run.returncode}"
    return f"a trial in another process failed: {reason}"


def shape_of(model: Mistral, batch_size: int) -> Shape:
    """The shape of a model with one layer of each kind that this one has."""
    kinds: dict[str, GgmlType] = {}
    seen: list[dict[str, GgmlType]] = []
    for layer in model.model.layers:
        own = _kinds(layer)
        if own not in seen:
            kinds |= {f"model.layers.{len(seen)}.{name}": kind for name, kind in own.items()}
            seen.append(own)
    kinds |= {name: kind for name, kind in _kinds(model).items() if ".layers." not in name}
    return Shape(
        config=replace(model.config, num_hidden_layers=len(seen)),
        dtype=model.dtype,
        kinds=kinds,
        tied=isinstance(model.lm_head, TiedOutput),
        batch_size=batch_size,
    )


def _kinds(module: nn.Module) -> dict[str, GgmlType]:
    """The types of the packed layers inside, by name."""
    named = module.named_modules()
    return {name: layer.kind for name, layer in named if isinstance(layer, Packed)}


def model_of(shape: Shape, device: torch.device) -> Mistral:
    """A model of this shape; what is plain has random values, what is packed is 0."""
    with torch.device("meta"):
        model = Mistral(shape.config).to(shape.dtype)
    for name, kind in shape.kinds.items():
        plain = model.get_submodule(name)
        rows, columns = plain.weight.shape
        size = (rows, columns // kind.block_weights * kind.block_bytes)
        packed: Packed = PackedLinear(torch.empty(size, dtype=torch.uint8, device="meta"), kind)
        if isinstance(plain, nn.Embedding):
            packed = PackedEmbedding(packed.blocks, kind, shape.dtype)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, packed)
    if shape.tied:
        model.lm_head = TiedOutput(model.model.embed_tokens)
    model = model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for layer in model.modules():
            if isinstance(layer, Packed):
                layer.blocks.zero_()
    return model.requires_grad_(False)


def main() -> None:
    """Of the other process: stdin has the shape, the argument is the number of the GPU."""
    from mistral_kernels.decoder import Decoder
    from mistral_kernels.trial import TOKENS, try_out

    shape: Shape = pickle.loads(sys.stdin.buffer.read())
    device = torch.device("cuda", int(sys.argv[1]))
    torch.cuda.set_device(device)
    model = model_of(shape, device)
    decoder = Decoder(model, shape.batch_size, _ROOM, pdl=True)
    # Without the model's own logits nothing is compared.
    try_out(decoder, torch.full((TOKENS, shape.config.vocab_size), torch.nan, device=device))
    torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
