"""A history as a repository of the Hugging Face hub: a commit for each checkpoint, and a revision that names it.

    main                              what was published so far; `History("hf://OWNER/NAME")`
    step260000-stable-1.02T           a tag: as of a commit that holds this checkpoint whole; on request also as a model

Objects, manifest and index of a checkpoint are one commit, so nobody ever sees a part of it. Objects are sent before
their commit; what the hub has of an interrupted call is not sent again. What this leaves out: the token, which
huggingface_hub takes from HF_TOKEN or `hf auth login`.

Source: the names are those of Pythia's and OLMo's revisions, with the stage between.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minicpm.errors import CheckpointError
from minicpm.history.catalogue import ABOUT, INDEX, OBJECTS, Row
from minicpm.history.destination import RemoteDestination, copy_object
from minicpm.history.manifest import FOLDER
from minicpm.history.place import Folder, Place
from minicpm.history.store import disk_errors

_REPOSITORY = re.compile(r"hf://([A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)/?")
_UNITS = (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3))
# Objects are no text, whatever their size.
_ATTRIBUTES = f"{OBJECTS}/** filter=lfs diff=lfs merge=lfs -text\n*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def revision_name(row: Row) -> str:
    """Return the name of a checkpoint's revision, such as step260000-stable-1.02T."""
    stage = re.sub(r"[^A-Za-z0-9_]+", "_", row.stage).strip("_") or "step"
    return f"step{row.step}-{stage}-{_short(row.tokens)}"


def _short(count: int) -> str:
    """Three digits and a unit: 1.02T, 15B, 640K, 12."""
    for unit, size in _UNITS:
        if count >= size * 0.9995:
            text = f"{count / size:#.3g}" if count < 999.5 * size else f"{count / size:.0f}"
            return f"{text.rstrip('0').rstrip('.') if '.' in text else text}{unit}"
    return str(count)


class HubDestination(RemoteDestination):
    """A model repository of its own; made when the first checkpoint is sent.

    Args:
        url: hf://OWNER/NAME.
        make_model: makes a new folder the model of a checkpoint, which its revision then holds besides the history, so
            that `from_pretrained(NAME, revision=…)` works; None leaves it out.

    Raises:
        CheckpointError: a URL that names none, huggingface_hub is missing, or the hub cannot be reached.
    """

    def __init__(self, url: str, make_model: Callable[[Row, Path], None] | None = None) -> None:
        match = _REPOSITORY.fullmatch(url)
        if match is None:
            raise CheckpointError(f"{url} is no repository to publish to; write hf://OWNER/NAME, a model of its own")
        try:
            import huggingface_hub
            from huggingface_hub.utils.tqdm import disable_progress_bars
        except ImportError as error:
            raise CheckpointError(
                f"{url} is written by huggingface_hub, which is not installed: pip install 'minicpm[hf,remote]'"
            ) from error
        # Progress is told by the caller's own line.
        disable_progress_bars()
        super().__init__(url)
        self._repository = match[1]
        self._hub = huggingface_hub
        self._api = huggingface_hub.HfApi()
        self._make_model = make_model
        self._scratch = tempfile.TemporaryDirectory(prefix="minicpm-publish-")
        self._pending: dict[str, Any] = {}
        self._head: str | None = None
        self._tags: set[str] | None = None

    def add_object(self, source: Place, name: str, num_bytes: int) -> None:
        """Hash an object, then send it; it appears with the commit of its checkpoint."""
        folder = Folder(Path(self._scratch.name))
        with disk_errors(folder.path):
            (folder.path / OBJECTS).mkdir(exist_ok=True)
            copy_object(source, folder, name, num_bytes)
        file = folder.path / OBJECTS / name
        self._stage(f"{OBJECTS}/{name}", str(file))

        def sent(_: Any) -> None:
            self._api.preupload_lfs_files(self._repository, [self._pending[f"{OBJECTS}/{name}"]])

        self._call("write", f"{OBJECTS}/{name}", sent)

    def write(self, path: str, content: bytes) -> None:
        """Take a small file; what a checkpoint consists of becomes one commit, when the index that lists it comes."""
        self._stage(path, content)
        is_listing = path == INDEX and any(name.startswith(f"{FOLDER}/") for name in self._pending)
        if is_listing or path not in (INDEX, ABOUT, *(name for name in self._pending if name.startswith(f"{FOLDER}/"))):
            self._commit()

    def mark(self, row: Row) -> None:
        """Give the revision with this checkpoint its name; the commit before this call holds it."""
        self._call("name a revision of", revision_name(row), lambda _: self._mark(row, revision_name(row)))

    def _mark(self, row: Row, name: str) -> None:
        if self._tags is None:
            self._tags = {ref.name for ref in self._api.list_repo_refs(self._repository).tags}
        if name in self._tags:
            return
        # A tag appears with all that it holds: what is added to a commit for it is added on a branch that goes again.
        branch = f"writing-{name}"
        commit = self._head if self._make_model is None else self._add_model(row, name, branch, self._make_model)
        self._api.create_tag(self._repository, tag=name, revision=commit, exist_ok=True)
        if self._make_model is not None:
            self._api.delete_branch(self._repository, branch=branch)
        self._tags.add(name)

    def _add_model(self, row: Row, name: str, branch: str, make_model: Callable[[Row, Path], None]) -> str:
        """Return a commit that holds the checkpoint as a model as well."""
        self._api.create_branch(self._repository, branch=branch, revision=self._head or "main", exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="minicpm-publish-") as scratch:
            folder = Path(scratch) / "model"
            make_model(row, folder)
            made = self._api.upload_folder(
                repo_id=self._repository, folder_path=folder, revision=branch, ignore_patterns=["README.md"],
                commit_message=f"Add the model of {name}",
            )  # fmt: skip
        return str(made.oid)

    def close(self) -> None:
        """Drop what was not committed."""
        self._pending.clear()
        self._scratch.cleanup()

    def _stage(self, path: str, content: str | bytes) -> None:
        """Let a file, or the content of one, wait for the next commit."""
        self._call("write", path, lambda _: self._open())
        self._pending[path] = self._hub.CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)

    def _open(self) -> None:
        """Make the repository if it is not there, and have its objects stored as such."""
        if self._head is None:
            self._api.create_repo(self._repository, exist_ok=True)
            if ABOUT not in self.names():
                attributes = self._hub.CommitOperationAdd(
                    path_in_repo=".gitattributes", path_or_fileobj=_ATTRIBUTES.encode()
                )
                self._api.create_commit(self._repository, [attributes], commit_message="Store objects as large files")
            self._head = self._api.repo_info(self._repository).sha

    def _commit(self) -> None:
        """Make everything that waits appear, at once; a repository that another process changed meanwhile refuses."""
        manifests = [Path(name).stem for name in self._pending if name.startswith(f"{FOLDER}/")]
        message = f"Add {', '.join(manifests)}" if manifests else f"Write {', '.join(self._pending)}"

        def committed(files: Any) -> None:
            made = self._api.create_commit(
                self._repository, list(self._pending.values()), commit_message=message, parent_commit=self._head
            )
            self._head = made.oid
            files.invalidate_cache()

        self._call("write", message, committed)
        self._pending.clear()
        for file in Path(self._scratch.name).glob(f"{OBJECTS}/*"):
            file.unlink()
