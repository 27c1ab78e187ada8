"""Write a checkpoint as a GGUF file, for llama.cpp or for less memory.

It is read and written tensor by tensor: a checkpoint of 7 billion weights takes less than 2 GB.
"""

import argparse

import common

from mistral.checkpoints.gguf_export import KINDS, export_checkpoint
from mistral.checkpoints.load import local_path, open_reader, read_config_and_tokenizer
from mistral.files import format_bytes


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__, "python scripts/export_gguf.py ~/Mistral-7B-v0.1 mistral.Q8_0.gguf --type Q8_0"
    )
    common.add_model_arguments(parser, optional=False)
    parser.add_argument("output", type=common.path, help="the file to write; it must not exist")
    parser.add_argument(
        "--type", choices=KINDS, default="Q8_0", help="of the matrices (default: Q8_0)"
    )
    args = parser.parse_args()
    if args.packed or args.quantize:
        raise ValueError(
            "--type says how the weights are rounded; leave out --packed and --quantize"
        )
    if args.device is not None:
        common.note(f"note: --device {args.device} is not used: an export needs the CPU only")
    common.check_output(args.output)
    if args.output.exists():
        raise ValueError(f"{args.output} exists; remove it or name another file")
    return args


def main() -> None:
    args = arguments()
    common.introduce(args.model)
    reader = open_reader(local_path(args.model, args.revision))
    config, tokenizer = read_config_and_tokenizer(reader, args.window)
    dtype = common.DTYPES.get(args.dtype)
    export_checkpoint(reader, config, tokenizer, args.output, args.type, dtype=dtype)
    common.note(f"wrote {args.output}, {format_bytes(args.output.stat().st_size)}")


if __name__ == "__main__":
    common.run(main)
