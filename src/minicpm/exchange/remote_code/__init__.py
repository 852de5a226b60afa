"""Files that an export in the `minicpm` format carries, so that `trust_remote_code=True` runs it in transformers.

`configuration_minicpm.py` and `modeling_minicpm.py` are package data: they are copied beside the weights and import
only torch and transformers. Nothing in this package imports them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources

FILE_NAMES = ("configuration_minicpm.py", "modeling_minicpm.py")
AUTO_MAP: Mapping[str, str] = {
    "AutoConfig": "configuration_minicpm.MiniCPMConfig",
    "AutoModel": "modeling_minicpm.MiniCPMModel",
    "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
}


def read_files() -> dict[str, bytes]:
    """Return the contents of every file by name; `AUTO_MAP` belongs into the config.json beside them."""
    folder = resources.files(__name__)
    return {name: (folder / name).read_bytes() for name in FILE_NAMES}
