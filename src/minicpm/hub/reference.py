"""How a model of a hub is named: `hf:owner/name[@revision][/file]` and `ms:…` for ModelScope."""

from __future__ import annotations

import re
from dataclasses import dataclass

from minicpm.errors import HubError

_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_PATTERN = re.compile(rf"(hf|ms):({_WORD})/({_WORD})(?:@({_WORD}))?(?:/(.+))?")
FORM = "hf:owner/name[@revision][/file] or ms:owner/name[@revision][/file]"


@dataclass(frozen=True)
class Reference:
    """A repository of a hub: `revision` None is the hub's own default, `file` None is the whole model."""

    site: str
    owner: str
    name: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        file = f"/{self.file}" if self.file else ""
        return f"{self.site}:{self.repository}{revision}{file}"

    @property
    def repository(self) -> str:
        """The hub's own name of the repository: owner/name."""
        return f"{self.owner}/{self.name}"


def is_reference(text: str) -> bool:
    """Return whether `text` starts like a name of a hub."""
    return text.startswith(("hf:", "ms:"))


def parse(text: str) -> Reference:
    """Return the reference that `text` spells.

    Raises:
        HubError: it is not of the form above.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise HubError(f"{text!r} does not name a model of a hub; write {FORM}")
    reference = Reference(*match.groups())
    if reference.file is not None and not is_safe_path(reference.file):
        raise HubError(f"{reference.file!r} in {text!r} is not a path inside a repository")
    return reference


def is_safe_path(path: str) -> bool:
    """Return whether `path` stays inside the folder that it is put in, on every system, and is not hidden."""
    if not path or len(path) > 400 or not path.isprintable() or any(c in path for c in '\\:*?"<>|'):
        return False
    return all(part and not part.startswith(".") for part in path.split("/"))
