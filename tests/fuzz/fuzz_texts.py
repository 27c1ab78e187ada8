"""Targets of texts, sampling and evaluation: encode and decode, next ids, rows with answers."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import small
import tokenizer_files
import tokenizers
import torch
from fuzz_case import Maker, Target, cases, one_printable_line
from fuzz_chat import PARTS, TAGS, made_schema

import mistral
from mistral.chat.tools.json_schema import as_json
from mistral.engine.draws import RandomNumbers, sample_rows
from mistral.evaluation import fixed_rules, paper_rules
from mistral.evaluation.rows import DataError, read_rows
from mistral.evaluation.verdict import REASONS
from mistral.sampling import IDLE, next_ids, processed_scores

# 1. Texts

FORMS = ("sentencepiece", *tokenizer_files.FORMS)
EXACT = ("sentencepiece", "legacy", "none", "never", "bytes", "split", "whole_words")
PIECES = (
    *" \n\t<>|/_{}\"'",
    *("<s>", "</s>", "<unk>", "<|im_end|>", "<|im_start|>", "[INST]", "<think>", "capital"),
    *("im_end", " capital", "é", "語", "😀", "the", " The", "12", "▂", "ß", "\u0301", "א", "don't"),
    *(chr(0x10FFFF), "\0", "\ufeff", "\u200b", "\u2028", "\r\n", "  ", "'S", "ſ", "\ufffd", "𝒳"),
)


@cache
def _tokenizer(form: str) -> tuple[mistral.Tokenizer, Any]:
    """A tokenizer and its peer."""
    if form == "sentencepiece":
        made = small.true_tokenizer(stop_ids=(32000,))
        return made, sentencepiece.SentencePieceProcessor(model_proto=made.model_proto)
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_files.content(form)))
    return tokenizer_files.tokenizer(form), library


def _text(m: Maker) -> tuple[Any, ...]:
    parts = m.some(lambda: m.pick(PIECES) if m.chance(85) else m.letters(4), 0, 14)
    if m.chance(3):
        parts *= m.pick((30, 300))
    ids = m.some(lambda: m.number(0, 720) if m.chance(95) else m.whole(), 0, 8)
    return m.pick(FORMS), "".join(parts), ids, m.number(0, 20)


def check_text(case: tuple[Any, ...]) -> str:
    """Encoding is the peer's, and undone by decoding; a stream's pieces are the decoded text."""
    form, text, any_ids, cut = case
    made, peer = _tokenizer(form)
    ids = made.encode(text, bos=False)
    assert not made.control_ids & set(ids), "text became a control token"
    decoded = made.decode(ids)
    if form in EXACT:
        assert decoded == text.replace("▁", " "), f"decoded as {decoded!r}"
    if form == "sentencepiece":
        assert ids == peer.encode(text), "sentencepiece splits it differently"
    else:
        theirs = peer.encode(text, add_special_tokens=False).ids
        assert made.encode(text, bos=False, special=True) == theirs, (
            "tokenizers splits it otherwise"
        )
    if form in EXACT:
        rest = made.encode(text[cut:], bos=False, prefix_space=False)
        stream = made.stream()
        continued = "".join(map(stream.feed, rest)) + stream.finish()
        assert continued == text[cut:].replace("▁", " "), f"continued text is {continued!r}"
    for some in (ids, any_ids):
        for control in (False, True):
            stream = made.stream(strip_leading_space=True, control=control)
            pieces = "".join(map(stream.feed, some)) + stream.finish()
            assert pieces == made.decode(some, control=control), "a stream is another text"
    return form


# 2. Sampling

FIELDS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
FIELDS += ("no_repeat_ngram_size", "seed")
USUAL = {
    "temperature": (0, 0.7, 1, 1.0, 1e-5, 50.0, 1e30, 10**400),
    "top_k": (0, 1, 2, 5, 100, 2**63, 2**64),
    "top_p": (0, 0.0, 1e-9, 0.5, 0.9, 0.999999, 1, 1.0),
    "min_p": (0, 0.0, 1e-9, 0.1, 1, 1.0),
    "typical_p": (1e-9, 0.2, 0.95, 1, 1.0),
    "repetition_penalty": (1e-5, 0.5, 1, 1.3, 1e5),
    "no_repeat_ngram_size": (0, 1, 2, 3, 2**63),
    "seed": (None, 0, 1, 2**64 - 1),
}
VALUES = (*(0.0, 1.0, -1.0, 1.0, 3e38, -3e38, 1e-40, float("-inf"), 88.0, -104.0),)


def _sampling(m: Maker) -> tuple[Any, ...]:
    options = {}
    for name in FIELDS:
        if m.chance(40):
            options[name] = m.pick(USUAL[name]) if m.chance(92) else m.json(1)
    rows, vocabulary = m.number(1, 3), m.number(1, 9)
    strange = m.chance(15)

    def score() -> float:
        return m.float() if strange else m.pick(VALUES) if m.chance(50) else m.number(-40, 40) / 8

    logits = [[score() for _ in range(vocabulary)] for _ in range(rows)]
    history = [m.some(lambda: m.number(0, vocabulary - 1), 0, 6) for _ in range(rows)]
    mask = None
    if m.chance(50):
        mask = [[m.chance(60) for _ in range(vocabulary)] for _ in range(rows)]
    return options, logits, history, mask


def check_sampling(case: tuple[Any, ...]) -> str:
    """An id is allowed and kept, or there is none; a row alone is as in a batch; HF's scores."""
    options, logits, history, mask = case
    sampling = mistral.Sampling(**options)
    logits = torch.tensor(logits, dtype=torch.float32)
    mask = None if mask is None else torch.tensor(mask)
    lengths = [len(row) for row in history]
    longest = max(lengths)
    history = torch.tensor([row + [-1] * (longest - len(row)) for row in history])
    history = history.reshape(len(lengths), longest).long()
    scores = processed_scores(logits, sampling, history, lengths, mask)
    ids = next_ids(logits, sampling, history, lengths, mask, torch.Generator().manual_seed(0))
    for b, id in enumerate(ids.tolist()):
        if id >= 0:
            assert scores[b, id] > float("-inf"), "an excluded id is chosen"
            assert mask is None or mask[b, id], "a forbidden id is chosen"
            continue
        # temperature may overflow finite logits, which is NO_NUMBERS too
        finite = bool(scores[b].isfinite().any() and not scores[b].isnan().any())
        assert not (finite and scores[b].max() < float("inf")), f"{scores[b]} has a choice"
    for b in range(len(ids)):
        row = slice(b, b + 1)
        own_mask = None if mask is None else mask[row]
        own = processed_scores(logits[row], sampling, history[row], lengths[row], own_mask)
        assert torch.equal(own.nan_to_num(), scores[row].nan_to_num()), "another row matters"
    own = [sampling if b else None for b in range(len(ids))]
    random = RandomNumbers(torch.device("cpu"))
    mixed = sample_rows(
        logits, own, history, lengths, mask, random, [b > 0 for b in range(len(ids))]
    )
    assert mixed[0] == IDLE, "an idle row got an id"
    if logits.isfinite().all():
        theirs = _of_transformers(logits, sampling, history, lengths, mask)
        assert theirs is None or torch.equal(theirs, scores), (
            f"transformers: {theirs}, ours {scores}"
        )
    return "sampled" if bool((ids >= 0).all()) else "no choice in a row"


def _of_transformers(
    logits: torch.Tensor,
    sampling: mistral.Sampling,
    history: torch.Tensor,
    lengths: list[int],
    mask: torch.Tensor | None,
) -> torch.Tensor | None:
    """The scores of transformers' processors, row by row; None if they refuse a parameter."""
    from transformers.generation import logits_process as hf

    steps: list[Any] = []
    if sampling.repetition_penalty != 1:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.no_repeat_ngram_size:
        steps.append(hf.NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
    warpers: list[Any] = []
    if sampling.temperature not in (0, 1):
        warpers.append(hf.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        warpers.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(hf.TopPLogitsWarper(float(sampling.top_p)))
    if sampling.min_p > 0:
        warpers.append(hf.MinPLogitsWarper(float(sampling.min_p)))
    if sampling.typical_p < 1:
        warpers.append(hf.TypicalLogitsWarper(float(sampling.typical_p)))
    rows = []
    for b, length in enumerate(lengths):
        ids = history[b : b + 1, :length]
        row = logits[b : b + 1].clone()
        for step in steps:
            row = step(ids, row)
        if mask is not None:
            row = row.masked_fill(~mask[b], float("-inf"))
        for step in warpers if sampling.temperature else ():
            if not row.isfinite().any():
                return None  # theirs fail; ours report that there is no choice
            row = step(ids, row)
        rows.append(row)
    return torch.cat(rows)


# 3. Rows of an evaluation


def _row(m: Maker) -> tuple[Any, ...]:
    task = m.pick(("function-calling", "json-mode"))
    call = {"name": m.pick(("f", "g")), "arguments": {m.text(): m.json(1)}}
    tool = {
        "type": "function",
        "function": {"name": "f", "description": "", "parameters": made_schema(m, 2)},
    }
    expected: Any = call if task == "function-calling" else m.json(2)
    row: dict[str, Any] = {
        "prompt": [{"role": "user", "content": m.text()}],
        "completion": json.dumps(expected) if m.chance(95) else m.text(),
    }
    if task == "function-calling":
        row["tools"] = json.dumps([tool])
    else:
        row["schema"] = json.dumps(made_schema(m, 2))
    if m.chance(20):
        row = m.changed(row)
    line = json.dumps(row).encode()
    if m.chance(10):
        line = m.damaged(line)
    parts = m.some(lambda: m.pick(TAGS) if m.chance(25) else m.pick(PARTS), 0, 6)
    answer = "".join(parts)
    right = m.chance(40)
    return task, line, answer, right


def check_row(case: tuple[Any, ...]) -> str:
    """A row is read and every answer gets a verdict; the expected answer passes the fixed rules."""
    task, line, answer, right = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(line + b"\n")
        row = read_rows(str(path), task)[0]
    name = "score_calls" if task == "function-calling" else "score_json"
    if right:
        answer = _expected_answer(row, task)
    verdicts = [getattr(rules, name)(row, answer) for rules in (fixed_rules, paper_rules)]
    for verdict in verdicts:
        assert verdict.reason in ("passed", *REASONS[task]), verdict.reason
        if verdict.detail:
            one_printable_line(verdict.detail)
    if right and _is_shallow(row.expected):
        assert verdicts[0].passed, f"the expected answer fails: {verdicts[0]}"
    return verdicts[0].reason


def _expected_answer(row: Any, task: str) -> str:
    if task == "json-mode":
        return json.dumps(row.expected)
    return "".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in row.expected)


def _is_shallow(value: Any) -> bool:
    """Whether a value is within the limits of what a model's answer may hold."""
    try:
        as_json(value)
    except ValueError:
        return False
    return True


TARGETS = (
    Target(
        "texts",
        "texts of control tokens, spaces, accents and any characters, in ten vocabularies",
        cases(_text),
        check_text,
        (ValueError,),
        holds="the ids of sentencepiece and tokenizers; decoded it is the text; a stream is the whole",
    ),
    Target(
        "sampling",
        "sampling parameters of any type, with logits, histories and masks",
        cases(_sampling),
        check_sampling,
        (ValueError,),
        holds="the scores of transformers; a row is the same alone",
    ),
    Target(
        "rows",
        "rows of an evaluation, with answers",
        cases(_row),
        check_row,
        (DataError,),
        holds="the expected answer passes",
    ),
)
