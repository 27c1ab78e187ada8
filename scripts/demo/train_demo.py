"""Train the demo checkpoint from nothing, and write it as a GGUF file.

After Ctrl-C the same command continues. So does one with more --steps after the end, at the stage
and the rate that a run of that length would have reached.
"""

import argparse
import math
import pickle
import signal
import sys
import time
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py, demo/

import common
import torch
from tqdm import tqdm

from demo.training import Trainer, train_tokenizer
from mistral.checkpoints.gguf_export import export
from mistral.checkpoints.load import choose_device
from mistral.files import whole_file

SAVE_EVERY = 200  # steps


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__, "python scripts/demo/train_demo.py /tmp/demo")
    parser.add_argument(
        "folder",
        type=common.path,
        help="where the state of the training is kept, and demo.gguf is written",
    )
    parser.add_argument(
        "--steps", type=int, default=14800, help="batches of about 2,048 tokens (default: 14800)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="multiply in bfloat16: faster on a GPU, and on a CPU with AVX-512 BF16",
    )
    args = parser.parse_args()
    if args.steps < 1 or not 0 <= args.seed < 2**63:
        raise ValueError("--steps must be 1 or more, --seed 0 or more (and below 2**63)")
    return args


def main() -> None:
    args = arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        train_tokenizer(args.seed),
        args.steps,
        choose_device(args.device),
        args.seed,
        bfloat16=args.bfloat16,
    )
    state = args.folder / "state.pt"
    seconds = 0.0
    if state.exists():
        try:
            saved = torch.load(state, map_location=trainer.device, weights_only=True)
            trainer.load_state_dict(saved["trainer"])
        except (RuntimeError, KeyError, TypeError, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(
                f"{state} is not a state of this training; remove it: {error}"
            ) from None
        if saved["trainer"]["seed"] != args.seed:
            raise ValueError(
                f"{state} was begun with --seed {saved['trainer']['seed']}; "
                "use that seed, or remove it"
            )
        seconds = saved["seconds"]
        common.note(f"continues at step {trainer.step}")
    seconds = train(trainer, state, seconds)
    target = args.folder / "demo.gguf"
    export(trainer.model.float().cpu(), trainer.tokenizer, target, "Q8_0")
    common.note(
        f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB) "
        f"after {seconds / 60:.0f} minutes of training"
    )


def train(trainer: Trainer, state: Path, before: float) -> float:
    """Train to the end and save now and then; returns all seconds, those `before` included.

    KeyboardInterrupt after Ctrl-C, when the step in progress has ended and its state is saved. A
    second Ctrl-C does not wait.
    """
    start = time.perf_counter() - before
    mean = None
    interrupts: list[int] = []

    def notice(number: int, _: FrameType | None) -> None:
        interrupts.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, notice)
    with tqdm(total=trainer.steps, initial=trainer.step, unit="step", mininterval=5) as bar:
        for step, loss in trainer.run():
            if not math.isnan(loss):  # a batch may have nothing that the model is to write
                mean = loss if mean is None else 0.98 * mean + 0.02 * loss
                bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            bar.update()
            if step % SAVE_EVERY == 0 or step == trainer.steps or interrupts:
                save(trainer, state, time.perf_counter() - start)
            if interrupts:
                common.note(f"saved step {step}; the same command continues there")
                raise KeyboardInterrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return time.perf_counter() - start


def save(trainer: Trainer, state: Path, seconds: float) -> None:
    """Write the state, whole or not at all."""
    with whole_file(state) as file:
        torch.save({"trainer": trainer.state_dict(), "seconds": seconds}, file)


if __name__ == "__main__":
    common.run(main)
