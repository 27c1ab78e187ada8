"""An engine that writes what a script says, to test what stands around a model."""

import json

import small
import torch

TOKENIZER = small.true_tokenizer(stop_ids=(32000,))
END = 32000


class Scripted:
    """An engine for one row that writes the given answers, one after each thing that it reads.

    slack       how much `rewind` can take back, but for everything; None: without limit
    fail_after  Ctrl-C when so many tokens are there
    """

    def __init__(self, *answers, slack=None, limit=4096, fail_after=None):
        self.config = small.config(
            vocab_size=32032, max_position_embeddings=limit, eos_token_id=(END,)
        )
        self.batch_size, self.ids, self.pending, self.reads = 1, [], [], []
        self.answers = [
            answer if isinstance(answer, list) else written(answer) for answer in answers
        ]
        self.slack, self.furthest = slack, 0
        self.fail_after, self.holder = fail_after, None

    @property
    def lengths(self):
        return [len(self.ids)]

    @property
    def limit(self):
        return self.config.max_position_embeddings

    @property
    def logits(self):
        return torch.zeros(1, self.config.vocab_size)

    def read(self, rows):
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
        # The last token is not in the cache yet, as in `Decoder`.
        if (
            n
            and n < len(self.ids)
            and self.slack is not None
            and self.furthest - len(self.ids) + n > self.slack + 1
        ):
            raise ValueError("gone")
        del self.ids[len(self.ids) - n :]


def written(text, end=True):
    """The ids of an answer."""
    return TOKENIZER.encode(text, bos=False, prefix_space=False) + [END] * end


def call(name, /, **arguments):
    """A call as the default prompt asks for it."""
    return f"<tool_call>\n{json.dumps({'arguments': arguments, 'name': name})}\n</tool_call>"
