"""Score function calling or JSON mode by the model card's rules and by corrected ones.

bfcl is the Berkeley function-calling suite, version 4, scored by its own checker.
"""

import argparse
from hashlib import sha256
from pathlib import Path

import common
from tqdm import tqdm

import mistral
from mistral.chat.answer import SLACK
from mistral.evaluation.rows import read_rows
from mistral.evaluation.run import RULES, Answers, ModelAnswers, evaluate
from mistral.evaluation.verdict import REASONS, Verdict, summary
from mistral_kernels import open_engine

_SETTINGS = (
    "task model revision window packed quantize engine temperature max_new_tokens seed batch_size"
)


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__,
        "python scripts/evaluate.py function-calling --model ~/Hermes-2-Pro-Mistral-7B "
        "--data NousResearch/func-calling-eval --output answers.jsonl",
    )
    parser.add_argument("task", choices=(*RULES, "bfcl"))
    common.add_model_arguments(parser, name="--model")
    common.add_engine_argument(parser)
    parser.add_argument(
        "--data",
        help="rows: .jsonl, .parquet, or owner/name of a dataset on the hub; for bfcl a folder "
        "with the package bfcl-eval (default: where Python finds it)",
    )
    parser.add_argument(
        "--output",
        type=common.path,
        help="keep every answer in this .jsonl; the same command continues there",
    )
    parser.add_argument("--rules", choices=("paper", "fixed", "both"), help="default: both")
    parser.add_argument(
        "--limit", type=int, help="only so many rows, from the first; for bfcl, of each category"
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="rows that are answered at once (default: 1)"
    )
    parser.add_argument(
        "--url",
        help="for bfcl: ask this server in place of a model, such as http://127.0.0.1:8000; "
        "--batch-size rows at the same time",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--temperature", type=float, default=0.1, help="0 is greedy (default: 0.1, as for the card)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, help="default: 512, as for the card"
    )
    args = parser.parse_args()
    if args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise ValueError("--limit and --batch-size must be 1 or more")
    if args.task == "bfcl" and (args.output or args.rules):
        raise ValueError("bfcl has neither --output nor --rules")
    if args.url and args.task != "bfcl":
        raise ValueError("only bfcl has --url")
    if args.task != "bfcl" and args.data is None:
        raise ValueError(f"{args.task} needs --data: .jsonl, .parquet, or a dataset on the hub")
    mistral.Sampling(temperature=args.temperature, seed=args.seed)  # ValueError
    if args.output:
        common.check_output(args.output)
    common.check(args)
    return args


def main() -> None:
    args = arguments()
    if args.task == "bfcl":
        evaluate_bfcl(args)
        return
    rows = read_rows(args.data, args.task, args.limit)
    settings = {name: vars(args)[name] for name in _SETTINGS.split()}
    model, tokenizer = common.load(args)
    settings |= {"dtype": str(model.dtype).removeprefix("torch."), "weights": fingerprint(model)}
    answers = Answers(args.output, settings)
    ask = ModelAnswers(
        model,
        tokenizer,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    ask.empty_decoder = common.open_batch_engines(args, model, ask.check(rows))
    if args.output is None:
        common.note("the answers are not kept: --output FILE keeps them")
    verdicts: dict[str, list[Verdict]] = {name: [] for name in RULES[args.task]}
    with tqdm(total=len(rows), unit="row") as bar:
        for row in evaluate(args.task, rows, ask, answers=answers, batch_size=args.batch_size):
            for name, verdict in row.items():
                verdicts[name].append(verdict)
            passed = {
                name: sum(verdict.passed for verdict in so_far) for name, so_far in verdicts.items()
            }
            bar.set_postfix(passed, refresh=False)
            bar.update()
    wanted = list(verdicts) if args.rules in (None, "both") else [args.rules]
    report({name: summary(verdicts[name]) for name in wanted}, settings)


def evaluate_bfcl(args: argparse.Namespace) -> None:
    """Ask a model the Berkeley suite, and report by category."""
    from mistral.evaluation import bfcl, bfcl_server

    data = bfcl.open_suite(args.data and Path(args.data))
    checker = bfcl.load_checker()
    rows = [
        row for category in bfcl.CATEGORIES for row in bfcl.read_suite(data, category, args.limit)
    ]
    options = {name: vars(args)[name] for name in ("temperature", "seed", "max_new_tokens")}
    if args.url:
        settings = {"task": "bfcl", "url": args.url, **options, "batch_size": args.batch_size}
        asked = bfcl_server.ask_server(
            bfcl_server.post_to(args.url), rows, at_once=args.batch_size, **options
        )
    else:
        settings = {name: vars(args)[name] for name in _SETTINGS.split()}
        model, tokenizer = common.load(args)
        dtype = str(model.dtype).removeprefix("torch.")
        settings |= {"dtype": dtype, "weights": fingerprint(model)}
        room = model.config.max_position_embeddings
        engine, line = open_engine(
            args.engine,
            model,
            args.batch_size,
            room,
            slack=SLACK,
            say=common.note,
            progress=common.compiling,
        )
        common.note(line)
        asked = bfcl.ask(engine, tokenizer, rows, **options)
    scored = []
    for row, answer in tqdm(asked, total=len(rows), unit="row"):
        scored.append((row, answer, bfcl.judge(row, answer, checker)))
    report_bfcl(bfcl.bfcl_summary(scored), settings)


def report_bfcl(results: dict[str, dict], settings: dict) -> None:
    """A table, and all of it as one line of JSON."""
    columns = f"{'rows':>6}{'passed':>8}{'rate':>8}{'95% interval':>18}"
    common.show(f"{'category':<16}{columns}{'calls':>8}{'invalid':>9}{'cut off':>9}")
    for category, result in results.items():
        interval = "{:.1%} - {:.1%}".format(*result["interval"])
        scores = f"{result['n']:>6}{result['passed']:>8}{result['rate']:>8.1%}{interval:>18}"
        counts = f"{result['calls']:>8}{len(result['invalid_calls']):>9}{result['cut']:>9}"
        common.show(f"{category:<16}{scores}{counts}")
        for reason, count in sorted(result["reasons"].items(), key=lambda pair: -pair[1]):
            common.show(f"  {count:>4} {reason}")
    common.show_json(settings | results)


def fingerprint(model: mistral.Mistral) -> str:
    """Tells a checkpoint from another of the same name, by the norms' weights: they are few."""
    norms = [
        weights.float().cpu().numpy().tobytes()
        for name, weights in model.state_dict().items()
        if "norm" in name
    ]
    return sha256(b"".join(norms)).hexdigest()[:8]


def report(results: dict[str, dict], settings: dict) -> None:
    """A table, and all of it as one line of JSON."""
    [n] = {result["n"] for result in results.values()}
    common.show(
        f"{settings['task']}, {n} rows, seed {settings['seed']}, temperature "
        f"{settings['temperature']}"
    )
    common.show("".join([f"{'rules':<18}", *(f"{name:>16}" for name in results)]))
    lines = {"passed": [str(result["passed"]) for result in results.values()]}
    lines["rate"] = [f"{result['rate']:.1%}" for result in results.values()]
    lines["95% interval"] = [
        "{:.1%} - {:.1%}".format(*result["interval"]) for result in results.values()
    ]
    for reason in REASONS[settings["task"]]:
        lines[f"  {reason}"] = [
            str(result["reasons"].get(reason, 0)) for result in results.values()
        ]
    for title, values in lines.items():
        common.show("".join([f"{title:<18}", *(f"{value:>16}" for value in values)]))
    common.show_json(settings | results)


if __name__ == "__main__":
    common.run(main)
