"""The interface of the service as an OpenAPI document: what requests are taken, what comes back.

A body of a request is valid by it exactly where the service takes it, but for spellings that nobody
needs ("SEVEN ", "007", " 0 , 16 ") and what no schema can say (of captions, more than
their length).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ddray.config.serving import MAX_IMAGES
from ddray.method.schedule import TEACHER_ALONE
from ddray.serving.api import MAX_CAPTION, MAX_SEED, ModelCard
from ddray.serving.image_file import MEDIA_TYPES

GENERATIONS, RAW = "/v1/images/generations", "/v1/images/raw"
MODELS, MODEL = "/v1/models", "/v1/models/{model}"

Schema = dict[str, Any]

# More names, or jumps of a schedule, would make a pattern that is longer than all the rest.
_NAMES_IN_PATTERN, _JUMPS_IN_PATTERN = 100, 6
_NULL: Schema = {"type": "null"}
_TEXT: Schema = {"type": "string"}
_SEED: Schema = {"type": "integer", "minimum": 0, "maximum": MAX_SEED}
_MEANINGS = {
    400: "What was wrong, its value and what is allowed",
    401: "The API key is missing or not known",
    404: "No such model",
    413: "The body is too large",
    415: "The body is not application/json",
    500: "A fault of the service",
    503: "Busy, or no student is ready; Retry-After says when to ask again",
    504: "The images were not made in time",
}


def openapi(
    cards: Mapping[str, ModelCard], version: str, keys: bool = False, urls: bool = False
) -> Schema:
    """The document.

    Args:
        cards: of the students, by name; the first is the default.
        version: of the service.
        keys: whether it asks for API keys.
        urls: whether images can be had as links.
    """
    lock: Schema = {"security": [{"key": []}]} if keys else {}
    paths: Schema = {
        GENERATIONS: {"post": {**_generations(cards, urls), **lock}},
        RAW: {"post": {**_raw(cards), **lock}},
        MODELS: {"get": {**_models(), **lock}},
        MODEL: {"get": {**_model(cards), **lock}},
        "/healthz": {"get": _health("Whether this process answers", "ok")},
        "/readyz": {"get": _health("Whether a warm student answers", "ready", 503)},
    }
    components: Schema = {"schemas": {"Error": _error(), "Model": _entry()}}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    info = {"title": "ddray", "version": version}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def _generations(cards: Mapping[str, ModelCard], urls: bool) -> Schema:
    given = {"X-DDRay-Seed": {"description": "The seed of the images", "schema": _TEXT}}
    kinds = ["b64_json", "url"] if urls else ["b64_json"]
    content = {"application/json": {"schema": _images(kinds)}}
    return {
        "operationId": "generate_images",
        "summary": "Images as base64 or as links, in JSON",
        "requestBody": _body(cards, MAX_IMAGES, kinds),
        "responses": {
            "200": {"description": "The images", "headers": given, "content": content},
            **_refusals(400, 401, 404, 413, 415, 500, 503, 504),
        },
    }


def _raw(cards: Mapping[str, ModelCard]) -> Schema:
    given = {"X-DDRay-Seed": {"description": "The seed of the image", "schema": _TEXT}}
    content = {kind: {"schema": {"contentMediaType": kind}} for kind in MEDIA_TYPES.values()}
    return {
        "operationId": "generate_image_file",
        "summary": "One image as the bytes of a file",
        "requestBody": _body(cards, 1, ["b64_json"]),
        "responses": {
            "200": {"description": "The image", "headers": given, "content": content},
            **_refusals(400, 401, 404, 413, 415, 500, 503, 504),
        },
    }


def _models() -> Schema:
    entries = {"type": "array", "items": {"$ref": "#/components/schemas/Model"}}
    known = _object({"object": {"const": "list"}, "data": entries})
    content = {"application/json": {"schema": known}}
    return {
        "operationId": "list_models",
        "summary": "The served students and what may be asked of them",
        "responses": {"200": {"description": "The students", "content": content}, **_refusals(401)},
    }


def _model(cards: Mapping[str, ModelCard]) -> Schema:
    name = {"name": "model", "in": "path", "required": True, "schema": {"enum": [*cards]}}
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Model"}}}
    return {
        "operationId": "retrieve_model",
        "summary": "One of them",
        "parameters": [name],
        "responses": {
            "200": {"description": "The student", "content": content},
            **_refusals(401, 404),
        },
    }


def _health(summary: str, status: str, *refusals: int) -> Schema:
    content = {"application/json": {"schema": _object({"status": {"const": status}})}}
    return {
        "summary": summary,
        "responses": {"200": {"description": "Yes", "content": content}, **_refusals(*refusals)},
    }


def _refusals(*statuses: int) -> Schema:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        str(status): {"description": _MEANINGS[status], "content": content} for status in statuses
    }


def _object(properties: Schema, optional: Sequence[str] = ()) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _error() -> Schema:
    text_or_null: Schema = {"type": ["string", "null"]}
    kinds = {"enum": ["invalid_request_error", "server_error"]}
    told = {"message": _TEXT, "type": kinds, "code": _TEXT, "param": text_or_null}
    example = {
        "message": "steps=3 is not allowed: digits-llamagen-dd was trained for 1, 2",
        "type": "invalid_request_error",
        "code": "invalid_value",
        "param": "steps",
    }
    return {**_object({"error": _object(told)}), "examples": [{"error": example}]}


def _entry() -> Schema:
    count: Schema = {"type": "integer", "minimum": 0}
    texts: Schema = {"type": "array", "items": _TEXT}
    return _object(
        {
            "id": _TEXT,
            "object": {"const": "model"},
            "created": count,
            "owned_by": {"const": "ddray"},
            "conditioning": {"enum": ["class", "text"]},
            "num_classes": count,
            "class_names": texts,
            "schedule": {"type": "array", "items": count},
            "stages": count,
            "teacher": _TEXT,
            "size": _TEXT,
            "example_captions": texts,
            "steps": {"type": "array", "items": {"type": ["integer", "string"]}},
            "max_n": count,
            "max_caption": count,
        }
    )


def _images(kinds: Sequence[str]) -> Schema:
    """The answer with images."""
    index: Schema = {"type": "integer", "minimum": 0}
    items = [_object({kind: _TEXT, "index": index}) for kind in kinds]
    return _object(
        {
            "created": {"type": "integer", "description": "Unix time"},
            "data": {"type": "array", "items": items[0] if len(items) == 1 else {"anyOf": items}},
            "model": _TEXT,
            "seed": _SEED,
            "seed_str": {**_TEXT, "description": "The seed for readers that round beyond 2^53"},
            "steps": {"type": ["integer", "string"]},
            "size": _TEXT,
            "output_format": {"enum": [*MEDIA_TYPES]},
        }
    )


def _body(cards: Mapping[str, ModelCard], most: int, kinds: Sequence[str]) -> Schema:
    """What may be sent: of each student what it can make."""
    first = next(iter(cards.values()))
    schemas = [_request(card, card is first, most, kinds) for card in cards.values()]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    schema = {**schema, "examples": _examples(first, most)}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _examples(card: ModelCard, most: int) -> list[Schema]:
    """Two bodies that the first student takes."""
    k = min(3, card.num_classes - 1)
    plain: int | str = k
    name = card.class_names[k] if card.class_names else str(k)
    if card.conditioning == "text":
        plain, name = card.example_captions[0], card.example_captions[-1]
    more = {"n": 4} if most > 1 else {}
    full = {"prompt": name, **more, "seed": 7, "steps": max(_counts(card)), "output_format": "webp"}
    return [{"prompt": plain}, full]


def _request(card: ModelCard, is_default: bool, most: int, kinds: Sequence[str]) -> Schema:
    """Bodies that ask one student."""
    steps = {"anyOf": [*_steps(card), _NULL]}
    properties: Schema = {
        "model": {"enum": [card.id, *([None] if is_default else [])]},
        "prompt": _prompt(card),
        "n": {**_number(1, most), "default": 1},
        "size": {"enum": [card.size, "auto", None]},
        "seed": _number(0, MAX_SEED),
        "steps": {**steps, "default": 1},
        "response_format": {"enum": [*kinds, None], "default": "b64_json"},
        "output_format": {"enum": [*MEDIA_TYPES, None], "default": "png"},
        "output_compression": _number(0, 100),
        "num_inference_steps": {**steps, "description": "The same as steps; send one of them"},
        "guidance_scale": _number(0, 1),
        "user": {"type": ["string", "null"]},
        "safety_identifier": {"type": ["string", "null"]},
        "quality": {"enum": ["auto", "standard", None]},
        "style": _NULL,
        "background": {"enum": ["auto", "opaque", None]},
        "moderation": {"enum": ["auto", "low", None]},
        "stream": {"enum": [False, None]},
        "partial_images": _number(0, 0),
    }
    needed = {"prompt"} if is_default else {"model", "prompt"}
    schema = _object(properties, [name for name in properties if name not in needed])
    rules = {"anyOf": _one_spelling(card), **_exact_png(), **_own_guidance(card)}
    # What a client has a name for and leaves alone.
    return {**schema, "additionalProperties": _NULL, **rules}


def _number(least: int, most: int) -> Schema:
    """An integer, the same in a string, or null."""
    integer = {"type": "integer", "minimum": least, "maximum": most}
    text = {"type": "string", "pattern": f"^(?:{decimals(least, most)})$"}
    return {"anyOf": [integer, text, _NULL]}


def decimals(least: int, most: int) -> str:
    """Pattern of the decimal numbers from 0 or 1 to most."""
    text = str(most)
    longer = [f"[1-9][0-9]{{0,{len(text) - 2}}}"] if len(text) > 1 else []
    for k, digit in enumerate(text):
        lowest = 0 if k else 1  # no number begins with 0
        if int(digit) > lowest:
            rest = len(text) - k - 1
            tail = f"[0-9]{{{rest}}}" if rest else ""
            longer.append(f"{text[:k]}[{lowest}-{int(digit) - 1}]{tail}")
    return "|".join([*(["0"] if least == 0 else []), *longer, *([text] if most else [])])


def _prompt(card: ModelCard) -> Schema:
    if card.conditioning == "text":
        return {"type": "string", "maxLength": MAX_CAPTION, "pattern": r"\S"}
    last = card.num_classes - 1
    names = [_any_case(name) for name in card.class_names]
    text: Schema = {"type": "string"}
    if len(names) <= _NAMES_IN_PATTERN:
        text["pattern"] = f"^(?:{'|'.join([decimals(0, last), *names])})$"
    return {"anyOf": [{"type": "integer", "minimum": 0, "maximum": last}, text]}


def _any_case(name: str) -> str:
    return "".join(map(_letter, name))


def _letter(letter: str) -> str:
    if letter.isascii() and letter.isalpha():
        return f"[{letter.lower()}{letter.upper()}]"
    if letter.isalnum() or letter == " ":
        return letter
    return f"\\u{ord(letter):04x}" if ord(letter) < 2**16 else "."


def _steps(card: ModelCard) -> list[Schema]:
    """Numbers of steps, and schedules of one's own."""
    counts = _counts(card)
    texts = [*map(str, counts), *_schedules(card)]
    return [{"enum": counts}, {"type": "string", "pattern": f"^(?:{'|'.join(texts)})$"}]


def _counts(card: ModelCard) -> list[int]:
    return [step for step in card.steps if isinstance(step, int)]


def _schedules(card: ModelCard) -> list[str]:
    """Patterns."""
    if len(card.schedule) > _JUMPS_IN_PATTERN:
        return ["[0-9teacher:,-]{1,200}"]
    schedules = [f"0{_jumps_behind(0, card)}"]
    return [*schedules, TEACHER_ALONE, *_begun_by_teacher(card)] if card.teacher else schedules


def _jumps_behind(at: int, card: ModelCard) -> str:
    """What a schedule may hold behind a jump at a stage: jumps, and before each the teacher."""
    options = []
    for step in [step for step in card.schedule if step > at]:
        taught = f"(?:teacher:(?:{decimals(0, step - 1)})-{step},)?" if card.teacher else ""
        options.append(f",{taught}{step}{_jumps_behind(step, card)}")
    if card.teacher:
        options.append(f",teacher:(?:{decimals(0, card.stages - 1)})-{card.stages}")
    return f"(?:{'|'.join(options)})?" if options else ""


def _begun_by_teacher(card: ModelCard) -> list[str]:
    jumps = [step for step in card.schedule if step > 0]
    begun = [f"teacher:0-{step},{step}{_jumps_behind(step, card)}" for step in jumps]
    return [*begun, f"teacher:0-{card.stages}"]


def _one_spelling(card: ModelCard) -> list[Schema]:
    """Of `steps` and its other name one, or the same in both, as far as can be listed."""
    both = ("steps", "num_inference_steps")
    left_out = [{"properties": {name: _NULL}} for name in both]
    schedules = {"0", ",".join(map(str, card.schedule)), TEACHER_ALONE}
    values = [*([k, str(k)] for k in _counts(card)), *([text] for text in sorted(schedules))]
    alike = [{"properties": dict.fromkeys(both, {"enum": same})} for same in values]
    return [*left_out, *alike]


def _exact_png() -> Schema:
    lossy = {"output_format": {"enum": ["webp", "jpeg"]}}
    exact = {"output_compression": {"enum": [100, "100", None]}}
    return {
        "if": {"properties": lossy, "required": [*lossy]},
        "then": True,
        "else": {"properties": exact},
    }


def _own_guidance(card: ModelCard) -> Schema:
    """The teacher takes none that is sent."""
    if not card.teacher:
        return {}
    untaught = {"not": {"type": "string", "pattern": "teacher"}}
    alone = {"properties": {"steps": untaught, "num_inference_steps": untaught}}
    return {
        "dependentSchemas": {
            "guidance_scale": {"anyOf": [{"properties": {"guidance_scale": _NULL}}, alone]}
        }
    }
