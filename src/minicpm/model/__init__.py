"""The MiniCPM network in PyTorch: the reference that everything else is held to.

Legend of shapes: B sequences, T new positions, S all positions, H query heads, K key/value heads, D head width,
E hidden size, F feed-forward width, V vocabulary, R LoRA rank, G quantization group.

Of tokens, files and training this knows nothing: weights come as a mapping of named `Weight`s, ids as tensors.
"""

from minicpm.model.cache import KVCache
from minicpm.model.generation import generate
from minicpm.model.init import ParameterRule, initialize, parameter_rules
from minicpm.model.loading import load_model
from minicpm.model.minicpm import MiniCPM

__all__ = ["KVCache", "MiniCPM", "ParameterRule", "generate", "initialize", "load_model", "parameter_rules"]
