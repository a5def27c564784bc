"""Keys, values and what is allowed, as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from orchestrator.job.metrics import CUSTOM_PATTERN
from orchestrator.job.spec import ALIAS_PATTERN, NAME_PATTERN

KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
}
RANGE = "[low, high]"  # describes lists of fixed length, except those with an example
LIMITS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def show(value: Any) -> str:
    """Return a value as it would stand in the file, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return encodable(text if len(text) <= 60 else f"{text[:57]}...")


def encodable(text: str) -> str:
    """Return ``text`` without lone surrogates, which YAML's escapes can make.

    A terminal would not accept them.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def below(where: str, name: Any) -> str:
    """Return the dotted key of ``name`` in the mapping at ``where``."""
    key = (
        name if isinstance(name, str) and "." not in name else json.dumps(name, ensure_ascii=False)
    )
    return encodable(f"{where}.{key}" if where else key)


def listed(texts: Sequence[str]) -> str:
    """Join the texts to a list of choices: ``a, b or c``."""
    return f"{', '.join(texts[:-1])} or {texts[-1]}" if len(texts) > 1 else "".join(texts)


def describe(schema: dict[str, Any]) -> str:
    """Describe the values that a JSON schema allows.

    The limits come from the schema, so that none is written down twice.
    """
    return listed(_alternatives(schema, schema.get("$defs", {})))


def _alternatives(schema: dict[str, Any], models: dict[str, Any]) -> list[str]:
    match schema:
        case {"anyOf": branches}:
            texts: list[str] = []
            for branch in branches:
                inner = _alternatives(branch, models)
                texts += ["a list of them"] if inner == [f"a list of {listed(texts)}"] else inner
            return texts
        case {"enum": words}:
            return [str(word) for word in words]
        case {"$ref": name}:
            return _alternatives(models[name.rsplit("/", 1)[-1]], models)
        case {"prefixItems": [part, *_] as parts, "examples": [example, *_]}:
            return [
                (
                    f"a list of {len(parts)}, each {listed(_alternatives(part, models))}, as "
                    f"{show(example)}"
                )
            ]
        case {"prefixItems": _}:
            return [RANGE]
        case {"items": items}:
            return [f"a list of {listed(_alternatives(items, models))}"]
        case {"properties": fields}:
            inner = [
                f"{name}: {RANGE if 'prefixItems' in field else '...'}"
                for name, field in fields.items()
            ]
            return [f"{{{', '.join(inner)}}}"]
        case {"additionalProperties": values}:
            return [f"a mapping to {listed(_alternatives(values, models))}"]
    return [_one(schema)]


def _one(schema: dict[str, Any]) -> str:
    limits = " and ".join(
        f"{words} {schema[key]}" for key, words in LIMITS.items() if key in schema
    )
    match schema:
        case {"const": word}:
            return str(word)
        case {"pattern": pattern} if pattern == NAME_PATTERN:
            return "letters, digits, '.', '_' and '-', a letter or digit first, 100 at most"
        case {"pattern": pattern} if pattern == ALIAS_PATTERN:
            return "letters, digits, '_' and '-', a letter or digit first, 100 at most"
        case {"pattern": pattern} if pattern == CUSTOM_PATTERN:
            return "module:function"
        case {"minLength": _}:
            return "text that is not empty"
        case {"type": kind}:
            return f"{KINDS.get(kind, kind)} {limits}".rstrip()
    return "a value"
