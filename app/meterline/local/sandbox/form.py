"""Stripe's request format: form fields with nested keys such as `payload[value]`, read with their types."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, TypeAlias, TypeVar
from urllib.parse import parse_qsl

from meterline.local.sandbox.errors import StripeError

__all__ = ["FIELDS_MAX", "Field", "Params", "decode_form", "decode_json"]

FIELDS_MAX = 200
"""Fields of one request: metadata's 50 keys and everything else fit several times over."""
DEPTH_MAX = 5
"""Levels of nesting; the deepest parameter of the served endpoints has two."""

T = TypeVar("T")
Field: TypeAlias = "str | dict[str, Field]"

_KEY = re.compile(r"[^\[\]]+(?:\[[^\[\]]*\])*")
_INTEGER = re.compile(r"-?[0-9]{1,18}")


def decode_form(text: str) -> dict[str, Field]:
    """Decode `a[b]=1&c=2` into `{"a": {"b": "1"}, "c": "2"}`; arrays become maps of their indexes.

    Raises:
        StripeError: 400 for a malformed key, a key that is both a value and a map, or too many fields.
    """
    try:
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=FIELDS_MAX, errors="strict")
    except ValueError as error:
        raise StripeError(400, f"The parameters cannot be decoded: {error}") from None
    fields: dict[str, Field] = {}
    for key, value in pairs:
        if not _KEY.fullmatch(key):
            raise StripeError(400, f"Invalid parameter name: {key}", param=key)
        path = key.replace("]", "").split("[")
        if len(path) > DEPTH_MAX:
            raise StripeError(400, f"Nested too deeply: {key}", param=key)
        level = fields
        for name in path[:-1]:
            inner = level.setdefault(name, {})
            if isinstance(inner, str):
                raise StripeError(400, f"{key} is given both as a value and as a map.", param=key)
            level = inner
        if path[-1] in level:
            raise StripeError(400, f"{key} is given more than once.", param=key)
        level[path[-1]] = value
    return fields


def decode_json(data: bytes) -> dict[str, Field]:
    """Decode API v2's bodies into the same fields: arrays as maps of their indexes, true as "true".

    Raises:
        StripeError: 400 for what is no JSON object, or has too many fields.
    """
    try:
        body = json.loads(data or b"{}")
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise StripeError(400, "Send one JSON object.")
    left = FIELDS_MAX

    def field_of(value: Any, depth: int) -> Field:
        nonlocal left
        left -= 1
        if left < 0 or depth > DEPTH_MAX:
            raise StripeError(400, "The parameters cannot be decoded: too many fields")
        if isinstance(value, list):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            items = value.items()
            return {name: field_of(item, depth + 1) for name, item in items if item is not None}
        return value if isinstance(value, str) else json.dumps(value)

    return {name: field_of(value, 1) for name, value in body.items() if value is not None}


class Params:
    """Fields of one request; each is taken once, and `finish` refuses what nobody took.

    Every method raises StripeError 400 with the parameter's name. Refusals here come before the idempotency
    layer, so they are never stored under a key.
    """

    def __init__(self, fields: dict[str, Field], prefix: str = "") -> None:
        self._fields = dict(fields)
        self._prefix = prefix

    def name(self, key: str) -> str:
        """The parameter's full name as the client wrote it."""
        return f"{self._prefix}[{key}]" if self._prefix else key

    def text(self, key: str, *, length_max: int = 5_000) -> str | None:
        """A string, or None where it is absent; an empty one is refused."""
        value = self._fields.pop(key, None)
        if value is None:
            return None
        name = self.name(key)
        if isinstance(value, dict):
            raise StripeError(400, f"Invalid string: {name}", param=name)
        if not value:
            raise StripeError(
                400, f"{name} is empty. Leave it out instead.", code="parameter_invalid_empty", param=name
            )
        if len(value) > length_max:
            raise StripeError(
                400,
                f"Invalid string: {value[:20]}...; must be at most {length_max} characters",
                code="parameter_invalid_string",
                param=name,
            )
        return value

    def required_text(self, key: str, *, length_max: int = 5_000) -> str:
        """A string that must be there."""
        return self._required(key, self.text(key, length_max=length_max))

    def integer(self, key: str) -> int | None:
        """A whole number, or None where it is absent."""
        value = self.text(key)
        if value is None:
            return None
        if not _INTEGER.fullmatch(value):
            name = self.name(key)
            raise StripeError(400, f"Invalid integer: {value}", code="parameter_invalid_integer", param=name)
        return int(value)

    def required_integer(self, key: str) -> int:
        """A whole number that must be there."""
        return self._required(key, self.integer(key))

    def choice(self, key: str, allowed: Collection[str]) -> str | None:
        """One of the allowed words, or None where it is absent."""
        value = self.text(key)
        if value is not None and value not in allowed:
            name = self.name(key)
            raise StripeError(400, f"Invalid {name}: must be one of {', '.join(allowed)}", param=name)
        return value

    def text_list(self, key: str) -> list[str]:
        """The strings of an array, sent as `key[0]`, or of `key` alone; empty where it is absent."""
        if self.is_map(key):
            return list(self.text_map(key).values())
        value = self.text(key)
        return [] if value is None else [value]

    def is_map(self, key: str) -> bool:
        """Whether a parameter is there and has keys below it."""
        return isinstance(self._fields.get(key), dict)

    def nested(self, key: str) -> Params:
        """The parameters below a key; none where it is absent."""
        return Params(self._map(key), self.name(key))

    def nested_list(self, key: str) -> list[Params]:
        """The maps of an array, `key[0][...]`, in the order they were sent; none where it is absent."""
        items = self._map(key)
        names = [f"{self.name(key)}[{index}]" for index in items]
        return [Params(_as_map(item, name), name) for name, item in zip(names, items.values(), strict=True)]

    def text_map(self, key: str) -> dict[str, str]:
        """A flat map of strings; empty where it is absent."""
        values: dict[str, str] = {}
        for name, value in self._map(key).items():
            if isinstance(value, dict):
                raise StripeError(
                    400, f"{self.name(key)} must be a flat map of strings.", param=self.name(key)
                )
            values[name] = value
        return values

    def finish(self) -> None:
        """Refuse what is left, as Stripe does: a misspelt parameter must never be ignored."""
        for key in self._fields:
            name = self.name(key)
            raise StripeError(
                400, f"Received unknown parameter: {name}", code="parameter_unknown", param=name
            )

    def _map(self, key: str) -> dict[str, Field]:
        return _as_map(self._fields.pop(key, {}), self.name(key))

    def _required(self, key: str, value: T | None) -> T:
        if value is None:
            name = self.name(key)
            raise StripeError(400, f"Missing required param: {name}.", code="parameter_missing", param=name)
        return value


def _as_map(value: Field, name: str) -> dict[str, Field]:
    if isinstance(value, str):
        raise StripeError(400, f"{name} must be a map.", param=name)
    return value
