"""The trained part of a tokenizer: text to ids and back, without the tokens that were added."""

from mistral.pieces.added import AddedToken, Splitter, is_control_spelling
from mistral.pieces.base import SPACE, Pieces, Place
from mistral.pieces.json_pieces import JsonPieces
from mistral.pieces.sentence_pieces import SentencePieces

__all__ = [
    "SPACE",
    "AddedToken",
    "JsonPieces",
    "Pieces",
    "Place",
    "SentencePieces",
    "Splitter",
    "is_control_spelling",
]
