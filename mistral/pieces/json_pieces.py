"""A tokenizer.json of Hugging Face, read by the library `tokenizers`."""

import json
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as Library
from tokenizers.models import Model as LibraryModel

from mistral.errors import CheckpointError, one_line, shown
from mistral.pieces.added import AddedToken
from mistral.pieces.base import SPACE, Pieces, Place
from mistral.pieces.library import guarded
from mistral.pieces.model_proto import BYTE, NORMAL, UNKNOWN, UNUSED
from mistral.pieces.regex_cost import require_linear

MOST_IDS = 1 << 20  # a file with a larger id is damaged: memory grows with it
_MOST_STEPS = 16  # of a normalizer, a pre-tokenizer; those in use have up to 8
_MOST_EXPRESSIONS = 10  # different ones; each is measured
_MOST_GROWTH = 128  # how many times longer than a text its normalized form may be
# How many characters the steps of these types make of one, at most; other types: 1
_GROWTH = {
    "BertNormalizer": 4,
    "ByteLevel": 4,
    "Lowercase": 2,
    "NFC": 3,
    "NFD": 4,
    "NFKC": 18,
    "NFKD": 18,
    "Precompiled": 18,
}


class JsonPieces(Pieces):
    """The byte-pair vocabulary in the content of a tokenizer.json, without its added tokens.

    content  the object in the file
    hidden   ids that `encode` never returns

    Raises CheckpointError for a content that the library does not read, and for another type of
    model.
    """

    def __init__(self, content: Mapping[str, Any], hidden: Collection[int] = ()):
        # 1. The vocabulary.
        self.content = content
        model = _bpe_model(content)
        self._hidden = frozenset(hidden)
        self._ids: dict[str, int] = model["vocab"]
        self._spelled = {id: piece for piece, id in self._ids.items()}
        self.size = max(self._spelled) + 1
        unknown = self._ids.get(model.get("unk_token"))
        self.control = {} if unknown is None else {unknown: self._spelled[unknown]}
        self._unusable = self._hidden | self.control.keys()
        self.words: Mapping[int, AddedToken] = {}
        self.bos_id = None
        self.eos_id = None

        # 2. How pieces spell bytes.
        normalizer = leaves(content.get("normalizer"), "normalizers")
        splits = leaves(content.get("pre_tokenizer"), "pretokenizers")
        decoder = leaves(content.get("decoder"), "decoders")
        steps = (*normalizer, *splits, *decoder)
        _require_bounded(normalizer, splits)
        self.is_byte_level = any(step.get("type") == "ByteLevel" for step in steps)
        self._byte_ids = {}  # byte -> id of the piece that stands for it alone
        if model.get("byte_fallback") and not self.is_byte_level:
            pieces = {byte: f"<0x{byte:02X}>" for byte in range(256)}
            self._byte_ids = {b: self._ids[p] for b, p in pieces.items() if p in self._ids}
        self._bytes = {id: byte for byte, id in self._byte_ids.items()}
        self._spells_all = self._has_all_bytes()

        # 3. The steps before the model, for each place.
        self.space_at = _space_at([*normalizer, *splits])
        after = [_without_first(step) for step in splits]
        self._steps = {
            Place.START: (normalizer, splits),
            Place.AFTER_TOKEN: (normalizer, after),
            Place.INSIDE: (_without_prefix(normalizer), _without_prefix(after)),
        }

    def without(self, ids: Collection[int]) -> "JsonPieces":
        hidden = self._hidden | {id for id in ids if id in self._spelled}
        pieces = JsonPieces(self.content, hidden)
        pieces._libraries  # noqa: B018  errors in the file are raised now, not at the first text
        return pieces

    def encode(self, text: str, place: Place) -> list[int]:
        return self._ids_of(text, place, self._libraries[place])

    def normalize(self, text: str, place: Place) -> str:
        normalizer = self._libraries[place].normalizer
        return text if normalizer is None else guarded(lambda: normalizer.normalize_str(text))

    def encode_normalized(self, text: str, place: Place) -> list[int]:
        return self._ids_of(text, place, self._after_normalizer[place])

    def spelling(self, id: int) -> str | None:
        return self._spelled.get(id)

    def id_of(self, spelling: str) -> int | None:
        return self._ids.get(spelling)

    def token_bytes(self, id: int) -> bytes | None:
        piece = self._spelled.get(id)
        if piece is None or id in self._unusable:
            return None
        if id in self._bytes:
            return bytes([self._bytes[id]])
        if self.is_byte_level and all(letter in _BYTE_OF for letter in piece):
            return bytes(_BYTE_OF[letter] for letter in piece)
        return self.text_bytes(piece)

    def text_bytes(self, normalized: str) -> bytes:
        if not self.is_byte_level:
            normalized = normalized.replace(SPACE, " ")
        return normalized.encode("utf-8")

    def is_byte(self, id: int) -> bool:
        return id in self._bytes

    def entries(self) -> list[tuple[str, float, int]]:
        rank: dict[str, int] = {}  # of the first merge that makes a piece
        for number, merge in enumerate(self.content["model"]["merges"]):
            parts = merge.split(" ") if isinstance(merge, str) else merge
            rank.setdefault("".join(parts), number)
        entries = []
        for id in range(self.size):
            piece = self._spelled.get(id)
            if piece is None:
                entries.append((f"[PAD{id}]", -1000.0, UNUSED))
            elif id in self.control:
                entries.append((piece, 0.0, UNKNOWN))
            else:
                # Single characters are never the result of a merge: any score does. A longer piece
                # that no merge makes must not be found by its score either.
                score = -float(rank.get(piece, 0))
                kind = BYTE if id in self._bytes else NORMAL
                if kind == NORMAL and len(piece) > 1 and piece not in rank:
                    kind = UNUSED
                entries.append((piece, score, kind))
        return entries

    @cached_property
    def _libraries(self) -> dict[Place, Library]:
        """The library's object for each place; they share one model."""
        model = _library([], [], _visible(_bpe_model(self.content), self._hidden)).model
        return {place: _library(*steps, model) for place, steps in self._steps.items()}

    @cached_property
    def _after_normalizer(self) -> dict[Place, Library]:
        """The same for text that is normalized."""
        model = self._libraries[Place.START].model
        return {place: _library([], splits, model) for place, (_, splits) in self._steps.items()}

    def _ids_of(self, text: str, place: Place, library: Library) -> list[int]:
        ids = guarded(lambda: library.encode(text, add_special_tokens=False).ids)
        unusable = not self._unusable.isdisjoint(ids)
        if unusable or not (self._spells_all or self._is_spelled(ids, text, place)):
            shown = one_line(text.replace(SPACE, " "), 80)
            raise ValueError(f"the vocabulary has no pieces for a part of {shown!r}")
        return ids

    def _has_all_bytes(self) -> bool:
        """Whether the vocabulary can spell every text."""
        if not self.is_byte_level:
            return len(self._byte_ids) == 256
        never_in_utf8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
        letters = [letter for letter, byte in _BYTE_OF.items() if byte not in never_in_utf8]
        return all(letter in self._ids for letter in letters)

    def _is_spelled(self, ids: list[int], text: str, place: Place) -> bool:
        """Whether the ids spell the text: the library drops characters that it cannot spell."""
        spelled = b"".join(self.token_bytes(id) or b"" for id in ids)
        expected = self.text_bytes(self.normalize(text, place))
        return spelled.replace(b" ", b"") == expected.replace(b" ", b"")


def leaves(step: Any, inner: str) -> list[dict[str, Any]]:
    """The single steps of a normalizer, pre-tokenizer or decoder of a tokenizer.json, in order.

    inner  the key under which a Sequence has its steps

    Raises CheckpointError for a step that is not an object.
    """
    found = []
    waiting = [] if step is None else [step]
    while waiting:
        step = waiting.pop()
        if not isinstance(step, dict) or not isinstance(step.get(inner, []), list):
            raise CheckpointError(f"a step of {inner} is {shown(step)}")
        if inner in step:
            waiting += reversed(step[inner])
        else:
            found.append(step)
    return found


def _require_bounded(normalizer: list[dict[str, Any]], splits: list[dict[str, Any]]) -> None:
    """CheckpointError for steps that make a short text long, or take long for a long text."""
    if max(len(normalizer), len(splits)) > _MOST_STEPS:
        raise CheckpointError(f"it has more than {_MOST_STEPS} steps before the model")
    growth = 1
    for step in (*normalizer, *splits):
        kind = step.get("type")
        content = step.get("content")
        if kind == "Replace" and isinstance(content, str):
            growth *= max(1, len(content))
        growth *= _GROWTH.get(kind, 1) if isinstance(kind, str) else 1
    if growth > _MOST_GROWTH:
        raise CheckpointError("its normalizer replaces characters by strings that are too long")
    patterns = [step.get("pattern") for step in (*normalizer, *splits)]
    found = [pattern.get("Regex") for pattern in patterns if isinstance(pattern, dict)]
    expressions = {one for one in found if isinstance(one, str)}
    if len(expressions) > _MOST_EXPRESSIONS:
        raise CheckpointError(f"it has more than {_MOST_EXPRESSIONS} regular expressions")
    for expression in expressions:
        require_linear(expression)


def _bpe_model(content: Mapping[str, Any]) -> dict[str, Any]:
    """The model in the content, with ids that were checked. CheckpointError if it is another."""
    model = content.get("model")
    if not isinstance(model, dict):
        raise CheckpointError("there is no model in it")
    if model.get("type", "BPE") != "BPE":
        raise CheckpointError(f"the model is {shown(model['type'])}; only BPE is read here")
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(option):
            raise CheckpointError(f"the model has {option}, which no Mistral has")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise CheckpointError("the model has no vocabulary")
    _require_ids(vocab)
    if not isinstance(model.get("merges"), list):
        raise CheckpointError("the model has no merges")
    if not isinstance(model.get("unk_token"), str | None):
        raise CheckpointError(f"the unk_token is {shown(model['unk_token'])}")
    return model


def _require_ids(vocab: dict[str, Any]) -> None:
    """CheckpointError unless every piece has an id of its own."""
    for piece, id in vocab.items():
        if type(id) is not int or not 0 <= id < MOST_IDS:
            raise CheckpointError(f"the piece {shown(piece)} has the id {shown(id)}")
        if not piece.isascii() and piece.encode("utf-8", "replace").decode() != piece:
            raise CheckpointError(f"the piece {shown(piece)} is not valid Unicode")
    if len(set(vocab.values())) < len(vocab):
        counts = Counter(vocab.values())
        twice = next(piece for piece, id in vocab.items() if counts[id] > 1)
        raise CheckpointError(f"the id of the piece {shown(twice)} is that of another piece, too")


def _visible(model: dict[str, Any], hidden: Collection[int]) -> dict[str, Any]:
    """The model with pieces that no text can spell in the place of the hidden ones."""
    vocab = model["vocab"]
    # No merge makes them, and a space is never part of what the model gets.
    renamed = {piece: f"hidden {id} " for piece, id in vocab.items() if id in hidden}
    if not renamed:
        return model
    merges = []
    for merge in model["merges"]:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        touched = isinstance(parts, list) and all(isinstance(part, str) for part in parts)
        if not (touched and not renamed.keys().isdisjoint([*parts, "".join(parts)])):
            merges.append(merge)
    return {
        **model,
        "vocab": {renamed.get(piece, piece): id for piece, id in vocab.items()},
        "merges": merges,
        "unk_token": renamed.get(model.get("unk_token"), model.get("unk_token")),
    }


def _library(
    normalizer: list[dict], splits: list[dict], model: dict[str, Any] | LibraryModel
) -> Library:
    """The library's object for these steps, without added tokens."""
    is_content = isinstance(model, dict)
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": normalizer} if normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits} if splits else None,
        "model": model if is_content else {"type": "BPE", "vocab": {}, "merges": []},
    }
    library = guarded(lambda: Library.from_str(json.dumps(content)))
    if not is_content:
        library.model = model
    return library


def _space_at(steps: list[dict[str, Any]]) -> frozenset[Place]:
    """The places at which these steps add a leading space to a text."""
    found = set()
    for step in steps:
        prepends = step.get("type") == "Prepend" and step.get("prepend") == SPACE
        is_byte_level = step.get("type") == "ByteLevel"
        scheme = _scheme(step)
        if scheme in ("first", "always") or prepends or (is_byte_level and _adds_prefix(step)):
            found.add(Place.START)
            if scheme != "first":
                found.add(Place.AFTER_TOKEN)
    return frozenset(found)


def _scheme(step: dict[str, Any]) -> str | None:
    """Where a Metaspace adds a space: "first", "always", "never"; None: it is another step."""
    if step.get("type") != "Metaspace":
        return None
    return step.get("prepend_scheme") or ("always" if _adds_prefix(step) else "never")


def _adds_prefix(step: dict[str, Any]) -> bool:
    return step.get("add_prefix_space", True) is not False


def _without_first(step: dict[str, Any]) -> dict[str, Any]:
    """A step as it works after an added token."""
    return _never(step) if _scheme(step) == "first" else step


def _without_prefix(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps that add no leading space."""
    kept = []
    for step in steps:
        if step.get("type") == "Metaspace":
            kept.append(_never(step))
        elif step.get("type") == "ByteLevel" and "add_prefix_space" in step:
            kept.append({**step, "add_prefix_space": False})
        elif step.get("type") != "Prepend":
            kept.append(step)
    return kept


def _never(step: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in step.items() if key != "add_prefix_space"}
    return {**kept, "prepend_scheme": "never"}


def _byte_alphabet() -> dict[str, int]:
    """The letter that stands for each byte in byte-level pieces, as GPT-2 chose them.

    Bytes that are printable in Latin-1 are their own letters, the others follow from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
