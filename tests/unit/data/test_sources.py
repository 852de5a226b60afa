from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpm.data.readers import read_rows
from minicpm.data.sources import find_files, read_documents, stamp
from minicpm.data.stdlib_text import stdlib_files
from minicpm.errors import DataError

ROWS = [{"text": "one\nline 你好", "n": 1}, {"text": "two", "meta": {"inner": "deep"}}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def texts(source: Path | str, field: str = "text") -> list[str]:
    return [document.text for document in read_documents(str(source), field)]


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    # Two frames, as `cat a.zst b.zst` makes them.
    half = data.index(b"\n") + 1
    packed: bytes = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    return packed


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress), (".zst", zstd)],
)
def test_json_lines_in_every_packing(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(pack(LINES))
    assert texts(file) == ["one\nline 你好", "two"]
    assert [row.where for row in read_rows(file)] == [f"{file}:1", f"{file}:2"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_cut_off_packing_names_file_and_line(tmp_path: Path, suffix: str) -> None:
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd}[suffix]
    file = tmp_path / f"a.jsonl{suffix}"
    noise = "".join(json.dumps({"text": str(hash((i, "x")))}) + "\n" for i in range(3000)).encode()
    whole = pack(noise)
    file.write_bytes(whole[: len(whole) // 2] if suffix != ".zst" else b"junk" + whole[20:])
    with pytest.raises(DataError, match=r"a\.jsonl\.\w+:\d+: the compressed file is damaged or cut off"):
        texts(file)


def test_json_array_text_and_separators(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    assert texts(tmp_path / "a.json") == ["one\nline 你好", "two"]
    (tmp_path / "b.txt").write_text("\ufefffirst\r\nline\n<|endoftext|>\nsecond\n<|endoftext|>\n \n", newline="")
    assert list(read_documents(str(tmp_path / "b.txt"))) == [
        ("first\nline\n", f"{tmp_path}/b.txt:1"),
        ("second\n", f"{tmp_path}/b.txt:4"),
    ]
    (tmp_path / "c.py").write_text("print('hello')\n")
    assert texts(tmp_path / "c.py") == ["print('hello')\n"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "two", None], "n": [1, 2, 3]}), file)
    assert texts(file) == ["one", "two"]
    with pytest.raises(DataError, match=r"a\.parquet\[0\]: field 'n' is int, expected text"):
        texts(file, "n")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.parquet\[0\]: not a whole Parquet file"):
        texts(file)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}]).save_to_disk(str(tmp_path / "set"))
    assert texts(tmp_path / "set") == ["one", "two"]


def test_fields_and_templates(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"en": "yes", "zh": "是", "meta": {"title": "T"}, "none": null}\n')
    assert texts(file, "{en} = {zh}\n{meta.title}") == ["yes = 是\nT"]
    assert texts(file, "meta.title") == ["T"]
    assert texts(file, "none") == []
    with pytest.raises(DataError, match=r"a\.jsonl:1: field 'fr' is missing; the row has 'en', 'zh', 'meta', 'none'"):
        texts(file, "{en} {fr}")
    with pytest.raises(DataError, match=r"a\.jsonl:1: field 'meta' is dict, expected text"):
        texts(file, "meta")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": }\n', r"a\.jsonl:2: not valid JSON: Expecting value at column 10"),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', r"a\.jsonl:3: the row is a JSON list; an object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not valid JSON"),
        ("a.json", b'[{"text": "x"},\n{]', r"a\.json:2: not valid JSON"),
        ("a.json", b'{"text": "x"}', r"a\.json holds a JSON dict; an array"),
        ("a.json", b'["x"]', r"a\.json\[0\]: the row is a JSON str"),
        ("a.docx", b"", "is of no known kind"),
    ],
)
def test_broken_files_name_file_and_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / name)


def test_folders_and_globs_in_order(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl", "a/.hidden/3.jsonl", "a/picture.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert texts(tmp_path) == ["a/1.jsonl", "b/2.jsonl"]
    assert texts(f"{tmp_path}/*/2.jsonl") == ["b/2.jsonl"]
    for source, message in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "*.nope", "matches no file"),
        (tmp_path / "a" / ".hidden" / "x", "does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            find_files(str(source))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is an empty folder"):
        find_files(str(tmp_path / "empty"))
    (tmp_path / "empty" / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match="holds no file that can be read"):
        find_files(str(tmp_path / "empty"))


def test_standard_library_is_a_corpus_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    code = list(read_documents("stdlib:sources"))
    assert len(code) > 200
    assert any(d.where.endswith("json/decoder.py:1") and "class JSONDecoder" in d.text for d in code)
    assert not any("/test/" in d.where or "site-packages" in d.where for d in code)
    with pytest.raises(DataError, match="unknown source 'stdlib:dcos'"):
        texts("stdlib:dcos")
    few = tuple(f for f in stdlib_files() if f.parts[-2:] in {("json", "encoder.py"), ("pydoc_data", "topics.py")})
    monkeypatch.setattr("minicpm.data.stdlib_text.stdlib_files", lambda: few)
    docs = list(read_documents("stdlib:docs"))
    assert sum("Extensible JSON" in d.text and d.where.endswith("encoder.py:1") for d in docs) == 1
    assert sum("“assert” statement" in d.text or 'The "assert" statement' in d.text for d in docs) >= 1
    assert sum(len(d.text) for d in docs) > 300_000


def test_stamp_changes_with_the_files(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(LINES)
    before = stamp([str(tmp_path)])
    assert stamp([str(tmp_path)]) == before
    file.write_bytes(LINES + LINES)
    assert stamp([str(tmp_path)]) != before
    assert stamp(["stdlib:"]) == stamp(["stdlib:"]) != stamp(["stdlib:docs"])
