"""Strict reading of JSON documents and their fields, shared by every format.

Unknown keys, missing keys and wrong types are errors that name the file and the field.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from edge_tcur_runtime.errors import FileFormatError

_INTEGER_DIGITS = 20  # with a sign: what 64 bits hold


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} appears twice")
        result[key] = value
    return result


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # 1e999 is valid JSON and reads as infinity
        raise ValueError(f"the number {text:.30} is too large")
    return value


def _bounded_int(text: str) -> int:
    if len(text) > _INTEGER_DIGITS:
        raise ValueError(f"the number {text:.30} is too large")
    return int(text)


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object from UTF-8 bytes; for a user's data, which may hold any number and string.

    Raises:
        FileFormatError: bad UTF-8, bad JSON, a duplicate key, NaN or infinity, too deep a nesting,
            or not an object.
    """
    return _load(raw, where, {})


def parse_document(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object of one of our formats: as `parse_json`, and it can be computed with and printed.

    Raises:
        FileFormatError: as `parse_json`; a number beyond 64 bits; half of a surrogate pair.
    """
    document = _load(raw, where, {"parse_float": _finite_float, "parse_int": _bounded_int})
    try:
        # An escape such as \ud800 gives a string that no file name, digest or terminal can take.
        if b"\\u" in raw:
            json.dumps(document, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise FileFormatError(f"holds a string that is not Unicode text: {error}", where=where) from error
    return document


def _load(raw: bytes, where: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    try:
        document = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_constant,
            **numbers,
        )
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"not a valid JSON document: {error}", where=where) from error
    if not isinstance(document, dict):
        raise FileFormatError("expected a JSON object at the top", where=where)
    return document


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, for 'did you mean'."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return matches[0] if matches else None


class Fields:
    """Typed access to the fields of one JSON object.

    Args:
        document: the object.
        where: the file, and the path of the object inside it, for messages.
    """

    def __init__(self, document: Mapping[str, Any], where: str) -> None:
        self._document = document
        self.where = where

    def only(self, *known: str) -> Fields:
        """Refuses keys that are not in `known`, suggesting the nearest one."""
        for key in self._document:
            if key not in known:
                guess = nearest(key, known)
                raise FileFormatError(
                    f"unknown field {key!r}",
                    where=self.where,
                    hint=f"did you mean {guess!r}?" if guess else f"known fields: {', '.join(known)}",
                )
        return self

    def _get(self, key: str, kinds: tuple[type, ...], expected: str) -> Any:
        if key not in self._document:
            raise FileFormatError(f"the field {key!r} is missing", where=self.where)
        value = self._document[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise FileFormatError(
                f"the field {key!r} must be {expected}, not {type(value).__name__}", where=self.where
            )
        return value

    def text(self, key: str) -> str:
        """A string."""
        return str(self._get(key, (str,), "a string"))

    def optional_text(self, key: str) -> str | None:
        """A string, or null / absent."""
        return None if self._document.get(key) is None else self.text(key)

    def is_null(self, key: str) -> bool:
        """Whether the field is null or absent."""
        return self._document.get(key) is None

    def choice(self, key: str, allowed: Iterable[str]) -> str:
        """A string out of `allowed`."""
        value, options = self.text(key), list(allowed)
        if value not in options:
            raise FileFormatError(
                f"the field {key!r} is {value!r}; expected one of {', '.join(options)}", where=self.where
            )
        return value

    def integer(self, key: str, *, low: int = 0, high: int = 2**53) -> int:
        """An integer in ``[low, high]``."""
        value = int(self._get(key, (int,), "an integer"))
        if not low <= value <= high:
            raise FileFormatError(f"the field {key!r} is {value}; expected {low} to {high}", where=self.where)
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        return float(self._get(key, (int, float), "a number"))

    def flag(self, key: str) -> bool:
        """A boolean."""
        return bool(self._get(key, (bool,), "true or false"))

    def mapping(self, key: str) -> dict[str, Any]:
        """An object, as a plain dict."""
        return dict(self._get(key, (dict,), "an object"))

    def child(self, key: str) -> Fields:
        """An object, as `Fields` that know their place."""
        return Fields(self.mapping(key), f"{self.where}: {key}")

    def children(self, key: str) -> dict[str, Fields]:
        """An object of objects."""
        parent = self.child(key)
        return {name: parent.child(name) for name in parent.mapping_keys()}

    def mapping_keys(self) -> list[str]:
        """The keys, in file order."""
        return list(self._document)

    def items(self, key: str) -> list[Any]:
        """A list of anything."""
        return list(self._get(key, (list,), "a list"))

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self.items(key)
        if not all(isinstance(value, str) for value in values):
            raise FileFormatError(f"the field {key!r} must hold strings only", where=self.where)
        return tuple(values)

    def sizes(self, key: str) -> tuple[int, ...]:
        """A list of integers that are not negative."""
        values = self.items(key)
        if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values):
            raise FileFormatError(f"the field {key!r} must hold sizes", where=self.where)
        return tuple(values)
