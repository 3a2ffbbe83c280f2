"""The schema of the service: it holds for a body exactly where the service takes the body."""

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from ddray.errors import ConfigError
from ddray.method.schedule import parse_schedule
from ddray.serving.api import MAX_SEED, ModelCard, RequestError
from ddray.serving.schema import GENERATIONS, RAW, decimals, openapi
from tests.core.serving.cards import CARD, CARDS, TAUGHT, TEXTS, order

# A few students in every order, each of which may be the default.
SERVICES = [{card.id: card for card in cards} for cards in ([CARD], [TAUGHT], [TEXTS])]
SERVICES += [CARDS, {card.id: card for card in (TAUGHT, TEXTS, CARD)}]


def _schema(cards: dict[str, ModelCard], path: str = GENERATIONS, **more: bool) -> Any:
    post = openapi(cards, "1", **more)["paths"][path]["post"]
    return post["requestBody"]["content"]["application/json"]["schema"]


def _takes(body: Any, cards: dict[str, ModelCard], urls: bool = False) -> bool:
    try:
        order(body, cards, urls)
    except RequestError:
        return False
    return True


WRONG: list[Any] = [0.5, -1, "", "x", True, [], {}]
VALUES: dict[str, list[Any]] = {
    "prompt": [0, 2, 2.0, 3, "0", "2", "3", "one", "ONE", "two", "a cat", " ", "x" * 2001, None],
    "model": [*CARDS, "dall-e-3", None],
    "n": [1, 16, 16.0, 17, 0, "1", "16", "17", "0", "01", None],
    "size": ["28x28", "256x256", "auto", "512x512", None],
    "seed": [0, MAX_SEED, MAX_SEED + 1, str(MAX_SEED), str(MAX_SEED + 1), "0", None],
    "steps": [1, 2, 3, 2.0, "1", "2", "3", "0", "0,16", "0,8", "16", "0,16,16", "teacher", None]
    + ["teacher:0-49", "0,teacher:8-16,16", "0,teacher:8-49", "0,teacher:8-16", "0,teacher:9-8,16"]
    + ["teacher:0-16,16", "teacher:1-16,16", "teacher:0-16,16,teacher:20-49", "0,teacher:49-49"],
    "response_format": ["b64_json", "url", None],
    "output_format": ["png", "webp", "jpeg", "gif", None],
    "output_compression": [0, 50, 100, 101, "0", "50", "100", "101", None],
    "guidance_scale": [0, 1, 1.0, 2, 7.5, "0", "1", "2", None],
    "user": ["me", None],
    "safety_identifier": ["me", None],
    "quality": ["auto", "standard", "hd", None],
    "style": ["vivid", None],
    "background": ["auto", "opaque", "transparent", None],
    "moderation": ["auto", "low", "high", None],
    "stream": [False, True, 0, None],
    "partial_images": [0, 1, "0", "1", None],
    "sed": [1, None],
}
VALUES["num_inference_steps"] = [1, 2, 3, 2.0, "1", "2", "3", "0", "0,16", "teacher", None]
# Nearly all that is drawn at random is wrong twice, and so a few fields at a time.
TOGETHER = [
    ["n", "size", "model"],
    ["steps", "num_inference_steps", "guidance_scale"],
    ["output_format", "output_compression", "model"],
    ["response_format", "seed", "user"],
    ["quality", "style", "background"],
    ["moderation", "stream", "partial_images"],
]


def _bodies(count: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(0)
    for k in range(count):
        names = draw.sample(TOGETHER[k % len(TOGETHER)], draw.randint(1, 3))
        body = {name: draw.choice(VALUES[name]) for name in names}
        yield {"prompt": draw.choice(VALUES["prompt"] if k % 9 == 0 else [1, "a cat"]), **body}


@pytest.mark.parametrize("cards", SERVICES, ids=lambda cards: " ".join(cards))
def test_a_body_is_valid_where_it_is_taken(cards: dict[str, ModelCard]) -> None:
    verdicts: Counter[bool] = Counter()
    for urls in (False, True):
        validator = jsonschema.Draft202012Validator(_schema(cards, urls=urls))
        for body in _bodies(60):
            assert validator.is_valid(body) == _takes(body, cards, urls), body
            verdicts[_takes(body, cards, urls)] += 1
    assert min(verdicts[True], verdicts[False]) > 10


@pytest.mark.parametrize("name", VALUES)
def test_each_value_of_a_field_is_valid_where_it_is_taken(name: str) -> None:
    for cards in SERVICES[1:4]:
        prompt = "a cat" if next(iter(cards.values())) is TEXTS else 1
        validator = jsonschema.Draft202012Validator(_schema(cards))
        for value in [*VALUES[name], *WRONG]:
            body = {"prompt": prompt, name: value}
            assert validator.is_valid(body) == _takes(body, cards), body


@pytest.mark.parametrize("schedule", [(0,), (0, 2), (0, 1, 3)])
def test_a_schedule_is_valid_where_it_is_taken(schedule: tuple[int, ...]) -> None:
    card = replace(TAUGHT, schedule=schedule, stages=4)
    steps = _schema({card.id: card})["properties"]["steps"]
    jumps = [str(stage) for stage in range(5)]
    taught = [f"teacher:{a}-{b}" for a, b in itertools.product(range(5), repeat=2)]
    # Two turns of the teacher's one after another are one, which the schema has.
    lists = [*itertools.product([*jumps, *taught]), *itertools.product(jumps, [*jumps, *taught])]
    lists += [*itertools.product(taught, jumps), *itertools.product(jumps[:2], taught, jumps)]
    pattern = re.compile(steps["anyOf"][1]["pattern"])
    verdicts: Counter[bool] = Counter()
    for parts in lists:
        text = ",".join(parts)
        taken = _takes({"prompt": 1, "steps": text}, {card.id: card})
        assert bool(pattern.search(text)) == taken, text
        verdicts[taken] += 1
    assert len(verdicts) == 2


@pytest.mark.parametrize("most", [0, 1, 9, 10, 16, 100, 209, 999, MAX_SEED])
def test_the_pattern_of_a_number_ends_at_it(most: int) -> None:
    for least in (0, 1):
        pattern = re.compile(f"(?:{decimals(least, most)})")
        near = {most + step for step in (-11, -10, -1, 0, 1, 10, 90, 10 * most)}
        for number in near | set(range(220)) | {10**k for k in range(20)}:
            if number >= 0:
                fits = pattern.fullmatch(str(number)) is not None
                assert fits == (least <= number <= most), number
    assert not pattern.fullmatch("007")


NAMED = replace(CARD, num_classes=5, class_names=("a", "b", "c", "Dog (brown)", "e"))
NAMELESS = replace(CARD, num_classes=2, class_names=(), schedule=(0,))


@pytest.mark.parametrize("card", [CARD, TEXTS, NAMED, NAMELESS])
def test_the_examples_are_taken(card: ModelCard) -> None:
    served = {card.id: card}
    for path, most in ((GENERATIONS, 16), (RAW, 1)):
        validator = jsonschema.Draft202012Validator(_schema(served, path))
        assert len(validator.schema["examples"]) == 2
        for example in validator.schema["examples"]:
            assert validator.is_valid(example)
            assert order(example, served).n <= most
        assert not validator.is_valid({**validator.schema["examples"][0], "n": most + 1})


def test_a_name_is_valid_in_any_case() -> None:
    schema = _schema({"digits": NAMED})
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({"prompt": "dog (BROWN)"})
    assert not validator.is_valid({"prompt": "dog brown"})


def test_keys_are_declared_where_they_are_asked_for() -> None:
    closed, opened = openapi(CARDS, "1", keys=True), openapi(CARDS, "1")
    assert closed["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    assert "securitySchemes" not in opened["components"]
    for path, item in closed["paths"].items():
        for method, operation in item.items():
            assert ("security" in operation) == path.startswith("/v1")
            assert "security" not in opened["paths"][path][method]
            assert ("401" in operation["responses"]) == path.startswith("/v1")


def test_no_number_of_the_document_is_a_float() -> None:
    def refuse(text: str) -> None:
        raise AssertionError(text)

    text = json.dumps(openapi(CARDS, "1", urls=True))
    json.loads(text, parse_float=refuse)
    assert str(MAX_SEED) in text


def test_a_thousand_names_and_a_long_schedule_make_no_monster() -> None:
    names = tuple(f"thing {k}" for k in range(1000))
    card = replace(TAUGHT, num_classes=1000, class_names=names, schedule=tuple(range(0, 40, 2)))
    assert len(json.dumps(openapi({card.id: card}, "1"))) < 40_000
    validator = jsonschema.Draft202012Validator(_schema({card.id: card}))
    for body in ({"prompt": "thing 999"}, {"prompt": 1, "steps": "0,2,teacher:3-4,4"}):
        assert validator.is_valid(body)
        assert _takes(body, {card.id: card})
    with pytest.raises(ConfigError):
        parse_schedule("4", card.stages)
