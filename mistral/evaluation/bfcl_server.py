"""The Berkeley suite's questions to a server of OpenAI's chat completions."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from mistral.chat.events import Call
from mistral.errors import one_line
from mistral.evaluation.bfcl import BfclAnswer, BfclRow
from mistral.evaluation.rows import DataError

# A path and a body to the status of the reply, and the reply
Post = Callable[[str, dict[str, Any]], tuple[int, Any]]
_PATH = "/v1/chat/completions"
_SECONDS = 600  # for one answer


def ask_server(
    post: Post,
    rows: Sequence[BfclRow],
    *,
    at_once: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 512,
) -> Iterator[tuple[BfclRow, BfclAnswer]]:
    """Ask a server all rows, `at_once` of them at the same time, as `bfcl.ask` asks a model.

    Raises DataError if the server cannot be reached, or its reply is not a chat completion. A reply
    of 400 or 500 is a row that is not answered.
    """

    def ask(number: int) -> BfclAnswer:
        body = {
            "messages": rows[number].messages,
            "tools": rows[number].tools,
            "temperature": temperature,
            "seed": seed + number,
            "max_tokens": max_new_tokens,
        }
        return _answer(*post(_PATH, body))

    with ThreadPoolExecutor(at_once) as pool:
        yield from zip(rows, pool.map(ask, range(len(rows))))


def post_to(address: str) -> Post:
    """A `Post` to the server at this address, such as http://127.0.0.1:8000."""

    def post(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json"}
        request = Request(address.rstrip("/") + path, json.dumps(body).encode(), headers)
        try:
            with urlopen(request, timeout=_SECONDS) as response:
                return response.status, json.load(response)
        except HTTPError as error:
            return error.code, error.read().decode(errors="replace")
        except (OSError, ValueError, HTTPException) as error:
            raise DataError(f"{address} cannot be asked: {one_line(str(error))}") from None

    return post


def _answer(status: int, reply: Any) -> BfclAnswer:
    """What a reply says. A call whose arguments are not a JSON object keeps its text as them."""
    if status in (400, 500):
        return BfclAnswer(refusal=one_line(str(reply)))
    if status != 200:
        raise DataError(f"the server refuses to answer, with {status}: {one_line(str(reply))}")
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        calls = [
            Call(call["function"]["name"], _arguments(call["function"]["arguments"]))
            for call in message.get("tool_calls") or ()
        ]
        text = message.get("content") or ""
        return BfclAnswer(calls=calls, text=text, was_cut=choice["finish_reason"] == "length")
    except (LookupError, TypeError, AttributeError) as error:
        raise DataError(f"the reply is not a chat completion: {error!r}") from None


def _arguments(written: str) -> Any:
    try:
        return json.loads(written)
    except ValueError:
        return written
