"""Everything that can continue a sequence, with the same two methods."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

import mistral
import mistral_kernels
from benchmark_parts.sizes import Case
from mistral.engine.generation import IdsInFlight

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


class LlamaCpp(Contestant):
    """llama.cpp through llama-cpp-python, all layers on the GPU if it was built for one."""

    def __init__(self, path: str, case: Case, prompts: Tensor):
        import llama_cpp

        if case.batch > 1:
            raise ValueError("its Python interface runs one sequence at a time")
        self.note = "on a GPU" if llama_cpp.llama_supports_gpu_offload() else "on the CPU"
        threads = torch.get_num_threads()
        room = case.context + case.tokens + 2
        sizes = dict(n_ctx=room, n_batch=512, n_threads=threads, n_threads_batch=threads)
        self.llama = llama_cpp.Llama(path, n_gpu_layers=-1, verbose=False, **sizes)
        self.prompt = prompts[0].tolist()

    def prefill(self) -> None:
        """Also samples the first id."""
        self.llama.reset()
        self.llama.eval(self.prompt)
        self.id = self.llama.sample(temp=0.0)

    def generate(self, n: int) -> None:
        """`n` steps."""
        for _ in range(n):
            self.llama.eval([self.id])
            self.id = self.llama.sample(temp=0.0)
