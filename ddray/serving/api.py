"""What the image service accepts and answers: requests, their checks, errors, image files.

Knows neither Ray nor torch, so that every refusal can be tested without a server.
"""

import difflib
import io
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from ddray.config.serving import MAX_IMAGES
from ddray.errors import ConfigError
from ddray.method.schedule import TEACHER_ALONE, TeacherStages, parse_schedule
from ddray.storage.caption_file import clean_caption

MAX_BODY_BYTES = 64_000
MAX_SEED = 2**63 - 1
MAX_CAPTION = 2000
"""Characters of a caption; an encoder reads fewer."""

ImageFormat = Literal["png", "webp", "jpeg"]
MEDIA_TYPES: dict[ImageFormat, str] = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
}

# Seeds that the service draws stay below 2^53: every reader of JSON holds them exactly.
_DRAWN_SEEDS = 2**32
_NAMES_SHOWN = 20


class RequestError(Exception):
    """A request that gets an error answer.

    Args:
        status: HTTP status.
        message: the whole story: what was wrong, the value, what is allowed.
        code: a word for programs, such as "unknown_class".
        param: the field at fault, if one is.
        retry_after_s: when it is worth trying again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        retry_after_s: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that belong to the answer."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}

    def body(self) -> bytes:
        """The answer as OpenAI's clients expect it: {"error": {message, type, code, param}}."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "code": self.code, "param": self.param}
        return to_json({"error": error})


def to_json(value: object) -> bytes:
    """JSON in pure ASCII, so that a client can be quoted whatever it sent, even lone surrogates."""
    return json.dumps(value).encode("ascii")


class ImageRequest(BaseModel):
    """Body of an image request; null means absent.

    Attributes:
        model: one of the served students; absent = the first.
        prompt: class id or class name, or a caption where the student takes captions.
        n: number of images.
        size: must be the student's, such as "28x28".
        seed: decides, with an image's place in the answer, its noise; absent = drawn, and returned.
        steps: jumps of the student: one, or its full schedule. Where the teacher is deployed, also
            a schedule in which it takes part, such as "0,teacher:8-16,16", or "teacher" alone.
        response_format: how images come: as base64, or as links where storage is configured.
        output_format: file format of an image.
        user: accepted for OpenAI's clients, without effect.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={
            "examples": [
                {"prompt": 3},
                {"prompt": "three", "n": 4, "seed": 7, "steps": 2, "output_format": "webp"},
            ]
        },
    )

    model: StrictStr | None = None
    prompt: StrictInt | StrictStr
    n: Annotated[StrictInt, Field(ge=1, le=MAX_IMAGES)] = 1
    size: StrictStr | None = None
    seed: Annotated[StrictInt, Field(ge=0, le=MAX_SEED)] | None = None
    steps: Annotated[StrictInt, Field(ge=1)] | Annotated[StrictStr, Field(max_length=200)] = 1
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: ImageFormat = "png"
    user: StrictStr | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: Any) -> Any:
        if isinstance(body, Mapping):
            return {key: value for key, value in body.items() if value is not None}
        return body


_ALLOWED = {
    "model": "a string; GET /v1/models lists the names",
    "prompt": "a class id (an integer), or a class name or caption (a string)",
    "n": f"an integer from 1 to {MAX_IMAGES}",
    "size": 'a string such as "28x28"',
    "seed": f"an integer from 0 to {MAX_SEED}",
    "steps": "a positive integer or a schedule; GET /v1/models lists what each model can do",
    "response_format": '"b64_json" or "url"',
    "output_format": '"png", "webp" or "jpeg"',
    "user": "a string",
}


@dataclass(frozen=True)
class ModelCard:
    """What a served student can make.

    Attributes:
        id: name in requests.
        created: when the service was started, Unix time.
        conditioning: "class" or "text".
        num_classes: class ids are 0 to num_classes - 1.
        class_names: a name for each class, or empty.
        schedule: stages at which it jumps, as trained.
        stages: number of its teacher's steps.
        teacher: name of the teacher beside it; "" = none is deployed.
        size: "WIDTHxHEIGHT" of its images.
    """

    id: str
    created: int
    conditioning: Literal["class", "text"]
    num_classes: int
    class_names: tuple[str, ...]
    schedule: tuple[int, ...]
    stages: int
    teacher: str
    size: str

    @property
    def steps(self) -> tuple[int | str, ...]:
        """What may be asked for as `steps`, beside schedules of one's own with the teacher."""
        jumps = sorted({1, len(self.schedule)})
        return (*jumps, TEACHER_ALONE) if self.teacher else tuple(jumps)

    def entry(self) -> dict[str, Any]:
        """The model in GET /v1/models: OpenAI's fields, then ours."""
        head = {"id": self.id, "object": "model", "created": self.created, "owned_by": "ddray"}
        return {**head, **asdict(self), "steps": self.steps, "max_n": MAX_IMAGES}


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
    """

    model: str
    prompt: int | str
    n: int
    seed: int
    steps: int | str
    schedule: str
    output_format: ImageFormat = "png"
    as_url: bool = False


def parse_request(body: bytes) -> ImageRequest:
    """Read and check the body of a request.

    Args:
        body: JSON.

    Returns:
        The request; what depends on the student is not checked yet.

    Raises:
        RequestError: with status 400, for the first thing that is wrong.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            400, f"the body is not valid JSON: {_clip(str(error))}", "invalid_json"
        ) from error
    try:
        return ImageRequest.model_validate(value)
    except ValidationError as error:
        raise _rewritten(error) from error


def _rewritten(error: ValidationError) -> RequestError:
    """The first complaint of pydantic in the words and shape of this service."""
    first = error.errors(include_url=False, include_context=False)[0]
    if not first["loc"]:
        example = '{"prompt": 3}'
        return RequestError(
            400, f"the body must be a JSON object such as {example}", "invalid_value"
        )
    param = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(param, _ALLOWED, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        known = ", ".join(_ALLOWED)
        message = f"unknown parameter {_show(param)}; {hint}known are {known}"
        return RequestError(400, message, "unknown_parameter", _clip(param))
    if first["type"] == "missing":
        message = f"{param} is missing: it must be {_ALLOWED[param]}"
        return RequestError(400, message, "missing_required_parameter", param)
    message = f"{param}={_show(first['input'])} is not allowed: it must be {_ALLOWED[param]}"
    return RequestError(400, message, "invalid_value", param)


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
    card = next(iter(cards.values())) if request.model is None else cards.get(request.model)
    if card is None:
        raise RequestError(
            404,
            f"model {_show(request.model)} is not served here; served is "
            f"{' or '.join(map(repr, cards))}",
            "model_not_found",
            "model",
        )
    if request.response_format == "url" and not urls:
        raise RequestError(
            400,
            'response_format="url" is not configured here: images cannot be fetched by link; '
            'use "b64_json", or POST /v1/images/raw for the bytes of one image',
            "url_not_configured",
            "response_format",
        )
    if request.size not in (None, card.size):
        message = f"size={_show(request.size)} is not allowed: {card.id} makes {card.size} images"
        raise RequestError(400, message, "invalid_value", "size")
    return Order(
        model=card.id,
        prompt=find_prompt(request.prompt, card),
        n=request.n,
        seed=secrets.randbelow(_DRAWN_SEEDS) if request.seed is None else request.seed,
        steps=request.steps,
        schedule=find_schedule(request.steps, card),
        output_format=request.output_format,
        as_url=request.response_format == "url",
    )


def find_schedule(steps: int | str, card: ModelCard) -> str:
    """Schedule that a number of steps, or a schedule of the client's own, means.

    Raises:
        RequestError: with status 400, for what the student has not learnt or nobody is there for.
    """
    allowed = ", ".join(map(repr, card.steps))
    if isinstance(steps, int):
        if steps not in card.steps:
            message = f"steps={_show(steps)} is not allowed: {card.id} was trained for {allowed}"
            raise RequestError(400, message, "invalid_value", "steps")
        jumps = card.schedule if steps == len(card.schedule) else card.schedule[:1]
        return ",".join(map(str, jumps))
    if "teacher" in steps and not card.teacher:
        message = (
            f"steps={_show(steps)} needs the teacher, which is not deployed here; use {allowed}"
        )
        raise RequestError(400, message, "teacher_not_deployed", "steps")
    if steps == TEACHER_ALONE:
        return TEACHER_ALONE
    try:
        schedule = parse_schedule(steps, card.stages)
    except (ConfigError, ValueError) as error:  # int() refuses thousands of digits
        message = f"steps={_show(steps)} is not allowed: {_clip(str(error))}; use {allowed}"
        raise RequestError(400, message, "invalid_value", "steps") from error
    unknown = [
        step
        for step in schedule
        if not isinstance(step, TeacherStages) and step not in card.schedule
    ]
    if unknown:
        known = ", ".join(map(str, card.schedule))
        message = (
            f"steps={_show(steps)} is not allowed: {card.id} was not trained to jump at "
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
    # Lone surrogates have no UTF-8, and an encoder takes none.
    text = prompt.strip() if isinstance(prompt, str) else ""
    if not 0 < len(text) <= MAX_CAPTION or not text.isprintable():
        message = (
            f"prompt={_show(prompt)} is not allowed: {card.id} takes a caption of 1 to "
            f"{MAX_CAPTION} characters on one line"
        )
        raise RequestError(400, message, "invalid_value", "prompt")
    if not clean_caption(text):  # an encoder refuses it, and the whole batch with it
        message = f"prompt={_show(prompt)} is not allowed: behind markup and addresses it is empty"
        raise RequestError(400, message, "invalid_value", "prompt")
    return text


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
    raise RequestError(400, f"unknown class {_show(prompt)}; {valid}", "unknown_class", "prompt")


def image_bytes(pixels: npt.NDArray[np.uint8], output_format: ImageFormat = "png") -> bytes:
    """An image file, the same bytes for the same pixels.

    Args:
        pixels: uint8 [H, W] or [H, W, 3].
        output_format: PNG is exact, WebP and JPEG are of quality 90.
    """
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if output_format == "png":
        # Level 1 instead of 6: files hardly grow, and the time until the image is there counts.
        image.save(buffer, "PNG", compress_level=1)
    else:
        image.save(buffer, output_format.upper(), quality=90)
    return buffer.getvalue()


def _clip(text: str) -> str:
    return text if len(text) <= 80 else text[:80] + "..."


def _show(value: object) -> str:
    """A client's value for a message: escaped, on one line, short."""
    try:
        return _clip(repr(value))
    except ValueError:  # Python prints no integer beyond 4300 digits
        return "a number of thousands of digits"
