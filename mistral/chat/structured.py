"""Answers in JSON that follow a schema: prompt, generate, parse, validate, and try again."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral.chat import feedback
from mistral.chat.answer import SPELLED, Answer, TextOnly
from mistral.chat.formats import chat_format
from mistral.chat.grammar import UnsupportedSchema, json_constraint
from mistral.chat.json_schema import SchemaError, as_json, compile_schema, one_line, problem
from mistral.chat.prompts import json_prompt
from mistral.decoder import Decoder, Engine
from mistral.errors import MistralError
from mistral.generation import Constraint
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
    schema            a JSON schema, a file with one, or a pydantic model (then an instance of it is returned)
    sampling          None: greedily
    grammar           let the model write nothing else (needs the extra `chat`). A schema that no grammar can express
                      is a warning, and the answer is then only checked.
    max_new_tokens    of one answer
    retries           how often the model may correct an answer that is not valid: it is shown the answer and the error
    format            a name of `mistral.chat.formats`; None: what the checkpoint's tokens tell

    Raises SchemaError for a schema that is none, OutOfTokens where the last answer was cut off, JSONError where it is
    not valid. Validation needs the extra `chat`.
    """
    if retries < 0 or max_new_tokens < 1:
        raise ValueError("retries must be 0 or more, and max_new_tokens 1 or more")
    model_class = schema if isinstance(schema, type) else None
    rules = read_schema(schema)
    validator = compile_schema(rules)
    decoder = _decoder(model_or_decoder)
    chat = chat_format(tokenizer, format)
    stop_tokens = tuple(dict.fromkeys((*tokenizer.stop_ids, *chat.stop_ids(tokenizer))))
    constraint = _constraint(decoder, tokenizer, rules, stop_tokens) if grammar else None
    text_only = TextOnly(tokenizer, decoder.config.vocab_size, stop_tokens)
    messages = [{"role": "system", "content": json_prompt(rules)}, {"role": "user", "content": prompt}]
    ids = chat.begin(tokenizer, messages)
    for attempt in range(retries + 1):
        room = decoder.limit - decoder.lengths[0] - len(ids)
        if room < 1:
            raise ValueError(f"the prompt has {len(ids)} tokens, and there is room for {decoder.limit}: shorten it")
        answer = Answer(
            decoder,
            tokenizer,
            ids,
            sampling or Sampling(temperature=0),
            constraint.copy() if constraint else text_only,
            max_new_tokens=min(max_new_tokens, room),
            stop_tokens=stop_tokens,
            begins_text=chat.reply_begins_text,
            spelled=() if constraint else SPELLED,  # in JSON, what spells the end is text
        )
        text = "".join(answer)
        value, wrong = _check(text, validator, model_class)
        if wrong is None:
            return value
        if attempt < retries and answer.reason == "stop":
            ids = chat.go_on(tokenizer, [{"role": "tool", "name": "", "error": feedback.not_json(attempt, wrong)}])
        else:
            break
    if answer.reason == "length":
        raise OutOfTokens(f"the answer is not complete after {len(answer.ids)} tokens: {wrong}", text, attempt + 1)
    raise JSONError(f"no valid answer in {attempt + 1} attempts: {wrong}", text, attempt + 1)


def read_schema(schema: Schema) -> dict[str, Any]:
    """The JSON schema that a dict, a file or a pydantic model stands for. SchemaError where it is none."""
    if isinstance(schema, type):
        if not hasattr(schema, "model_json_schema"):
            raise SchemaError(f"{schema!r} is not a class made from pydantic 2's BaseModel")
        return schema.model_json_schema()
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
    except ValueError as error:  # checks of its own, which a schema cannot say
        return None, one_line(str(error))


def _constraint(decoder: Engine, tokenizer: Tokenizer, schema: dict, stop_tokens: tuple[int, ...]) -> Constraint | None:
    try:
        return json_constraint(tokenizer, decoder.config.vocab_size, schema, stop_tokens=stop_tokens)
    except UnsupportedSchema as error:
        warnings.warn(f"the answer is checked only after it is written: {error}", stacklevel=3)
        return None


def _decoder(model_or_decoder: Mistral | Engine) -> Engine:
    if isinstance(model_or_decoder, Mistral):
        config = model_or_decoder.config
        return Decoder(model_or_decoder, 1, None if config.sliding_window else config.max_position_embeddings, slack=32)
    if model_or_decoder.batch_size != 1:
        raise ValueError(f"one answer needs a decoder of one row, not {model_or_decoder.batch_size}")
    model_or_decoder.rewind(model_or_decoder.lengths[0])
    return model_or_decoder
