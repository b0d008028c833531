"""Messages as MessagePack, decoded into frozen structs with every bound checked.

Two steps, so that neither library is trusted with a hostile length: `msgpack` unpacks with no
container allowed to be longer than the bytes that carry it, then `msgspec` converts into the
declared types and checks their bounds. Unknown fields are ignored (a newer peer may add some); an
unknown message is refused.
"""

from typing import Any, Generic, TypeVar

import msgpack
import msgspec

from ollamamax_p2p.errors import MalformedMessage

T = TypeVar("T")


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="is"):
    """What every message on the wire derives from: `class Ping(Message, tag="ping")`.

    Bound each list and string with `Annotated[..., msgspec.Meta(max_length=…)]`, each number with
    ge and le.
    """


class Codec(Generic[T]):
    """Encodes and decodes one protocol's messages."""

    def __init__(self, messages: Any, *, max_bytes: int) -> None:
        """messages: a union of Message classes, or one; max_bytes: the longest encoding, either
        way.
        """
        self.max_bytes = max_bytes
        self._type = messages

    def encode(self, message: T) -> bytes:
        """Raises ValueError if the encoding is longer than max_bytes: our own fault."""
        data = msgspec.msgpack.encode(message)
        if len(data) > self.max_bytes:
            raise ValueError(
                f"{type(message).__name__} takes {len(data)} bytes, limit {self.max_bytes}"
            )
        return data

    def decode(self, data: bytes) -> T:
        """Raises MalformedMessage for anything that is not one of the messages."""
        if len(data) > self.max_bytes:
            raise MalformedMessage(
                "", f"a message of {len(data)} bytes, the limit is {self.max_bytes}"
            )
        try:
            plain = msgpack.unpackb(data, strict_map_key=True, max_ext_len=0)
            return msgspec.convert(plain, self._type)  # type: ignore[no-any-return]
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            # msgpack's and msgspec's own errors are ValueErrors, UnicodeDecodeError too.
            raise MalformedMessage("", f"not a message of this protocol: {error}") from error
