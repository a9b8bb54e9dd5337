"""Many clients at a time: the same answers as alone, batches that are shared, and a queue with an end."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from typing import Any

import httpx
import pytest

from cmaclip_fast import Classifier
from cmaclip_fast.serving import service as module
from cmaclip_fast.serving.batching import Batcher
from cmaclip_fast.serving.errors import Refused
from cmaclip_fast.serving.settings import Limits
from tests.classifier.conftest import TEXTS
from tests.serving.conftest import PICTURES, Running, Start
from tests.serving.test_endpoints import same

PAIRS = [pair for pair in product(PICTURES, TEXTS) if pair != (None, None)]


def test_many_threads_get_the_answers_of_one(start: Start, classifier: Classifier) -> None:
    running = start(batch_rows=8)
    wanted = classifier.predict(*map(list, zip(*PAIRS, strict=True)))
    chosen = [(i, i + 1 + i % 3) for i in range(len(PAIRS) - 3)] * 3

    def ask(span: tuple[int, int]) -> bool:
        rows = [
            {"image": None if image is None else base64.b64encode(image).decode(), "text": text}
            for image, text in PAIRS[slice(*span)]
        ]
        found = running.client.post("/predict", json={"rows": rows}).json()["predictions"]
        assert len(found) == len(rows)
        return all(same(*pair) for pair in zip(found, wanted[slice(*span)], strict=True))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, chosen))
    rows = sum(stop - start for start, stop in chosen)
    assert running.metric('cmaclip_rows_total{kind="predict"}') == rows == running.metric("cmaclip_batch_rows_sum")
    assert running.metric("cmaclip_batch_rows_count") < len(chosen)  # some shared one


def test_endpoints_may_be_mixed(served: Running, classifier: Classifier) -> None:
    vector = classifier.embed(None, "a red dress").tolist()
    wanted = classifier.predict(None, "a red dress")
    body = {"rows": [{"text": "a red dress"}]}

    def ask(number: int) -> bool:
        path = ("/predict", "/embed", "/explain", "/bad")[number % 4]
        response = served.client.post(path, json=body)
        if path == "/bad":
            return response.status_code == 404
        (row,) = response.json().popitem()[1]
        if path == "/embed":
            return bool(row == pytest.approx(vector, abs=1e-5))
        return same(row if path == "/predict" else row["predictions"], wanted)

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(120)))


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The model waits, once it has begun, until the event is set."""
    let_go, run = threading.Event(), module._run

    def slow(*arguments: Any) -> list[Any]:
        assert let_go.wait(20)
        return run(*arguments)

    monkeypatch.setattr(module, "_run", slow)
    try:
        yield let_go
    finally:
        let_go.set()


def until(condition: Any) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to pass")


def test_a_full_queue_refuses_and_answers_what_it_accepted(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(monkeypatch) as let_go, ThreadPoolExecutor(8) as pool:
        running = start(limits=Limits(queue_rows=2))
        body = {"rows": [{"text": "a red dress"}]}
        waiting = [pool.submit(running.client.post, "/predict", json=body)]
        until(lambda: running.metric("cmaclip_requests_in_progress") == 2)  # the one that asks is the other
        until(lambda: running.metric("cmaclip_batch_rows_count") == 1)
        waiting += [pool.submit(running.client.post, "/predict", json=body) for _ in range(2)]
        until(lambda: running.metric("cmaclip_queue_rows") == 2)
        refused = running.client.post("/predict", json=body)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "busy"
        assert int(refused.headers["retry-after"]) >= 1
        assert running.client.get("/health").status_code == 200  # probes are answered all the same
        let_go.set()
        assert [future.result().status_code for future in waiting] == [200] * 3
        assert running.client.post("/predict", json=body).status_code == 200
        assert running.metric('cmaclip_refused_total{code="busy"}') == 1


def test_requests_at_a_time_have_a_limit(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(monkeypatch) as let_go, ThreadPoolExecutor(2) as pool:
        running = start(limits=Limits(requests=1))
        waiting = pool.submit(running.client.post, "/predict", json={"rows": [{"text": "a"}]})
        until(lambda: running.metric("cmaclip_batch_rows_count") == 1)
        refused = running.client.post("/embed", json={"rows": [{"text": "a"}]})
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        let_go.set()
        assert waiting.result().status_code == 200


def test_an_answer_that_takes_too_long_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(monkeypatch) as let_go:
        running = start(limits=Limits(seconds=0.3))
        response = running.client.post("/predict", json={"rows": [{"text": "a"}]})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "too_slow")
        let_go.set()
        assert running.client.post("/predict", json={"rows": [{"text": "a"}]}).status_code == 200


def test_rows_of_a_client_that_left_are_not_run(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(monkeypatch) as let_go, ThreadPoolExecutor(1) as pool:
        running = start(limits=Limits(seconds=1))
        waiting = pool.submit(running.client.post, "/predict", json={"rows": [{"text": "a"}]})
        until(lambda: running.metric("cmaclip_batch_rows_count") == 1)
        given_up = running.client.post("/predict", json={"rows": [{"text": "a"}] * 5})
        let_go.set()
        assert (given_up.status_code, waiting.result().status_code) == (504, 504)
        until(lambda: running.metric("cmaclip_queue_rows") == 0)
        assert running.metric("cmaclip_batch_rows_sum") == 1


def test_a_table_leaves_room_for_others(start: Start) -> None:
    running = start(batch_rows=4, limits=Limits(queue_rows=8))
    table = ("rows.csv", b"title\n" + b"a red dress\n" * 400)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(running.client.post, "/predict-table", files={"table": table})
        until(lambda: running.metric('cmaclip_rows_total{kind="predict"}') > 0)
        assert running.client.post("/predict", json={"rows": [{"text": "a"}]}).status_code == 200
        assert not whole.done()
        rows = whole.result().json()["rows"]
    assert len(rows) == 400 and all(row["error"] is None for row in rows)


def test_a_new_artefact_is_loaded_without_losing_a_request(start: Start) -> None:
    running = start()
    before, stop = running.client.get("/model").json()["version"], threading.Event()
    codes: list[int] = []

    def ask() -> None:
        with httpx.Client(base_url=running.client.base_url) as client:
            while not stop.is_set():
                codes.append(client.post("/predict", json={"rows": [{"text": "a red dress"}]}).status_code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        assert asyncio.run(running.service.reload())
    stop.set()
    for thread in threads:
        thread.join()
    assert len(codes) > 8 and set(codes) == {200}
    assert running.client.get("/model").json()["version"] == before  # of the same files
    assert running.metric('cmaclip_model_loads_total{outcome="loaded"}') == 3


def squares(kind: Any, rows: list[Any]) -> list[Any]:
    if "bad" in rows:
        raise ValueError("a bad row")
    return [(kind, row * row) for row in rows]


def in_loop(scenario: Any, batch_rows: int = 4, queue_rows: int = 100, run: Any = squares) -> tuple[Any, list[int]]:
    """What a coroutine gives that is given a batcher, and the sizes of the batches."""
    sizes: list[int] = []

    async def main() -> Any:
        batcher = Batcher(run, batch_rows, queue_rows, sizes.append)
        batcher.start()
        try:
            return await scenario(batcher)
        finally:
            await batcher.close()

    return asyncio.run(main()), sizes


def test_a_batch_has_rows_of_one_kind_and_not_too_many() -> None:
    async def scenario(batcher: Batcher) -> Any:
        asked = [(kind, [number] * size) for number in range(5) for kind in "ab" for size in (1, 2, 6)]
        return asked, await asyncio.gather(*(batcher.submit(kind, rows, 10) for kind, rows in asked))

    (asked, found), sizes = in_loop(scenario)
    assert found == [[(kind, row * row) for row in rows] for kind, rows in asked]
    assert sum(sizes) == sum(len(rows) for _, rows in asked) and max(sizes) == 6
    assert all(size <= 4 or size == 6 for size in sizes) and len(sizes) < len(asked)


def test_only_the_request_that_cannot_be_answered_fails() -> None:
    async def scenario(batcher: Batcher) -> Any:
        rows = [[1], ["bad"], [3]]
        return await asyncio.gather(*(batcher.submit("a", one, 10) for one in rows), return_exceptions=True)

    found, _ = in_loop(scenario)
    assert found[0] == [("a", 1)] and found[2] == [("a", 9)] and isinstance(found[1], ValueError)


def test_answers_that_are_too_few_are_an_error() -> None:
    async def scenario(batcher: Batcher) -> None:
        with pytest.raises(RuntimeError, match="2 rows got 1 answers"):
            await batcher.submit("a", [1, 2], 10)

    in_loop(scenario, run=lambda kind, rows: rows[:1])


def test_closing_answers_what_was_accepted_and_takes_no_more() -> None:
    async def scenario(batcher: Batcher) -> Any:
        waiting = [asyncio.ensure_future(batcher.submit("a", [number], 10)) for number in range(9)]
        await asyncio.sleep(0)
        await batcher.close()
        with pytest.raises(Refused) as refused:
            await batcher.submit("a", [1], 10)
        assert refused.value.status == 503
        return await asyncio.gather(*waiting)

    found, _ = in_loop(scenario)
    assert found == [[("a", number**2)] for number in range(9)]


def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits() -> None:
    async def scenario(batcher: Batcher) -> Any:
        return await batcher.submit("a", [1] * 5, 10)

    assert len(in_loop(scenario, queue_rows=2)[0]) == 5
