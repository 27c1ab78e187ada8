"""The types of the pieces in the bytes of a sentencepiece model.

A `tokenizer.model` is a protobuf message: a sequence of fields, each a key (field number * 8 +
type of its value) and a value. Its pieces are its fields 1, messages with a text (1), a score (2)
and a type (3).

Source: sentencepiece_model.proto,
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from collections.abc import Collection, Iterator

# Types of pieces; GGUF uses the same numbers
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6

_PIECE = 1  # the field of the model that holds a piece
_TYPE = 3  # the field of the piece that holds its type
_COUNTED = 2  # the type of a value that begins with its size
_FIXED_SIZES = {1: 8, 5: 4}  # type of a value -> its bytes


def user_defined_ids(model_proto: bytes) -> set[int]:
    """The ids of the pieces that the user defined, which the library finds first in every text."""
    if bytes((_TYPE * 8, USER_DEFINED)) not in model_proto:  # most models have none
        return set()
    pieces = (value for field, _, value in _fields(model_proto) if field == _PIECE)
    found = set()
    for id, piece in enumerate(pieces):
        if any(field == _TYPE and value == USER_DEFINED for field, _, value in _fields(piece)):
            found.add(id)
    return found


def as_control(model_proto: bytes, ids: Collection[int]) -> bytes:
    """The model with these pieces as control pieces, which the library never finds in a text."""
    out = bytearray()
    id = 0
    for field, raw, value in _fields(model_proto):
        if field == _PIECE:
            if id in ids:
                inner = b"".join(part for inner, part, _ in _fields(value) if inner != _TYPE)
                raw = bytes_field(_PIECE, inner + int_field(_TYPE, CONTROL))
            id += 1
        out += raw
    return bytes(out)


def int_field(field: int, value: int) -> bytes:
    """A field with a number."""
    return _varint(field * 8) + _varint(value)


def bytes_field(field: int, value: bytes) -> bytes:
    """A field with bytes: a text or a message."""
    return _varint(field * 8 + 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; negative numbers as 64-bit two's complement."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def _fields(message: bytes) -> Iterator[tuple[int, bytes, int | bytes]]:
    """(number, the whole field's bytes, value) of each field of a message that is valid.

    Raises ValueError for groups, which protobuf has given up, and for a cut message.
    """
    at = 0
    while at < len(message):
        start = at
        key, at = _read_varint(message, at)
        if key % 8 == 0:
            value, at = _read_varint(message, at)
        else:
            if key % 8 == _COUNTED:
                size, at = _read_varint(message, at)
            elif key % 8 in _FIXED_SIZES:
                size = _FIXED_SIZES[key % 8]
            else:
                raise ValueError("it has a group, which no tokenizer.model has")
            value = message[at : at + size]
            at += size
        yield key // 8, message[start:at], value


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """The number at a place, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("it is damaged; download it again")
