"""Write any checkpoint that loads as a GGUF file, for llama.cpp or for less memory."""

from pathlib import Path

import common

from mistral.checkpoints.gguf_export import KINDS, export
from mistral.engine.memory import format_bytes


def main() -> None:
    parser = common.parser(
        __doc__, "python scripts/export_gguf.py ~/Mistral-7B-v0.1 mistral.Q8_0.gguf --type Q8_0"
    )
    common.add_model_arguments(parser, optional=False)
    parser.add_argument("output", type=Path, help="the file to write; it must not exist")
    parser.add_argument(
        "--type", choices=KINDS, default="Q8_0", help="of the matrices (default: Q8_0)"
    )
    args = parser.parse_args()
    if args.packed or args.quantize:
        raise ValueError(
            "--type says how the weights are rounded; leave out --packed and --quantize"
        )
    if args.output.exists():
        raise ValueError(f"{args.output} exists; remove it or name another file")
    if not args.output.absolute().parent.is_dir():
        raise ValueError(f"{args.output.absolute().parent} is not a folder")
    model, tokenizer = common.load(args)
    export(model, tokenizer, args.output, args.type)
    common.note(f"wrote {args.output}, {format_bytes(args.output.stat().st_size)}")


if __name__ == "__main__":
    common.run(main)
