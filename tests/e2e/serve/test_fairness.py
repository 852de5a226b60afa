"""Nobody waits for all of what somebody else asked for before, on a real server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tests.e2e.serve.conftest import Running, Server

BIG = {
    "prompt": "Once upon a time",
    "n": 12,
    "seed": 7,
    "temperature": 0.8,
    "max_tokens": 60,
    "logit_bias": {"0": -100},
}
KEYS = ("the-first-client", "the-second-client")


def wait_for_queue(server: Server, count: int) -> None:
    while server.gauge("requests_waiting") < count:
        pass


def test_a_short_request_does_not_wait_for_all_choices_of_an_earlier_one(start: Running) -> None:
    with start("--ctx", "256", "--parallel", "2") as server, ThreadPoolExecutor(1) as pool:
        alone = server.post("/v1/completions", BIG).json()["choices"]
        before = server.gauge("preemptions_total")
        big = pool.submit(server.post, "/v1/completions", BIG)
        wait_for_queue(server, 10)
        answer = server.post("/v1/completions", {"prompt": "The capital of France is", "max_tokens": 4})
        assert answer.json()["usage"]["completion_tokens"] == 4
        # One choice made room, most others were not begun when the answer came.
        assert server.gauge("requests_waiting") >= 8
        assert server.gauge("preemptions_total") == before + 1
        assert not big.done()
        # And whoever made room gets what it would have got.
        assert big.result().json()["choices"] == alone
        server.wait_until_idle()


def test_a_client_with_many_requests_does_not_stand_before_another(start: Running) -> None:
    options = [part for key in KEYS for part in ("--api-key", key)]
    with start("--ctx", "256", "--parallel", "2", *options) as server, ThreadPoolExecutor(12) as pool:
        server.client.headers["authorization"] = f"Bearer {KEYS[0]}"
        body = {**BIG, "n": 1}
        many = [pool.submit(server.post, "/v1/completions", body) for _ in range(12)]
        wait_for_queue(server, 10)
        headers = {"authorization": f"Bearer {KEYS[1]}"}
        answer = server.post("/v1/completions", {"prompt": "The capital of", "max_tokens": 4}, headers=headers)
        assert answer.status_code == 200
        assert server.gauge("requests_waiting") >= 8
        assert {request.result().status_code for request in many} == {200}
