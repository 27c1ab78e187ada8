"""The fields that OpenAI's two older APIs have in common: sampling, stop strings, streams."""

from typing import Any, Self

from pydantic import model_validator

from mistral.sampling import Sampling
from mistral.server.protocol.errors import invalid
from mistral.server.protocol.fields import Body, Part, differs, done, ignored

MOST_CHOICES = 128
_MOST_STOPS = 64


class StreamOptions(Part):
    """How to stream."""

    include_usage: bool | None = done("a last chunk without choices has the usage")
    include_obfuscation: bool | None = ignored("nothing is added to the chunks")


class StreamableBody(Body):
    """A request whose reply may be a stream."""

    stream: bool | None = done("server-sent events")
    stream_options: StreamOptions | None = done("needs stream: true")

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options needs stream: true", "stream_options")
        return self


class GenerationBody(StreamableBody):
    """How to generate."""

    model: str | None = differs("any name; the server has one model, and replies with its name")
    n: int | None = done("answers; the k-th has the seed + k", ge=1, le=MOST_CHOICES)
    seed: int | None = done("the same seed, prompt and options give the same text")
    stop: str | list[str] | None = differs("any number of strings; they do not end a call")
    temperature: float | None = differs("0 (greedy), or 0.00001 and more; not only up to 2")
    top_p: float | None = done()
    top_k: int | None = differs("not in OpenAI's API: keep the k highest scores")
    min_p: float | None = differs("not in OpenAI's API: keep tokens of this relative probability")
    typical_p: float | None = differs("not in OpenAI's API: keep tokens of typical surprise")
    repetition_penalty: float | None = differs("not in OpenAI's API: divides scores (CTRL)")
    no_repeat_ngram_size: int | None = differs("not in OpenAI's API: no n-gram occurs twice")
    frequency_penalty: float | None = done("over the tokens of the answer")
    presence_penalty: float | None = done("over the tokens of the answer")
    logit_bias: dict[str, float] | None = done("ids as strings; any finite number")
    user: str | None = ignored("users are not told apart")

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self) -> Sampling:
        """The fields of `mistral.Sampling`."""
        return sampling_of(
            {
                name: getattr(self, name)
                for name in (
                    "temperature top_p top_k min_p typical_p repetition_penalty "
                    "no_repeat_ngram_size frequency_penalty presence_penalty logit_bias seed"
                ).split()
            }
        )

    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, as a tuple. ApiError for an empty one."""
        return stop_strings(self.stop, "stop")


def sampling_of(given: dict[str, Any]) -> Sampling:
    """A Sampling of fields of a request; None is the default. ApiError for values out of range."""
    values = {name: value for name, value in given.items() if value is not None}
    seed = values.get("seed")
    values["seed"] = None if seed is None else seed % 2**64
    if "logit_bias" in values:
        values["logit_bias"] = _bias(values["logit_bias"])
    try:
        return Sampling(**values)
    except ValueError as error:
        name = str(error).split()[0]
        raise invalid(str(error), name if name in values else None, "invalid_value") from None


def stop_strings(given: str | list[str] | None, field: str) -> tuple[str, ...]:
    """Stop strings as a tuple. ApiError for an empty one, and for too many."""
    strings = [given] if isinstance(given, str) else given or []
    if not all(strings):
        raise invalid(f"{field}: a stop string is empty", field, "invalid_value")
    if len(strings) > _MOST_STOPS:
        raise invalid(f"{field}: {len(strings)} strings, and at most {_MOST_STOPS} are allowed")
    return tuple(strings)


def _bias(given: dict[str, float]) -> dict[int, float]:
    if not all(id.isascii() and id.isdecimal() for id in given):
        raise invalid("logit_bias: the keys must be token ids", "logit_bias", "invalid_value")
    return {int(id): bias for id, bias in given.items()}
