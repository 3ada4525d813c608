"""The types of values, in words for people."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from raylaunch.config.schema.base import Section


def section_type(model: type[Section], name: str) -> type[Section] | None:
    """The model of a field that is a section, else None."""
    annotation = model.model_fields[name].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


class FieldType:
    """A field's type taken apart, for reading and for messages; `str()` says what it allows."""

    def __init__(self, annotation: Any, metadata: Sequence[Any] = ()) -> None:
        found = list(metadata)
        while get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            found += more
        origin, arguments = get_origin(annotation), get_args(annotation)
        union = origin in (Union, types.UnionType)
        self._metadata = [m for f in found for m in ([f, *f.metadata] if isinstance(f, FieldInfo) else [f])]
        self._base: Any = str if origin is Literal or annotation is SecretStr else origin or annotation
        self._arguments = arguments
        self._options = [FieldType(a, found) for a in arguments] if union else [self]
        self.choices = [str(a) for a in arguments] if origin is Literal else []
        """The words of a Literal."""

    @classmethod
    def of(cls, model: type[Section], name: str) -> Self:
        field = model.model_fields[name]
        # examples are the one thing that pydantic keeps outside of metadata
        return cls(field.annotation, [*field.metadata, field])

    def takes(self, base: type) -> bool:
        """Whether values of exactly this Python type are among those allowed."""
        return any(option._base is base for option in self._options)

    def element(self, base: type) -> FieldType:
        """The kind of a list's items or a mapping's values; itself, where it is neither."""
        return next((FieldType(o._arguments[-1]) for o in self._options if o._base is base), self)

    def _limit(self, name: str) -> Any:
        return next((getattr(m, name) for m in self._metadata if getattr(m, name, None) is not None), None)

    def __str__(self) -> str:
        if len(self._options) > 1:
            return " or ".join(str(option) for option in self._options)
        if self.choices:
            return ("one of " if len(self.choices) > 1 else "") + ", ".join(self.choices)
        if self._base is list:
            low, high = self._limit("min_length"), self._limit("max_length")
            count = f"{low} " if low and low == high else "one or more " if low == 1 else ""
            return f"a list of {count}items, each {self.element(list)}"
        if self._base is dict:
            return f"a mapping of names to {self.element(dict)}"
        example = self._limit("examples")
        if self._base is str and example:
            return f"text such as {example[0]}"
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text",
                 type(None): "null", Any: "any value"}  # fmt: skip
        limits = (("ge", "of at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
        bounds = [f"{text} {self._limit(n)}" for n, text in limits if self._limit(n) is not None]
        return f"{words.get(self._base, 'a section')} {' and '.join(bounds)}".strip()
