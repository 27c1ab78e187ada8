"""Answers in JSON that follow a schema: prompt, generate, parse, validate, retry."""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mistral.chat.answer import Answer, one_row
from mistral.chat.formats import ChatFormat, chat_format
from mistral.chat.formats.literals import read_literals
from mistral.chat.formats.messages import Message, check_messages
from mistral.chat.formats.prompts import json_prompt
from mistral.chat.grammar import UnsupportedSchema, json_constraint
from mistral.chat.grammar.free_text import TextOnly
from mistral.chat.tools import feedback
from mistral.chat.tools.json_schema import (
    SchemaError,
    as_json,
    compile_schema,
    problem,
    pydantic_schema,
    with_integers,
)
from mistral.engine.base import Constraint, Engine
from mistral.errors import MistralError, one_line
from mistral.files import read_text
from mistral.model import Mistral
from mistral.sampling import Sampling
from mistral.tokenizer import Tokenizer

Schema = Mapping[str, Any] | str | Path | type
_LARGEST_SCHEMA = 16_000_000  # bytes


class JSONError(MistralError, ValueError):
    """The model wrote no valid answer: `text` is the last one of `attempts`."""

    def __init__(self, message: str, text: str, attempts: int):
        super().__init__(message)
        self.text = text
        self.attempts = attempts


class OutOfTokens(JSONError):
    """The answer was not complete after `max_new_tokens`; `text` is its beginning."""


def generate_json(  # noqa: PLR0913
    model_or_decoder: Mistral | Engine,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    schema: Schema,
    *,
    sampling: Sampling | None = None,
    grammar: bool = True,
    max_new_tokens: int = 512,
    retries: int = 3,
    format: str | None = None,
) -> Any:
    """Answer `prompt` with JSON that is valid for `schema`; returns the parsed value.

    model_or_decoder  a decoder has one row; it is emptied first
    prompt            the user's message, or a conversation that the assistant is to answer; its
                      system message follows the schema
    schema            a JSON schema, a file with one, or a pydantic model (then an instance of it is
                      returned)
    sampling          None: greedy
    grammar           allow nothing else (needs the extra `chat`). A keyword that the grammar cannot
                      express causes a warning, and is then only checked.
    max_new_tokens    of one answer: besides the schema, nothing else bounds it
    retries           how often the model may correct an invalid answer: it is shown the answer and
                      the error
    format            a name in `mistral.chat.formats.FORMATS`; None: chosen by the checkpoint's
                      control tokens

    Raises SchemaError for an invalid schema, GrammarError for one that no value is valid for,
    OutOfTokens if the last answer was cut off, JSONError if it is not valid, ValueError for a
    prompt that is too long. All of them are ValueErrors. Needs the extra `chat`, even without a
    grammar.
    """
    if retries < 0 or max_new_tokens < 1:
        raise ValueError("retries must be 0 or more, and max_new_tokens 1 or more")
    model_class = schema if isinstance(schema, type) else None
    rules = read_schema(schema)
    validator = compile_schema(rules)
    decoder = one_row(model_or_decoder)
    decoder.rewind(decoder.lengths[0])
    chat = chat_format(tokenizer, format)
    constraint = _constraint(decoder, tokenizer, rules, chat, grammar)
    messages = prompt
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    ids = chat.begin(tokenizer, with_instruction(messages, json_prompt(rules)))
    sampling = sampling or Sampling(temperature=0)
    # Under a grammar, a spelled end of turn can only be in a string.
    spelled_ends = isinstance(constraint, TextOnly)
    for attempt in range(retries + 1):
        answer = Answer(
            decoder=decoder,
            tokenizer=tokenizer,
            chat=chat,
            prompt_ids=ids,
            sampling=sampling,
            constraint=constraint.copy(),
            max_new_tokens=max_new_tokens,
            spelled_ends=spelled_ends,
        )
        value, wrong = _check("".join(answer), validator, model_class)
        if wrong is None:
            return value
        if attempt == retries or answer.reason == "length":
            break
        told = {"role": "tool", "name": "", "error": feedback.not_json(attempt, wrong)}
        ids = chat.extend(tokenizer, [told])
    if answer.reason == "length":
        message = f"the answer is not complete after {len(answer.ids)} tokens: {wrong}"
        raise OutOfTokens(message, answer.text, attempt + 1)
    raise JSONError(f"no valid answer in {attempt + 1} attempts: {wrong}", answer.text, attempt + 1)


def with_instruction(messages: Sequence[Message], instruction: str) -> list[Message]:
    """The conversation, with the instruction at the beginning of its system message.

    ValueError for messages that are malformed, or that end with an answer.
    """
    checked = check_messages(messages)
    if checked[-1].role == "assistant":
        raise ValueError(
            f"{checked[-1].where} is an answer already: end with what is to be answered"
        )
    if checked[0].role != "system":
        return [{"role": "system", "content": instruction}, *messages]
    system = {"role": "system", "content": f"{instruction}\n\n{checked[0].content}"}
    return [system, *messages[1:]]


def read_schema(schema: Schema) -> dict[str, Any]:
    """The JSON schema of a dict, a file or a pydantic model. SchemaError if it has none."""
    if isinstance(schema, type):
        return pydantic_schema(schema)
    if isinstance(schema, str | Path):
        try:
            text = read_text(schema, _LARGEST_SCHEMA)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SchemaError(f"the schema {schema} cannot be read: {reason}") from None
        try:
            schema = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SchemaError(f"{schema} is not valid JSON: {error}") from None
    if not isinstance(schema, Mapping):
        raise SchemaError(f"a JSON schema is an object, not {type(schema).__name__}")
    return as_json(dict(schema))


def _check(text: str, validator: Any, model_class: type | None) -> tuple[Any, str | None]:
    """The parsed answer and None, or None and the problem."""
    try:
        value = _read_json(text)
    except (ValueError, RecursionError) as error:
        return None, f"the answer is not valid JSON: {one_line(str(error))}"
    if wrong := problem(validator, value):
        return None, wrong
    value = with_integers(validator, value)
    if model_class is None:
        return value, None
    try:
        return model_class.model_validate_json(json.dumps(value)), None
    except ValueError as error:  # by a check of the class that no schema can express
        return None, one_line(str(error))


def _read_json(text: str) -> Any:
    """The JSON of an answer, or what was meant as that; ValueError if there is none, or doubt.

    That is JSON with Python's literals or a comma too many in it, or with text around it.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        strict = error
    inner = re.search(r"[\[{].*[\]}]", text, re.DOTALL)
    try:
        values = read_literals(inner[0] if inner else text)
    except ValueError:
        raise strict from None
    if len(values) > 1:
        raise ValueError(f"there are {len(values)} values in it")
    return values[0]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; a name that occurs twice would lose a value."""
    names = [name for name, _ in pairs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"the name {twice[0]!r} occurs twice in an object")
    return dict(pairs)


def _constraint(
    decoder: Engine, tokenizer: Tokenizer, schema: dict, chat: ChatFormat, grammar: bool
) -> Constraint:
    """Allows only valid JSON, or any text if no grammar is wanted or possible."""
    stop_tokens = chat.stop_ids(tokenizer)
    if grammar:
        try:
            return json_constraint(
                tokenizer,
                decoder.config.vocab_size,
                schema,
                stop_tokens=stop_tokens,
                strip_leading_space=chat.strip_leading_space,
            )
        except UnsupportedSchema as error:
            warnings.warn(f"the answer is checked only after it is written: {error}", stacklevel=3)
    return TextOnly(decoder, tokenizer, stop_tokens)
