"""Which part of a raw answer is thinking, where a template marks it with <think> and </think>."""

OPENS, CLOSES = "<think>", "</think>"


class ThinkingSplitter:
    """Splits text as it comes; nothing that may yet become a mark is given out."""

    def __init__(self, *, inside: bool, begun: bool = False) -> None:
        """inside: the prompt ends within the thinking already; begun: and after some of it."""
        self._state = "thinking" if inside else "undecided"
        self._held = ""
        self._strip = inside and not begun

    def feed(self, text: str) -> tuple[str, str]:
        """What is thinking and what is answer in it; each may be empty.

        The white space around the thinking belongs to its marks, not to it.
        """
        self._held += text
        thinking = ""
        if self._state == "undecided":
            begun = self._held.lstrip()
            if OPENS.startswith(begun[: len(OPENS)]) and len(begun) < len(OPENS):
                return "", ""
            opened = begun.startswith(OPENS)
            self._state = "thinking" if opened else "answer"
            if opened:
                self._held, self._strip = begun.removeprefix(OPENS), True
        if self._state == "thinking":
            thinking = self._think()
        if self._state != "answer":
            return thinking, ""
        answer, self._held = self._held, ""
        if self._strip:
            answer = answer.lstrip()
            self._strip = not answer
        return thinking, answer

    def end(self) -> tuple[str, str]:
        """What was held back when the answer ended."""
        held, self._held = self._held, ""
        return (held, "") if self._state == "thinking" else ("", held)

    @property
    def holds(self) -> bool:
        """Whether text was fed that was not given out yet."""
        return bool(self._held)

    def _think(self) -> str:
        if self._strip:
            self._held = self._held.lstrip()
            self._strip = not self._held
        thinking, mark, rest = self._held.partition(CLOSES)
        if mark:
            self._state, self._held, self._strip = "answer", rest, True
            return thinking.rstrip()
        # White space at the end may stand before the mark.
        keep = len(thinking.rstrip())
        for length in range(min(len(CLOSES) - 1, len(thinking)), 0, -1):
            if thinking.endswith(CLOSES[:length]):
                keep = len(thinking[:-length].rstrip())
                break
        self._held = thinking[keep:]
        return thinking[:keep]
