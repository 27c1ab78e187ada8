"""Asks a model the rows of an evaluation, keeps its answers in a file, and scores them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from mistral.chat.formats.chatml import begin_turn, encode_turn
from mistral.engine.base import Engine
from mistral.engine.generation import generate_batch
from mistral.evaluation import fixed_rules, paper_rules
from mistral.evaluation.rows import DataError, Row, Task
from mistral.evaluation.verdict import Verdict
from mistral.files import append_line
from mistral.model import Mistral
from mistral.sampling import Sampling
from mistral.tokenizer import Tokenizer

RULES: dict[str, dict[str, Callable[[Row, str], Verdict]]] = {
    "function-calling": {"paper": paper_rules.score_calls, "fixed": fixed_rules.score_calls},
    "json-mode": {"paper": paper_rules.score_json, "fixed": fixed_rules.score_json},
}
_BEGINNING = b'{"id": '  # of every line of a file of answers


class ModelAnswers:
    """Asks a model, several rows at once: called with rows, it returns a text for each.

    The card's numbers come from a temperature of 0.1, 512 new tokens, and top_k 50, transformers'
    default at the time. The random numbers of a row depend on the seed and its index (of several
    rows at once, on the index of the first), so an evaluation that continues after an interruption
    has the same answers.

    empty_decoder  set it to use another engine than the reference: creates a decoder of the model
                   for so many rows, with the room that `check` returned
    """

    def __init__(
        self,
        model: Mistral,
        tokenizer: Tokenizer,
        *,
        temperature: float = 0.1,
        max_new_tokens: int = 512,
        seed: int = 0,
    ):
        self._model = model
        self._tokenizer = tokenizer
        self.empty_decoder: Callable[[int], Engine] | None = None
        self._sampling = {"temperature": temperature, "top_k": 50}
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        Sampling(**self._sampling)  # raises before the model is asked
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, not {max_new_tokens}")

    def check(self, rows: Sequence[Row]) -> int:
        """The room in tokens that the longest row needs.

        Raises ValueError if the model was not made for so many.
        """
        limit = self._model.config.max_position_embeddings
        most = 0
        for row in rows:
            tokens = len(self._encode(row))
            if (room := tokens + self._max_new_tokens) > limit:
                raise ValueError(
                    f"{row.where}: a prompt of {tokens} tokens and {self._max_new_tokens} new ones "
                    f"are more than the {limit} that the checkpoint was made for; "
                    "lower max_new_tokens"
                )
            most = max(most, room)
        return most

    def __call__(self, rows: Sequence[Row]) -> list[str]:
        """The answers' text, without the stop token; other control tokens are spelled."""
        number = sha256(f"{self._seed} {rows[0].index}".encode()).digest()[:8]
        sampling = Sampling(**self._sampling, seed=int.from_bytes(number))
        prompts = [self._encode(row) for row in rows]
        decoder = self.empty_decoder(len(rows)) if self.empty_decoder else self._model
        answers = generate_batch(decoder, prompts, sampling, max_new_tokens=self._max_new_tokens)
        stop = self._model.config.eos_token_id
        return [
            self._tokenizer.decode(ids[:-1] if ids[-1] in stop else ids, control=True)
            for ids in answers
        ]

    def _encode(self, row: Row) -> list[int]:
        ids = self._tokenizer.encode("")
        for message in row.messages:
            ids += encode_turn(self._tokenizer, message["role"], message["content"])
        return ids + begin_turn(self._tokenizer, "assistant")


class Answers:
    """The model's answers, in a file of JSON lines that grows by one line with each of them.

    path      None: nothing is written. A file of an earlier run with the same settings is
              continued; a last line that was cut off is dropped.
    settings  that the answers depend on, besides the prompts

    Raises DataError for a file with other settings, and for one that is not a file of answers.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]):
        self._path = path
        self._settings = dict(settings)
        self._records: dict[int, dict[str, Any]] = {}
        if path is not None:
            path.touch()  # fails before the model is asked if the file cannot be written
            self._read(path)

    def text(self, row: Row) -> str | None:
        """The answer to a row with this prompt, if there is one."""
        record = self._records.get(row.index)
        return record["text"] if record and record["prompt"] == row.prompt_hash else None

    def add(self, row: Row, text: str, verdicts: Mapping[str, Verdict]) -> None:
        """Append one line, unless the file has it already."""
        record: dict[str, Any] = {"id": row.index, "prompt": row.prompt_hash, "text": text}
        for rules, verdict in verdicts.items():
            record[rules] = {"passed": verdict.passed, **vars(verdict)}
        record["settings"] = self._settings
        if self._path is None or record == self._records.get(row.index):
            return
        append_line(self._path, json.dumps(record, ensure_ascii=False).encode())
        self._records[row.index] = record

    def _read(self, path: Path) -> None:
        *lines, rest = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            record = self._record(f"{path}, line {number}", line)
            self._records[record["id"]] = record
        if not rest:
            return
        try:
            json.loads(rest)
        except (ValueError, RecursionError):  # cut off, or not a file of answers
            if not lines and not rest.startswith(_BEGINNING[: len(rest)]):
                raise DataError(
                    f"{path} is not a file of answers; name another file for them"
                ) from None
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size - len(rest))
            return
        record = self._record(f"{path}, line {len(lines) + 1}", rest)
        self._records[record["id"]] = record
        append_line(path, b"")

    def _record(self, where: str, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
            types = {"id": int, "prompt": str, "text": str, "settings": dict}
            if not all(isinstance(record[key], type) for key, type in types.items()):
                raise ValueError
        except (ValueError, LookupError, TypeError, RecursionError):
            raise DataError(
                f"{where}: this is not a line of an evaluation's answers; name another file"
            ) from None
        for name in {**self._settings, **record["settings"]}:
            theirs = record["settings"].get(name)
            ours = self._settings.get(name)
            if theirs != ours:
                raise DataError(
                    f"{where}: it was written with {name} {theirs}, not {ours}; name another file"
                )
        return record


def evaluate(
    task: Task,
    rows: Sequence[Row],
    ask: Callable[[Sequence[Row]], list[str]],
    *,
    answers: Answers | None = None,
    batch_size: int = 1,
) -> Iterator[dict[str, Verdict]]:
    """The verdicts on each row, by the name of the rules, as soon as its batch is answered.

    ask      returns the model's text for each row of a batch (`ModelAnswers`)
    answers  keeps them; rows that have an answer in it are scored, but not asked again
    """
    answers = answers or Answers(None, {})
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        texts = [answers.text(row) for row in batch]
        if None in texts:  # ask all again: the random numbers of one depend on the batch
            texts = [new if kept is None else kept for kept, new in zip(texts, ask(batch))]
        for row, text in zip(batch, texts):
            verdicts = {name: score(row, text) for name, score in RULES[task].items()}
            answers.add(row, text, verdicts)
            yield verdicts
