"""Reading the stack of cluster/aws."""

import functools
from typing import Any

import yaml

from tests.paths import ROOT

STACK = ROOT / "cluster" / "aws" / "stack.yaml"


# libyaml's, where there is one.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):
    """Takes `!Ref x` for what CloudFormation does: {"Ref": "x"}."""


def _function(loader: Any, tag: str, node: yaml.Node) -> dict[str, Any]:
    value: Any
    if isinstance(node, yaml.MappingNode):
        value = loader.construct_mapping(node, deep=True)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        value = loader.construct_scalar(node)
    return {tag if tag in ("Ref", "Condition") else f"Fn::{tag}": value}


_Loader.add_multi_constructor("!", _function)


@functools.cache
def template() -> dict[str, Any]:
    return yaml.load(STACK.read_text("utf-8"), _Loader)


def resources(kind: str) -> dict[str, Any]:
    """Properties of all resources of a kind such as `IAM::Role`, by their names in the template."""
    found = template()["Resources"].items()
    return {name: one["Properties"] for name, one in found if one["Type"] == f"AWS::{kind}"}


def statements(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of a policy, with actions and resources as lists."""
    told = []
    for statement in document["Statement"]:
        lists = {
            key: value if isinstance(value, list) else [value]
            for key, value in statement.items()
            if key in ("Action", "Resource")
        }
        told.append(statement | lists)
    return told
