"""Write a small Mistral with random weights in Hugging Face's layout, to try the scripts with."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py, demo/

import common
import torch
from demo.training import train_pieces

import mistral
from mistral.checkpoints.hugging_face import save

CHATML = ("<|im_end|>", "<|im_start|>")


def train_tokenizer(num_pieces: int) -> bytes:
    """A sentencepiece model learned from this package's source."""
    sources = sorted(Path(mistral.__file__).parent.rglob("*.py"))
    return train_pieces(
        (line for source in sources for line in source.read_text().splitlines()), num_pieces
    )


def write_random_checkpoint(
    folder: Path,
    *,
    tokenizer_model: bytes | None = None,
    hidden_size: int = 256,
    num_layers: int = 4,
    window: int | None = 128,
    seed: int = 0,
) -> None:
    """Fill `folder` with a checkpoint: 4 query heads a key/value head, ChatML's tokens added."""
    proto = tokenizer_model or train_tokenizer(768)
    size = mistral.Tokenizer(proto).vocab_size
    added = {size + i: text for i, text in enumerate(CHATML)}
    tokenizer = mistral.Tokenizer(proto, added, [size])
    config = mistral.Config(
        vocab_size=size + 32,  # padded: Hermes-2-Pro's embedding has 30 rows without a token
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 7 // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 128,
        head_dim=32,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        sliding_window=window,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.stop_ids,
    )
    torch.manual_seed(seed)
    save(mistral.Mistral(config).to(torch.bfloat16), tokenizer, folder)


def main() -> None:
    arguments = common.parser(
        __doc__, "python scripts/dev/random_checkpoint.py /tmp/small --hidden-size 512"
    )
    arguments.add_argument("folder", type=common.path)
    arguments.add_argument(
        "--tokenizer",
        type=common.path,
        help="a tokenizer.model to use; none: a small one is trained",
    )
    arguments.add_argument(
        "--hidden-size", type=int, default=256, help="a multiple of 128 (default: 256)"
    )
    arguments.add_argument("--layers", type=int, default=4, help="default: 4")
    arguments.add_argument(
        "--window", type=common.window, default=128, help="tokens, or none (default: 128)"
    )
    arguments.add_argument("--seed", type=int, default=0)
    args = arguments.parse_args()
    if not 0 <= args.seed < 2**63 or args.layers < 1:
        raise ValueError("--seed must be 0 or more (and below 2**63), --layers 1 or more")
    if args.hidden_size < 128 or args.hidden_size % 128:
        raise ValueError(f"--hidden-size must be a multiple of 128, not {args.hidden_size}")
    if args.window == "auto":
        raise ValueError(
            "--window must be a number of tokens, or none: "
            "there is no checkpoint yet that determines it"
        )
    if args.folder.exists() and any(args.folder.iterdir()):
        raise ValueError(f"{args.folder} is not empty; name a new folder")
    write_random_checkpoint(
        args.folder,
        tokenizer_model=args.tokenizer.read_bytes() if args.tokenizer else None,
        hidden_size=args.hidden_size,
        num_layers=args.layers,
        window=args.window,
        seed=args.seed,
    )
    common.note(f"wrote {args.folder}")


if __name__ == "__main__":
    common.run(main)
