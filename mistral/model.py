"""Mistral: embedding, a stack of blocks, a norm, and scores for the next token.

Source: Mistral 7B, section 2, https://arxiv.org/abs/2310.06825

Letters at line ends, here and in every file:

    B  rows of the batch          D  hidden size     N  query heads
    T  tokens in this call        F  MLP size        K  key/value heads
    S  slots of a cache row       H  head size       G  query heads of a key/value head, N/K
    W  window                     V  vocabulary

The modules bear the names of Hugging Face's checkpoints, so `state_dict()` has theirs:
`model.layers.0.self_attn.q_proj.weight`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mistral.attention import Attention
from mistral.cache import LayerCache, RollingCache, chunk_mask, token_counts
from mistral.config import Config
from mistral.mlp import MLP
from mistral.peft_call import tokens_of
from mistral.rms_norm import RMSNorm
from mistral.rotary import Rotary


class Block(nn.Module):
    """One layer: attention, then the MLP, each on a normalised copy and added back."""

    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:  # [B, T, D] -> [B, T, D]
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything before the output matrix: tokens to hidden states."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.rope_scaling)

    def forward(
        self, tokens: Tensor, cache: RollingCache | None, lengths: Sequence[int] | None
    ) -> Tensor:  # [B, T] -> [B, T, D]
        if cache is None:
            plan = None
            # [1, T]: the same in every row
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
            mask = chunk_mask(positions, self.config.sliding_window)
        else:
            plan = cache.plan(tokens.shape[1], lengths)
            cache.begin(plan)
            positions = plan.positions
            mask = plan.mask
        x = self.embed_tokens(tokens)  # [B, T, D]
        rotary = self.rotary(positions, x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary, mask, None if cache is None else cache.layer(i, plan))
        x = self.norm(x)
        if cache is not None:
            cache.commit(plan)
        return x


class Mistral(nn.Module):
    """The language model: tokens to logits."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations, logits and cache."""
        return self.model.norm.weight.dtype

    def forward(
        self,
        tokens: Tensor | None = None,
        cache: RollingCache | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        last_only: bool = False,
        **hugging_face: Any,
    ) -> Tensor:
        """Logits of the token after each position, in the model's dtype.

        tokens     int64 [B, T] with T >= 1
        cache      from `new_cache`: each row continues at its length there, and the tokens are
                   added to it. None: the rows begin here. For generation; leave it out to train.
        lengths    [B]: how many of a row's T tokens are real; the rest, on the right, are pads
                   whose logits mean nothing. A tensor on an accelerator is read back first.
        last_only  return only each row's last real position, [B, V], instead of [B, T, V]. A row
                   without a real token returns meaningless logits.

        hugging_face  what PEFT's wrapper of a causal model passes, see peft_call.py

        Raises ValueError for arguments that are not as above or do not fit together, and if the
        cache has no room.
        """
        if hugging_face:
            tokens = tokens_of(hugging_face, tokens)
        is_tensor = isinstance(tokens, Tensor)
        if not is_tensor or tokens.dtype not in (torch.int64, torch.int32):
            kind = tokens.dtype if is_tensor else type(tokens).__name__
            raise ValueError(f"tokens must be an int64 tensor [B, T], not {kind}")
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be [B, T] with T >= 1, not {list(tokens.shape)}")
        if cache is not None and cache.batch_size != tokens.shape[0]:
            raise ValueError(f"the cache has {cache.batch_size} rows, the tokens {tokens.shape[0]}")
        if lengths is not None and cache is None and not last_only:
            raise ValueError(
                "lengths says what a cache keeps or which position is last; here is neither"
            )
        counts = None if lengths is None else token_counts(lengths, *tokens.shape)
        x = self.model(tokens, cache, counts)  # [B, T, D]
        if last_only and counts is None:
            x = x[:, -1]  # [B, D]
        elif last_only:
            last = torch.tensor(counts).to(x.device, non_blocking=True).sub(1).clamp(min=0)
            x = x[torch.arange(x.shape[0], device=x.device), last]  # [B, D]
        return self.lm_head(x)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """PEFT looks for it when it wraps a causal model; `mistral.generate` generates."""
        raise NotImplementedError("call mistral.generate(model, ...), which takes PEFT's models")

    def new_cache(
        self, batch_size: int, max_tokens: int | None = None, slack: int = 0
    ) -> RollingCache:
        """An empty cache in the model's dtype and on its device.

        max_tokens  make room for this many tokens a row. Required without a window (32,768 tokens
                    of a 7B in 16 bits take 4.3 GB a row). With one, window + slack slots are enough
                    for a sequence of any length; a smaller max_tokens is a limit and saves memory.
        slack       how many tokens `rewind` can roll back once the cache has begun to roll

        Raises ValueError for impossible sizes. Nothing checks the memory: an engine does.
        """
        return RollingCache(
            self.config,
            batch_size,
            max_tokens=max_tokens,
            slack=slack,
            dtype=self.dtype,
            device=self.device,
        )
