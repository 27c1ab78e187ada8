"""Rows in, verdicts out: the model is asked, its answers are kept in a file as they come, and
scored by both rules.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from mistral.chat.formats.chatml import begin_turn, encode_turn
from mistral.engine.decoder import Engine
from mistral.engine.generation import generate_batch
from mistral.evaluation import fixed_rules, paper_rules
from mistral.evaluation.rows import DataError, Row, Task
from mistral.evaluation.verdict import Verdict
from mistral.model import Mistral
from mistral.sampling import Sampling
from mistral.tokenizer import Tokenizer

RULES: dict[str, dict[str, Callable[[Row, str], Verdict]]] = {
    "function-calling": {"paper": paper_rules.score_calls, "fixed": fixed_rules.score_calls},
    "json-mode": {"paper": paper_rules.score_json, "fixed": fixed_rules.score_json},
}
BEGINNING = b'{"id": '  # of every line that is written here


class ModelAnswers:
    """Asks a model, several rows at once: called with rows, it gives a text for each.

    The card's numbers come from a temperature of 0.1, 512 new tokens, and top_k 50, transformers'
    default at the time. The random numbers of a row depend on the seed and its index (with several
    rows at once, on that of the first), so an evaluation that was cut gives the same answers when
    it goes on.

    empty_decoder  to be set for another engine than the reference: gives a decoder of the model for
                   so many rows, with as much room as `check` says
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
        self._model, self._tokenizer = model, tokenizer
        self.empty_decoder: Callable[[int], Engine] | None = None
        self._sampling = {"temperature": temperature, "top_k": 50}
        self._max_new_tokens, self._seed = max_new_tokens, seed
        Sampling(**self._sampling)  # raises before any work is done
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, not {max_new_tokens}")

    def check(self, rows: Sequence[Row]) -> int:
        """The room in tokens that the longest row needs.

        Raises ValueError where that is more than the model has.
        """
        limit, most = self._model.config.max_position_embeddings, 0
        for row in rows:
            tokens = len(self._encode(row))
            if (room := tokens + self._max_new_tokens) > limit:
                raise ValueError(
                    f"{row.where}: a prompt of {tokens} tokens and {self._max_new_tokens} new ones "
                    f"are more than the "
                    f"{limit} that the checkpoint was made for; ask for fewer new tokens"
                )
            most = max(most, room)
        return most

    def __call__(self, rows: Sequence[Row]) -> list[str]:
        """The answers' text: the token that ends one is left out, other control tokens are
        spelled.
        """
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
    """The answers that were given, kept in a file of JSON lines that grows by one with each of
    them.

    path      None: nothing is kept. A file of an earlier run with the same settings is gone on
              with; a last line that was cut off is dropped.
    settings  what the answers depend on besides the prompts

    Raises DataError for a file with other settings, and for one that was not written here.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]):
        self._path, self._settings = path, dict(settings)
        self._records: dict[int, dict[str, Any]] = {}
        if path is not None:
            path.touch()  # where nothing can be written, it is known before the model is asked
            self._read(path)

    def text(self, row: Row) -> str | None:
        """The answer to a row, if there is one to this very prompt."""
        record = self._records.get(row.index)
        return record["text"] if record and record["prompt"] == row.prompt_hash else None

    def add(self, row: Row, text: str, verdicts: Mapping[str, Verdict]) -> None:
        """Write one line; nothing if it is there already."""
        scores = {
            rules: {"passed": verdict.passed, **vars(verdict)}
            for rules, verdict in verdicts.items()
        }
        record = {
            "id": row.index,
            "prompt": row.prompt_hash,
            "text": text,
            **scores,
            "settings": self._settings,
        }
        if self._path is None or record == self._records.get(row.index):
            return
        with self._path.open("ab") as file:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
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
        except (
            ValueError,
            RecursionError,
        ):  # cut off; but never touch the end of a file that is not ours
            if not lines and not rest.startswith(BEGINNING[: len(rest)]):
                raise DataError(
                    f"{path} is no file of answers; name another file for them"
                ) from None
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size - len(rest))
            return
        record = self._record(f"{path}, line {len(lines) + 1}", rest)
        self._records[record["id"]] = record
        with path.open("ab") as file:
            file.write(b"\n")

    def _record(self, where: str, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
            kinds = {"id": int, "prompt": str, "text": str, "settings": dict}
            if not all(isinstance(record[key], kind) for key, kind in kinds.items()):
                raise ValueError
        except (ValueError, LookupError, TypeError, RecursionError):
            raise DataError(
                f"{where}: this is no line that an evaluation wrote; name another file"
            ) from None
        for name in {**self._settings, **record["settings"]}:
            theirs, ours = record["settings"].get(name), self._settings.get(name)
            if theirs != ours:
                raise DataError(
                    f"{where}: it was made with {name} {theirs}, not {ours}; name another file"
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
    """The verdicts on each row, by name of the rules, as soon as it is done.

    ask      gives the model's text for each row of a batch (`ModelAnswers`)
    answers  where they are kept; rows whose answer is there already are scored, but not asked again
    """
    answers = answers or Answers(None, {})
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        texts = [answers.text(row) for row in batch]
        if None in texts:  # all of them again: the random numbers of one depend on its neighbours
            texts = [kept if kept is not None else new for kept, new in zip(texts, ask(batch))]
        for row, text in zip(batch, texts):
            verdicts = {name: score(row, text) for name, score in RULES[task].items()}
            answers.add(row, text, verdicts)
            yield verdicts
