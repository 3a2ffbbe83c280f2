"""Three students, and what the service makes of a body that asks for them."""

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest

from ddray.serving.api import ModelCard, RequestError, parse_request
from ddray.serving.order import Order, check_request

CARD = ModelCard(
    id="digits",
    created=0,
    conditioning="class",
    num_classes=3,
    class_names=("zero", "One", "2"),
    schedule=(0, 16),
    stages=49,
    teacher="",
    size="28x28",
)
TAUGHT = replace(CARD, id="taught", teacher="digits-llamagen")
TEXTS = replace(
    CARD,
    id="texts",
    conditioning="text",
    class_names=(),
    size="256x256",
    example_captions=("a red cat", "a roof", "the sea"),
)
CARDS = {card.id: card for card in (CARD, TAUGHT, TEXTS)}


def order(body: object, cards: Mapping[str, ModelCard] = CARDS, urls: bool = False) -> Order:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return check_request(parse_request(raw), cards, urls)


def refusal(body: object, cards: Mapping[str, ModelCard] = CARDS) -> RequestError:
    with pytest.raises(RequestError) as caught:
        order(body, cards)
    return caught.value
