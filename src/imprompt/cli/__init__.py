"""The command line. Commands import what they need when they run, so that `imprompt --help` is quick."""

import atexit
import gc
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer

from imprompt.errors import ImpromptError

app = typer.Typer(
    name="imprompt",
    help="Image prompts for text-to-image diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def commands() -> None:
    """Register every command, once."""
    from imprompt.cli import adapters, data, demo, embed, evaluate, generate, train

    if not app.registered_commands:
        for module in (generate, demo, embed, train, data, evaluate, adapters):
            module.register(app)


def main() -> None:
    """Run a command; a user's mistake is one line on standard error and exit code 2."""
    commands()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to fail
    try:
        app()
    except ImpromptError as error:
        fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def shell() -> None:
    """What a shell starts: `main`, and at its end the process is gone.

    Python would take its modules apart first, one by one: after torch and diffusers that is a second of nothing. What
    libraries registered with atexit runs before, for the first registered runs last.
    """
    code = 1  # of an exception that nobody caught

    def leave() -> None:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # also where nobody reads any more
            os._exit(code)

    atexit.register(leave)
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise


@contextmanager
def loading() -> Iterator[None]:
    """Around imports and weights. The cyclic collector waits, and later leaves out what there is by then: it stays to the end."""
    from imprompt.models import collector_waits

    with collector_waits():
        yield
        gc.freeze()
        atexit.register(gc.unfreeze)  # extension modules complain of what is left then


def quiet() -> None:
    """Keep the libraries' loading bars and notices out of the terminal; the commands show their own progress."""
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao where it is installed
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log

    for log in (diffusers_log, transformers_log):
        log.set_verbosity_error()
        log.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when datasets is imported, which not every run does


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Labels and values in two columns."""
    wide = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:{wide}}  {value}")


def fail(message: str) -> None:
    print("imprompt: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)
