"""Trains the demo: a small Mistral, from scratch, on made-up dialogues.

The whole of it is a loop over batches.
"""

import io
import re
from collections.abc import Iterable, Iterator
from random import Random

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor

from demo.blockwise_attention import attend_in_blocks
from demo.dialogues import Stage, Turn, dialogue, plain_text
from mistral.attention import Attention
from mistral.chat.formats.chatml import begin_turn, encode_turn
from mistral.config import Config
from mistral.model import Mistral
from mistral.tokenizer import Tokenizer

_CUT = "\t"  # a border that no piece of the tokenizer may cross
# Pieces of the tokenizer; ChatML's two control tokens follow, and rows without a token, as in
# Hermes-2-Pro.
PIECES = 1000
CONFIG = Config(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=1024,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
    eos_token_id=(PIECES,),
)
# G: query heads that share a key/value head
GROUP = CONFIG.num_attention_heads // CONFIG.num_key_value_heads
BATCH_TOKENS = 2048  # half of it at the first stage
_RATE = 1.5e-3  # learning rate
# Weight in the loss of a token that the model only reads; a token that it must write has 1.
_OTHERS = 0.3


def train_tokenizer(seed: int = 0) -> Tokenizer:
    """A tokenizer learned from dialogues, with ChatML's control tokens added.

    No piece joins a space to a letter. So a word is cut in the same way after a space, a quote or
    an underscore, and what the demo copies out of a request is what it was there, piece by piece.
    Letters beyond ASCII are bytes.
    """
    random = Random(seed)
    turns = (turn for _ in range(3000) for turn in dialogue(random))
    lines = (line for turn in turns for line in turn.content.splitlines() if line.isascii())
    return _with_chatml(
        train_pieces((re.sub(r"(^|(?<= ))(?=[^\W\d_])", _CUT, line) for line in lines), PIECES)
    )


def _with_chatml(pieces: bytes) -> Tokenizer:
    """A sentencepiece model of PIECES pieces and ChatML's two control tokens after them."""
    added = {PIECES: "<|im_end|>", PIECES + 1: "<|im_start|>"}
    return Tokenizer(pieces, added, stop_ids=(PIECES,))


def train_pieces(lines: Iterable[str], num_pieces: int) -> bytes:
    """A sentencepiece model with the settings of Mistral's own, learned from lines of text.

    A _CUT in them is a border that no piece crosses; it is not part of the text.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=num_pieces,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        pretokenization_delimiter=_CUT,
        max_sentence_length=100_000,
        minloglevel=2,
    )
    return model.getvalue()


def _new_model(seed: int = 0) -> Mistral:
    """The untrained model: random, but for the pair of heads that copies.

    Most of what the demo does is copying: names, keys, values. It takes a head that looks at the
    previous token, and one in a later layer that looks for a token whose previous one was the
    current, and puts out what it finds (induction heads, https://arxiv.org/abs/2209.11895). A first
    attempt without them copied nothing after two
    million tokens; this one begins with a rough pair in its first two layers.
    """
    torch.manual_seed(seed)
    model = Mistral(CONFIG)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()  # a block begins as the identity
            elif weight.dim() == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
        embedding = model.model.embed_tokens.weight.normal_(std=0.5)
        # so that what a head puts out of a token is a vote for it
        model.lm_head.weight.copy_(0.16 * embedding)
        embedding[:, 0] = (
            4.0  # the same for all tokens: what a head attends by that looks at positions only
        )
        previous, match = (layer.self_attn for layer in model.model.layers[:2])
        _look_at_previous(previous)
        _look_for_match(match, previous)
    return model


def _look_at_previous(attention: Attention) -> None:
    """Let the first key/value head's queries attend to the previous token, and copy it.

    Rotary turns pair d of queries and keys by f_d for each position. Queries that lag behind the
    keys by f_d to begin with agree with those at distance 1.
    """
    H = CONFIG.head_dim
    half = CONFIG.head_dim // 2
    # the fast pairs: the slow ones tell no neighbours apart
    f = CONFIG.rope_theta ** (-torch.arange(12) / half)
    attention.k_proj.weight[:H] = 0
    attention.k_proj.weight[: len(f), 0] = 0.8
    for q in attention.q_proj.weight.split(H)[:GROUP]:
        q.zero_()
        q[: len(f), 0] = 0.8 * f.cos()
        q[half : half + len(f), 0] = -0.8 * f.sin()
    attention.o_proj.weight[:, :H].normal_(std=CONFIG.hidden_size**-0.5)


def _look_for_match(attention: Attention, previous: Attention) -> None:
    """Let the first key/value head's queries attend to tokens that follow an equal token.

    Only the slow rotary pairs are compared, which distance hardly turns.
    """
    H = CONFIG.head_dim
    half = CONFIG.head_dim // 2
    slow = torch.cat((torch.arange(14, half), torch.arange(14 + half, H)))
    q, k, v = (w.weight for w in (attention.q_proj, attention.k_proj, attention.v_proj))
    k[:H] = 0
    k[slow] = previous.o_proj.weight[:, slow].T  # reads what the other head wrote ...
    for head in range(GROUP):
        q[head * H : (head + 1) * H] = 0
        # ... which is what this is of the current token
        q[head * H + slow] = 4.0 * previous.v_proj.weight[slow]
        attention.o_proj.weight[:, head * H : (head + 1) * H] = 2.0 * v[:H].T


def encode(tokenizer: Tokenizer, turns: list[Turn]) -> tuple[list[int], list[float]]:
    """Ids of a dialogue as the chat driver would send them, and what each counts in the loss."""
    ids = tokenizer.encode("")
    weights = [0.0]
    for role, content, learn in turns:
        turn = encode_turn(tokenizer, role, content)
        heading = len(begin_turn(tokenizer, role))
        # Of an assistant's turn the model writes the content and <|im_end|>; the newline after it
        # is put there.
        end = max(i for i, id in enumerate(turn) if id == tokenizer.control_id("<|im_end|>")) + 1
        own = role == "assistant" and learn
        ids += turn
        weights += [1.0 if own and heading <= i < end else _OTHERS for i in range(len(turn))]
    return ids, weights


def _stage_at(progress: float) -> Stage:
    """What is trained on at a part of the way, 0 to 1."""
    ends: tuple[tuple[Stage, float], ...] = (
        ("words", 0.09),
        ("signatures", 0.5),
        ("schemas", 0.78),
    )
    return next((stage for stage, end in ends if progress < end), "prompts")


def batches(
    tokenizer: Tokenizer, random: Random, progress: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Some batches of (ids, weights), [B, T] each: dialogues of like length, padded with weight 0.

    What is easy comes first, in small batches of short dialogues.
    """
    stage = _stage_at(progress)
    longest = 384 if stage == "words" else CONFIG.max_position_embeddings
    room = BATCH_TOKENS // 2 if stage == "words" else BATCH_TOKENS
    rows: list[tuple[list[int], list[float]]] = []
    while len(rows) < 200:
        if random.random() < 0.97:
            row = encode(tokenizer, dialogue(random, stage))
        else:
            ids = tokenizer.encode(plain_text(random))
            row = ids, [_OTHERS] * len(ids)
        if len(row[0]) <= longest:
            rows.append(row)
    rows.sort(key=lambda row: len(row[0]))
    pool: list[list] = []
    while rows:
        take = max(room // len(rows[-1][0]), 1)
        pool.append(rows[-take:])
        rows = rows[:-take]
    random.shuffle(pool)
    for batch in pool:
        T = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (T - len(ids)) for ids, _ in batch])
        weights = torch.tensor([weights + [0.0] * (T - len(weights)) for _, weights in batch])
        yield ids, weights


def _loss_of(model: Mistral, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted mean of the cross-entropies, and the mean over the answers alone (nan: none)."""
    logits = model(ids[:, :-1]).float()  # [B, T-1, V]
    entropies = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    own = weights == 1.0
    return (entropies * weights).sum() / weights.sum(), entropies.detach()[own].mean()


class Trainer:
    """Model, optimizer and position in the data; `state_dict` has all of it, to continue later.

    bfloat16  multiply matrices in it, which is faster where the processor can; weights and sums
              stay float32
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        steps: int,
        device: torch.device,
        seed: int = 0,
        *,
        bfloat16: bool = False,
    ):
        self.model = _new_model(seed).to(device)
        self.tokenizer = tokenizer
        self.steps = steps
        self.device = device
        self.step = 0
        self.seed = seed
        self.bfloat16 = bfloat16
        if bfloat16 and device.type == "cpu":
            for layer in self.model.model.layers:
                layer.self_attn.attend = attend_in_blocks
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )

    def run(self) -> Iterator[tuple[int, float]]:
        """Train on; yields the step and the loss of what the model is to write."""
        while self.step < self.steps:
            random = Random(f"{self.seed} {self.step}")
            for ids, weights in batches(self.tokenizer, random, self.step / self.steps):
                yield self._train(ids.to(self.device), weights.to(self.device))
                if self.step == self.steps:
                    return

    def _train(self, ids: Tensor, weights: Tensor) -> tuple[int, float]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss, own = _loss_of(self.model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        # A short warm-up, then the full rate, and from the middle on a straight line to nearly zero
        self.optimizer.param_groups[0]["lr"] = _RATE * min(
            (self.step + 1) / 30, 1.0, 2.02 - 2 * self.step / self.steps
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return self.step, own.item()

    def state_dict(self) -> dict:
        """Everything that a later run needs to continue."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "tokenizer": self.tokenizer.model_proto,
            "step": self.step,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where another run stopped."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.tokenizer = _with_chatml(state["tokenizer"])  # today's dialogues might give another
        self.step = state["step"]
        self.seed = state["seed"]
