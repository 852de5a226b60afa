"""Every published configuration loads."""

from pathlib import Path

import pytest

from minicpm import config
from minicpm.train.pretrain_config import PretrainConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


def test_there_are_configurations() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_configuration_loads(path: Path) -> None:
    assert config.load(PretrainConfig, path).name == path.stem
