"""Write docs/reference/endpoints.md: what the server does with every field of every request.

The tables are made of the models of the requests in mistral/server/protocol/.
"""

import types
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from mistral.files import write_text
from mistral.server.protocol import chat_completions, completions, messages, responses, tokens

PAGE = Path(__file__).resolve().parents[2] / "docs/reference/endpoints.md"
BODIES = {
    "POST /v1/chat/completions": chat_completions.ChatBody,
    "POST /v1/completions": completions.CompletionBody,
    "POST /v1/responses": responses.ResponsesBody,
    "POST /v1/messages": messages.MessagesBody,
    "POST /v1/messages/count_tokens": messages.CountBody,
    "POST /tokenize": tokens.TokenizeBody,
    "POST /detokenize": tokens.DetokenizeBody,
}
INTRODUCTION = """# The endpoints: done, differs, ignored, refused

`scripts/serve.py` serves a model under the APIs of OpenAI and Anthropic, and under some names of llama-server. This page
is written by `scripts/dev/endpoints_page.py` from the models of the requests in `mistral/server/protocol/`. For each
field it says whether it is **done** as the API says, **differs** from it, is **ignored** (accepted, and changes
nothing), or is **refused** (every value except null is an error). A field that is not listed is an error.

| path | what it does |
|---|---|
| `GET /` | the chat window; its files, and what only it may use, are under `/page/`, which is no API |
| `GET /health` | 200 when requests are served; 503 while the model is loading and when the server is shutting down; needs no key |
| `GET /metrics` | numbers for Prometheus |
| `GET /slots` | a row for each slot, without contents |
| `GET /props` | facts about the model and the slots |
| `GET /v1/models`, `GET /v1/models/NAME` | the one model; in Anthropic's form if the request has `anthropic-version` |

## What holds everywhere

- Prompts are made by `encode_chat`: text that spells a control token stays text, in every role, in results, in the names
  and schemas of tools. Only a prompt that is a list of ids, and `/tokenize` with `parse_special`, can have control tokens.
- The ids of an answer do not depend on the other requests: each has random numbers of its own. A request without a seed
  gets a random one. Logits differ in their last bits, because a sum of float32 has another order for another number of
  rows; with `--same-bits` they do not. The engines `kernels` and `cpu` then still step all slots together: their splits
  and tiles do not depend on the others (with more than 16 slots `kernels` reads plain weights once for every 16 then). `eager` and `compile` multiply by PyTorch's library, whose order depends on the
  number of rows, so each slot has a forward pass of its own.
- What a prompt has in common with a slot, from its first token on (16 tokens or more), is not read again: the slot is
  continued if it is free, and copied if it is not. So `n` answers read their prompt once. `cached_tokens` says how much. A
  prefix is exact or not used: one that the window has left is read again.
- `--lookup N` guesses from the text of each slot; the ids stay the same, except for the kernels' seeds, which give another
  text of the same distribution. Off by default: docs/benchmarks has what a step with guesses costs.
- An answer ends at its own end, at a stop string, at the number of tokens that it may have, or where its slot is full; the
  last two are both reported as length. What does not fit is never an error, except for a prompt that leaves no room:
  400 with the code `context_length_exceeded`.
- Calls and JSON are held by a grammar. A keyword of a schema that the grammar cannot express is not guaranteed; in an
  answer with `strict` it is checked, and an invalid answer is the error `invalid_answer` (500). A schema that no grammar
  can express at all is an error (400).
- The grammar is narrower than a schema in two ways, in answers and in the arguments of calls. An integer is written in
  digits alone: many clients refuse `27.0`, an integer too in JSON. An object that names its properties has no others,
  unless its schema says something about others: `additionalProperties` (true or a schema), `unevaluatedProperties`,
  `patternProperties`, `propertyNames`, more `minProperties` than it names, or a condition such as `if`. So a schema
  without `additionalProperties: false` gets what OpenAI's strict schemas must ask for. What is checked with `strict`
  follows the schema as it is written. `generate_json` and `Conversation` in Python have the same rule.
- The model reads the schema of `json_schema` in its system message, and the tools as its chat format writes them.
- Text that begins like a call but cannot be read as one (it was cut off by the number of tokens) is part of the text.
- Arguments of calls reach the client as the model wrote them, and as soon as the call is complete: in one piece.
- A stop string does not end a call. Spelled ends of a turn (`<|im_end|>` as text) end an answer, except for JSON.
- Log-probabilities are the model's own, before penalties and masks. An id that cannot come has -9999.
- Usage counts the token that ended the answer, and none after a stop string.
- `details` of a chat completion tells how the answer was made; without it nothing of it is computed. Chunks have, beside
  `choices`, `details` with some of: `prompt` (its tokens, how many the slot held already, which slot), `tokens` (`id`,
  `text`, `origin`: sampled, forced by a grammar, or drafted by a guess; `p` and the `top` alternatives, the model's own
  before penalties and masks, none for a forced token; `forward`, the pass that appended it), `forwards` (`n`, `kind`:
  prompt, step, forced or verify; `rows`, `tokens`, `ms`) and at the end `end` (`position`, `window`, `rolled`).

## Errors

The body is `{"error": {"message", "type", "param", "code"}}`; under `/v1/messages` it has Anthropic's form. In the middle of
a stream an error is an event of the same form, the last one.

| status | when |
|---|---|
| 400 | the request is not as it must be; `param` names the field |
| 401 | the key is missing or wrong (`Authorization: Bearer KEY`, or `x-api-key: KEY`) |
| 403 | under `/page/`: the request is not from the window that this server has opened |
| 404, 405 | there is no such path, model or method |
| 413 | the body is too large |
| 415 | the body is not declared as JSON: a page in a browser could send it without asking |
| 429 | all slots are busy and the queue is full; `Retry-After` says when to try again |
| 500 | an error of the server, or an answer that is not valid (`invalid_answer`) |
| 503 | the model is loading, or the server is shutting down |
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for path, body in BODIES.items():
        parts.append(f"## `{path}`\n\n{table(body)}")
    return "\n".join(parts)


def table(body: type[BaseModel]) -> str:
    """One row a field; fields of objects in it follow with their path."""
    rows = []
    for path, status, what in rows_of(body, ""):
        name = ".".join(f"`{part}`" for part in path.split("."))
        rows.append(f"| {name} | {status} | {what} |")
    return "\n".join(["| field | | |", "|---|---|---|", *rows]) + "\n"


def rows_of(body: type[BaseModel], before: str) -> list[tuple[str, str, str]]:
    """(path, status, what is done) of the fields that say it."""
    rows = []
    for name, field in body.model_fields.items():
        path = f"{before}{field.alias or name}"
        extra = field.json_schema_extra
        if isinstance(extra, dict) and "status" in extra:
            rows.append((path, str(extra["status"]), field.description or ""))
        for inner, is_list in objects(field.annotation):
            rows += rows_of(inner, f"{path}{'[]' if is_list else ''}.")
    return rows


def objects(annotation: Any, in_list: bool = False) -> list[tuple[type[BaseModel], bool]]:
    """The models in an annotation, and whether they are items of a list."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        is_model = issubclass(annotation, BaseModel)
        return [(annotation, in_list)] if is_model else []
    is_list = in_list or getattr(annotation, "__origin__", None) is list
    found: list[tuple[type[BaseModel], bool]] = []
    for inner in get_args(annotation):
        found += objects(inner, is_list)
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    write_text(PAGE, page())
