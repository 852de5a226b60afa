"""A run published to S3 and read from there: s3fs against moto's server. Skipped where they are not installed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.unit.history.conftest import STEPS, weights_at

from minicpm.architecture import ModelConfig
from minicpm.errors import CheckpointError
from minicpm.history import History
from minicpm.history.destination import open_destination
from minicpm.history.publishing import publish
from minicpm.history.transfer import pull
from minicpm.history.verification import verify

NAME = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket, found as any other S3 is: by the environment."""
    s3fs = pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"), ("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket/runs/tiny"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


def test_published_to_s3_and_read_there(
    make_history: Callable[..., Path], bucket: str, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    source = History(make_history(STEPS[:5]))
    with contextlib.closing(open_destination(bucket)) as destination:
        sent = publish(source, destination, source.steps[:3], "tiny")
    with contextlib.closing(open_destination(bucket)) as destination:
        sent += publish(source, destination, source.steps, "tiny")
        assert publish(source, destination, source.steps, "tiny") == 0
    assert sent == sum(file.stat().st_size for file in (tmp_path / "history" / "objects").iterdir())
    there = History(bucket)
    assert there.steps == source.steps
    assert verify(there) == []
    assert there[150].weight(NAME).data.tobytes() == weights_at(tiny_config, 150)[NAME].data.tobytes()
    pull(there, tmp_path / "copy", [100])
    assert verify(History(tmp_path / "copy")) == []
    with pytest.raises(CheckpointError, match=r"s3://nowhere/tiny is no history|cannot read s3://nowhere/tiny"):
        History("s3://nowhere/tiny")
