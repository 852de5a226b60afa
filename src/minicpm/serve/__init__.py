"""An OpenAI-compatible server over the engine's continuous batching: HTTP, limits, access, metrics, the chat page.

Left out: names and files of models (the caller opens a `LanguageModel`), and arithmetic (`engine`).
"""

from minicpm.serve.app import create_app
from minicpm.serve.server import run_server
from minicpm.serve.settings import Caps, ServeSettings

__all__ = ["Caps", "ServeSettings", "create_app", "run_server"]
