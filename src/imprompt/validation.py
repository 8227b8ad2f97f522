"""Settings that tell what is wrong with them in one line.

Needs neither torch nor what computes with them.
"""

import difflib
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from imprompt.errors import SettingError


class Validated(BaseModel, frozen=True):
    """A model of pydantic whose faults are a SettingError that names the first wrong value and what
    is allowed.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingError(one_line(error, type(self).model_fields)) from error


@dataclass(frozen=True)
class Flag:
    """Says of a field how it is given on the command line, where its name and type do not say it.

    A field without one has a flag of its own name, whose help is the field's description; a field
    with several has several flags.

    name   such as "--negative", or "--captions/--no-captions"
    short  such as "-n"
    type   bool, int, float, str or Path, or a list of one of them for a flag that may be repeated;
           the field's own, and then with its default, if not given
    help   if it is not the field's description
    read   makes the field's value of what was given
    """

    name: str = ""
    short: str = ""
    type: Any = None
    help: str = ""
    read: Callable[[Any], Any] = lambda given: given


def one_line(error: ValidationError, known: Iterable[str] = ()) -> str:
    """pydantic's first complaint as one sentence. `known`: the settings that an unknown one could
    have meant.
    """
    faults = error.errors()
    # what is missing may be misspelt
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    name = ".".join(map(str, first["loc"])) or "settings"
    if first["type"] == "extra_forbidden":
        return f"unknown setting {name!r}{suggestions(name, known)}"
    given = "" if first["type"] == "missing" else f" = {reprlib.repr(first['input'])}"
    return f"{name}{given}: {first['msg'][0].lower()}{first['msg'][1:]}"


def one_of(literal: Any) -> BeforeValidator:
    """For a field of a Literal type: a name that is not of it is told with those like it, or
    all.
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
    """The end of a message about an unknown name: what is like it, or else all that there is."""
    names = list(known)
    found = difflib.get_close_matches(str(name), names, 3, cutoff=0.65)
    return f"; near: {', '.join(found)}" if found else f"; known: {', '.join(names)}"
