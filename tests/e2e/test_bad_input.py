"""What people give by mistake: each a one-line error, exit code 2, and no traceback."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def assert_one_line(run: subprocess.CompletedProcess[str], *parts: str) -> None:
    """The command failed as every command must: exit code 2, one line that says what to do, nothing else."""
    assert run.returncode == 2, run
    assert run.stdout == ""
    assert run.stderr.startswith("error: "), run.stderr
    assert run.stderr.count("\n") == 1, run.stderr
    for part in parts:
        assert part in run.stderr, run.stderr


def gguf_header(architecture: str) -> bytes:
    """A whole GGUF file with one key and no tensor."""

    def text(value: str) -> bytes:
        data = value.encode()
        return struct.pack("<Q", len(data)) + data

    return (
        b"GGUF"
        + struct.pack("<IQQ", 3, 0, 1)
        + text("general.architecture")
        + struct.pack("<I", 8)
        + text(architecture)
    )


VERBS = [("chat", "hello"), ("show",), ("generate", "hello")]


def arguments_for(verb: tuple[str, ...], model: object) -> list[str]:
    return [verb[0], str(model), *verb[1:]]


@pytest.mark.parametrize("verb", VERBS, ids=lambda v: v[0])
def test_not_a_gguf(minicpm: Command, tmp_path: Path, verb: tuple[str, ...]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\3\4 this is something else")
    assert_one_line(minicpm(*arguments_for(verb, path)), str(path), "is not a GGUF file")


@pytest.mark.parametrize("verb", VERBS, ids=lambda v: v[0])
def test_a_truncated_gguf(minicpm: Command, tmp_path: Path, smollm2_path: Path, verb: tuple[str, ...]) -> None:
    path = tmp_path / "model.gguf"
    with smollm2_path.open("rb") as file:
        path.write_bytes(file.read(8_000_000))
    assert_one_line(minicpm(*arguments_for(verb, path)), str(path), "truncated")


@pytest.mark.parametrize("verb", VERBS, ids=lambda v: v[0])
def test_an_unknown_architecture(minicpm: Command, tmp_path: Path, verb: tuple[str, ...]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_header("mamba"))
    assert_one_line(minicpm(*arguments_for(verb, path)), "'mamba' is not supported", "llama")


def test_an_unknown_tensor_type(minicpm: Command, tmp_path: Path, smollm2_path: Path) -> None:
    name = b"blk.0.attn_q.weight"
    with smollm2_path.open("rb") as file:
        data = bytearray(file.read(4_000_000))
        at = data.index(name) + len(name)
        (num_dimensions,) = struct.unpack_from("<I", data, at)
        struct.pack_into("<I", data, at + 4 + 8 * num_dimensions, 10)
        path = tmp_path / "model.gguf"
        path.write_bytes(data + file.read())
    assert_one_line(minicpm("chat", str(path), "hello"), "blk.0.attn_q.weight", "Q2_K", "supported: ")


def test_a_prompt_longer_than_the_context(minicpm: Command, smollm2_path: Path) -> None:
    run = minicpm("chat", str(smollm2_path), "one two three " * 40, "--ctx", "64")
    assert_one_line(run, "64")
    numbers = [int(word) for word in run.stderr.replace(",", "").split() if word.isdigit()]
    assert any(number > 120 for number in numbers), run.stderr
    run = minicpm("generate", str(smollm2_path), "one two three " * 40, "--ctx", "64")
    assert_one_line(run, "64")


@pytest.mark.parametrize("verb", VERBS, ids=lambda v: v[0])
def test_a_name_that_means_nothing(minicpm: Command, empty_home: Path, verb: tuple[str, ...]) -> None:
    run = minicpm(*arguments_for(verb, "smolm2"), MINICPM_HOME=str(empty_home))
    assert_one_line(run, "no model named 'smolm2'", "nearest: smollm2")
    assert not empty_home.exists()


def test_a_prompt_in_the_place_of_the_model(minicpm: Command, empty_home: Path) -> None:
    run = minicpm("chat", "What is this?", MINICPM_HOME=str(empty_home), input="")
    assert run.returncode == 2
    run = minicpm("chat", "What is this?", "x", MINICPM_HOME=str(empty_home))
    assert_one_line(run, 'minicpm chat smollm2 "…"')


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--top-p", "1.5"], ["top_p", "1.5"]),
        (["--max-tokens", "-5"], ["-5"]),
        (["--threads", "-3"], ["-3"]),
        (["--ctx", "0"], ["0"]),
        (["--ctx", "1000000"], ["1000000", "8192"]),
        (["--temprature", "1"], ["--temperature"]),
        (["--greedy", "--temperature", "1"], ["leave one out"]),
        (["--load", "/nonexistent.json"], ["cannot read /nonexistent.json"]),
    ],
    ids=lambda a: " ".join(a),
)
def test_settings_that_cannot_be(minicpm: Command, smollm2_path: Path, arguments: list[str], parts: list[str]) -> None:
    assert_one_line(minicpm("chat", str(smollm2_path), "hello", *arguments), *parts)


def test_a_cache_that_cannot_be_written(minicpm: Command, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o500)
        run = minicpm("pull", "smollm2", MINICPM_HOME=str(folder))
        folder.chmod(0o700)
        assert_one_line(run, "cannot write to the cache folder", "MINICPM_HOME")
        return
    # Root may write into any folder, but not into a file system that is mounted for reading.
    run = in_file_system("ro,size=1m", folder)
    assert_one_line(run, "cannot write to the cache folder", "Read-only file system", "MINICPM_HOME")


def test_a_cache_without_space(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid():
        pytest.skip("only root may mount a small file system; a limit on file sizes is tested in unit/hub")
    run = in_file_system("size=1m", folder)
    assert_one_line(run, "no space left in the cache folder", "191 MB needed", "1 MB free")


def in_file_system(options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `minicpm pull smollm2` with `folder` as its cache, on a file system of its own."""
    script = f'mount -t tmpfs -o {options} tmpfs "$0" || exit 77; exec "$1" -m minicpm pull smollm2'
    run = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, str(folder), sys.executable],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"MINICPM_HOME": str(folder)},
    )
    if run.returncode in {1, 77} and "Traceback" not in run.stderr:
        pytest.skip(f"no file system can be mounted here: {run.stderr.strip()}")
    return run


def test_a_file_in_the_place_of_the_cache(minicpm: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = minicpm("pull", "smollm2", MINICPM_HOME=str(tmp_path / "file"))
    assert_one_line(run, "cannot", str(tmp_path / "file"), "MINICPM_HOME")


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "configs/nano.toml"),
        ("plan", "smollm2", "--gpu", "3090"),
        ("pretrain", "configs/nano.toml"),
        ("sft", "smollm2", "rows.jsonl"),
        ("quantize", "smollm2", "out.gguf", "--to", "q4_0"),
    ],
)
def test_verbs_that_train_say_what_to_install(arguments: tuple[str, ...]) -> None:
    root = Path(__file__).parents[2]
    hide = "import sys; sys.modules['torch'] = None; from minicpm.cli.main import run; sys.exit(run(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", hide, *arguments], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith(
        f"error: {arguments[0]} needs torch, which is not installed: pip install 'minicpm[train]'\n"
    )
