"""Text to token ids and back; chat templates and the supervised mask live here alone.

Importing this costs next to nothing: `tokenizers` and `jinja2` are loaded when a tokenizer or a template is built.
"""

from minicpm.tokenizer.chat import LabelledRow, build_completion_labels, build_labels
from minicpm.tokenizer.stream import StreamDecoder
from minicpm.tokenizer.template import ChatTemplate
from minicpm.tokenizer.tokenizer import Tokenizer
from minicpm.tokenizer.vocabulary import TokenType, Vocabulary

__all__ = [
    "ChatTemplate",
    "LabelledRow",
    "StreamDecoder",
    "TokenType",
    "Tokenizer",
    "Vocabulary",
    "build_completion_labels",
    "build_labels",
]
