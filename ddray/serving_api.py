"""What the image service accepts and answers: requests, their checks, errors, PNG bytes.

Knows neither Ray nor torch, so that every refusal can be tested without a server.
Imports ddray.report.
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

from ddray.report import to_uint8

MAX_IMAGES = 16
MAX_BODY_BYTES = 64_000
MAX_SEED = 2**63 - 1

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
        model: the served student; absent = that one.
        prompt: class id, or class name.
        n: number of images.
        size: must be the student's, such as "28x28".
        seed: decides, with an image's place in the answer, its noise; absent = drawn, and returned.
        steps: jumps of the student: one, or its full schedule.
        response_format: how images come; links are not configured.
        output_format: file format of an image.
        user: accepted for OpenAI's clients, without effect.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: StrictStr | None = None
    prompt: StrictInt | StrictStr
    n: Annotated[StrictInt, Field(ge=1, le=MAX_IMAGES)] = 1
    size: StrictStr | None = None
    seed: Annotated[StrictInt, Field(ge=0, le=MAX_SEED)] | None = None
    steps: Annotated[StrictInt, Field(ge=1)] = 1
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png"] = "png"
    user: StrictStr | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: Any) -> Any:
        if isinstance(body, Mapping):
            return {key: value for key, value in body.items() if value is not None}
        return body


_ALLOWED = {
    "model": "a string; GET /v1/models lists the names",
    "prompt": "a class id (an integer) or a class name (a string)",
    "n": f"an integer from 1 to {MAX_IMAGES}",
    "size": 'a string such as "28x28"',
    "seed": f"an integer from 0 to {MAX_SEED}",
    "steps": "a positive integer; GET /v1/models lists the numbers the student was trained for",
    "response_format": '"b64_json"',
    "output_format": '"png"',
    "user": "a string",
}


@dataclass(frozen=True)
class ModelCard:
    """What a served student can make.

    Attributes:
        id: name in requests.
        created: when it was loaded, Unix time.
        num_classes: class ids are 0 to num_classes - 1.
        class_names: a name for each class, or empty.
        schedule: stages at which it jumps, as trained.
        size: "WIDTHxHEIGHT" of its images.
    """

    id: str
    created: int
    num_classes: int
    class_names: tuple[str, ...]
    schedule: tuple[int, ...]
    size: str

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of steps that may be asked for."""
        return tuple(sorted({1, len(self.schedule)}))

    def schedule_of(self, steps: int) -> tuple[int, ...]:
        """Stages at which the student jumps when it makes that many steps."""
        return self.schedule if steps == len(self.schedule) else self.schedule[:1]

    def entry(self) -> dict[str, Any]:
        """The model in GET /v1/models: OpenAI's fields, then ours."""
        head = {"id": self.id, "object": "model", "created": self.created, "owned_by": "ddray"}
        return {**head, **asdict(self), "steps": self.steps, "max_n": MAX_IMAGES}


@dataclass(frozen=True, slots=True)
class ImageJob:
    """One image: all that decides its bytes."""

    class_id: int
    index: int
    seed: int
    schedule: tuple[int, ...]


@dataclass(frozen=True)
class Order:
    """A request that was checked against the student.

    Attributes:
        class_id: class of all its images.
        n: number of images.
        seed: given or drawn.
        steps: number of jumps.
        schedule: where it jumps.
    """

    class_id: int
    n: int
    seed: int
    steps: int
    schedule: tuple[int, ...]

    def jobs(self) -> list[ImageJob]:
        """Its images; the noise of image k is that of sample index k under the seed."""
        return [ImageJob(self.class_id, k, self.seed, self.schedule) for k in range(self.n)]


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


def check_request(request: ImageRequest, card: ModelCard) -> Order:
    """Check a request against the student and draw its seed if it has none.

    Args:
        request: as parsed.
        card: of the served student.

    Returns:
        The order.

    Raises:
        RequestError: status 404 for another model, else 400, with what is allowed.
    """
    if request.model not in (None, card.id):
        raise RequestError(
            404,
            f"model {_show(request.model)} is not served here; served is {card.id!r}",
            "model_not_found",
            "model",
        )
    if request.response_format == "url":
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
    if request.steps not in card.steps:
        allowed = " or ".join(map(str, card.steps))
        message = f"steps={request.steps} is not allowed: {card.id} was trained for {allowed}"
        raise RequestError(400, message, "invalid_value", "steps")
    return Order(
        class_id=find_class(request.prompt, card.num_classes, card.class_names),
        n=request.n,
        seed=secrets.randbelow(_DRAWN_SEEDS) if request.seed is None else request.seed,
        steps=request.steps,
        schedule=card.schedule_of(request.steps),
    )


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


def png_bytes(image: npt.NDArray[np.floating[Any]]) -> bytes:
    """A PNG file of one image, rounded to bytes as everywhere in ddray.

    Args:
        image: float [C, H, W] in [0, 1], C = 1 or 3.

    Returns:
        The file's bytes, the same for the same pixels.

    Raises:
        ConfigError: another shape, or values that are not numbers.
    """
    buffer = io.BytesIO()
    # Level 1 instead of 6: files hardly grow, and the time until the image is there counts.
    Image.fromarray(to_uint8(image[None])[0]).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _clip(text: str) -> str:
    return text if len(text) <= 80 else text[:80] + "..."


def _show(value: object) -> str:
    """A client's value for a message: escaped, on one line, short."""
    try:
        return _clip(repr(value))
    except ValueError:  # Python prints no integer beyond 4300 digits
        return "a number of thousands of digits"
