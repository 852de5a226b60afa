"""Plans of tuning: bytes by hand, settings that make a run fit, cards by name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from minicpm import config as configuration
from minicpm.architecture import PRESETS, ModelConfig
from minicpm.errors import ConfigError
from minicpm.train.cards import card
from minicpm.train.tune_config import TuneConfig
from minicpm.train.tune_plan import Base, first_fitting, make_tune_plan, most_at_once, passes, tune_bytes

COUNT, LINEAR = 2_724_880_896, 2_441_871_360
BASE = Base(PRESETS["minicpm-2b"])


def config(*words: str) -> TuneConfig:
    return configuration.load(TuneConfig, None, ["name=x", "base=m", 'rows.sources=["r"]', "epochs=0.0", *words])


def test_what_is_fixed_follows_from_the_shape() -> None:
    # Rank 8 on seven projections of 40 layers.
    adapters = 40 * 8 * (4 * 2 * 2304 + 3 * (2304 + 5760))
    lora, qlora = (tune_bytes(BASE, config(f"method={name}"), 1) for name in ("lora", "qlora"))
    assert lora["weights"] == 2 * COUNT
    assert lora["adapters"] == qlora["adapters"] == 16 * adapters
    assert qlora["weights"] == LINEAR * 20 // 32
    assert qlora["other weights"] == 2 * (COUNT - LINEAR)
    lean = tune_bytes(BASE, config("method=full", "optimizer.masters=none", "optimizer.states=int8"), 1)
    assert lean["weights"] == 2 * COUNT
    assert 2 * COUNT < lean["moments"] < 2.04 * COUNT
    assert lean["gradients"] == 4 * COUNT
    assert tune_bytes(dataclasses.replace(BASE, block_bytes=77), config("method=qlora"), 1)["weights"] == 77


def test_settings_are_found_that_make_a_run_fit() -> None:
    full = config("method=full")
    with pytest.raises(ConfigError, match=r"24\.00 GB are given; with .*optimizer\.masters=none.* it fits"):
        make_tune_plan(BASE, full, memory_bytes=24 * 10**9)
    found = first_fitting(BASE, full, 24 * 10**9)
    assert found is not None
    words, lean = found
    # The words of a command line say the same as the configuration.
    assert config("method=full", *words.split()) == lean
    assert make_tune_plan(BASE, lean, memory_bytes=24 * 10**9).total_bytes <= 24 * 10**9
    assert first_fitting(BASE, full, 10**9) is None
    with pytest.raises(ConfigError, match="nothing here makes it fit"):
        make_tune_plan(BASE, full, memory_bytes=10**9)


def test_most_at_once_is_where_it_ends() -> None:
    lora = config("method=lora", "batch.sequences=[64]", "loop.recompute_every=1")
    memory = 12 * 10**9
    most, length = most_at_once(BASE, lora, memory)
    assert sum(tune_bytes(BASE, lora, most).values()) <= memory < sum(tune_bytes(BASE, lora, most + 1).values())
    assert length == BASE.model.max_position_embeddings
    short = dataclasses.replace(lora, loop=dataclasses.replace(lora.loop, recompute_every=0))
    _, length = most_at_once(BASE, short, memory)
    rows = [dataclasses.replace(short.batch, sequence_length=n) for n in (length, length + 1)]
    sizes = [sum(tune_bytes(BASE, dataclasses.replace(short, batch=batch), 1).values()) for batch in rows]
    assert sizes[0] <= memory < sizes[1]
    assert most_at_once(BASE, lora, 10**9) == (0, 0)


def test_pairs_are_two_rows_and_frozen_weights_have_no_slope(tiny_config: ModelConfig) -> None:
    base = Base(tiny_config)
    sft, dpo = (make_tune_plan(base, config(f"goal={goal}"), peak_flops=1e12) for goal in ("sft", "dpo"))
    assert dpo.components["activations"] == pytest.approx(2 * sft.components["activations"], rel=0.05)
    full = make_tune_plan(base, config("method=full"), peak_flops=1e12)
    assert sft.tokens_per_second / full.tokens_per_second == pytest.approx(3 / 2)
    assert [passes(config(f"method={m}", "loop.recompute_every=2")) for m in ("full", "lora")] == [3.5, 2.5]


def test_cards_by_name() -> None:
    assert card("RTX 3090") is card("3090") is card("nvidia-geforce-rtx-3090")
    assert card("GTX 1080 Ti").gib == 11
    assert not card("1080").has_bfloat16
    assert np.isclose(card("3090").usable_bytes, 24 * 2**30, rtol=0.07)
    with pytest.raises(ConfigError, match="not in the table"):
        card("voodoo2")
