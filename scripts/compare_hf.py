"""Compare a checkpoint's forward pass with transformers', layer by layer.

The exit code is 1 if they differ.
"""

import argparse
import tempfile
from pathlib import Path

import common
import torch
from torch import Tensor, nn

import mistral
from mistral.checkpoints.hugging_face import save
from mistral.checkpoints.paths import local_path
from mistral.engine.memory import require_memory

TEXT = (
    "Mistral 7B leverages grouped-query attention for faster inference, coupled with sliding "
    "window attention to handle sequences of arbitrary length with a reduced inference cost.\n\n"
    "```python\ndef window(i, W):\n"
    "    return range(max(0, i - W + 1), i + 1)  # naïve — 滑动窗口 🪟\n```\n"
)


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__, "python scripts/compare_hf.py ~/Mistral-7B-v0.1 --dtype bfloat16 --tokens 5000"
    )
    common.add_model_arguments(parser)
    parser.add_argument(
        "--prompt", default=TEXT, help="the text to compare on (default: a built-in one)"
    )
    parser.add_argument("--tokens", type=int, help="repeat or cut the text to this many tokens")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="largest allowed difference (default: 0, none)"
    )
    args = parser.parse_args()
    if args.packed or args.quantize:
        raise ValueError(
            "transformers has no packed weights to compare with; leave out --packed and --quantize"
        )
    if args.tokens is not None and args.tokens < 1:
        raise ValueError(f"--tokens must be 1 or more, not {args.tokens}")
    if not args.tolerance >= 0:
        raise ValueError(f"--tolerance must be 0 or more, not {args.tolerance}")
    common.check_text(args.prompt or None, "--prompt")
    common.check(args)
    return args


def main() -> int:
    args = arguments()
    try:
        import transformers
    except ImportError:
        raise ValueError("transformers is not installed: pip install transformers") from None
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    ours, tokenizer = common.load(args)
    tokens = tokens_to_compare(args, ours, tokenizer)
    theirs = load_theirs(local_path(args.model, args.revision), ours)
    mine = record(ours, lambda: ours(tokens))
    reference = record(theirs, lambda: theirs(tokens, use_cache=False).logits)
    return report(mine, reference, ours.config.sliding_window, args.tolerance)


def tokens_to_compare(
    args: argparse.Namespace, model: mistral.Mistral, tokenizer: mistral.Tokenizer
) -> Tensor:
    """The prompt's ids, repeated or cut to --tokens: [1, T]."""
    ids = tokenizer.encode(args.prompt)
    limit = model.config.max_position_embeddings
    length = len(ids) if args.tokens is None else args.tokens
    if not 1 <= length <= limit:
        raise ValueError(f"{length} tokens cannot be compared: this checkpoint takes 1 to {limit}")
    return torch.tensor([(ids * (length // len(ids) + 1))[:length]], device=model.device)


def load_theirs(path: Path, ours: mistral.Mistral) -> nn.Module:
    """The same checkpoint in transformers, with the window and dtype of ours.

    transformers reads its own layout and most GGUF files. Of another checkpoint it gets our
    weights, so that the forward pass is compared and not the reading; a note says so.
    """
    size = ours.config.num_parameters * ours.dtype.itemsize
    require_memory(
        size,
        ours.device,
        "the same model in transformers, beside ours,",
        lambda _: "try dtype=torch.bfloat16",
    )
    try:
        theirs = read_by_transformers(path, ours)
    # transformers may raise anything at a file that it does not know
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        common.note(f"transformers cannot read {path} ({reason}): it gets the weights from us")
        with tempfile.TemporaryDirectory() as folder:
            save(ours, None, Path(folder))
            theirs = read_by_transformers(Path(folder), ours)
    return theirs.eval().to(ours.device)


def read_by_transformers(path: Path, ours: mistral.Mistral) -> nn.Module:
    """What transformers itself makes of a folder or a GGUF file. Raises whatever it raises.

    A file of the architecture llama has no window there; one is added if ours has one.
    """
    import transformers

    options = dict(dtype=ours.dtype, attn_implementation="sdpa", output_loading_info=True)
    if path.is_file():
        options["gguf_file"] = path.name
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        options["config"] = transformers.AutoConfig.from_pretrained(path)
        options["config"].sliding_window = ours.config.sliding_window
    folder = path.parent if path.is_file() else path
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    if told["missing_keys"]:  # they have random values now
        raise ValueError(f"it does not find {sorted(told['missing_keys'])[0]}")
    if theirs.config.model_type == "llama" and ours.config.sliding_window is not None:
        return with_window(theirs, ours.config.sliding_window)
    return theirs


def with_window(llama: nn.Module, window: int) -> nn.Module:
    """transformers' Mistral with the weights of its Llama: the same model, and a window."""
    from transformers import MistralConfig, MistralForCausalLM
    from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

    fields = llama.config.to_dict()
    for name in ("model_type", "architectures", "quantization_config", "transformers_version"):
        fields.pop(name, None)
    config = MistralConfig(**fields | {"sliding_window": window}, attn_implementation="sdpa")
    with torch.device("meta"):
        mistral_model = MistralForCausalLM(config)
    mistral_model.load_state_dict(llama.state_dict(), assign=True)
    mistral_model.model.rotary_emb = MistralRotaryEmbedding(config)
    return mistral_model


@torch.inference_mode()
def record(model: nn.Module, forward) -> dict[str, Tensor]:
    """What each part of the model put out in one forward.

    Both models use Hugging Face's names for their parts.
    """
    outputs: dict[str, Tensor] = {}
    parts = {"embedding": model.model.embed_tokens}
    parts |= {f"layer {i}": layer for i, layer in enumerate(model.model.layers)}
    parts |= {"final norm": model.model.norm}

    def hook(name: str):
        return lambda _module, _inputs, output: outputs.update({name: output})

    handles = [part.register_forward_hook(hook(name)) for name, part in parts.items()]
    outputs["logits"] = forward()
    for handle in handles:
        handle.remove()
    return outputs | {"logits": outputs.pop("logits")}  # logits last


def report(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], window: int | None, tolerance: float
) -> int:
    logits = theirs["logits"]
    T = logits.shape[1]
    reach = (
        "no window"
        if window is None
        else f"window {window}, {'reached' if window <= T else 'not reached'}"
    )
    common.show(
        f"{T} tokens, {reach}, {str(logits.dtype).removeprefix('torch.')} on {logits.device}\n"
    )
    common.show(f"{'':<12}{'max |d|':>12}{'mean |d|':>12}{'max |theirs|':>14}")
    worst = 0.0
    for name in theirs:
        difference = (ours[name].double() - theirs[name].double()).abs()
        largest = difference.max().item()
        worst = max(worst, largest) if largest == largest else float("nan")
        common.show(
            f"{name:<12}{largest:>12.2e}{difference.mean().item():>12.2e}{theirs[name].abs().max().item():>14.3f}"
        )
        if worst != worst:
            break
    agree = (ours["logits"].argmax(-1) == logits.argmax(-1)).float().mean().item()
    common.show(f"\nmost probable next token: the same at {agree:.2%} of the positions")
    if worst == 0:
        common.show("bit-identical")
    elif worst <= tolerance:
        common.show(f"within the tolerance of {tolerance:g}")
    else:
        common.show(f"DIFFERENT: {worst:.2e}, and the tolerance is {tolerance:g}")
    return 0 if worst <= tolerance else 1


if __name__ == "__main__":
    common.run(main)
