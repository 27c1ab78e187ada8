"""Write a sentencepiece model from a list of pieces, as a GGUF file carries them.

A `tokenizer.model` is a protobuf message. Its wire format is simple enough to write by hand, which
saves a dependency: each field is a key (field number * 8 + type) and a value; type 0 is a varint, 2
a length and bytes, 5 four bytes.

Source: sentencepiece_model.proto,
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Sequence

# Types of pieces; GGUF uses the same numbers
NORMAL = 1
UNKNOWN = 2
CONTROL = 3  # 4 is user-defined
UNUSED = 5
BYTE = 6

_BPE = 2  # the type of the model


def write_model(
    pieces: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    bos_id: int | None,
    eos_id: int | None,
    dummy_prefix: bool = True,
) -> bytes:
    """The bytes of a BPE model with Mistral's settings.

    Those are byte fallback, no normalisation, and spaces kept.

    pieces, scores, kinds  one entry for each id
    dummy_prefix           each text gets a leading space

    Raises ValueError if no piece has the type UNKNOWN.
    """
    unknown = list(kinds).index(UNKNOWN)
    # type, size, byte fallback
    trainer = _int_field(3, _BPE) + _int_field(4, len(pieces)) + _int_field(35, BYTE in kinds)
    special = (  # field of the id, field of the piece, id
        (40, 45, unknown),
        (41, 46, bos_id),
        (42, 47, eos_id),
        (43, 48, None),  # pad
    )
    for id_field, piece_field, id in special:
        trainer += _int_field(id_field, -1 if id is None else id)
        trainer += _bytes_field(piece_field, pieces[id].encode()) if id is not None else b""
    # name, dummy prefix, remove extra spaces, write spaces as U+2581
    normalizer = (
        _bytes_field(1, b"identity")
        + _int_field(3, dummy_prefix)
        + _int_field(4, False)
        + _int_field(5, True)
    )
    entries = []
    for piece, score, kind in zip(pieces, scores, kinds):
        entry = _bytes_field(1, piece.encode()) + _float_field(2, score) + _int_field(3, kind)
        entries.append(_bytes_field(1, entry))
    return b"".join(entries) + _bytes_field(2, trainer) + _bytes_field(3, normalizer)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; negative numbers as 64-bit two's complement."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def _int_field(field: int, value: int) -> bytes:
    return _varint(field * 8) + _varint(value)


def _bytes_field(field: int, value: bytes) -> bytes:
    return _varint(field * 8 + 2) + _varint(len(value)) + value


def _float_field(field: int, value: float) -> bytes:
    return _varint(field * 8 + 5) + struct.pack("<f", max(-3e38, min(value, 3e38)))
