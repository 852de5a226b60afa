"""The chat page in headless Chromium, against the real server and model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.e2e.browser_session import browse
from tests.e2e.serve.conftest import Running, Server


@pytest.mark.slow
def test_the_page(server: Server, tmp_path: Path) -> None:
    seen = browse("chat", server.url, tmp_path)
    assert seen["foreign"] == []
    # A refused key, and what the browser says of handlers in the hostile reply as the sanitizer reads them.
    expected = ("401", "inline event handler")
    assert [text for text in seen["errors"] if not any(part in text for part in expected)] == []
    assert seen["axe"] == []
    assert "smollm2" in seen["card"]
    assert "1,024" in seen["card"]
    assert seen["streamed"] > 20
    assert "stopped" in seen["stopped"]
    assert 0 < len(seen["stoppedText"]) < 2000
    assert "cut at the token limit" in seen["note"]
    assert "tokens/s" in seen["note"]
    assert "24 tokens" in seen["note"]
    assert seen["tokens"] >= 20
    # Greedy: the same beginning again.
    assert seen["again"][:20] == seen["stoppedText"][:20]
    assert "%" in seen["hovered"]
    assert "alternatives" in seen["hovered"]
    assert seen["moved"] != seen["hovered"]
    assert len(seen["edited"]) == 2
    assert "capital of France" in seen["edited"][0]
    assert "24 tokens" in seen["edited"][1]
    assert [text.replace("Regenerate", "") for text in seen["reloaded"]] == [
        text.replace("Regenerate", "") for text in seen["edited"]
    ]
    assert seen["hit"] is None
    for part in ("<img", "<script", "<svg", "<iframe", "javascript:", "onclick", "onerror"):
        assert part not in seen["hostile"]
    for part in ("<strong>bold</strong>", "<table>", '<pre tabindex="0"><code>'):
        assert part in seen["hostile"]
    assert seen["conversations"] == 2
    assert seen["chinese"] == 1
    # The key stays in the tab.
    assert seen["keyed"] == [False, True]
    server.wait_until_idle()


@pytest.mark.slow
def test_the_page_behind_a_key(start: Running, tmp_path: Path) -> None:
    key = "correct-horse-battery"
    with start("--ctx", "512", MINICPM_API_KEY=key) as server:
        seen = browse("key", server.url, tmp_path, key)
    assert (seen["refused"], seen["opened"]) == (401, 200)
    assert "no valid API key" in seen["refusal"]
    assert seen["reply"]
    assert seen["asked"] == 0
    assert seen["keptByBrowser"] == [False, False]
    assert (seen["silent"], seen["alerts"]) == (0, 0)
    assert "refused this key" in seen["wrong"]
    assert seen["ownReply"]
    # In the tab's store and nowhere else.
    assert seen["kept"] == [False, True]
    assert seen["remembered"]
    assert seen["other"] == 0
    assert seen["foreign"] == []
