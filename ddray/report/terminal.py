"""Results on the terminal, as JSON or YAML: names as they are, where the terminal can show them."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any


def print_json(values: Mapping[str, Any]) -> None:
    """Print values as JSON."""
    print(_shown(lambda as_is: json.dumps(values, indent=2, ensure_ascii=not as_is)))


def print_yaml(values: Mapping[str, Any], width: int = 2**16) -> None:
    """Print JSON values as YAML, in their order."""
    import yaml

    plain = json.loads(json.dumps(values))
    text = _shown(
        lambda as_is: yaml.safe_dump(plain, sort_keys=False, width=width, allow_unicode=as_is)
    )
    print(text, end="")


def _shown(dump: Callable[[bool], str]) -> str:
    """The text with all its characters; by their numbers where stdout does not take them."""
    text = dump(True)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return dump(False)
    return text
