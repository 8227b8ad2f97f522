"""Provide what commands share: quiet loading, rows of text, one line for a mistake."""

import atexit
import gc
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

Force = Annotated[
    bool, typer.Option("--force", help="Replace the file that is to be written, if it exists.")
]


class LateCommand(TyperCommand):
    """A command whose schemas are imported when it is used: `imprompt --help` is quick.

    Its callback returns the function that implements the command.
    """

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Make the command, and parse the arguments for it."""
        assert self.callback is not None
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(self.name, help=self.help)(self.callback())
        return typer.main.get_command(app).make_context(*args, **options)


@contextmanager
def loading() -> Iterator[None]:
    """Suspend garbage collection while imports and weights are loaded.

    Later collections skip the objects that exist by then, because these stay to the end.
    """
    from imprompt.models import collector_waits

    with collector_waits():
        yield
        gc.freeze()
        atexit.register(gc.unfreeze)  # extension modules warn of objects that are left then


def quiet() -> None:
    """Keep the libraries' loading bars and notices out of the terminal.

    The commands show their own progress.
    """
    for name in ("torchao", "torch.utils._pytree"):
        # transformers imports torchao where it is installed
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log

    for log in (diffusers_log, transformers_log):
        log.set_verbosity_error()
        log.disable_progress_bar()
    # datasets reads it when it is imported, which not every run does
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Print labels and values in two columns."""
    wide = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:{wide}}  {value}")


def fail(message: str, code: int = 2) -> None:
    """Print a message as one line on standard error and exit with a code."""
    print("imprompt: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)
