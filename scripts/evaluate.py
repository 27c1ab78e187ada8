"""Score function calling or JSON mode by the model card's rules and by corrected ones."""

import argparse
from hashlib import sha256

import common
from tqdm import tqdm

import mistral
from mistral.evaluation.rows import read_rows
from mistral.evaluation.run import RULES, Answers, ModelAnswers, evaluate
from mistral.evaluation.verdict import REASONS, Verdict, summary


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__,
        "python scripts/evaluate.py function-calling --model ~/Hermes-2-Pro-Mistral-7B "
        "--data NousResearch/func-calling-eval --output answers.jsonl",
    )
    parser.add_argument("task", choices=RULES)
    common.add_model_arguments(parser, name="--model")
    common.add_engine_argument(parser)
    parser.add_argument(
        "--data",
        required=True,
        help="rows: .jsonl, .parquet, or owner/name of a dataset on the hub",
    )
    parser.add_argument(
        "--output",
        type=common.path,
        help="keep every answer in this .jsonl; the same command continues there",
    )
    parser.add_argument(
        "--rules", choices=("paper", "fixed", "both"), default="both", help="default: both"
    )
    parser.add_argument("--limit", type=int, help="only so many rows, from the first")
    parser.add_argument(
        "--batch-size", type=int, default=1, help="rows that are answered at once (default: 1)"
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
    mistral.Sampling(temperature=args.temperature, seed=args.seed)  # ValueError
    if args.output:
        common.check_output(args.output)
    common.check(args)
    return args


def main() -> None:
    args = arguments()
    rows = read_rows(args.data, args.task, args.limit)
    names = (
        "task model revision window packed quantize engine "
        "temperature max_new_tokens seed batch_size"
    )
    settings = {name: vars(args)[name] for name in names.split()}
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
    wanted = list(verdicts) if args.rules == "both" else [args.rules]
    report({name: summary(verdicts[name]) for name in wanted}, settings)


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
