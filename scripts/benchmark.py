"""Prefill and decode speed against transformers, in one run, on random weights (no download)."""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
from random_checkpoint import train_tokenizer

import mistral
from mistral.checkpoints.hugging_face import load_model, save
from mistral.checkpoints.load import choose_device
from mistral.memory import format_bytes

# 165 million parameters, cut like the 7B: 4 query heads a key/value head, an MLP of 3.5 times the width
SIZES = dict(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=3584,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
)


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__, "python scripts/benchmark.py --threads 2 --prompt-tokens 200 --new-tokens 40")
    parser.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=common.DTYPES, help="default: float32 on the CPU, else bfloat16")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of PyTorch (default: 2)")
    parser.add_argument("--prompt-tokens", type=int, default=200, help="default: 200")
    parser.add_argument("--new-tokens", type=int, default=40, help="default: 40")
    parser.add_argument("--repeats", type=int, default=15, help="turns; the quickest counts (default: 15)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if min(args.threads, args.prompt_tokens, args.new_tokens, args.repeats) < 1:
        raise ValueError("--threads, --prompt-tokens, --new-tokens and --repeats must be 1 or more")
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    dtype = common.DTYPES[args.dtype] if args.dtype else torch.float32 if device.type == "cpu" else torch.bfloat16
    ours, theirs = both_models(device, dtype)

    facts = versions(device) | {"dtype": str(dtype).removeprefix("torch."), "parameters": ours.config.num_parameters}
    for name, value in facts.items():
        print(f"{name:<14} {value:,}" if isinstance(value, int) else f"{name:<14} {value}")
    bandwidth = read_bandwidth(device)
    # What one token must read: every weight but the embedding, of which it takes one row
    read = (ours.config.num_parameters - ours.config.vocab_size * ours.config.hidden_size) * dtype.itemsize
    print(f"{'read speed':<14} {format_bytes(bandwidth)}/s, measured: a sum over 1 GB")
    print(f"{'decode roof':<14} {bandwidth / read:.1f} tokens/s: {format_bytes(read)} a token at that speed\n")

    prompt = torch.randint(3, 32000, (1, args.prompt_tokens), device=device)
    results = {
        "prefill": measure(args, args.prompt_tokens, lambda: ours(prompt), lambda: theirs(prompt, use_cache=False)),
        "decode": measure(args, args.new_tokens, our_decode(ours, prompt, args), their_decode(theirs, prompt, args)),
    }
    print(f"{'tokens/s':<10}{'ours':>10}{'transformers':>15}{'ratio':>8}{'of medians':>12}   (of {args.repeats} turns)")
    for name, r in results.items():
        medians = r["ratio_of_medians"]
        print(f"{name:<10}{r['ours']:>10.1f}{r['transformers']:>15.1f}{r['ratio']:>8.2f}{medians:>12.2f}")
    print(json.dumps(facts | {"read_bytes_per_s": round(bandwidth), **results}))


def both_models(device: torch.device, dtype: torch.dtype):
    """The same random weights, ours and transformers'."""
    try:
        import transformers
    except ImportError:
        raise ValueError("transformers is not installed: pip install transformers") from None
    transformers.utils.logging.disable_progress_bar()
    config = mistral.Config(
        **SIZES,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        sliding_window=4096,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        eos_token_id=(2,),
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save(mistral.Mistral(config).to(dtype), mistral.Tokenizer(train_tokenizer(512)), Path(folder))
        theirs = transformers.MistralForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        ours = load_model(Path(folder), config, device, dtype)
        theirs = theirs.to(device).eval()
    return ours, theirs


def our_decode(model: mistral.Mistral, prompt: torch.Tensor, args: argparse.Namespace) -> Callable[[], float]:
    def run() -> float:
        ids = mistral.generate(
            model,
            prompt[0].tolist(),
            mistral.Sampling(temperature=0.0),
            max_new_tokens=args.new_tokens + 1,
            stop_tokens=(),
        )
        next(ids)  # the prompt and the first token are not counted
        start = time.perf_counter()
        for _ in ids:
            pass
        return time.perf_counter() - start

    return run


def their_decode(model, prompt: torch.Tensor, args: argparse.Namespace) -> Callable[[], float]:
    """The model in a bare loop: `generate` itself would only add to it."""
    from transformers import DynamicCache

    def run() -> float:
        cache = DynamicCache(config=model.config)
        token = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(args.new_tokens):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            token.item()  # a generated token is looked at
        return time.perf_counter() - start

    return run


@torch.inference_mode()
def measure(args: argparse.Namespace, tokens: int, ours: Callable, theirs: Callable) -> dict[str, float]:
    """Tokens/s of both, taken in turns so that both meet the same machine.

    The quickest turn counts: whatever else the machine did made a turn slower, never faster. The ratio of the medians
    stands beside it.
    """
    times: dict[Callable, list[float]] = {ours: [], theirs: []}
    for turn in range(args.repeats + 1):
        for run in (ours, theirs) if turn % 2 else (theirs, ours):
            times[run].append(seconds(run))
    del times[ours][0], times[theirs][0]  # to warm up
    best, best_theirs = min(times[ours]), min(times[theirs])
    return {
        "ours": round(tokens / best, 2),
        "transformers": round(tokens / best_theirs, 2),
        "ratio": round(best_theirs / best, 3),
        "ratio_of_medians": round(statistics.median(times[theirs]) / statistics.median(times[ours]), 3),
    }


def seconds(run: Callable) -> float:
    """How long it takes; a function that times itself returns a float."""
    synchronize()
    start = time.perf_counter()
    result = run()
    synchronize()
    return result if isinstance(result, float) else time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s of the fastest of five sums over 1 GB."""
    numbers = torch.ones(250_000_000, device=device)
    return 1e9 / min(seconds(lambda: numbers.sum()) for _ in range(5))


def versions(device: torch.device) -> dict[str, str | int]:
    import transformers

    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "machine": processor,
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    common.run(main)
