from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from minicpm.data.cleaning import CleanConfig, clean, look_at, normalise
from minicpm.data.contamination import EvaluationIndex
from minicpm.data.language import detect_language
from minicpm.data.minhash import NUM_BANDS, NUM_MINIMA, find_copies, sketch
from minicpm.data.quality import QualityConfig, find_fault
from minicpm.data.sources import Document
from minicpm.data.words import hash_ngrams, hash_words, ideograph_share
from minicpm.errors import ConfigError, DataError

WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "l", "")]


def prose(seed: int, length: int = 120) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(length))


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def kept(folder: Path, name: str) -> list[str]:
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


# ------------------------------------------------------------------ words


def test_words_are_runs_of_letters_and_single_ideographs() -> None:
    assert len(hash_words("Hello, world! x2 你好。The_end é")) == 8
    assert hash_words("HELLO World").tolist() == hash_words("hello   world!").tolist()
    assert len(set(hash_words("ab ba a b aab aba").tolist())) == 6
    assert hash_words("").tolist() == hash_words(" .,! 🤗").tolist() == []
    one, two = hash_words("山东省"), hash_words("东山省")
    assert sorted(one.tolist()) == sorted(two.tolist())
    assert one.tolist() != two.tolist()


def test_word_hashes_are_fixed_for_good() -> None:
    assert hash_words("hello 你").tolist() == [8772306819644705021, 14663198797460331536]


def test_ngrams_depend_on_order() -> None:
    words = hash_words("a b c d")
    assert len(hash_ngrams(words, 2)) == 3
    assert len(hash_ngrams(words, 9)) == 1
    assert hash_ngrams(words, 2)[0] != hash_ngrams(words[::-1].copy(), 2)[2]
    assert hash_ngrams(words, 3)[1] == hash_ngrams(hash_words("b c d"), 3)[0]


def test_share_of_ideographs() -> None:
    assert ideograph_share("你好 ab") == 0.5
    assert ideograph_share("...") == 0


# ------------------------------------------------------------------ copies


def copies_of(texts: list[str], threshold: float = 0.7) -> list[int]:
    sketches = [sketch(hash_words(text)) for text in texts]
    bands = np.stack([s.bands for s in sketches])
    assert bands.shape[1] == NUM_BANDS
    return find_copies(bands, np.stack([s.minima for s in sketches]), threshold).tolist()


def test_near_copies_are_found_and_others_left_alone() -> None:
    texts = [prose(seed) for seed in range(50)]
    near = texts[3].split(" ")
    near[60] = "other"
    found = copies_of([*texts, " ".join(near), texts[7].upper() + "!", prose(99)])
    assert found == [*range(50), 3, 7, 52]


def test_sharing_a_band_is_not_enough() -> None:
    # All three share one band. The second is like nothing; the third is like the first, over the second's head.
    rng = np.random.default_rng(0)
    bands = rng.integers(0, 1 << 60, (3, NUM_BANDS), dtype=np.uint64)
    bands[:, 4] = 7
    minima = rng.integers(0, 256, (3, NUM_MINIMA), dtype=np.uint8)
    minima[2, :110] = minima[0, :110]
    assert find_copies(bands, minima, 0.7).tolist() == [0, 1, 0]
    assert find_copies(bands, minima, 0.95).tolist() == [0, 1, 2]


def test_estimated_similarity_is_the_true_one() -> None:
    # 300 pairs with a known share of common 5-grams: the estimate's mean is right to within three standard errors.
    estimates, truths = [], []
    for seed in range(300):
        words = hash_words(prose(seed, 400))
        other = np.concatenate([words[:300], hash_words(prose(seed + 10_000, 100))])
        one, two = set(hash_ngrams(words, 5).tolist()), set(hash_ngrams(other, 5).tolist())
        truths.append(len(one & two) / len(one | two))
        same = (sketch(words).minima == sketch(other).minima).mean()
        estimates.append((same - 1 / 256) / (1 - 1 / 256))
    error = np.array(estimates) - np.array(truths)
    assert abs(error.mean()) < 3 * error.std() / np.sqrt(300)
    assert error.std() < 0.06


def test_copies_of_copies_are_one_group() -> None:
    base = prose(1, 200).split(" ")
    chain = []
    for step in range(4):
        changed = list(base)
        for i in range(step * 2):
            changed[20 + i * 25] = f"new{step}"
        chain.append(" ".join(changed))
    assert set(copies_of(chain, 0.6)) == {0}


# ------------------------------------------------------------------ rules


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("short", "too-short"),
        (prose(1), None),
        (
            "山东省最高的山是哪座山它比黄山高还是矮差距多少， 春眠不觉晓处处闻啼鸟夜来风雨声， 床前明月光疑是地上霜",
            None,
        ),
        ("#$% &*( )_+ " * 20, "few-letters"),
        (("word " + "=+ " * 5) * 30, "few-letters"),
        ("a b c d e f g h i j k l m n " * 10, "word-length"),
        ("\n".join(f"- {prose(i, 6)}" for i in range(20)), "bullets"),
        ("\n".join(f"{prose(i, 6)} ..." for i in range(20)), "ellipses"),
        ("\n".join([prose(1, 10), prose(2, 10)] * 10), "repeated-lines"),
        (prose(1, 20) + " " + " ".join([prose(2, 12)] * 20), "repeated-words"),
        (prose(1) + "\ufffd\ufffd\ufffd", "broken-characters"),
    ],
)
def test_rules_of_text(text: str, fault: str | None) -> None:
    assert find_fault(text, hash_words(text), QualityConfig()) == fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("def f(x):\n    return x + 1\n" * 5, None),
        ("x = '" + "a" * 3000 + "'\n", "long-line"),
        (("x = '" + "a" * 300 + "'\n") * 3, "long-lines"),
        ("# auto-generated, do not edit\n" + "x = 1\n" * 20, "generated"),
        ("((((([[[[[{{{{{\n" * 20, "few-letters"),
    ],
)
def test_rules_of_code(text: str, fault: str | None) -> None:
    assert find_fault(text, hash_words(text), QualityConfig(kind="code")) == fault


def test_limits() -> None:
    assert find_fault(prose(1), hash_words(prose(1)), QualityConfig(max_characters=100)) == "too-long"
    assert find_fault("#" * 100, hash_words(""), QualityConfig(kind="off")) is None
    with pytest.raises(ConfigError, match="max_symbols must not be negative"):
        QualityConfig(max_symbols=-0.1)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The cat sat on the mat and looked at the dog, which was not amused by it.", "en"),
        ("Der Hund läuft schnell durch den Wald und bellt laut.", "latin"),
        ("山东省最高的山是泰山,海拔1545米。Python", "zh"),
        ("これは日本語の文章です。漢字もあります。", "ja"),
        ("이것은 한국어 문장입니다.", "ko"),
        ("Это предложение на русском языке.", "ru"),
        ("هذه جملة باللغة العربية", "ar"),
        ("123 456 !!!", "other"),
    ],
)
def test_languages(text: str, language: str) -> None:
    assert detect_language(text) == language


def test_normal_form() -> None:
    assert normalise("cafe\u0301\r\na\rb\x00\ufeff") == "café\na\nb"
    assert normalise("\ud83e\udd17 \ud83e") == "🤗 \ufffd"


# ------------------------------------------------------------------ evaluation sets


def test_contamination_needs_a_whole_run(tmp_path: Path) -> None:
    question = prose(500, 30)
    file = tmp_path / "eval.jsonl"
    file.write_text(json.dumps({"q": question, "choices": ["yes", {"long": prose(501, 13)}]}) + "\n")
    (tmp_path / "table.tsv").write_text(prose(502, 15) + "\t5\n")
    index = EvaluationIndex.build([str(file), str(tmp_path / "table.tsv")])
    assert index.num_short == 1
    words = question.split(" ")

    def found(*middle: str) -> str | None:
        return look_at(Document(" ".join([prose(1), *middle, prose(2)]), "x"), CleanConfig(), index).detail or None

    assert found(*words[5:18]) == "eval.jsonl"
    assert found(*words[5:17]) is None
    assert found(*[word.upper() + "," for word in words[5:18]]) == "eval.jsonl"
    assert found(prose(501, 13)) == "eval.jsonl"
    assert found(prose(502, 15)) == "table.tsv"
    assert EvaluationIndex.build([str(tmp_path)]).names == ("eval.jsonl", "table.tsv")
    with pytest.raises(DataError, match="no text of 99 words"):
        EvaluationIndex.build([str(file)], 99)
    with pytest.raises(ConfigError, match="at least 5"):
        EvaluationIndex.build([str(file)], 2)


# ------------------------------------------------------------------ all of it


def corpora(folder: Path) -> dict[str, str]:
    texts = [prose(seed) for seed in range(40)]
    near = texts[4].split(" ")
    near[50] = "changed"
    secret = prose(900, 40)
    (folder / "eval.txt").write_text(secret + "\n")
    first = [*texts[:20], texts[2] + "  \n", " ".join(near), "short", prose(77) + " " + secret]
    second = [*texts[20:], texts[5], " ".join([*texts[6].split(" ")[:-1], "end"]), "#" * 200]
    return {"one": write(folder / "one.jsonl", first), "two": write(folder / "two.jsonl", second)}


def test_report_says_why_every_row_went(tmp_path: Path) -> None:
    sources = corpora(tmp_path)
    report = clean(sources, tmp_path / "out", evaluation=[str(tmp_path / "eval.txt")])
    one, two = report["sources"]["one"], report["sources"]["two"]
    assert one["dropped"] == {"exact-copy": 1, "near-copy": 1, "too-short": 1, "contaminated": 1}
    assert two["dropped"] == {"exact-copy": 1, "near-copy-of-other": 1, "few-letters": 1}
    assert one["contaminated_by"] == {"eval.txt": 1}
    assert one["examples"]["too-short"] == [f"{tmp_path}/one.jsonl:23"]
    assert (one["num_kept"], two["num_kept"]) == (20, 20)
    assert report["num_rows"] == 47 == report["num_kept"] + sum(report["dropped"].values())
    assert kept(tmp_path / "out", "one") == [prose(seed) for seed in range(20)]
    assert kept(tmp_path / "out", "two") == [prose(seed) for seed in range(20, 40)]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "cleaning-report.json",
        "one.jsonl.gz",
        "two.jsonl.gz",
    ]
    assert json.loads((tmp_path / "out" / "cleaning-report.json").read_text()) == report


def test_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    sources = corpora(tmp_path)
    for workers in (1, 2):
        clean(sources, tmp_path / f"out{workers}", CleanConfig(workers=workers))
    for name in ("one.jsonl.gz", "two.jsonl.gz", "cleaning-report.json"):
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()


def test_near_copies_stay_on_request(tmp_path: Path) -> None:
    report = clean(corpora(tmp_path), tmp_path / "out", CleanConfig(near=0))
    assert "near-copy" not in report["dropped"]
    assert report["dropped"]["exact-copy"] == 2


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    sources = {"bad": write(tmp_path / "bad.jsonl", ["x", "y"])}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"nothing is left of .*: 2 too-short"):
        clean(sources, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"'\.\./x' cannot name a corpus"):
        clean({"../x": sources["bad"]}, tmp_path / "out")
    with pytest.raises(ConfigError, match="language 'fr' is not told apart"):
        CleanConfig(languages=("fr",))
    assert sorted(tmp_path.iterdir()) == before


def test_languages_are_kept_by_name(tmp_path: Path) -> None:
    english = "The cat sat on the mat and looked at the dog, which was not amused by it at all, as they say."
    source = write(tmp_path / "a.jsonl", [english, prose(1)])
    report = clean({"a": source}, tmp_path / "out", CleanConfig(languages=("en", "zh")))
    assert report["dropped"] == {"language-latin": 1}
    assert kept(tmp_path / "out", "a") == [english]
