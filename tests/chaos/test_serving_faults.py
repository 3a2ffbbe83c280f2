"""Serving under faults, overload and hostile requests: what clients get, and what is left after.

Every service is the real command with the bundled student, in a process group of its own.
"""

import asyncio
import http.client
import json
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest

from ddray.serving.api import ModelCard
from tests.chaos.hostile import Case, cases, read_cards
from tests.chaos.job import is_alive
from tests.chaos.service import FULL, RAW, Load, Service, clients, until
from tests.core.deployment.test_dashboard import dashboard_metrics

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., Service]]:
    """Start a service; whatever a failed test leaves running is ended."""
    services: list[Service] = []

    def begin(*arguments: str) -> Service:
        services.append(Service(*arguments))
        services[-1].until_ready()
        return services[-1]

    yield begin
    for service in services:
        job = service.job
        if job.process.poll() is None:
            for process in (*job.tree(), psutil.Process(job.process.pid)):
                process.kill()
            job.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def pair(serve: Callable[..., Service]) -> Service:
    """Two replicas."""
    return serve("--replicas", "2")


def test_killed_replicas_cost_no_client_its_images(pair: Service) -> None:
    kills = 10

    async def scenario() -> Load:
        async with clients(pair, 8, n=2, pause_s=0.2) as load:
            for gone in range(kills):
                wait_s = await _until_warm(pair, 2 + gone)
                await until(lambda: load.in_flight >= 3, "load")
                pair.replicas()[0].kill()
                print(f"kill {gone + 1}, {wait_s:.1f} s after the last: {dict(load.statuses)}")
            await _until_warm(pair, 2 + kills)
        return load

    load = asyncio.run(scenario())
    print(f"{sum(load.statuses.values())} requests, the slowest {load.slowest():.1f} s")
    assert set(load.statuses) == {"200"}, load.failures[:5]
    assert asyncio.run(_until_total(pair, "ray_ddray_retries_total", 1))


async def _until_warm(service: Service, count: int) -> float:
    return await until(lambda: service.started() >= count, "replica that is warm")


async def _until_total(service: Service, name: str, least: float) -> bool:
    await until(lambda: service.total(name) >= least, f"{name} of {least}", 30)
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
    connection = http.client.HTTPConnection("127.0.0.1", single.port, timeout=60)
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


def test_no_request_is_answered_by_a_5xx_or_out_of_shape(single: Service) -> None:
    before = {process.pid for process in single.processes()}
    began = time.monotonic()
    sent = cases(5000)
    made_s = time.monotonic() - began
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
    print(f"made in {made_s:.0f} s, all in {time.monotonic() - began:.0f} s: {dict(statuses)}")
    assert sum(statuses.values()) == 5000
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
    answer = httpx.post(single.url + RAW, json={"prompt": 1}, timeout=60, trust_env=False)
    assert answer.status_code == 200


def test_clients_that_leave_take_their_work_with_them(single: Service) -> None:
    count, n = 50, 16
    body = json.dumps({"prompt": 1, "n": n}).encode()
    head = (
        f"POST {FULL} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )

    async def leave() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", single.port)
        writer.write(head.encode() + body)
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.transport.abort()

    async def scenario() -> tuple[float, float]:
        load = Load()
        async with single.client() as client:
            for seed in range(3):
                await load.ask(client, prompt=1, n=n, seed=seed)
            await asyncio.gather(*(leave() for _ in range(count)))
            began = time.monotonic()
            while (answer := await load.ask(client, prompt=1, n=1, seed=1)) is None or (
                answer.status_code == 503
            ):
                await asyncio.sleep(0.1)
            assert answer.status_code == 200
        return statistics.median(load.seconds["200"][:3]), time.monotonic() - began

    before = single.total("ray_ddray_images_total")
    alone_s, after_s = asyncio.run(scenario())
    left = [access for access in single.accesses() if access["status"] == 499]
    print(
        f"{n} images alone {alone_s:.2f} s, one after {count} left {after_s:.2f} s; "
        f"{len(left)} of {count} were noticed to leave"
    )
    # A batch of them may have been under way; all of them would take this many times as long.
    assert after_s < alone_s * count / 4
    assert len(left) >= count / 2
    made = asyncio.run(_settled(single, "ray_ddray_images_total")) - before
    print(f"{made:.0f} of {count * n} images were made, with those of others")
    assert made < count * n / 2


async def _settled(service: Service, name: str) -> float:
    """A total that has stopped growing; Ray shows it after ten seconds."""
    await asyncio.sleep(12)
    return service.total(name)


@pytest.mark.parametrize("n", [4, 16])
def test_overload_is_refused_at_once_and_passes_without_a_trace(single: Service, n: int) -> None:
    load_s = 20.0

    async def scenario() -> tuple[Load, Load, float, float, dict[int, list[int]]]:
        async with single.client() as http:
            before = Load()
            for seed in range(6):
                await before.ask(http, prompt=1, n=1, seed=seed)
            async with clients(single, 64 // n, n) as full:
                await asyncio.sleep(2)
                done, began = full.images, time.monotonic()
                await asyncio.sleep(10)
                per_s = (full.images - done) / (time.monotonic() - began)
            load, memory, sent = Load(), {p.pid: [] for p in single.processes()}, 0
            # This client takes several milliseconds a request: more of them, and it would measure
            # how long they wait for itself; and with one image each they would be no overload.
            per_s_asked = min(3 * per_s / n, 60.0)
            tasks, began = set(), time.monotonic()
            while (now := time.monotonic() - began) < load_s:
                while sent < per_s_asked * now:
                    sent += 1
                    tasks.add(asyncio.create_task(load.ask(http, prompt=1, n=n, seed=sent)))
                for process in single.processes() if int(now) > len(memory[max(memory)]) else ():
                    memory[process.pid].append(process.memory_info().rss)
                await asyncio.sleep(0.01)
            recovered_s = await until(lambda: _is_quick(single, before), "recovery", 60)
            await asyncio.gather(*tasks)
            return before, load, per_s, recovered_s, memory

    before, load, per_s, recovered_s, memory = asyncio.run(scenario())
    goodput = load.images / (load_s + recovered_s)
    waits = {status: statistics.quantiles(s, n=10) for status, s in load.seconds.items()}
    grown = {
        pid: f"{rss[len(rss) // 2] / 2**20:.0f}-{rss[-1] / 2**20:.0f} MiB"
        for pid, rss in memory.items()
    }
    print(
        f"alone {before.slowest():.2f} s; capacity {per_s:.0f} images/s; {dict(load.statuses)}; "
        f"goodput {goodput:.0f} images/s; recovered in {recovered_s:.1f} s; {grown}; "
        + "; ".join(f"{s}: median {w[4]:.2f} s, p90 {w[8]:.2f} s" for s, w in waits.items())
    )
    assert set(load.statuses) == {"200", "503"}, load.failures[:5]
    assert waits["503"][4] < waits["200"][4] / 2
    assert goodput > 0.7 * per_s
    assert recovered_s < max(5, 2 * 128 / per_s)
    for rss in memory.values():
        assert rss[-1] < rss[len(rss) // 2] * 1.1 + 20 * 2**20


def _is_quick(service: Service, before: Load) -> bool:
    began = time.monotonic()
    answer = httpx.post(
        service.url + FULL, json={"prompt": 1, "seed": 1}, timeout=60, trust_env=False
    )
    return answer.status_code == 200 and time.monotonic() - began < 2 * before.slowest()


def test_prometheus_gets_what_the_dashboard_shows(single: Service) -> None:
    # A gauge is there for ten seconds after it was set, and the rest needs a fault.
    wanted = dashboard_metrics() - {"ray_ddray_retries_total", "ray_ddray_refused_total"}

    async def scenario() -> None:
        async with clients(single, 4, n=1):
            await until(lambda: not wanted - _named(single.metrics()), "metric of every name", 40)

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
    stderr = job.process.communicate()[1]
    print(f"ended in {ended_s:.1f} s: {dict(load.statuses)}; {load.failures[:3]}")
    assert job.process.returncode == status, stderr
    assert "Traceback" not in stderr
    assert "SIGTERM received" not in stderr
    # Serve lets requests finish, for at most 20 s, and itself needs a little.
    assert ended_s < 60
    assert load.statuses["200"] >= due
    assert "cut" not in load.statuses
    deadline = time.monotonic() + 30
    while any(map(is_alive, tree)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [process for process in tree if is_alive(process)]


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
    assert set(load.statuses) == {"200"}, load.failures[:5]


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
