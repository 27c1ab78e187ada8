"""The rows of an evaluation: questions and expected answers.

Their form is that of NousResearch/func-calling-eval (prompt, completion, tools) and of
NousResearch/json-mode-eval (prompt, completion, schema): `prompt` is a list of {"role", "content"},
the other columns are JSON in a string.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from mistral.chat.formats.prompts import tool_prompt
from mistral.checkpoints import hub
from mistral.errors import MistralError
from mistral.files import expanded

Task = Literal["function-calling", "json-mode"]
_ENDINGS = (".parquet", ".jsonl")


class DataError(MistralError, ValueError):
    """The rows of an evaluation cannot be read, or one of them is malformed."""


@dataclass(frozen=True)
class Row:
    """One question with its expected answer.

    index     its place among all rows, from 0
    where     file and line, for messages
    messages  the conversation that the model continues: {"role", "content"} each, both text
    expected  the calls, {"name", "arguments"} each; in JSON mode any value
    tools     the functions in OpenAI's form ([] in JSON mode)
    schema    JSON schema of the answer ({} for function calling)
    """

    index: int
    where: str
    messages: list[dict[str, str]]
    expected: Any
    tools: list[dict[str, Any]]
    schema: dict[str, Any]

    @property
    def prompt_hash(self) -> str:
        """Identifies the prompt of an answer."""
        return sha256(json.dumps(self.messages).encode()).hexdigest()[:16]


def read_rows(source: str, task: Task, limit: int | None = None) -> list[Row]:
    """The rows of a .jsonl or .parquet file, of a folder of them, or of a dataset on the hub.

    source  a path, or "owner/name"
    limit   how many rows, from the first

    In a folder only the .parquet files count if there are any, and only those of the split "train"
    if there is one. Raises DataError for rows that cannot be read, and for a malformed row, with
    its file and line. Parquet needs pyarrow.
    """
    lines = (line for file in _files(source) for line in _lines(file))
    rows = [_row(i, *where_line, task) for i, where_line in enumerate(islice(lines, limit))]
    if not rows:
        raise DataError(f"{source} has no rows")
    return rows


def _files(source: str) -> list[Path]:
    try:
        path = expanded(source)
    except FileNotFoundError as error:
        raise DataError(str(error)) from None
    if path.is_file():
        return [path]
    if not path.exists():
        if not hub.is_name(source) or ":" in source or path.suffix in _ENDINGS:
            raise DataError(
                f"{source} does not exist; name a .jsonl or .parquet file, or a dataset on the hub"
            )
        path = _download(source)
    for ending in _ENDINGS:  # some datasets have both forms
        files = sorted(path.rglob(f"*{ending}"))
        if files:
            split = re.compile(r"(^|[/._-])train($|[/._-])")
            train = [file for file in files if split.search(file.relative_to(path).as_posix())]
            return train or files
    raise DataError(f"{source} has no .parquet and no .jsonl file")


def _download(name: str) -> Path:
    patterns = [f"*{ending}" for ending in _ENDINGS]
    try:
        return Path(
            huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=patterns)
        )
    except GatedRepoError as error:
        raise DataError(
            f"{name} needs access: accept its terms on its page, and set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(
            f"there is no file and no dataset {name}, or HF_TOKEN has no access to it"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise DataError(
            f"the dataset {name} is not in the cache, and the hub cannot be reached"
        ) from error
    except Exception as error:  # the HTTP client's own errors differ by version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"the dataset {name} could not be downloaded ({reason}); run it again"
        ) from error


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    """The place and the columns of each row."""
    if file.suffix == ".parquet":
        for number, columns in enumerate(_parquet(file), 1):
            yield f"{file}, row {number}", columns
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            if line.strip():
                yield where, _json(where, "the line", line)


def _parquet(file: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"reading {file.name} needs pyarrow (pip install pyarrow); rows in .jsonl do not"
        ) from None
    try:
        return parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as parquet: {error}") from None


def _row(index: int, where: str, columns: Any, task: Task) -> Row:
    wanted = ("prompt", "completion", "tools" if task == "function-calling" else "schema")
    for name in wanted:
        _require(
            isinstance(columns, dict) and name in columns,
            where,
            f"it has no {name!r}, and {task} needs it",
        )
    _check_prompt(where, columns["prompt"])
    messages = [{key: message[key] for key in ("role", "content")} for message in columns["prompt"]]
    expected = _json(where, "'completion'", columns["completion"])
    if task == "json-mode":
        schema = _json(where, "'schema'", columns["schema"])
        _require(isinstance(schema, dict), where, "its 'schema' is not a JSON object")
        return Row(
            index=index, where=where, messages=messages, expected=expected, tools=[], schema=schema
        )
    tools = _json(where, "'tools'", columns["tools"])
    _check_tools(where, tools)
    expected = expected if isinstance(expected, list) else [expected]
    _check_calls(where, expected)
    messages.insert(0, {"role": "system", "content": _tool_prompt(columns["tools"])})
    return Row(
        index=index, where=where, messages=messages, expected=expected, tools=tools, schema={}
    )


def _tool_prompt(tools: str) -> str:
    """The system prompt of the evaluation, with the tools as the row spells them."""
    before, after = tool_prompt([], style="eval").split(" [] ")
    return f"{before} {tools} {after}"


def _json(where: str, name: str, text: Any) -> Any:
    _require(isinstance(text, (str, bytes)), where, f"{name} is not a string of JSON")
    try:
        if isinstance(text, str):
            text.encode()
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not Unicode
        raise DataError(f"{where}: {name} is not valid JSON: {error}") from None


def _check_prompt(where: str, prompt: Any) -> None:
    _require(isinstance(prompt, list) and prompt, where, "its 'prompt' is not a list of messages")
    for message in prompt:
        valid = isinstance(message, dict)
        valid = valid and _is_text(message.get("role")) and _is_text(message.get("content"))
        _require(
            valid, where, "a message of its 'prompt' needs a 'role' and a 'content' that are text"
        )


def _check_tools(where: str, tools: Any) -> None:
    _require(isinstance(tools, list), where, "its 'tools' are not a list")
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        valid = isinstance(function, dict) and isinstance(function.get("name"), str)
        _require(
            valid,
            where,
            "one of its 'tools' is not of the form {'type': 'function', 'function': {'name': ...}}",
        )


def _check_calls(where: str, calls: list[Any]) -> None:
    for call in calls:
        valid = (
            isinstance(call, dict)
            and isinstance(call.get("name"), str)
            and isinstance(call.get("arguments"), dict)
        )
        _require(
            valid,
            where,
            "its 'completion' is not a call, {'name': ..., 'arguments': {...}}, or a list of calls",
        )


def _is_text(value: Any) -> bool:
    """A str that is valid Unicode."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _require(valid: Any, where: str, problem: str) -> None:
    if not valid:
        raise DataError(f"{where}: {problem}")
