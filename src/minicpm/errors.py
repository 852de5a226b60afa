"""Every error that this package raises on purpose.

    MiniCPMError
    ├── ConfigError      a setting that cannot be used: unknown name, wrong type, broken constraint
    ├── FormatError      a file that is not what it claims to be
    ├── CheckpointError  weights that do not fit the model, or a checkpoint that is not whole
    ├── DataError        rows or text that cannot be trained on or scored
    ├── HubError         a model that cannot be found, fetched, or kept in the cache
    ├── EngineError      a request that the inference engine cannot serve
    ├── EvalError        an evaluation that cannot be run, continued or compared
    └── ServeError       a server setting that would not be safe or cannot work

A message is one line: what was given (file, line, field, offset), what is accepted, what to do.
The command line prints a `MiniCPMError` as that line and exits 2; anything else keeps its traceback.
"""

from __future__ import annotations


class MiniCPMError(Exception):
    """The base of every error raised on purpose; catch it to catch them all."""


class ConfigError(MiniCPMError):
    """A setting cannot be used: an unknown name, a value of the wrong type, or a broken constraint."""


class FormatError(MiniCPMError):
    """A file is not what it claims to be; the message names the file and the byte offset or field."""


class CheckpointError(MiniCPMError):
    """Weights do not fit the model, or a checkpoint is not whole."""


class DataError(MiniCPMError):
    """Rows or text cannot be used; the message names the file, line and field."""


class HubError(MiniCPMError):
    """A model cannot be found by its name, fetched from its source, or kept in the cache folder."""


class EngineError(MiniCPMError):
    """The inference engine cannot serve a request as it was given."""


class EvalError(MiniCPMError):
    """An evaluation cannot be run, continued or compared; the message names the task or the file."""


class ServeError(MiniCPMError):
    """A server setting is unsafe or cannot work."""
