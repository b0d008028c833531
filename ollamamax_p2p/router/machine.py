"""Machine: what this machine has for models: free memory, and whose (the accelerators' or its own).

NVIDIA's accelerators are asked through `nvidia-smi`, which comes with their driver; others are not
known, and count as none. Where engines run elsewhere (an OpenAI-compatible server on another
machine) these figures say nothing about them.
"""

import shutil
import subprocess

import psutil
import trio

MiB = 1024 * 1024

ASKED_EVERY_S = 2.0
"""nvidia-smi takes up to half a second of a core."""

ANSWER_S = 5.0


class Machine:
    """Asked as often as anybody likes; looks no more often than it is worth."""

    def __init__(self) -> None:
        self._smi = shutil.which("nvidia-smi")
        self._known: tuple[int, int, str] = (0, 0, "")
        self._asked_at = -ASKED_EVERY_S

    async def memory(self) -> tuple[int, int, str]:
        """Bytes free and in all, of the accelerators if there are any; and their name, or ""."""
        if self._smi is None:
            memory = psutil.virtual_memory()
            return memory.available, memory.total, ""
        if trio.current_time() - self._asked_at >= ASKED_EVERY_S:
            self._asked_at = trio.current_time()
            self._known = await self._ask(self._smi)
        return self._known

    async def _ask(self, smi: str) -> tuple[int, int, str]:
        query = "--query-gpu=name,memory.free,memory.total"
        try:
            with trio.fail_after(ANSWER_S):
                done = await trio.run_process(
                    [smi, query, "--format=csv,noheader,nounits"],
                    capture_stdout=True,
                    capture_stderr=True,
                )
            return read_accelerators(done.stdout.decode(errors="replace"))
        except (OSError, ValueError, subprocess.CalledProcessError, trio.TooSlowError):
            # A driver that does not work now: the engines use the processor then.
            memory = psutil.virtual_memory()
            return memory.available, memory.total, ""


def read_accelerators(text: str) -> tuple[int, int, str]:
    """The sums over nvidia-smi's lines `name, MiB free, MiB in all`. Raises ValueError for others.

    >>> read_accelerators("NVIDIA L4, 100, 200\\nNVIDIA L4, 1, 200\\n")
    (105906176, 419430400, '2 x NVIDIA L4')
    """
    rows = [line.rsplit(",", 2) for line in text.splitlines() if line.strip()]
    if not rows or any(len(row) != 3 for row in rows):
        raise ValueError(f"not what nvidia-smi prints: {text[:80]!r}")
    free = sum(int(row[1]) for row in rows) * MiB
    total = sum(int(row[2]) for row in rows) * MiB
    name = rows[0][0].strip()
    return free, total, name if len(rows) == 1 else f"{len(rows)} x {name}"
