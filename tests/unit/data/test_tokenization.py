from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from minicpm.data.mixture import Mix, StageMixture
from minicpm.data.opening import check_identity, data_identity, open_heldout, open_sources, sources_of
from minicpm.data.shards import TokenShards
from minicpm.data.supervised import tokenize_rows
from minicpm.data.tokenization import TokenizeConfig, tokenize_documents
from minicpm.errors import ConfigError, DataError
from minicpm.tokenizer import Tokenizer, build_labels
from minicpm.tokenizer.fingerprint import fingerprint

TEXTS = [f"the thing number {i}\nand {'abc ' * (i % 7)}你好" for i in range(200)]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus.jsonl", [*TEXTS[:100], "", *TEXTS[100:]])


def test_documents_come_back(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    manifest = tokenize_documents([str(corpus)], tokenizer, tmp_path / "out", TokenizeConfig(shard_tokens=500))
    shards = TokenShards.open(tmp_path / "out", fingerprint(tokenizer))
    assert shards.num_documents == 200
    assert len(manifest["shards"]) > 3
    for index, text in enumerate(TEXTS):
        ids = shards.document(index).tolist()
        assert ids[0] == 1
        assert ids[-1] == 2
        assert tokenizer.decode(ids[1:-1]) == text
    assert shards.text_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert manifest["sources"] == [
        {"source": str(corpus), "documents": 200, "text_bytes": sum(len(text.encode()) for text in TEXTS)}
    ]
    assert manifest["dtype"] == "<u2"
    assert manifest["num_tokens"] == shards.num_tokens == sum(shard["num_tokens"] for shard in manifest["shards"])
    with pytest.raises(DataError, match="has documents 0 to 199, not 200"):
        shards.document(200)


def test_workers_do_not_change_a_byte(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    folders = []
    for workers in (1, 2):
        folders.append(tmp_path / f"out{workers}")
        tokenize_documents([str(corpus)], tokenizer, folders[-1], TokenizeConfig(workers=workers, shard_tokens=500))
    for file in sorted(folders[0].glob("*.bin")) + sorted(folders[0].glob("*.npy")):
        assert file.read_bytes() == (folders[1] / file.name).read_bytes()


def test_heldout_documents_are_chosen_by_their_own_hash(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    tokenize_documents([str(corpus)], tokenizer, tmp_path / "out", TokenizeConfig(heldout_share=0.25))
    train, heldout = TokenShards.open(tmp_path / "out"), TokenShards.open(tmp_path / "out.heldout")
    aside = [hashlib.sha1(text.encode()).digest()[0] < 64 for text in TEXTS]
    for shards, expected in ((heldout, True), (train, False)):
        found = [tokenizer.decode(shards.document(i).tolist()[1:-1]) for i in range(shards.num_documents)]
        assert found == [text for text, is_aside in zip(TEXTS, aside, strict=True) if is_aside is expected]
    with pytest.raises(DataError, match="sets no document aside"):
        tokenize_documents([str(corpus)], tokenizer, tmp_path / "two", TokenizeConfig(heldout_share=1e-9))
    assert not list(tmp_path.glob("*two*"))


def test_it_stops_at_max_tokens(
    tokenizer: Tokenizer, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minicpm.data.tokenization._BATCH_CHARACTERS", 100)
    manifest = tokenize_documents([str(corpus)], tokenizer, tmp_path / "out", TokenizeConfig(max_tokens=300))
    assert 300 <= manifest["num_tokens"] < 500


def test_whole_or_not_at_all(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    corpus.write_text(corpus.read_text() + '{"text": 5}\n')
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"corpus\.jsonl:202: field 'text' is int"):
        tokenize_documents([str(corpus)], tokenizer, tmp_path / "out")
    write(corpus, ["", " \n"])
    with pytest.raises(DataError, match="the corpus is empty"):
        tokenize_documents([str(corpus)], tokenizer, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="exists already"):
        tokenize_documents([str(corpus)], tokenizer, tmp_path / "out")


def test_a_full_disk_leaves_nothing(
    tokenizer: Tokenizer, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match=r"cannot write .*out: No space left on device; free some space"):
        tokenize_documents([str(corpus)], tokenizer, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [corpus]


def test_another_tokenizer_is_refused(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    tokenize_documents([str(corpus)], tokenizer, tmp_path / "out")
    other = Tokenizer.from_vocabulary(
        dataclasses.replace(tokenizer.vocabulary, scores=[-s for s in tokenizer.vocabulary.scores or ()])
    )
    assert fingerprint(other) != fingerprint(tokenizer)
    with pytest.raises(DataError, match="was tokenized with another tokenizer"):
        TokenShards.open(tmp_path / "out", fingerprint(other))


def test_damaged_shards_are_named(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(DataError, match="holds no token shards"):
        TokenShards.open(folder)
    tokenize_documents([str(corpus)], tokenizer, folder)
    manifest = json.loads((folder / "manifest.json").read_text())

    def broken(change: dict[str, object] | str) -> str:
        text = change if isinstance(change, str) else json.dumps(manifest | change)
        (folder / "manifest.json").write_text(text)
        with pytest.raises(DataError) as error:
            TokenShards.open(folder)
        return str(error.value)

    assert "is not valid JSON" in broken("{")
    assert "is not the manifest" in broken("[]")
    assert "format version 99" in broken({"format_version": 99})
    assert "dtype is missing or wrong" in broken({"dtype": "O"})
    assert "is missing, its manifest says" in broken(
        {"shards": [{"tokens": "../out/tokens-00000.bin", "num_tokens": 5}]}
    )
    assert "expected 7 integers" in broken({"num_documents": 6})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with (folder / "tokens-00000.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"tokens-00000\.bin has \d+ bytes, its manifest says"):
        TokenShards.open(folder)


def test_rows_carry_their_mask(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [
        [{"role": "user", "content": "the thing"}, {"role": "assistant", "content": "and abc"}],
        [{"role": "user", "content": "in"}, {"role": "assistant", "content": "an"}, {"role": "user", "content": "x"},
         {"role": "assistant", "content": "你好"}],
    ]  # fmt: skip
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages))
    for turns in ("last", "all"):
        folder = tmp_path / turns
        manifest = tokenize_rows([str(file)], tokenizer, folder, trained_turns=turns)
        shards = TokenShards.open(folder, fingerprint(tokenizer))
        rows = [build_labels(tokenizer, m, trained_turns=turns) for m in messages]
        for index, row in enumerate(rows):
            start, stop = int(shards.bounds[index]), int(shards.bounds[index + 1])
            assert shards.document(index).tolist() == row.ids
            assert shards.supervised(start, stop).astype(bool).tolist() == row.is_trained
        assert manifest["num_targets"] == sum(row.num_trained for row in rows)


# ------------------------------------------------------------------ the data of a run


def stages(**paths: str) -> list[StageMixture]:
    return [StageMixture(tuple(Mix(name, 1 / len(paths), path) for name, path in paths.items()))]


def test_text_is_tokenized_once_and_again_when_it_changes(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    config = TokenizeConfig(heldout_share=0.1)
    first = open_sources(stages(web=str(corpus)), tokenizer, cache, config)["web"]
    written = (first.path / "manifest.json").stat().st_mtime_ns
    again = open_sources(stages(web=str(corpus)), tokenizer, cache, config)["web"]
    assert (again.path / "manifest.json").stat().st_mtime_ns == written
    heldout = open_heldout(Mix("web", 1.0, str(corpus)), cache)
    assert heldout is not None
    assert heldout.num_documents + first.num_documents == 200
    recorded = data_identity({"web": first})
    check_identity({"web": again}, recorded)
    write(corpus, TEXTS[:50])
    changed = open_sources(stages(web=str(corpus)), tokenizer, cache, config)
    assert changed["web"].num_documents < 50
    with pytest.raises(DataError, match=r"web \(.*\) holds other documents than this run began with"):
        check_identity(changed, recorded)


def test_shards_are_opened_where_they_are(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    tokenize_documents([str(corpus)], tokenizer, tmp_path / "ready")
    opened = open_sources(stages(web=str(tmp_path / "ready")), tokenizer, tmp_path / "cache")["web"]
    assert opened.path == tmp_path / "ready"
    assert not (tmp_path / "cache").exists()


def test_names_stand_for_one_path() -> None:
    decay = StageMixture((Mix("web", 0.5), Mix("sft", 0.5, "b", kind="rows")), "decay")
    found = sources_of([*stages(web="a"), decay])
    assert {name: mix.path for name, mix in found.items()} == {"web": "a", "sft": "b"}
    with pytest.raises(ConfigError, match=r"mixture name 'weeb' is unknown.*did you mean web\?"):
        sources_of([*stages(web="a"), StageMixture((Mix("weeb", 1.0),), "decay")])
    with pytest.raises(ConfigError, match="'web' stands for a and for b"):
        sources_of([*stages(web="a"), *stages(web="b")])
