"""The two hubs: what a repository holds, and the address of each of its files.

Which files are taken is decided here too: weights and texts, never files that can run code unless asked for.
Source: huggingface.co/docs/hub/api; modelscope.cn's API as its own client (`modelscope/hub/api.py`) calls it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from minicpm.errors import HubError
from minicpm.hub.cache import Digest
from minicpm.hub.progress import megabytes
from minicpm.hub.reference import Reference, is_safe_path
from minicpm.hub.transfer import Access, read_json

SAFE_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".gguf", ".md")
UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".py")
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, and where its bytes are."""

    path: str
    size_bytes: int
    digest: Digest
    url: str


@dataclass(frozen=True)
class Listing:
    """A repository at one revision."""

    revision: str
    licence: str
    files: tuple[RemoteFile, ...]


def access(reference: Reference) -> Access:
    """Return the endpoint and token for `reference`, from the environment.

    HF_ENDPOINT and MINICPM_MS_ENDPOINT name a mirror; HF_TOKEN opens private and gated models of `hf:`.
    """
    if reference.site == "hf":
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return Access(endpoint.rstrip("/"), "HF_ENDPOINT", os.environ.get("HF_TOKEN") or None)
    endpoint = os.environ.get("MINICPM_MS_ENDPOINT") or "https://modelscope.cn"
    return Access(endpoint.rstrip("/"), "MINICPM_MS_ENDPOINT", None)


def read_listing(reference: Reference, source: Access) -> Listing:
    """Return what the hub holds under `reference`, whatever its `file`.

    Raises:
        HubError: there is no such repository or revision, it is closed to us, or the answer is not a listing.
    """
    read = _read_hf if reference.site == "hf" else _read_ms
    try:
        return read(reference, source)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HubError(
            f"{source.endpoint} does not list {reference.repository} with sizes and hashes"
            f" ({type(error).__name__}: {error}); it may not be a mirror of the hub; check {source.setting}"
        ) from error


def choose(listing: Listing, reference: Reference, allow_unsafe: bool) -> tuple[RemoteFile, ...]:
    """Return the files that make up the model `reference`.

    Files in subfolders are other people's variants of the same weights and are taken only by name. Where there are
    safetensors, a GGUF beside them is left; a GGUF repository holds one model in many sizes, so one must be named.

    Raises:
        HubError: the named file is not there or not safe, or there is no set of weights that we read.
    """
    suffixes = SAFE_SUFFIXES + (UNSAFE_SUFFIXES if allow_unsafe else ())
    if reference.file is not None:
        return (_named_file(listing, reference, suffixes),)
    files = [f for f in listing.files if "/" not in f.path and is_safe_path(f.path) and f.path.endswith(suffixes)]
    safetensors = [f for f in files if f.path.endswith(".safetensors")]
    ggufs = [f for f in files if f.path.endswith(".gguf")]
    if safetensors:
        return tuple(f for f in files if f not in ggufs)
    if len(ggufs) > 1:
        choices = ", ".join(f"{f.path} ({megabytes(f.size_bytes)})" for f in ggufs)
        raise HubError(f"{reference} holds {len(ggufs)} GGUF files; name one as {reference}/FILE: {choices}")
    if not ggufs and not any(f.path.endswith(_WEIGHT_SUFFIXES) for f in files):
        pickled = sorted(f.path for f in listing.files if f.path.endswith(UNSAFE_SUFFIXES[:3]))
        hint = f"; it has {pickled[0]}, a pickle that can run code: --unsafe-files fetches it too" if pickled else ""
        raise HubError(f"{reference} holds no weights in safetensors or GGUF{hint}")
    return tuple(files)


def _named_file(listing: Listing, reference: Reference, suffixes: tuple[str, ...]) -> RemoteFile:
    for file in listing.files:
        if file.path == reference.file:
            if not file.path.endswith(suffixes):
                raise HubError(f"{file.path} can run code or is of no known kind; fetched are {', '.join(suffixes)};"
                               " --unsafe-files adds pickles and Python")  # fmt: skip
            return file
    weights = [f.path for f in listing.files if f.path.endswith(_WEIGHT_SUFFIXES)]
    raise HubError(
        f"{reference.repository} has no file {reference.file!r}; its weights: {', '.join(weights) or 'none'}"
    )


def _read_hf(reference: Reference, source: Access) -> Listing:
    revision = quote(reference.revision or "main", safe="")
    data = read_json(f"{source.endpoint}/api/models/{reference.repository}/revision/{revision}?blobs=true", source)
    commit = str(data["sha"])
    card = data.get("cardData") or {}
    files = []
    for entry in data["siblings"]:
        lfs = entry.get("lfs")
        digest = Digest("sha256", lfs["sha256"]) if lfs else Digest("git-sha1", entry["blobId"])
        path = str(entry["rfilename"])
        # The commit, not the branch: a push between two files must not mix two models.
        url = f"{source.endpoint}/{reference.repository}/resolve/{quote(commit, safe='')}/{quote(path)}"
        files.append(RemoteFile(path, int((lfs or entry)["size"]), _checked(digest), url))
    return Listing(commit, str(card.get("license") or "not stated"), tuple(files))


def _read_ms(reference: Reference, source: Access) -> Listing:
    revision = reference.revision or "master"
    base = f"{source.endpoint}/api/v1/models/{reference.repository}"
    about: dict[str, Any] = read_json(base, source)["Data"]
    listing = read_json(f"{base}/repo/files?{urlencode({'Revision': revision, 'Recursive': 'true'})}", source)
    files = []
    for entry in listing["Data"]["Files"]:
        if entry.get("Type") == "tree":
            continue
        path = str(entry["Path"])
        url = f"{base}/repo?{urlencode({'Revision': revision, 'FilePath': path})}"
        files.append(RemoteFile(path, int(entry["Size"]), _checked(Digest("sha256", entry["Sha256"])), url))
    return Listing(revision, str(about.get("License") or "not stated"), tuple(files))


def _checked(digest: Digest) -> Digest:
    length = 64 if digest.kind == "sha256" else 40
    if len(digest.value) != length:
        raise ValueError(f"{digest.value!r} is no {digest.kind}")
    int(digest.value, 16)
    return Digest(digest.kind, digest.value.lower())
