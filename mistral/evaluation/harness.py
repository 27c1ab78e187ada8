"""The model `mistral_from_scratch` for lm-evaluation-harness.

    python -m mistral.evaluation.harness --model mistral_from_scratch \\
        --model_args pretrained=FOLDER --tasks hellaswag

is the command line of https://github.com/EleutherAI/lm-evaluation-harness with this model added.
Releases after 0.4.13 read this package's entry point: there plain
`lm_eval --model mistral_from_scratch` does the same.

Truncation, scores and stop strings are those of the harness's own `hf` model, so that numbers can
be compared with published ones. Intended differences: log-probabilities are float32 for every dtype
(in `hf`: softmax_dtype=float32); sampling has only the options of the task (transformers adds a
top_k of 50); text after a control token has its leading space (Hugging Face calls it legacy);
broken UTF-8 is decoded as in `Tokenizer.decode`.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mistral.chat.formats import choose_format, render_chat
from mistral.checkpoints.load import load
from mistral.engine.decoder import Decoder
from mistral.errors import MistralError
from mistral.sampling import Sampling

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    missing = f'lm_eval cannot be imported ({error}); install the extra: pip install -e ".[eval]"'
    if __name__ == "__main__":
        raise SystemExit(f"error: {missing}") from None
    raise MistralError(missing) from None

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_SAMPLING = {field.name for field in fields(Sampling)}
_Item = TypeVar("_Item")
_Scored = tuple[Any, list[int], list[int]]  # key in the harness's cache, context, continuation


@register_model("mistral_from_scratch")
class MistralLM(TemplateLM):
    """A checkpoint for the harness: scores of continuations and of whole texts, generated text.

    pretrained     source for `mistral.load`, like device, revision, packed and sliding_window
    dtype          "float32", "bfloat16", "float16" or "float64"; None: as in `mistral.load`
    batch_size     rows of one forward pass; a number, there is no "auto"
    max_length     tokens of one forward pass. A longer prompt loses its beginning, a longer text is
                   scored in windows. None: max_position_embeddings
    max_gen_toks   how many tokens to generate if the task does not say
    chat_format    with --apply_chat_template: a name in `mistral.chat.formats.FORMATS`; None:
                   chosen by the control tokens

    As in `hf`, text that spells a control token becomes one: templates are text here. Raises
    ValueError for arguments out of range, and the errors of `mistral.load`.
    """

    def __init__(  # noqa: PLR0913
        self,
        pretrained: str = "demo",
        *,
        dtype: str | None = None,
        device: str | None = None,
        revision: str | None = None,
        packed: bool = False,
        sliding_window: int | None | Literal["auto"] = "auto",
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        chat_format: str | None = None,
    ):
        super().__init__()
        if dtype not in (None, *_DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number of rows, not {batch_size!r}")
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = None  # the default of the harness's command line is cuda:0
        options = dict(
            device=device, packed=packed, sliding_window=sliding_window, revision=revision
        )
        self.model, self.tokenizer = load(pretrained, dtype=_DTYPES.get(dtype), **options)
        limit = self.model.config.max_position_embeddings
        self.max_length = limit if max_length is None else max_length
        if not 1 <= self.max_length <= limit:
            raise ValueError(f"max_length must be between 1 and {limit}, not {max_length}")
        self.batch_size = int(batch_size)
        self.max_gen_toks = max_gen_toks
        self.chat_format = chat_format
        self._device = self.model.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. ValueError if the checkpoint has none."""
        if self.tokenizer.eos_id is None:
            raise ValueError("the checkpoint has no end-of-text token")
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before the first one of a text."""
        bos = self.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids, with the begin-of-text token unless `add_special_tokens` is False."""
        bos = add_special_tokens is not False and self.tokenizer.bos_id is not None
        return self.tokenizer.encode(string, bos=bos, special=True)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, each token scored once, in windows of `max_length`.

        As in `hf`, the begin-of-text token that `tok_encode` puts before a text is scored, too.
        """
        windows = []
        owners = []
        for i, (text,) in enumerate(request.args for request in requests):
            ids = self.tok_encode(text)
            for pair in get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (log_p, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[i] += log_p
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[_Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        # The input lacks the last token: all answers of one token to one question share an input.
        inputs: dict[tuple[int, ...], list[int]] = {}
        for i, (name, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"cannot score {len(continuation)} tokens after {len(context)}: {name!r:.200}"
                )
            ids = tuple((context + continuation)[-self.max_length - 1 : -1])
            inputs.setdefault(ids, []).append(i)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        longest_first = sorted(inputs, key=lambda ids: (-len(ids), ids))
        with tqdm(total=len(requests), disable=disable_tqdm, desc="log-likelihoods") as bar:
            for batch in _batches(longest_first, self.batch_size):
                padded = [[*ids, *[0] * (len(batch[0]) - len(ids))] for ids in batch]
                logits = self.model(torch.tensor(padded, device=self.model.device))  # [B, T, V]
                for row, ids in zip(logits, batch):
                    for i in inputs[ids]:
                        name, _, continuation = requests[i]
                        answers[i] = _score(row[: len(ids)], continuation)
                        if name is not None:
                            self.cache_hook.add_partial("loglikelihood", name, answers[i])
                        bar.update()
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string or end-of-text token."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        prompts = [
            self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests
        ]
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="texts") as bar:
            for group in groups.values():
                options = requests[group[0]].args[1]
                group.sort(key=lambda i: (-len(prompts[i]), requests[i].args[0]))
                for batch in _batches(group, self.batch_size):
                    for i, text in zip(batch, self._continue([prompts[i] for i in batch], options)):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                        bar.update()
        return texts

    def _continue(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        tokenizer = self.tokenizer
        most = settings.pop("max_gen_toks")
        until = handle_stop_sequences(
            settings.pop("until"), eos=tokenizer.control_text(self.eot_token_id)
        )
        until = [stop for stop in until if stop]
        stop_ids = {*self.model.config.eos_token_id, *map(tokenizer.control_id, until)}
        sampling = _sampling(settings)
        if not 0 <= most < self.max_length:
            raise ValueError(
                f"max_gen_toks must be between 0 and max_length - 1 = {self.max_length - 1}, "
                f"not {most}"
            )
        prompts = [ids[most - self.max_length :] for ids in prompts]
        decoder = Decoder(self.model, len(prompts), max(map(len, prompts)) + most, slack=0)
        decoder.prefill(prompts)
        streams = [tokenizer.stream(strip_leading_space=True) for _ in prompts]
        texts = [""] * len(prompts)
        running = set(range(len(prompts)))
        for _ in range(most):
            _require_numbers(decoder.logits)
            ids = decoder.step(sampling).tolist()
            for b in sorted(running):
                if ids[b] not in tokenizer.control_ids:
                    texts[b] += streams[b].feed(ids[b])
                if ids[b] in stop_ids or any(stop in texts[b] for stop in until):
                    running.remove(b)
            if not running:
                break
        texts = [text + stream.finish() for text, stream in zip(texts, streams)]
        return [postprocess_generated_text(text, until, None) for text in texts]

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in the harness's request cache."""
        return f"mistral_from_scratch_{self.tokenizer.vocab_size}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The name of the format, for the harness's records."""
        return (self.chat_format or choose_format(self.tokenizer)) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; without `add_generation_prompt` its last message is not ended."""
        whole = chat_history if add_generation_prompt else chat_history[:-1]
        text = render_chat(self.tokenizer, whole, format=self.chat_format)
        return text if add_generation_prompt else text + chat_history[-1]["content"]


def _score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Log-probability of the continuation under the last logits [T, V]; whether it is greedy."""
    logits = logits[-len(continuation) :]  # [T, V]
    _require_numbers(logits)
    target = torch.tensor(continuation, device=logits.device)
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    total = log_p.gather(1, target[:, None]).sum().item()
    return total, bool((logits.argmax(dim=-1) == target).all())


def _sampling(settings: dict[str, Any]) -> Sampling:
    settings = {"temperature": 0.0, "num_beams": 1} | settings
    settings.pop("do_sample")  # False is temperature 0 already
    if settings.pop("num_beams") != 1:
        raise ValueError("generation_kwargs has num_beams: beam search is not supported")
    if unknown := settings.keys() - _SAMPLING:
        raise ValueError(
            f"generation_kwargs has {min(unknown)!r}; supported: {', '.join(sorted(_SAMPLING))}"
        )
    return Sampling(**settings)


def _require_numbers(logits: Tensor) -> None:
    if logits.isnan().any():
        raise ValueError(
            "the logits are NaN (float16 overflows in some fine-tunes): use float32 or bfloat16"
        )


def _batches(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def main() -> None:
    """Run the harness's command line; an error of this package ends it in one line."""
    try:
        cli_evaluate()
    except (MistralError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
