"""What the image service accepts and answers: bodies of requests, their checks, errors.

Knows neither Ray nor torch, so that every refusal can be tested without a server.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from ddray.config.serving import MAX_IMAGES
from ddray.method.schedule import TEACHER_ALONE
from ddray.serving.image_file import ImageFormat

MAX_BODY_BYTES = 64_000
MAX_SEED = 2**63 - 1
MAX_CAPTION = 2000
"""Characters of a caption; an encoder reads fewer."""

_MAX_STEPS_TEXT = 200


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


def _from_digits(value: Any) -> Any:
    """A number that came as a string, as JavaScript must send one beyond 2^53."""
    plain = isinstance(value, str) and re.fullmatch("0|[1-9][0-9]{0,18}", value)
    return int(value) if plain else value


def _count_or_schedule(value: Any) -> Any:
    """Digits are a number of steps, except the schedule that jumps once, at stage 0."""
    return value if value == "0" else _from_digits(value)


def _off(value: bool) -> bool:
    if value:
        raise ValueError("on")
    return value


Digits = BeforeValidator(_from_digits)
Steps = Annotated[
    Annotated[StrictInt, Field(ge=1)] | Annotated[StrictStr, Field(max_length=_MAX_STEPS_TEXT)],
    BeforeValidator(_count_or_schedule),
]


class ImageRequest(BaseModel):
    """Body of an image request; null means absent, of whatever name, and digits are a number.

    What OpenAI's clients and those of diffusers send by themselves is taken where it asks for
    nothing.

    Attributes:
        model: one of the served students; absent = the first.
        prompt: class id or class name, or a caption where the student takes captions.
        n: number of images.
        size: the student's, such as "28x28", or "auto".
        seed: decides, with an image's place in the answer, its noise; absent = drawn, and returned.
        steps: jumps of the student: one, or its full schedule. Where the teacher is deployed, also
            a schedule in which it takes part, such as "0,teacher:8-16,16", or "teacher" alone.
        response_format: how images come: as base64, or as links where storage is configured.
        output_format: file format of an image.
        output_compression: quality of WebP and JPEG; of PNG, which is exact, only 100.
        num_inference_steps: the same as `steps`.
        guidance_scale: 0 or 1, which are off: a student has its guidance from its training.
        user: without effect, as all that follow.
        safety_identifier: its new name.
        quality: "auto" or "standard".
        style: null.
        background: "auto" or "opaque".
        moderation: "auto" or "low".
        stream: false.
        partial_images: 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: StrictStr | None = None
    prompt: StrictInt | StrictStr
    n: Annotated[StrictInt, Field(ge=1, le=MAX_IMAGES), Digits] = 1
    size: StrictStr | None = None
    seed: Annotated[StrictInt, Field(ge=0, le=MAX_SEED), Digits] | None = None
    steps: Steps = 1
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: ImageFormat = "png"
    output_compression: Annotated[StrictInt, Field(ge=0, le=100), Digits] | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Annotated[StrictInt, Field(ge=0, le=1), Digits] | None = None
    user: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    quality: Literal["auto", "standard"] = "auto"
    style: None = None
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = "auto"
    stream: Annotated[StrictBool, AfterValidator(_off)] = False
    partial_images: Annotated[StrictInt, Field(ge=0, le=0), Digits] = 0

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: Any) -> Any:
        if isinstance(body, Mapping):
            return {key: value for key, value in body.items() if value is not None}
        return body


_STEPS = "a positive integer or a schedule; GET /v1/models lists what each model can do"
_ALLOWED = {
    "model": "a string; GET /v1/models lists the names",
    "prompt": "a class id (an integer), or a class name or caption (a string)",
    "n": f"an integer from 1 to {MAX_IMAGES}",
    "size": 'a string such as "28x28", or "auto"',
    "seed": f"an integer from 0 to {MAX_SEED}",
    "steps": _STEPS,
    "response_format": '"b64_json" or "url"',
    "output_format": '"png", "webp" or "jpeg"',
    "output_compression": "an integer from 0 to 100, the quality of a webp or jpeg",
    "num_inference_steps": _STEPS,
    "guidance_scale": "0 or 1, which are off: a student has its guidance from its training",
    "user": "a string",
    "safety_identifier": "a string",
    "quality": '"auto" or "standard": steps decide about quality',
    "style": "null, or left out: a student has one style",
    "background": '"auto" or "opaque": images have no transparency',
    "moderation": '"auto" or "low": nothing is moderated',
    "stream": "false: images come all at once",
    "partial_images": "0: images come all at once",
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
        example_captions: for those who have none at hand; empty for classes.
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
    example_captions: tuple[str, ...] = ()

    @property
    def max_caption(self) -> int:
        """Characters of a caption; 0 = it takes none."""
        return MAX_CAPTION if self.conditioning == "text" else 0

    @property
    def steps(self) -> tuple[int | str, ...]:
        """What may be asked for as `steps`, beside schedules of one's own with the teacher."""
        jumps = sorted({1, len(self.schedule)})
        return (*jumps, TEACHER_ALONE) if self.teacher else tuple(jumps)

    def entry(self) -> dict[str, Any]:
        """The model in GET /v1/models: OpenAI's fields, then ours."""
        head = {"id": self.id, "object": "model", "created": self.created, "owned_by": "ddray"}
        allowed = {"steps": self.steps, "max_n": MAX_IMAGES, "max_caption": self.max_caption}
        return {**head, **asdict(self), **allowed}


def parse_request(body: bytes) -> ImageRequest:
    """Read and check the body of a request.

    Args:
        body: JSON.

    Returns:
        The request, with its steps under `steps`; what depends on the student is not checked yet.

    Raises:
        RequestError: with status 400, for the first thing that is wrong.
    """
    value = _read_json(body)
    try:
        return _with_one_spelling(ImageRequest.model_validate(value))
    except ValidationError as error:
        raise _rewritten(error) from error


def _with_one_spelling(request: ImageRequest) -> ImageRequest:
    steps, alias = request.steps, request.num_inference_steps
    if alias is None:
        return request
    if "steps" in request.model_fields_set and steps != alias:
        message = (
            f"num_inference_steps={show(alias)} is not allowed beside steps={show(steps)}: "
            "they mean the same; send one of them"
        )
        raise RequestError(400, message, "invalid_value", "num_inference_steps")
    return request.model_copy(update={"steps": alias})


def _read_json(body: bytes) -> Any:
    """The value of a JSON text, in which 7.0 is the integer 7.

    Raises:
        RequestError: with status 400, also where readers of JSON differ in what they make of it.
    """
    try:
        return json.loads(
            _decoded(body), parse_float=_number, object_pairs_hook=_with_distinct_keys
        )
    except (ValueError, RecursionError) as error:
        message = f"the body is not valid JSON: {clip(str(error), 150)}"
        raise RequestError(400, message, "invalid_json") from error


def _decoded(body: bytes) -> str:
    """The text of a body; else a ValueError says what it is."""
    if body.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it begins with a byte order mark; send UTF-8 without one")
    # Every JSON text begins with an ASCII character, whose other bytes are 0.
    if body.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in body[:4]:
        raise ValueError("it looks like UTF-16 or UTF-32; send UTF-8")
    return body.decode("utf-8")


def _number(text: str) -> int | float:
    value = float(text)
    if not value.is_integer() or abs(value) > 2 * MAX_SEED:
        return value
    if abs(value) < 2**53:
        return int(value)
    exact = Decimal(text)  # which a float of that size may not be
    return int(exact) if exact == int(exact) else value


def _with_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {show(key)} stands twice in one object")
    return found


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
        message = f"unknown parameter {show(param)}; {hint}known are {known}"
        return RequestError(400, message, "unknown_parameter", clip(param))
    if first["type"] == "missing":
        message = f"{param} is missing: it must be {_ALLOWED[param]}"
        return RequestError(400, message, "missing_required_parameter", param)
    message = f"{param}={show(first['input'])} is not allowed: it must be {_ALLOWED[param]}"
    return RequestError(400, message, "invalid_value", param)


def clip(text: str, most: int = 80) -> str:
    """A text for a message: not longer than so many characters, and what was cut off is seen."""
    return text if len(text) <= most else text[:most] + "..."


def show(value: object) -> str:
    """A client's value for a message: escaped, on one line, short."""
    try:
        return clip(repr(value))
    except ValueError:  # Python prints no integer beyond 4300 digits
        return "a number of thousands of digits"
