"""Write a sentencepiece model from a list of pieces, as a GGUF file carries them.

The wire format of protobuf is simple enough to write by hand, which saves a dependency; see
`mistral.pieces.model_proto`.

Source: sentencepiece_model.proto,
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Sequence

from mistral.pieces.model_proto import BYTE, UNKNOWN, bytes_field, int_field

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
    trainer = int_field(3, _BPE) + int_field(4, len(pieces)) + int_field(35, BYTE in kinds)
    special = (  # field of the id, field of the piece, id
        (40, 45, unknown),
        (41, 46, bos_id),
        (42, 47, eos_id),
        (43, 48, None),  # pad
    )
    for id_field, piece_field, id in special:
        trainer += int_field(id_field, -1 if id is None else id)
        trainer += bytes_field(piece_field, pieces[id].encode()) if id is not None else b""
    # name, dummy prefix, remove extra spaces, write spaces as U+2581
    normalizer = (
        bytes_field(1, b"identity")
        + int_field(3, dummy_prefix)
        + int_field(4, False)
        + int_field(5, True)
    )
    entries = []
    for piece, score, kind in zip(pieces, scores, kinds):
        entry = bytes_field(1, piece.encode()) + _float_field(2, score) + int_field(3, kind)
        entries.append(bytes_field(1, entry))
    return b"".join(entries) + bytes_field(2, trainer) + bytes_field(3, normalizer)


def _float_field(field: int, value: float) -> bytes:
    return bytes([field * 8 + 5]) + struct.pack("<f", max(-3e38, min(value, 3e38)))
