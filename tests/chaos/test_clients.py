"""OpenAI's clients, and what front ends on top of them send, with the real `ddray serve`."""

import asyncio
import base64
import functools
import inspect
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from playwright.sync_api import sync_playwright

from tests.chaos.service import FULL, Service
from tests.loopback import free_port
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.chaos

CHROMIUM, NODE, NPM = shutil.which("chromium"), shutil.which("node"), shutil.which("npm")
OPENAI_NODE = "openai@6.49.0"
MODEL = "digits-llamagen-dd"
LARGE_SEED = "9223372036854775807"
# What each parameter is in a request that leaves it alone, written out.
NEUTRAL: dict[str, Any] = {
    "background": "auto",
    "model": MODEL,
    "moderation": "auto",
    "n": 1,
    "output_compression": 100,
    "output_format": "png",
    "partial_images": 0,
    "quality": "auto",
    "response_format": "b64_json",
    "size": "auto",
    "stream": False,
    "style": None,
    "user": "somebody",
}


@pytest.fixture(scope="module")
def site_port() -> int:
    """Port of pages of another origin, which the service gives leave to."""
    return free_port()


@pytest.fixture(scope="module")
def service(serve: Callable[..., Service], site_port: int) -> Service:
    return serve("--cors-origins", f"http://127.0.0.1:{site_port}")


@pytest.fixture(scope="module")
def expected(service: Service) -> str:
    """The image of the plain request, as base64."""
    answer = httpx.post(
        f"{service.url}{FULL}",
        json={"prompt": 7, "seed": 5},
        trust_env=False,
        timeout=PATIENCE_S,
    )
    return str(answer.json()["data"][0]["b64_json"])


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with httpx.Client(trust_env=False, timeout=PATIENCE_S) as http:
        yield openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", http_client=http)


def _image(answer: Any) -> str:
    (image,) = answer.data
    return str(image.b64_json)


@pytest.mark.smoke
def test_openai_python_with_every_parameter_at_its_neutral_value(
    client: openai.OpenAI, expected: str
) -> None:
    of_http = {"prompt", "extra_headers", "extra_query", "extra_body", "timeout"}
    known = set(inspect.signature(client.images.generate).parameters) - of_http
    assert len(known) >= 13
    generate = functools.partial(client.images.generate, prompt="7", extra_body={"seed": 5})
    assert _image(generate(**{name: NEUTRAL[name] for name in known & set(NEUTRAL)})) == expected
    assert _image(generate(**dict.fromkeys(known))) == expected
    for name in known:
        # What a later version adds is left alone as null.
        assert _image(generate(**{name: NEUTRAL.get(name)})) == expected, name


def test_openai_python_learns_of_models_and_of_mistakes(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert model == client.models.retrieve(MODEL)
    assert (model.id, model.object) == (MODEL, "model")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.models.retrieve("dall-e-3/x y%")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert "'dall-e-3/x y%' is not served here; served is" in str(unknown.value)
    for name, value, told in (
        ("size", "512x512", "makes 28x28 images"),
        ("style", "vivid", "it must be null"),
        ("quality", "hd", 'it must be "auto" or "standard"'),
        ("background", "transparent", 'it must be "auto" or "opaque"'),
        ("stream", True, "it must be false"),
    ):
        asked: Any = {"prompt": "7", name: value}
        with pytest.raises(openai.BadRequestError, match=told) as refused:
            client.images.generate(**asked)
        assert refused.value.param == name


def test_openai_python_at_once_and_given_up(service: Service) -> None:
    async def scenario() -> list[Any]:
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as http:
            many = openai.AsyncOpenAI(
                base_url=f"{service.url}/v1", api_key="none", http_client=http
            )
            tasks = [
                asyncio.create_task(
                    many.images.generate(prompt="7", n=8, extra_body={"seed": 5, "steps": 2})
                )
                for _ in range(4)
            ]
            await asyncio.sleep(0.02)
            for task in tasks[::2]:
                task.cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(scenario())
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers[::2])
    first, second = ([image.b64_json for image in answer.data] for answer in answers[1::2])
    assert first == second
    assert len(set(first)) == 8


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which OpenAI's client for JavaScript is installed."""
    if not (NODE and NPM):
        pytest.skip("needs node and npm")
    folder = tmp_path_factory.mktemp("npm")
    command = [NPM, "install", "--no-audit", "--no-fund", "--ignore-scripts", OPENAI_NODE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"npm cannot install {OPENAI_NODE}: {done.stderr[-300:]}")
    return folder


# In Node and in a browser alike.
SCRIPT = """
export async function scenario(OpenAI, url, options) {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0, ...options });
  const order = { prompt: "7", seed: 5 }, told = {};
  const one = (answer) => answer.data[0].b64_json;
  const image = (more) => client.images.generate({ ...order, ...more }).then(one);
  told.plain = await image({});
  told.neutral = await image(NEUTRAL);
  const large = await client.images.generate({ prompt: "7", seed: "SEED" });
  told.seed = large.seed_str;
  const again = await client.images.generate({ prompt: "7", seed: large.seed_str });
  told.again = one(again) === one(large);
  const { response } = await client.images.generate(order).withResponse();
  told.header = response.headers.get("x-ddray-seed");
  told.models = [];
  for await (const model of client.models.list()) told.models.push(model.id);
  told.model = (await client.models.retrieve("MODEL")).id;
  const refusal = (error) => [error.constructor.name, error.status, error.code, error.param];
  told.unknown = await client.models.retrieve("a/b%2").catch(refusal);
  told.size = await client.images.generate({ ...order, size: "512x512" }).catch(refusal);
  const stop = new AbortController();
  const left = client.images.generate({ ...order, n: 16, steps: 2 }, { signal: stop.signal });
  stop.abort();
  told.left = await left.catch((error) => error.constructor.name);
  return told;
}
"""


def _script() -> str:
    filled = SCRIPT.replace("NEUTRAL", json.dumps(NEUTRAL)).replace("MODEL", MODEL)
    return filled.replace("SEED", LARGE_SEED)


def _check(told: dict[str, Any], expected: str) -> None:
    assert told == {
        "plain": expected,
        "neutral": expected,
        "seed": LARGE_SEED,
        "again": True,
        "header": "5",
        "models": [MODEL],
        "model": MODEL,
        "unknown": ["NotFoundError", 404, "model_not_found", "model"],
        "size": ["BadRequestError", 400, "invalid_value", "size"],
        "left": "APIUserAbortError",
    }


def test_openai_node(service: Service, packages: Path, expected: str) -> None:
    (packages / "scenario.mjs").write_text(_script())
    (packages / "main.mjs").write_text(
        'import OpenAI from "openai";\nimport { scenario } from "./scenario.mjs";\n'
        "console.log(JSON.stringify(await scenario(OpenAI, process.argv[2], {})));\n"
    )
    command = [str(NODE), "main.mjs", service.url]
    done = subprocess.run(command, cwd=packages, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _check(json.loads(done.stdout), expected)


@pytest.fixture
def site(packages: Path, site_port: int) -> Iterator[str]:
    """Pages of another origin, with the client beside them."""
    (packages / "scenario.mjs").write_text(_script())
    (packages / "index.html").write_text("<!doctype html><title>another origin</title>")

    class Handler(SimpleHTTPRequestHandler):
        extensions_map = {".mjs": "text/javascript", ".html": "text/html"}  # noqa: RUF012

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=str(packages))
    with ThreadingHTTPServer(("127.0.0.1", site_port), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{site_port}"
        server.shutdown()


@pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium (make browser)")
def test_openai_node_in_a_page_of_another_origin(
    service: Service, site: str, expected: str
) -> None:
    """No route of the test's own: it would answer the preflights in place of the service."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{site}/index.html")
        told = page.evaluate(
            """async (url) => {
              const { default: OpenAI } = await import("/node_modules/openai/index.mjs");
              const { scenario } = await import("/scenario.mjs");
              return scenario(OpenAI, url, { dangerouslyAllowBrowser: true });
            }""",
            service.url,
        )
        browser.close()
    _check(told, expected)


def test_the_bodies_of_front_ends(service: Service, expected: str) -> None:
    """As Open WebUI and others write them, with this student's name and size."""
    open_webui = {"model": MODEL, "prompt": "7", "n": 1, "response_format": "b64_json"}
    bodies: list[tuple[dict[str, Any], int]] = [
        (open_webui, 200),
        ({**open_webui, "size": "28x28"}, 200),
        ({**open_webui, "size": "512x512"}, 400),
        ({"prompt": "7", "size": "auto", "background": "auto", "moderation": "low"}, 200),
        ({"prompt": "7", "num_inference_steps": 1, "guidance_scale": 0.0, "n": 1.0}, 200),
        ({"prompt": "7", "quality": "standard", "style": None, "stream": False}, 200),
        ({"prompt": "7", "style": "vivid"}, 400),
        ({"prompt": "7", "steps": 1, "num_inference_steps": 2}, 400),
    ]
    for body, status in bodies:
        asked = {**body, "seed": "5"}
        answer = httpx.post(f"{service.url}{FULL}", json=asked, trust_env=False, timeout=PATIENCE_S)
        assert answer.status_code == status, (body, answer.text)
        if status == 200:
            assert answer.json()["data"][0]["b64_json"] == expected
        elif "size" in body:
            assert "digits-llamagen-dd makes 28x28 images" in answer.json()["error"]["message"]


def test_the_image_of_the_large_seed_is_told_exactly(service: Service) -> None:
    answer = httpx.post(
        f"{service.url}{FULL}",
        json={"prompt": 7, "seed": int(LARGE_SEED)},
        trust_env=False,
        timeout=PATIENCE_S,
    )
    assert answer.json()["seed"] == int(LARGE_SEED)
    assert answer.json()["seed_str"] == answer.headers["x-ddray-seed"] == LARGE_SEED
    assert base64.b64decode(answer.json()["data"][0]["b64_json"]).startswith(b"\x89PNG")
