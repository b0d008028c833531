"""What an operator sets about engines."""

from collections.abc import Mapping
from dataclasses import dataclass, field

MiB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceSettings:
    """Which engines a node has and how they run."""

    embedded: bool = True
    """Run models of this node's store with llama.cpp, where that is installed
    (`pip install 'ollamamax-p2p[engine]'`)."""

    memory_bytes: int = 0
    """For all models of the embedded engine together; 0: three quarters of this machine's memory.
    Idle models are unloaded to make room; a model that alone is larger is refused."""

    slots: int = 1
    """Answers that one model of the embedded engine gives at once. Each slot has a context of its
    own, which takes memory; Ollama's default (OLLAMA_NUM_PARALLEL) is 1 too."""

    threads: int = 0
    """Of one model of the embedded engine; 0: as llama.cpp finds best."""

    context_length: int = 4096
    """Tokens of a context where neither request nor model say (num_ctx); at most what the model
    was trained with. Ollama's default without a large accelerator."""

    batch_tokens: int = 128
    """Of a prompt at once. An answer that is given up while its prompt is read ends after the batch
    at hand: larger is a little faster and is cancelled later."""

    keep_alive_s: float = 300.0
    """How long an idle model stays in memory; negative: for ever. Ollama's default."""

    load_timeout_s: float = 300.0
    """A model that is not ready by then has failed. Ollama's default (OLLAMA_LOAD_TIMEOUT)."""

    stall_timeout_s: float = 120.0
    """An engine that sends nothing for so long in the midst of an answer is given up. Long, because
    a server may be reading somebody else's long prompt."""

    ollama_url: str = "auto"
    """An Ollama server: its URL; auto: the one on 127.0.0.1:11434 if there is one; "": none."""

    ollama_slots: int = 1
    """Requests that it works on at once (its OLLAMA_NUM_PARALLEL, which it does not tell)."""

    openai: tuple[str, ...] = ()
    """Servers that speak OpenAI's HTTP (vLLM, SGLang, llama-server, LM Studio), each as `name=url`,
    the URL up to and with its version: `vllm=http://10.0.0.7:8000/v1`."""

    openai_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Their keys, by name; sent as a bearer token, never shown or logged."""

    openai_slots: int = 64
    """Requests that each of them works on at once; vLLM and SGLang batch as many as their memory
    holds."""

    def openai_servers(self) -> "tuple[OpenAIServer, ...]":
        """What `openai` and `openai_keys` say, together. The texts are checked already."""
        pairs = (each.partition("=") for each in self.openai)
        return tuple(
            OpenAIServer(
                url=url, name=name, key=self.openai_keys.get(name, ""), slots=self.openai_slots
            )
            for name, _, url in pairs
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIServer:
    """One server that speaks OpenAI's HTTP: vLLM, SGLang, llama-server, LM Studio."""

    url: str
    """Up to and with the version: `http://10.0.0.7:8000/v1`."""

    name: str = ""
    """What this back end is called; "": its host and port."""

    key: str = field(default="", repr=False)
    """Sent as a bearer token; never logged, never in an error."""

    slots: int = 64
    """Requests at once; vLLM and SGLang batch as many as their memory holds."""
