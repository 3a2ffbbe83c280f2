"""The card of a set: a README.md that says how it was made, and by which `datasets` loads it.

The licence is for those who publish the set to choose, so none is named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import yaml

from ddray import __version__
from ddray.sets.plan import SetPlan
from ddray.storage.base import NotFoundError, Storage

CARD = "README.md"

_LETTERS = 200
_SEAL, _SEAL_END = "<!-- ddray card ", ": written anew when the set grows, until edited -->\n"
_BODY = """\
# {title}

{count} {what} made with ddray {version} by `{made_by}`: a function of the settings below and of the
row's index alone. `manifest.json` holds the whole plan (hash `{plan_hash}`).

| | |
|---|---|
{table}

{loading}
No licence is named here. Whoever publishes this chooses one, by a line `license:` at the head of
this file; the licences of the models, and of what they were trained on, may bind.
"""
_LOADING = """\
```python
from datasets import load_dataset

rows = load_dataset("path/or/name/of/this/folder", split="train")
```
"""


def write_card(storage: Storage, plan: SetPlan, model: Mapping[str, Any]) -> None:
    """Write the card of a set, unless somebody has edited the one that is there.

    Args:
        storage: of the set.
        plan: of the set.
        model: config of the model that makes it.

    Raises:
        StorageError: if it cannot be read or written.
    """
    try:
        there = storage.read(CARD).decode(errors="replace")
    except NotFoundError:
        there = None
    text = card_text(plan, model)
    if there is None or (there != text and _is_sealed(there)):
        storage.write(CARD, text.encode())


def card_text(plan: SetPlan, model: Mapping[str, Any]) -> str:
    """The card: a YAML head for `datasets`, settings as a table, a seal to tell edits by.

    Args:
        plan: of the set.
        model: config of the model that makes it.
    """
    head: dict[str, Any] = {"tags": ["synthetic", "ddray"]}
    if plan.data_files:
        files = [{"split": "train", "path": plan.data_files}]
        head["configs"] = [{"config_name": "default", "data_files": files, **plan.load_options}]
    table = {**_model_lines(plan, model), **_setting_lines(plan)}
    body = _BODY.format(
        title=f"{plan.ROWS.capitalize()} by {getattr(plan, plan.MODEL)}",
        count=plan.count,
        what=plan.ROWS,
        version=__version__,
        made_by=plan.MADE_BY,
        plan_hash=plan.hash[:12],
        table="\n".join(f"| {name} | {_cell(value)} |" for name, value in table.items()),
        loading=_LOADING if plan.data_files else "",
    )
    text = f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{body}\n"
    return f"{text}{_SEAL}{_digest(text)}{_SEAL_END}"


def _model_lines(plan: SetPlan, model: Mapping[str, Any]) -> dict[str, Any]:
    """Who made the rows, and who taught it."""
    weights = getattr(plan, f"{plan.MODEL}_fingerprint")
    lines = {plan.MODEL: f"{getattr(plan, plan.MODEL)} (sha256 of its weights {weights[:12]})"}
    if "teacher" not in lines and model.get("teacher"):
        lines["teacher of the student"] = model["teacher"]
    return lines


def _setting_lines(plan: SetPlan) -> dict[str, Any]:
    """The settings that say what rows these are; what is off is left out."""
    shown = {name: value for name, value in plan.shown().items() if name != plan.MODEL}
    asked = {"classes asked for": ", ".join(map(str, plan.classes)), "encoder": plan.text_encoder}
    return {name: value for name, value in {**shown, **asked}.items() if value not in (None, "")}


def _cell(value: Any) -> str:
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= _LETTERS else f"{text[:_LETTERS]} ..."


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_sealed(text: str) -> bool:
    """Whether a card is as ddray wrote it."""
    above, seal, below = text.rpartition(_SEAL)
    return bool(seal) and below == f"{_digest(above)}{_SEAL_END}"
