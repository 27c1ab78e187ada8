"""The vocabulary of a tokenizer in the header of a GGUF file."""

import warnings

import gguf

from mistral.checkpoints.pre_tokenizers import PRE_TOKENIZERS, name_of
from mistral.pieces import JsonPieces, Place
from mistral.tokenizer import Tokenizer


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Add the vocabulary to a header; every row of the model gets an entry, as llama.cpp requires.

    The format has keys for two stop tokens; a warning names the others. A warning says if text will
    be split differently, because the format has no key for what a tokenizer.json asks for. Raises
    ValueError for a vocabulary that the format cannot express.
    """
    entries = tokenizer.vocabulary()
    for id in range(len(entries), vocab_size):
        entries.append((f"[PAD{id}]", -1000.0, gguf.TokenType.UNUSED))
    texts, scores, kinds = zip(*entries)
    pieces = tokenizer.pieces
    if isinstance(pieces, JsonPieces):
        _warn_of_spaces(tokenizer, pieces)
    if isinstance(pieces, JsonPieces) and pieces.is_byte_level:
        _add_byte_level(writer, pieces)
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(tokenizer.adds_space)
    writer.add_token_list(texts)
    writer.add_token_types([int(kind) for kind in kinds])
    if gguf.TokenType.UNKNOWN in kinds:
        writer.add_unk_token_id(kinds.index(gguf.TokenType.UNKNOWN))
    _add_ends(writer, tokenizer)
    if tokenizer.chat_templates:
        writer.add_chat_template(
            [{"name": n, "template": t} for n, t in tokenizer.chat_templates.items()]
        )


def _add_ends(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    writer.add_add_bos_token(tokenizer.adds_bos and tokenizer.bos_id is not None)
    writer.add_add_eos_token(False)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    for add, id in zip((writer.add_eos_token_id, writer.add_eot_token_id), tokenizer.stop_ids):
        add(id)
    if others := tokenizer.stop_ids[2:]:
        names = ", ".join(f"{tokenizer.control_text(id) or 'token'} ({id})" for id in others)
        warnings.warn(
            f"GGUF has keys for two stop tokens; {names} will not stop a text in the exported file",
            stacklevel=4,
        )


def _add_byte_level(writer: gguf.GGUFWriter, pieces: JsonPieces) -> None:
    if pieces.content.get("normalizer") is not None:
        raise ValueError("GGUF has no key for the normalizer of this tokenizer.json")
    name = name_of(pieces.content)
    model = pieces.content["model"]
    if bool(model.get("ignore_merges")) != PRE_TOKENIZERS[name].ignore_merges:
        _warn(f"its pre-tokenizer is {name} there, with another ignore_merges than tokenizer.json")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    merges = model["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_add_space_prefix(False)


def _warn_of_spaces(tokenizer: Tokenizer, pieces: JsonPieces) -> None:
    """Warns of leading spaces that the format has no key for.

    There, every stretch of text gets one or none does, and added tokens are found in the text as it
    is.
    """
    prepends = pieces.normalize("a", Place.START) != "a"
    if pieces.space_at and not prepends:
        _warn("it adds a leading space to every stretch of text, also to one that begins with one")
    absorbs = [token.text for token in tokenizer.added_tokens.values() if token.normalized]
    if prepends and absorbs:
        _warn(f"the space before {absorbs[0]!r} does not belong to that token there")


def _warn(difference: str) -> None:
    warnings.warn(f"the exported file splits some texts differently: {difference}", stacklevel=5)
