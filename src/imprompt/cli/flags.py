"""Make command-line flags from schemas: a field states its name, type, default and help once.

A command is a function with parameters of its own and `given_fields`: for each schema the fields
that the user gave, by name. This module does not depend on any particular schema.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

import typer
from pydantic import BaseModel

from imprompt.errors import SettingError
from imprompt.validation import Flag

GivenFields = dict[type[BaseModel], dict[str, Any]]
VALUES = (bool, int, float, Path)  # types of flags; a value of any other type is given as text


class FieldFlag(NamedTuple):
    """One flag of a schema's field.

    `own`: whether its default is the field's; otherwise the default depends on other options.
    """

    schema: type[BaseModel]
    field: str
    flag: Flag
    own: bool = True

    @property
    def name(self) -> str:
        """Name of the flag, such as "--num-images"."""
        return self.flag.name or "--" + self.field.replace("_", "-")

    @property
    def parameter(self) -> str:
        """Name of the command's parameter."""
        return self.name.split("/")[0].strip("-").replace("-", "_")

    def option(self) -> inspect.Parameter:
        """Return the flag as a parameter of a typer command."""
        field = self.schema.model_fields[self.field]
        parts = get_args(field.annotation) or (field.annotation,)
        kind = next((part for part in parts if part in VALUES), str)
        names = [name for name in (self.name, self.flag.short) if name]
        option = typer.Option(*names, help=self.flag.help or field.description)
        return inspect.Parameter(
            self.parameter,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default if self.own and not self.flag.type else None,
            annotation=Annotated[self.flag.type or kind, option],
        )


def flags_of(schema: type[BaseModel], without: Mapping[str, str]) -> Iterator[FieldFlag]:
    """Yield the flags of a schema's fields; `without` maps fields that have none to the reason."""
    for name, field in schema.model_fields.items():
        if name not in without:
            own_flags = [mark for mark in field.metadata if isinstance(mark, Flag)]
            yield from (FieldFlag(schema, name, mark) for mark in own_flags or [Flag()])


def with_flags(work: Callable[..., None], flags: Sequence[FieldFlag]) -> Callable[..., None]:
    """Return the command that runs `work`: `given_fields` becomes flags, others stay."""
    own = inspect.signature(work).parameters
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    options = [context, *(flag.option() for flag in flags)]

    def command(context: typer.Context, **values: Any) -> None:
        given = [flag for flag in flags if is_given(context, flag.parameter)]
        kept = {name: values[name] for name in own if name != "given_fields"}
        work(given_fields=fields_given(given, values), **kept)

    kept = [
        one.replace(kind=one.KEYWORD_ONLY) for name, one in own.items() if name != "given_fields"
    ]
    vars(command)["__signature__"] = inspect.Signature([*options, *kept])
    return command


def is_given(context: typer.Context, parameter: str) -> bool:
    """Return whether the user gave a parameter, so that it is not its default."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def fields_given(given: Sequence[FieldFlag], values: Mapping[str, Any]) -> GivenFields:
    """Return the fields that flags set, by schema; SettingError if two set the same field."""
    given_fields: GivenFields = defaultdict(dict)
    first_flags: dict[tuple[type[BaseModel], str], FieldFlag] = {}
    for one in given:
        first = first_flags.setdefault((one.schema, one.field), one)
        if first is not one:
            what = str(one.schema.model_fields[one.field].description).rstrip(".")
            what = what[0].lower() + what[1:]
            raise SettingError(f"{first.name} and {one.name} both set {what}: give one")
        given_fields[one.schema][one.field] = one.flag.read(values[one.parameter])
    return given_fields
