"""Answers in JSON that follow a schema: prompt, generate, parse, validate, and try again."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral.chat.answer import Answer, one_row
from mistral.chat.formats import ChatFormat, chat_format
from mistral.chat.formats.prompts import json_prompt
from mistral.chat.grammar import UnsupportedSchema, json_constraint
from mistral.chat.grammar.free_text import TextOnly
from mistral.chat.tools import feedback
from mistral.chat.tools.json_schema import (
    SchemaError,
    as_json,
    compile_schema,
    one_line,
    problem,
    pydantic_schema,
)
from mistral.engine.constraints import Constraint
from mistral.engine.decoder import Engine
from mistral.errors import MistralError
from mistral.model import Mistral
from mistral.sampling import Sampling
from mistral.tokenizer import Tokenizer

Schema = Mapping[str, Any] | str | Path | type


class JSONError(MistralError, ValueError):
    """The model gave no valid answer. `text` is its last one, `attempts` how many there were."""

    def __init__(self, message: str, text: str, attempts: int):
        super().__init__(message)
        self.text, self.attempts = text, attempts


class OutOfTokens(JSONError):
    """The answer was not complete after `max_new_tokens`. `text` is what there is of it."""


def generate_json(
    model_or_decoder: Mistral | Engine,
    tokenizer: Tokenizer,
    prompt: str,
    schema: Schema,
    *,
    sampling: Sampling | None = None,
    grammar: bool = True,
    max_new_tokens: int = 512,
    retries: int = 3,
    format: str | None = None,
) -> Any:
    """Answer `prompt` with JSON that is valid for `schema`; returns the parsed value.

    model_or_decoder  a decoder is for one row; it forgets what it has read
    schema            a JSON schema, a file with one, or a pydantic model (then an instance of it is
                      returned)
    sampling          None: greedily
    grammar           let the model write nothing else (needs the extra `chat`). A schema that no
                      grammar can express is a warning, and the answer is then only checked.
    max_new_tokens    of one answer
    retries           how often the model may correct an answer that is not valid: it is shown the
                      answer and the error
    format            a name of `mistral.chat.formats`; None: what the checkpoint's tokens tell

    Raises SchemaError for a schema that is none, GrammarError for one that no value is valid for,
    OutOfTokens where the last answer was cut off, JSONError where it is not valid, ValueError for a
    prompt that there is no room for. All of them are ValueErrors. Needs the extra `chat`, with a
    grammar or without.
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
    messages = [
        {"role": "system", "content": json_prompt(rules)},
        {"role": "user", "content": prompt},
    ]
    ids = chat.begin(tokenizer, messages)
    sampling = sampling or Sampling(temperature=0)
    # Under a grammar, what spells the end of a turn stands in a string.
    spelled_ends = isinstance(constraint, TextOnly)
    for attempt in range(retries + 1):
        answer = Answer(
            decoder, tokenizer, chat, ids, sampling, constraint.copy(), max_new_tokens, spelled_ends
        )
        value, wrong = _check("".join(answer), validator, model_class)
        if wrong is None:
            return value
        if attempt == retries or answer.reason == "length":
            break
        ids = chat.go_on(
            tokenizer, [{"role": "tool", "name": "", "error": feedback.not_json(attempt, wrong)}]
        )
    if answer.reason == "length":
        message = f"the answer is not complete after {len(answer.ids)} tokens: {wrong}"
        raise OutOfTokens(message, answer.text, attempt + 1)
    raise JSONError(f"no valid answer in {attempt + 1} attempts: {wrong}", answer.text, attempt + 1)


def read_schema(schema: Schema) -> dict[str, Any]:
    """The JSON schema that a dict, a file or a pydantic model stands for.

    SchemaError where it is none.
    """
    if isinstance(schema, type):
        return pydantic_schema(schema)
    if isinstance(schema, str | Path):
        try:
            schema = json.loads(Path(schema).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise SchemaError(f"{schema} is no JSON: {error}") from None
        except OSError as error:
            raise SchemaError(f"the schema {schema} cannot be read: {error.strerror}") from None
    if not isinstance(schema, Mapping):
        raise SchemaError(f"a JSON schema is an object, not {type(schema).__name__}")
    return as_json(dict(schema))


def _check(text: str, validator: Any, model_class: type | None) -> tuple[Any, str | None]:
    """The parsed answer, or what is wrong with it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, f"the answer is no JSON: {one_line(str(error))}"
    if wrong := problem(validator, value):
        return None, wrong
    if model_class is None:
        return value, None
    try:
        return model_class.model_validate_json(text), None
    except ValueError as error:  # the class may have checks that no schema can express
        return None, one_line(str(error))


def _constraint(
    decoder: Engine, tokenizer: Tokenizer, schema: dict, chat: ChatFormat, grammar: bool
) -> Constraint:
    """Lets only valid JSON be written; where no grammar is wanted or possible, any text."""
    stop_tokens = chat.stop_ids(tokenizer)
    if grammar:
        options = dict(stop_tokens=stop_tokens, begins_text=chat.reply_begins_text)
        try:
            return json_constraint(tokenizer, decoder.config.vocab_size, schema, **options)
        except UnsupportedSchema as error:
            warnings.warn(f"the answer is checked only after it is written: {error}", stacklevel=3)
    return TextOnly(decoder, tokenizer, stop_tokens)
