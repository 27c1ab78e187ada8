"""An engine that writes a script, to test the code around a model."""

import json

import small
import torch

from mistral.engine.base import Engine

TOKENIZER = small.true_tokenizer(stop_ids=(32000,))
END = 32000


class Scripted(Engine):
    """An engine for one row that writes the given answers, one after each prefill.

    slack       how many tokens `rewind` can roll back, unless it is all of them
    fail_after  Ctrl-C at so many tokens
    """

    def __init__(self, *answers, slack=4096, limit=4096, fail_after=None):
        self.config = small.config(
            vocab_size=32032, max_position_embeddings=limit, eos_token_id=(END,)
        )
        self.batch_size = 1
        self.ids = []
        self.pending = []
        self.reads = []
        self.answers = [a if isinstance(a, list) else written(a) for a in answers]
        self.slack = slack
        self.furthest = 0
        self.fail_after = fail_after
        self.holder = None

    @property
    def lengths(self):
        return [len(self.ids)]

    @property
    def limit(self):
        return self.config.max_position_embeddings

    @property
    def logits(self):
        return torch.zeros(1, self.config.vocab_size)

    def prefill(self, rows):
        self.reads.append(list(rows[0]))
        self.ids += rows[0]
        self.furthest = max(self.furthest, len(self.ids))
        self.pending = list(self.answers.pop(0))

    def step(self, sampling, mask=None):
        if self.fail_after is not None and len(self.ids) >= self.fail_after:
            raise KeyboardInterrupt
        id = self.pending.pop(0)
        self.allowed = mask
        self.ids.append(id)
        self.furthest = max(self.furthest, len(self.ids))
        return torch.tensor([id])

    def rewind(self, n):
        is_limited = 0 < n < len(self.ids)
        # The last token is not in the cache yet, as in `Decoder`.
        if is_limited and self.furthest - len(self.ids) + n > self.slack + 1:
            raise ValueError("gone")
        del self.ids[len(self.ids) - n :]


def written(text, end=True):
    """The ids of an answer."""
    return TOKENIZER.encode(text, bos=False, prefix_space=False) + [END] * end


def call(name, /, **arguments):
    """A call in the form of the default prompt."""
    return f"<tool_call>\n{json.dumps({'arguments': arguments, 'name': name})}\n</tool_call>"
