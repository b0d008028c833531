"""Engines that run models: embedded llama.cpp, Ollama servers, whatever speaks OpenAI's HTTP.

Chooses nothing: which engine of which node answers is the router's. Start at `backend`; the values
are in `core.requests`.
"""

from ollamamax_p2p.inference.backend import Backend, LoadedModel, ServableModel
from ollamamax_p2p.inference.settings import InferenceSettings

__all__ = ["Backend", "InferenceSettings", "LoadedModel", "ServableModel"]
