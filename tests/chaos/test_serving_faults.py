"""Serving under faults, overload and hostile requests: what clients get, and what is left after.

Every service is the real command with the bundled student, in a process group of its own.
"""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from ddray.serving.api import ModelCard
from tests.chaos.hostile import Case, cases, read_cards
from tests.chaos.job import Job, is_alive
from tests.chaos.service import FULL, RAW, Load, Service, clients, standing_still, until
from tests.core.deployment.test_dashboard import dashboard_metrics
from tests.patience import PATIENCE_S, wait_until

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def pair(serve: Callable[..., Service]) -> Service:
    """Two replicas, both of them warm: the first alone would answer already."""
    service = serve("--replicas", "2")
    wait_until(lambda: service.started() == 2, "second replica that is warm")
    return service


@pytest.mark.parametrize("kills", [pytest.param(1, marks=pytest.mark.smoke), 10])
def test_killed_replicas_cost_no_client_its_images(pair: Service, kills: int) -> None:
    warm = pair.started()

    async def scenario() -> Load:
        async with clients(pair, 8, n=2, pause_s=0.2) as load:
            for gone in range(kills):
                wait_s = await _until_warm(pair, warm + gone)
                await until(lambda: load.in_flight >= 3, "load")
                pair.replicas()[0].kill()
                print(f"kill {gone + 1}, {wait_s:.1f} s after the last: {dict(load.statuses)}")
            await _until_warm(pair, warm + kills)
        return load

    load = asyncio.run(scenario())
    print(f"{sum(load.statuses.values())} requests, the slowest {load.slowest():.1f} s")
    assert set(load.statuses) == {"200"}, load.failures[:5]
    # One replica may have had nothing in hand when it died; of ten some had.
    assert kills == 1 or asyncio.run(_until_total(pair, "ray_ddray_retries_total", 1))


async def _until_warm(service: Service, count: int) -> float:
    return await until(lambda: service.started() >= count, "replica that is warm")


async def _until_total(service: Service, name: str, least: float) -> bool:
    await until(lambda: service.total(name) >= least, f"{name} of {least}")
    return True


def test_a_killed_ingress_fails_at_most_what_it_had_in_hand(pair: Service) -> None:
    count = 8

    async def scenario() -> tuple[Load, int, float]:
        async with clients(pair, count, n=4, pause_s=0.1) as load:
            await until(lambda: load.statuses["200"] > count, "load")
            before = pair.ingress()
            await until(lambda: load.in_flight >= 3, "requests in hand")
            in_flight = load.in_flight
            before.kill()
            began, done = time.monotonic(), load.statuses["200"]
            await until(lambda: load.statuses["200"] > done + 2 * count, "answers again")
            back_s = time.monotonic() - began
            assert pair.ingress() != before
        return load, in_flight, back_s

    load, in_flight, back_s = asyncio.run(scenario())
    print(f"{in_flight} in flight, back after {back_s:.1f} s, failed: {load.failures}")
    assert len(load.failures) <= in_flight, load.failures
    assert set(load.statuses) <= {"200", "503"}
    assert all('"code": "unavailable"' in failure for failure in load.failures)


def test_a_frozen_replica_is_replaced_and_its_requests_are_made_elsewhere(pair: Service) -> None:
    """SIGSTOP: as a process whose device never comes back, it neither answers nor dies."""

    async def scenario() -> tuple[Load, float]:
        await _until_warm(pair, 2)
        warm, frozen = pair.started(), pair.replicas()[0]
        async with clients(pair, 8, n=2, pause_s=0.2) as load:
            await until(lambda: load.in_flight >= 3, "load")
            frozen.suspend()
            began = time.monotonic()
            await until(lambda: not is_alive(frozen), "end of the frozen replica")
            gone_s = time.monotonic() - began
            await _until_warm(pair, warm + 1)
        return load, gone_s

    load, gone_s = asyncio.run(scenario())
    print(f"gone after {gone_s:.1f} s, slowest {load.slowest():.1f} s: {dict(load.statuses)}")
    assert set(load.statuses) == {"200"}, load.failures[:5]


def test_sigterm_ends_a_busy_service_with_143_and_leaves_nothing(pair: Service) -> None:
    _stop(pair, signal.SIGTERM, 143)


@pytest.fixture(scope="module")
def single(serve: Callable[..., Service]) -> Service:
    """One replica."""
    return serve()


def test_a_large_body_is_refused_and_the_connection_goes_on(single: Service) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", single.port, timeout=PATIENCE_S)
    kind = {"content-type": "application/json"}
    for _ in range(2):
        connection.request("POST", FULL, b" " * 10_000_000, kind)
        answer = connection.getresponse()
        assert (answer.status, json.load(answer)["error"]["code"]) == (413, "request_too_large")
        kept = connection.sock
        connection.request("POST", RAW, b'{"prompt": 1}', kind)
        assert connection.getresponse().read().startswith(b"\x89PNG")
        assert connection.sock is kept is not None
    connection.close()


@pytest.mark.parametrize("count", [pytest.param(300, marks=pytest.mark.smoke), 5000])
def test_no_request_is_answered_by_a_5xx_or_out_of_shape(single: Service, count: int) -> None:
    before = {process.pid for process in single.processes()}
    sent = cases(count)
    cards = read_cards(httpx.get(f"{single.url}/v1/models", trust_env=False).json())
    statuses: Counter[int] = Counter()

    async def scenario() -> None:
        waiting = iter(sent)

        async def send(client: httpx.AsyncClient) -> None:
            for case in waiting:
                request = client.build_request(case.method, case.path, content=case.body)
                request.headers = httpx.Headers([*request.headers.raw, *case.all_headers()])
                answer = await client.send(request)
                statuses[answer.status_code] += 1
                _check(case, answer, cards)

        async with single.client() as client:
            await asyncio.gather(*(send(client) for _ in range(8)))

    asyncio.run(scenario())
    print(dict(statuses))
    assert sum(statuses.values()) == count
    assert {process.pid for process in single.processes()} == before


def _check(case: Case, answer: httpx.Response, cards: dict[str, ModelCard]) -> None:
    """Valid requests get images, all others 4xx in the one shape."""
    told = f"{case} got {answer.status_code}: {answer.text[:300]}"
    if (case.method, case.path) in (("POST", FULL), ("POST", RAW)) and len(case.body) <= 64_000:
        if case.is_json:
            verdict = case.verdict(cards)
            expected = (200, None) if verdict is None else (verdict.status, verdict.code)
        else:
            expected = (415, "unsupported_media_type")
        code = None if answer.status_code == 200 else answer.json()["error"]["code"]
        assert (answer.status_code, code) == expected, told
    else:
        assert answer.status_code < 300 or 400 <= answer.status_code < 500, told
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == "application/json", told
        if case.method != "HEAD":
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "code", "param"}, told
            assert (error["type"], bool(error["message"])) == ("invalid_request_error", True), told


def test_what_is_no_http_harms_nobody(single: Service) -> None:
    before = {process.pid for process in single.processes()}
    head = b"POST /v1/images/raw HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    noise = [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"BREW /v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        head + b"content-length: -5\r\n\r\n{}",
        head + b"content-length: 5\r\ncontent-length: 6\r\n\r\n{}",
        head + b"content-length: 500\r\n\r\n{}",
        head + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        head + b"transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n",
        head + b"expect: 100-continue\r\ncontent-length: 12\r\n\r\n",
        head + b"x: " + b"a" * 200_000 + b"\r\n\r\n",
    ]

    async def scenario() -> list[bytes]:
        async def send(data: bytes) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", single.port)
            writer.write(data)
            try:
                return await asyncio.wait_for(reader.read(500), 3)
            except (TimeoutError, ConnectionError):
                return b""
            finally:
                writer.close()

        return list(await asyncio.gather(*map(send, noise)))

    heads = [answer.split(b"\r\n")[0] for answer in asyncio.run(scenario())]
    assert not [head for head in heads if head.startswith(b"HTTP/1.1 5")], heads
    assert {process.pid for process in single.processes()} == before
    answer = httpx.post(single.url + RAW, json={"prompt": 1}, timeout=PATIENCE_S, trust_env=False)
    assert answer.status_code == 200


def test_clients_that_leave_take_their_work_with_them(single: Service) -> None:
    """The device stands still until all have left: what is made then was made for nobody."""
    n, batch, limit, count = 16, 64, 512, 40
    body = json.dumps({"prompt": 1, "n": n}).encode()
    head = (
        f"POST {FULL} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )

    def noted(status: int) -> int:
        return sum(access["status"] == status for access in single.accesses())

    async def scenario() -> None:
        refused: list[bytes] = []

        async def send_and_wait() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", single.port)
            writer.write(head.encode() + body)
            try:
                refused.append(await reader.read(12))
            finally:
                writer.transport.abort()

        with standing_still(single.job):
            waiting = [asyncio.create_task(send_and_wait()) for _ in range(count)]
            # More than may be admitted have come: the others are in hand.
            await until(lambda: len(refused) * n >= count * n - limit, "refusals")
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert set(refused) == {b"HTTP/1.1 503"}
            # Whoever had not come as far as the front leaves no word there.
            await until(lambda: noted(499) > before, "word that some have left")
            await _unchanged(lambda: noted(499))
        async with single.client() as client:
            assert (await client.post(RAW, json={"prompt": 1})).status_code == 200

    before, made_before = noted(499), _settled(single, "ray_ddray_images_total")
    asyncio.run(scenario())
    left, made = noted(499) - before, _settled(single, "ray_ddray_images_total") - made_before
    print(f"{left} of {count} left; {made:.0f} images were made, with those of others")
    assert left * n >= batch
    # The batch that was under way when the device stopped, and one that was formed behind it.
    assert made <= 2 * batch + 1


async def _unchanged(read: Callable[[], int]) -> None:
    """Wait until a number that grows has stopped growing."""
    before = -1
    while before != (before := read()):
        await asyncio.sleep(5)


def _settled(service: Service, name: str) -> float:
    """A total that has stopped growing; Ray brings it up to date every ten seconds."""
    before = -1.0
    while before != (before := service.total(name)):
        time.sleep(12)
    return before


def _stalled(service: Service, count: int, sent: bytes) -> list[socket.socket]:
    """Connections that announce a body and send no more than its beginning."""
    head = (
        f"POST {FULL} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: 60000\r\n\r\n"
    )
    connections = []
    for _ in range(count):
        connections.append(socket.create_connection(("127.0.0.1", service.port), PATIENCE_S))
        connections[-1].sendall(head.encode() + sent)
    return connections


async def _ask_at_once(service: Service, count: int) -> Counter[str]:
    load = Load()
    async with service.client() as client:
        await asyncio.gather(*(load.ask(client, prompt=1, n=1, seed=k) for k in range(count)))
    return load.statuses


def test_an_overload_that_is_over_refuses_nobody(single: Service) -> None:
    """By slow requests, three times what the device can do; then 96 small ones come at once."""

    async def overload() -> Load:
        load = Load()
        async with single.client() as client:
            asked = {"prompt": 1, "n": 16, "steps": "teacher"}
            sent = (load.ask(client, **asked, seed=seed) for seed in range(60))
            tasks = [asyncio.create_task(request) for request in sent]
            await until(lambda: load.statuses["503"] > 20, "refusals")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return load

    asyncio.run(overload())
    time.sleep(3)
    assert asyncio.run(_ask_at_once(single, 96)) == {"200": 96}


@pytest.mark.parametrize(
    ("count", "sent"), [(8, b""), (16, b"{"), (64, b"{" * 50_000), (300, b"{")]
)
def test_stalled_connections_refuse_nobody(single: Service, count: int, sent: bytes) -> None:
    with contextlib.ExitStack() as opened:
        connections = [opened.enter_context(c) for c in _stalled(single, count, sent)]
        slow = opened.enter_context(socket.create_connection(("127.0.0.1", single.port)))
        slow.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nx: ")
        assert asyncio.run(_ask_at_once(single, 8)) == {"200": 8}
        for connection in connections:
            assert connection.recv(12) == b"HTTP/1.1 408"


def test_a_hundred_megabytes_of_headers_are_refused_and_leave_no_memory(single: Service) -> None:
    (proxy,) = single.proxies()
    watched = (proxy, single.ingress())
    before = [process.memory_info().rss for process in watched]
    for start in (b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx: ", b"GET /"):
        with socket.create_connection(("127.0.0.1", single.port), PATIENCE_S) as connection:
            connection.sendall(start)
            for _ in range(100):
                connection.sendall(b"a" * 1_000_000)
            answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 431")
        assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"] == "headers_too_large"
    assert proxy.is_running()
    for process, resident in zip(watched, before, strict=True):
        assert process.memory_info().rss - resident < 20e6


@pytest.mark.parametrize("n", [4, 16])
def test_what_is_too_much_is_refused_while_the_device_stands_still(single: Service, n: int) -> None:
    """So it waits for nothing; and what was admitted is made when the device goes on."""
    count, limit = 1600 // n, 512
    before = single.ingress()

    async def scenario() -> Load:
        load = Load()
        async with single.client() as client:
            with standing_still(single.job):
                sent = [load.ask(client, prompt=1, n=n, seed=seed) for seed in range(count)]
                tasks = [asyncio.create_task(request) for request in sent]
                await until(lambda: load.statuses["503"] * n >= count * n - limit, "refusals")
            await asyncio.gather(*tasks)
            await load.ask(client, prompt=1, n=1, seed=1)
        return load

    load = asyncio.run(scenario())
    print(f"{dict(load.statuses)}, {load.images} images")
    assert set(load.statuses) == {"200", "503"}, load.failures[:5]
    assert all('"code": "overloaded"' in failure for failure in load.failures)
    assert single.ingress() == before
    assert 64 <= load.images - 1 <= limit


def test_a_burst_leaves_no_memory_behind(single: Service) -> None:
    def resident() -> float:
        return sum(process.memory_info().rss for process in single.processes()) / 2**20

    async def burst() -> None:
        load = Load()
        async with single.client() as client:
            orders = (load.ask(client, prompt=1, n=4, seed=seed) for seed in range(300))
            await asyncio.gather(*orders)
        assert set(load.statuses) <= {"200", "503"}, load.failures[:5]

    asyncio.run(burst())
    before = resident()
    for _ in range(3):
        asyncio.run(burst())
    assert resident() < before * 1.1 + 20


def test_prometheus_gets_what_the_dashboard_shows(single: Service) -> None:
    # A gauge is there for ten seconds after it was set.
    wanted = dashboard_metrics("ddray-serving")

    async def scenario() -> None:
        async with clients(single, 4, n=1):
            await until(lambda: not wanted - _named(single.metrics()), "metric of every name")

    asyncio.run(scenario())


def _named(metrics: str) -> set[str]:
    return {line.partition("{")[0] for line in metrics.splitlines() if not line.startswith("#")}


def test_sigint_ends_a_busy_service_with_130_and_leaves_nothing(single: Service) -> None:
    _stop(single, signal.SIGINT, 130)


def _stop(service: Service, number: signal.Signals, status: int) -> None:
    """Signal a service under load; what was begun may finish, and then all is gone."""
    job = service.job

    async def scenario() -> tuple[Load, int, float, list[psutil.Process]]:
        async with clients(service, 8, n=4, pause_s=0.1) as load:
            await until(lambda: load.statuses["200"] > 16, "load")
            tree, began = job.tree(), time.monotonic()
            due = load.statuses["200"] + load.in_flight
            if number == signal.SIGINT:
                os.killpg(job.process.pid, number)  # as a terminal does: the whole group gets it
            else:
                os.kill(job.process.pid, number)
            await until(lambda: job.process.poll() is not None, "end")
            return load, due, time.monotonic() - began, tree

    load, due, ended_s, tree = asyncio.run(scenario())
    print(f"ended in {ended_s:.1f} s: {dict(load.statuses)}; {load.failures[:3]}")
    _check_end(job, status)
    assert load.statuses["200"] >= due
    assert "cut" not in load.statuses
    wait_until(lambda: not any(map(is_alive, tree)), "end of all processes")


def _check_end(job: Job, status: int, told: str = "") -> None:
    """It ended in silence but for a line, and its log is still there."""
    stdout, stderr = job.process.communicate()
    stdout = told + stdout
    assert job.process.returncode == status, stderr
    assert stderr == "stopping; what was begun is still answered\n"
    lines = stdout.splitlines()
    own = [
        line
        for line in lines
        if line.startswith("Serve's log: ") or " served at " in line or line == "Ctrl-C stops it"
    ]
    assert len(own) == 3
    # Of a service that has lost processes, Ray has told more, before or after.
    foreign = [line for line in lines if line not in own]
    assert not (foreign if told else [line for line in foreign if "graceful_shutdown" in line])
    folder = Path(own[0].partition(": ")[2])
    assert list(folder.glob("proxy_*.log"))
    files = list(folder.glob("replica_ddray_ingress_*_access.log"))  # one of each that was
    lines = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    assert all({"request_id", "status", "ms"} <= set(line) for line in lines)
    assert lines


def test_an_idle_service_ends_at_once_and_in_silence(serve: Callable[..., Service]) -> None:
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        service = serve()
        # The command looks whether it answers, as the test does, and may be later.
        assert service.job.process.stdout is not None
        told = [service.job.process.stdout.readline() for _ in range(3)]
        tree, began = service.job.tree(), time.monotonic()
        os.kill(service.job.process.pid, number)
        service.job.process.wait(PATIENCE_S)
        print(f"ended in {time.monotonic() - began:.1f} s")
        _check_end(service.job, status, "".join(told))
        wait_until(lambda: not any(map(is_alive, tree)), "end of all processes")  # noqa: B023


def test_replicas_come_and_go_with_the_load(serve: Callable[..., Service]) -> None:
    service = serve("--replicas", "1:2", "--upscale-delay-s", "2", "--downscale-delay-s", "4")
    assert len(service.replicas()) == 1

    async def scenario() -> tuple[Load, float, float]:
        async with clients(service, 40, n=1) as load:
            up_s = await _until_warm(service, 2)
        down_s = await until(lambda: len(service.replicas()) == 1, "single replica")
        async with service.client() as http:
            await load.ask(http, prompt=1, n=1, seed=1)
        return load, up_s, down_s

    load, up_s, down_s = asyncio.run(scenario())
    print(f"1 -> 2 in {up_s:.1f} s, 2 -> 1 in {down_s:.1f} s: {dict(load.statuses)}")
    # One replica of a slow machine may refuse some until the second is there.
    assert set(load.statuses) <= {"200", "503"}, load.failures[:5]
    assert all('"code": "overloaded"' in failure for failure in load.failures)


def test_a_service_that_sleeps_wakes_for_a_request(serve: Callable[..., Service]) -> None:
    service = serve("--replicas", "0:1", "--upscale-delay-s", "0", "--downscale-delay-s", "3")
    assert not service.replicas()

    async def scenario() -> tuple[Load, float]:
        load = Load()
        async with service.client() as http:
            await load.ask(http, prompt=1, n=1, seed=1)
        return load, await until(lambda: not service.replicas(), "sleep")

    load, asleep_s = asyncio.run(scenario())
    print(f"awake in {load.slowest():.1f} s, asleep again {asleep_s:.1f} s later")
    assert dict(load.statuses) == {"200": 1}, load.failures
