"""Define the command line.

Commands import what they need when they run, so that `imprompt --help` is quick.
"""

import atexit
import io
import os
import sys
from importlib import import_module
from typing import Annotated, NamedTuple

import typer

from imprompt import __version__
from imprompt.cli.console import LateCommand, fail
from imprompt.errors import ImpromptError, out_of_memory

app = typer.Typer(
    name="imprompt",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Command(NamedTuple):
    """One command: its name, and the module of this package and the function that implement it.

    help  of a command whose function is made when it is used: see
          `imprompt.cli.console.LateCommand`
    """

    name: str
    module: str
    function: str
    help: str = ""


COMMANDS = {  # group -> its commands; "" is the program itself
    "": (
        Command(
            "generate", "generate", "generate_command", "Make pictures that follow an image prompt."
        ),
        Command("demo", "demo", "demo"),
        Command("models", "generate", "models"),
        Command("families", "families", "families_command"),
        Command("blocks", "generate", "blocks"),
        Command(
            "embed",
            "embed",
            "embed_command",
            "Encode pictures into a file that can be used as an image prompt in their place.",
        ),
        Command("train", "train", "train_command"),
        Command("inspect", "adapters", "inspect"),
        Command("convert", "adapters", "convert"),
        Command("env", "environment", "env"),
    ),
    "data": (Command("check", "data", "check"), Command("encode", "encode", "encode")),
    "evaluate": (
        Command(
            "run",
            "evaluate",
            "evaluate_command",
            "Make pictures for every item of a set and measure them. The same command again "
            "resumes; torchrun shares the work.",
        ),
        Command("report", "evaluate", "report"),
        Command("compare", "evaluate", "compare"),
    ),
}
GROUPS = {  # group -> its help text
    "data": "Training sets: check them, encode their features.",
    "evaluate": "Measure a model and adapter over a set of pictures.",
}


def program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version, and do nothing else.")
    ] = False,
) -> None:
    """Image prompts for text-to-image diffusion models."""
    if version:
        print(f"imprompt {__version__}")
        raise typer.Exit


def commands() -> None:
    """Register every command, once."""
    if app.registered_commands:
        return
    app.callback(invoke_without_command=True)(program)
    for name, members in COMMANDS.items():
        group = app
        if name in GROUPS:
            group = typer.Typer(help=GROUPS[name], no_args_is_help=True, rich_markup_mode=None)
            app.add_typer(group, name=name)
        for command in members:
            function = getattr(import_module(f"imprompt.cli.{command.module}"), command.function)
            late = {"cls": LateCommand, "help": command.help} if command.help else {}
            group.command(command.name, **late)(function)


def main() -> None:
    """Run a command; a user's mistake is one line on standard error and exit code 2.

    A command that a signal ended exits with 128 and the signal's number.
    """
    commands()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a name that the terminal cannot show must not fail the command
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except ImpromptError as error:
        fail(str(error), error.code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        fail(
            out_of_memory(error)
            or f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        )
    except (MemoryError, RuntimeError) as error:  # torch's errors are RuntimeErrors
        if (message := out_of_memory(error)) is None:
            raise
        fail(message)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def shell() -> None:
    """Run `main` as a shell's program, and end the process without Python's cleanup.

    After torch and diffusers were imported, Python would spend a second on unloading modules.
    Functions that libraries registered with atexit run before: the first registered runs last.
    """
    code = 1  # exit code of an uncaught exception

    def leave() -> None:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # also if the reader of the output is gone
            os._exit(code)

    atexit.register(leave)
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
