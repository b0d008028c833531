"""What an operator sets about the HTTP API."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """Where the CLI and other programs reach this node."""

    listen: str = "127.0.0.1:11435"
    """host:port. Beside Ollama's 11434, so that both can run; only loopback addresses are taken.
    Everything is served there: the node's own API and Ollama's.
    """

    ollama_listen: str = ""
    """host:port of a second place for Ollama's API (and OpenAI's and Anthropic's) alone, of any
    address; empty for none. Who reaches it needs no token, as with Ollama. Another program that
    holds the port keeps it: then the node goes on without. `OLLAMA_HOST` is honoured when ours is
    not set.
    """

    origins: tuple[str, ...] = ()
    """Pages that may use Ollama's API from a browser, beside this machine's own, with one `*` each
    at most: `https://*.example.org`. `OLLAMA_ORIGINS` is honoured when ours is not set.
    """

    hosts: tuple[str, ...] = ()
    """Names by which this node may be asked for Ollama's API, beside addresses, this machine's
    name, localhost and what ends in .local or .internal. A proxy's public name, for one.
    """

    connections_max: int = 2_048
    """At once, in each of the two places; who comes beyond is hung up on. A thousand answers that
    are read slowly, and as many clients that wait. One that says nothing has five seconds.
    """
