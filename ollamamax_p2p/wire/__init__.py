"""Bytes on a stream, sans-IO: frames, typed messages, protocol ids. Knows no network. Start at
`codec`.
"""

from ollamamax_p2p.wire import protocol_ids
from ollamamax_p2p.wire.codec import Codec, Message
from ollamamax_p2p.wire.framing import HEADER_BYTES, FrameDecoder, encode_frame

__all__ = ["HEADER_BYTES", "Codec", "FrameDecoder", "Message", "encode_frame", "protocol_ids"]
