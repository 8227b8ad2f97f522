"""What commands share: loading without the libraries' notices, rows of text, one line for a
mistake.
"""

import atexit
import gc
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand


class LateCommand(TyperCommand):
    """Stands for a command whose schemas are imported when it is used: `imprompt --help` is quick.

    Its callback returns the function that the command is.
    """

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Make the command, and parse the words for it."""
        assert self.callback is not None
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(self.name, help=self.help)(self.callback())
        return typer.main.get_command(app).make_context(*args, **options)


@contextmanager
def loading() -> Iterator[None]:
    """Around imports and weights.

    The cyclic collector waits, and later leaves out what there is by then: it stays to the end.
    """
    from imprompt.models import collector_waits

    with collector_waits():
        yield
        gc.freeze()
        atexit.register(gc.unfreeze)  # extension modules complain of what is left then


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
    # read when datasets is imported, which not every run does
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Labels and values in two columns."""
    wide = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:{wide}}  {value}")


def fail(message: str) -> None:
    print("imprompt: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)
