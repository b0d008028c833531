"""Which pages may use Ollama's paths from a browser, and what a browser is told.

As Ollama has it (gin's cors with wildcards): a page at this machine's own names, and apps that
show pages of their own, always; others by `api.origins` or OLLAMA_ORIGINS. A pattern may hold one
`*`, which stands for anything; `*` alone lets every page in.
"""

from collections.abc import Sequence

from starlette.responses import Response

_LOCAL_NAMES = ("localhost", "127.0.0.1", "0.0.0.0")
ALWAYS = (
    *(f"{scheme}://{name}{port}" for name in _LOCAL_NAMES for port in ("", ":*")
      for scheme in ("http", "https")),
    "app://*", "file://*", "tauri://*", "vscode-webview://*", "vscode-file://*",
)  # fmt: skip
METHODS = "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"
HEADERS = ",".join(
    (
        "Authorization", "Content-Type", "User-Agent", "Accept", "X-Requested-With", "Openai-Beta",
        "X-Stainless-Arch", "X-Stainless-Async", "X-Stainless-Custom-Poll-Interval",
        "X-Stainless-Helper-Method", "X-Stainless-Lang", "X-Stainless-Os",
        "X-Stainless-Package-Version", "X-Stainless-Poll-Helper", "X-Stainless-Retry-Count",
        "X-Stainless-Runtime", "X-Stainless-Runtime-Version", "X-Stainless-Timeout",
    )
)  # fmt: skip
MAX_AGE_S = 12 * 3600


class Origins:
    """The pages that may ask."""

    def __init__(self, more: Sequence[str]) -> None:
        """more: patterns beside those that always hold."""
        self._all = "*" in more
        self._patterns = [_split(pattern) for pattern in (*more, *ALWAYS)]

    def allow(self, origin: str) -> bool:
        """Whether a page of this origin may ask."""
        return self._all or any(_fits(origin.lower(), pattern) for pattern in self._patterns)

    def headers(self, origin: str) -> list[tuple[bytes, bytes]]:
        """What an answer to it carries."""
        if self._all:
            return [(b"access-control-allow-origin", b"*")]
        return [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]

    def preflight(self, origin: str) -> Response:
        """The answer to a browser that asks what it may ask."""
        response = Response(status_code=204)
        told = {
            "access-control-allow-methods": METHODS,
            "access-control-allow-headers": HEADERS,
            "access-control-max-age": str(MAX_AGE_S),
        }
        vary = (
            () if self._all else ("Access-Control-Request-Method", "Access-Control-Request-Headers")
        )
        response.raw_headers += [(name.encode(), value.encode()) for name, value in told.items()]
        response.raw_headers += self.headers(origin)
        response.raw_headers += [(b"vary", name.encode()) for name in vary]
        return response


def _split(pattern: str) -> tuple[str, str | None]:
    """Before the star and behind it; None where there is none."""
    before, star, after = pattern.lower().partition("*")
    return before, after if star else None


def _fits(origin: str, pattern: tuple[str, str | None]) -> bool:
    before, after = pattern
    if after is None:
        return origin == before
    long_enough = len(origin) >= len(before) + len(after)
    return long_enough and origin.startswith(before) and origin.endswith(after)
