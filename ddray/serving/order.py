"""From a request to an order: what the served students make of it, and what they cannot."""

import difflib
import hashlib
import re
import secrets
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ddray.errors import ConfigError
from ddray.method.schedule import TEACHER_ALONE, TeacherStages, parse_schedule
from ddray.serving.api import MAX_CAPTION, ImageRequest, ModelCard, RequestError, clip, show
from ddray.serving.image_file import QUALITY, ImageFormat
from ddray.storage.caption_file import is_empty

EXAMPLE_CAPTIONS = (
    "a red bicycle by the sea",
    "two cats on a sofa",
    "a bowl of oranges",
    "a lighthouse in the fog",
)
"""For students whose config has no `example_captions`."""

# Seeds that the service draws stay below 2^53: every reader of JSON holds them exactly.
_DRAWN_SEEDS = 2**32
_NAMES_SHOWN = 20
# Control characters and ends of lines; and halves of surrogate pairs, which have no UTF-8.
_NO_TEXT = {"Cc", "Zl", "Zp", "Cs"}
_HASH_DIGITS = 12


@dataclass(frozen=True)
class Order:
    """A request that was checked against the students. All images of a seed share their noise.

    Attributes:
        model: name of the student.
        prompt: class id or caption of all its images.
        n: number of images; the noise of image k is that of sample index k under the seed.
        seed: given or drawn.
        steps: as asked for.
        schedule: what that means, such as "0,16".
        output_format: file format of the images.
        as_url: whether links are wanted.
        quality: of WebP and JPEG, 0 to 100.
    """

    model: str
    # What people write is nobody else's business: no log that shows an order shows it.
    prompt: int | str = field(repr=False)
    n: int
    seed: int
    steps: int | str
    schedule: str
    output_format: ImageFormat = "png"
    as_url: bool = False
    quality: int = QUALITY

    def logged(self, in_full: bool = False) -> dict[str, Any]:
        """What a log may hold of it.

        Args:
            in_full: whether that is a caption as it is, or its length and the beginning of its
                SHA-256, by which its requests can be found.
        """
        prompt: dict[str, Any] = {"prompt": self.prompt}
        if isinstance(self.prompt, str) and not in_full:
            digest = hashlib.sha256(self.prompt.encode()).hexdigest()[:_HASH_DIGITS]
            prompt = {"prompt_length": len(self.prompt), "prompt_sha256": digest}
        return {"model": self.model, **prompt, "n": self.n, "steps": self.steps, "seed": self.seed}


def check_request(
    request: ImageRequest, cards: Mapping[str, ModelCard], urls: bool = False
) -> Order:
    """Check a request against the served students and draw its seed if it has none.

    Args:
        request: as parsed.
        cards: of the students, by name; the first is the default.
        urls: whether images can be had as links.

    Returns:
        The order.

    Raises:
        RequestError: status 404 for another model, else 400, with what is allowed.
    """
    card = find_card(request.model, cards)
    if request.response_format == "url" and not urls:
        raise RequestError(
            400,
            'response_format="url" is not configured here: images cannot be fetched by link; '
            'use "b64_json", or POST /v1/images/raw for the bytes of one image',
            "url_not_configured",
            "response_format",
        )
    if request.size not in (None, "auto", card.size):
        message = f"size={show(request.size)} is not allowed: {card.id} makes {card.size} images"
        raise RequestError(400, message, "invalid_value", "size")
    schedule = find_schedule(request.steps, card)
    _check_guidance(request.guidance_scale, schedule)
    return Order(
        model=card.id,
        prompt=find_prompt(request.prompt, card),
        n=request.n,
        seed=secrets.randbelow(_DRAWN_SEEDS) if request.seed is None else request.seed,
        steps=request.steps,
        schedule=schedule,
        output_format=request.output_format,
        as_url=request.response_format == "url",
        quality=_find_quality(request),
    )


def find_card(model: str | None, cards: Mapping[str, ModelCard]) -> ModelCard:
    """The student of a name; None = the first.

    Raises:
        RequestError: with status 404, and those that are served.
    """
    card = next(iter(cards.values())) if model is None else cards.get(model)
    if card is None:
        served = " or ".join(map(repr, cards))
        message = f"model {show(model)} is not served here; served is {served}"
        raise RequestError(404, message, "model_not_found", "model")
    return card


def _check_guidance(scale: int | None, schedule: str) -> None:
    if scale is not None and "teacher" in schedule:
        message = (
            f"guidance_scale={scale} is not allowed where the teacher takes part, which has a "
            "guidance of its own; leave it out"
        )
        raise RequestError(400, message, "invalid_value", "guidance_scale")


def _find_quality(request: ImageRequest) -> int:
    asked = request.output_compression
    if request.output_format == "png" and asked not in (None, 100):
        message = (
            f"output_compression={asked} is not allowed: a png is exact, which is 100; "
            "use webp or jpeg, or leave it out"
        )
        raise RequestError(400, message, "invalid_value", "output_compression")
    return QUALITY if asked is None or request.output_format == "png" else asked


def find_schedule(steps: int | str, card: ModelCard) -> str:
    """Schedule that a number of steps, or a schedule of the client's own, means.

    Raises:
        RequestError: with status 400, for what the student has not learnt or nobody is there for.
    """
    allowed = ", ".join(map(repr, card.steps))
    if isinstance(steps, int):
        if steps not in card.steps:
            message = f"steps={show(steps)} is not allowed: {card.id} was trained for {allowed}"
            raise RequestError(400, message, "invalid_value", "steps")
        jumps = card.schedule if steps == len(card.schedule) else card.schedule[:1]
        return ",".join(map(str, jumps))
    if "teacher" in steps and not card.teacher:
        message = (
            f"steps={show(steps)} needs the teacher, which is not deployed here; use {allowed}"
        )
        raise RequestError(400, message, "teacher_not_deployed", "steps")
    if steps == TEACHER_ALONE:
        return TEACHER_ALONE
    try:
        schedule = parse_schedule(steps, card.stages)
    except (ConfigError, ValueError) as error:  # int() refuses thousands of digits
        message = f"steps={show(steps)} is not allowed: {clip(str(error), 300)}; use {allowed}"
        raise RequestError(400, message, "invalid_value", "steps") from error
    unknown = [
        step
        for step in schedule
        if not isinstance(step, TeacherStages) and step not in card.schedule
    ]
    if unknown:
        known = ", ".join(map(str, card.schedule))
        message = (
            f"steps={show(steps)} is not allowed: {card.id} was not trained to jump at "
            f"{unknown[0]}, only at {known}"
        )
        raise RequestError(400, message, "invalid_value", "steps")
    # One spelling: requests share a batch, and a series of a metric, by it.
    return ",".join(
        f"teacher:{step.first}-{step.last}" if isinstance(step, TeacherStages) else str(step)
        for step in schedule
    )


def find_prompt(prompt: int | str, card: ModelCard) -> int | str:
    """Class id, or caption, that a prompt means to a student.

    Raises:
        RequestError: with status 400, and the valid classes or what a caption must be.
    """
    if card.conditioning == "class":
        return find_class(prompt, card.num_classes, card.class_names)
    text = prompt.strip() if isinstance(prompt, str) else ""
    reason = _unfit(text)
    if reason:
        message = f"prompt={show(prompt)} is not allowed: {card.id} takes {reason}"
        raise RequestError(400, message, "invalid_value", "prompt")
    return text


def _unfit(caption: str) -> str | None:
    """What a student takes instead of a text; None where it is a caption."""
    if not 0 < len(caption) <= MAX_CAPTION or _NO_TEXT & set(map(unicodedata.category, caption)):
        return f"a caption of 1 to {MAX_CAPTION} characters on one line"
    # An encoder would refuse it, and the whole batch with it.
    if is_empty(caption):
        return "a caption that says something beside markup, addresses and invisible characters"
    return None


def find_examples(config: Mapping[str, Any], student: str) -> tuple[str, ...]:
    """Captions for those who have none at hand, as a student's config names them.

    Args:
        config: of a student of captions; without `example_captions` they are `EXAMPLE_CAPTIONS`.
        student: its name, for messages.

    Raises:
        ConfigError: if they are no list of captions that the service would take.
    """
    captions = config.get("example_captions") or EXAMPLE_CAPTIONS
    if isinstance(captions, str) or not isinstance(captions, Sequence):
        raise ConfigError(f"{student}: example_captions={show(captions)} is no list of captions")
    for caption in captions:
        reason = _unfit(caption) if isinstance(caption, str) else "captions"
        if reason:
            raise ConfigError(f"{student}: example_captions has {show(caption)}; it takes {reason}")
    return tuple(captions)


def find_class(prompt: int | str, num_classes: int, class_names: Sequence[str]) -> int:
    """Class id that a prompt means.

    Args:
        prompt: an id, or a name in any case; digits that are no name count as an id.
        num_classes: ids are 0 to num_classes - 1.
        class_names: a name for each class, or none.

    Returns:
        The class id.

    Raises:
        RequestError: with status 400 and the valid classes.
    """
    if isinstance(prompt, str):
        wanted = prompt.strip().casefold()
        for class_id, name in enumerate(class_names):
            if name.casefold() == wanted:
                return class_id
        # At most 18 digits: enough for any class, and int() refuses thousands of them.
        if re.fullmatch(r"[0-9]{1,18}", wanted):
            prompt = int(wanted)
    if isinstance(prompt, int) and 0 <= prompt < num_classes:
        return prompt
    valid = f"class ids 0 to {num_classes - 1}"
    if class_names:
        near = difflib.get_close_matches(str(prompt)[:100], class_names, 1)
        more = ", ... (GET /v1/models lists all)" if len(class_names) > _NAMES_SHOWN else ""
        valid += f", or names {', '.join(class_names[:_NAMES_SHOWN])}{more}"
        valid = f"did you mean {near[0]!r}? Valid are {valid}" if near else f"valid are {valid}"
    else:
        valid = f"valid are {valid}"
    raise RequestError(400, f"unknown class {show(prompt)}; {valid}", "unknown_class", "prompt")
