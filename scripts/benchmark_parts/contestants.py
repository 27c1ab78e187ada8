"""Everything that can continue a sequence, with the same two methods."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import mistral
import mistral_kernels
from benchmark_parts.llama_cpp_peer import LlamaCpp
from benchmark_parts.sizes import Case
from mistral.engine.loop import IdsInFlight

GREEDY = mistral.Sampling(temperature=0.0)


class Contestant(ABC):
    """One way to run one case. Each turn is `prefill`, then `generate`.

    note  what a table says about it
    """

    note: str = ""

    @abstractmethod
    def prefill(self) -> None:
        """Forget everything, prefill the prompts, and read the first new ids back."""

    @abstractmethod
    def generate(self, n: int) -> None:
        """Generate n more tokens a row.

        Each is read back after the next step was launched, as by a program that stops a token late.
        """

    def score(self, ids: Sequence[int]) -> None:
        """Append ids to the only row, and read the best id after each of them back."""
        raise ValueError("it takes one token a forward pass here")


class Ours(Contestant):
    """An engine of this project; kernels-pdl are the kernels with programmatic dependent launch."""

    def __init__(self, name: str, model: mistral.Mistral, case: Case, prompts: Tensor):
        room = case.context + case.tokens + 2
        if name == "kernels-pdl":
            self.decoder = mistral_kernels.Decoder(model, case.batch, room, pdl=True)
            self.note = "dependent launches"
        else:
            self.decoder, self.note = mistral_kernels.open_engine(name, model, case.batch, room)
        self.prompts = prompts.tolist()

    def prefill(self) -> None:
        """Also samples the first ids: after it, a token costs one forward pass."""
        self.decoder.rewind(self.decoder.lengths)
        self.decoder.prefill(self.prompts)
        self.decoder.step(GREEDY).tolist()

    def generate(self, n: int) -> None:
        """`n` steps."""
        previous = None
        for _ in range(n):
            ids = IdsInFlight(self.decoder.step(GREEDY))
            if previous is not None:
                previous.ids()
            previous = ids
        previous.ids()

    def score(self, ids: Sequence[int]) -> None:
        self.decoder.verify(ids).argmax(-1).tolist()


class Theirs(Contestant):
    """transformers' model in a bare loop: its own `generate` would only add to the time."""

    def __init__(self, model: torch.nn.Module, case: Case, prompts: Tensor, compiled: bool):
        from transformers import DynamicCache, StaticCache

        self.model = model
        self.prompts = prompts
        self.step = model.forward
        self.note = "dynamic cache, SDPA"
        self.new_cache: Callable = lambda: DynamicCache(config=model.config)
        if compiled:
            on_gpu = model.device.type == "cuda"
            mode = "reduce-overhead" if on_gpu else None
            self.note = f"static cache, torch.compile{', ' + mode if mode else ''}"
            self.step = torch.compile(model.forward, mode=mode, fullgraph=True)
            static = StaticCache(config=model.config, max_cache_len=case.context + case.tokens + 2)

            def emptied() -> StaticCache:
                static.reset()
                return static

            self.new_cache = emptied

    def prefill(self) -> None:
        """The prompt is not compiled: its length changes."""
        self.cache = self.new_cache()
        logits = self.model(
            self.prompts, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits
        self.ids = logits[:, -1:].argmax(-1)  # [B, 1]
        self.ids.tolist()

    def generate(self, n: int) -> None:
        """`n` steps."""
        previous = None
        for _ in range(n):
            logits = self.step(self.ids, past_key_values=self.cache, use_cache=True).logits
            self.ids = logits[:, -1:].argmax(-1)
            ids = IdsInFlight(self.ids)
            if previous is not None:
                previous.ids()
            previous = ids
        previous.ids()


class LlamaCppContestant(Contestant):
    """llama.cpp from the wheel xllamacpp, all layers on the GPU if it was built for one."""

    def __init__(self, path: str, case: Case, prompts: Tensor):
        if case.batch > 1:
            raise ValueError("it runs one sequence at a time here")
        room = case.context + case.tokens + 2
        self.llama = LlamaCpp(path, room, threads=torch.get_num_threads(), exact=False)
        self.note = "on a GPU" if self.llama.on_gpu else f"on the CPU, {self.llama.vector_units}"
        self.prompt = prompts[0].tolist()

    def prefill(self) -> None:
        """Also samples the first id."""
        self.llama.reset()
        self.id = int(self.llama.append(self.prompt).argmax())

    def generate(self, n: int) -> None:
        """`n` steps."""
        for _ in range(n):
            self.id = int(self.llama.append([self.id]).argmax())

    def score(self, ids: Sequence[int]) -> None:
        self.llama.append_all(ids).argmax(-1).tolist()
