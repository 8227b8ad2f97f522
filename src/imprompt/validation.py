"""Settings whose errors are one line.

This module needs neither torch nor anything that computes with it.
"""

import difflib
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from imprompt.errors import SettingError


class Validated(BaseModel, frozen=True):
    """A pydantic model whose validation errors are raised as SettingError.

    The message names the first wrong value and what is allowed.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    familiar: ClassVar[Mapping[str, str]] = {}  # names that users know from elsewhere -> ours

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            own = type(self)
            raise SettingError(one_line(error, own.model_fields, own.familiar)) from error


@dataclass(frozen=True)
class Flag:
    """The form of a field on the command line, where its name and type do not determine it.

    A field without a `Flag` has a flag of the field's name, whose help is the field's description;
    a field with several has several flags.

    name   such as "--negative", or "--captions/--no-captions"
    short  such as "-n"
    type   bool, int, float, str or Path, or a list of one of them for a flag that may be repeated;
           if not given, the field's own type, and then with its default
    help   if it is not the field's description
    read   converts the given value to the field's value
    """

    name: str = ""
    short: str = ""
    type: Any = None
    help: str = ""
    read: Callable[[Any], Any] = lambda given: given


def one_line(
    error: ValidationError, known: Iterable[str] = (), familiar: Mapping[str, str] | None = None
) -> str:
    """Return pydantic's first error as one sentence.

    known     names of the settings, from which suggestions for an unknown name are taken
    familiar  names that users know from elsewhere -> ours
    """
    faults = error.errors()
    # a missing setting may be a misspelt one
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    name = ".".join(map(str, first["loc"])) or "settings"
    if first["type"] == "extra_forbidden":
        if own := (familiar or {}).get(name):
            return f"unknown setting {name!r}: give it as {own}"
        return f"unknown setting {name!r}{suggestions(name, known)}"
    given = "" if first["type"] == "missing" else f" = {reprlib.repr(first['input'])}"
    return f"{name}{given}: {first['msg'][0].lower()}{first['msg'][1:]}"


def one_of(literal: Any) -> BeforeValidator:
    """Return a validator for a field of a Literal type.

    Its error for an unknown name lists similar names, or else all names.
    """
    known = get_args(literal)

    def checked(value: Any) -> Any:
        if value in known:
            return value
        raise PydanticCustomError(
            "unknown_name", "{said}", {"said": f"unknown{suggestions(value, known)}"}
        )

    return BeforeValidator(checked)


def suggestions(name: object, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: similar names, or else all names."""
    names = list(known)
    found = difflib.get_close_matches(str(name), names, 3, cutoff=0.65)
    return f"; near: {', '.join(found)}" if found else f"; known: {', '.join(names)}"
