"""Exceptions that imprompt raises.

Each message is one line that states what is wrong and what would be right.
"""


class ImpromptError(Exception):
    """A mistake of the user, or refused input.

    The command line prints it and exits with its `code`.
    """

    code = 2


class ImageError(ImpromptError):
    """A picture that cannot be read or used."""


class CheckpointError(ImpromptError):
    """An adapter file that is damaged, incomplete, unsafe or of an unknown layout."""


class MismatchError(ImpromptError):
    """An adapter, a base model and an image encoder that were not made for each other."""


class SettingError(ImpromptError):
    """A setting out of its range, or an unknown name."""


class Stopped(ImpromptError):
    """The end of work that a signal asked for; its code is 128 and the signal's number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.code = 128 + signal


# What takes less memory than the default; libraries say that there is too little in their own ways.
SAVING = (
    "out of memory ({}); less is needed with smaller --width and --height, --batch-size 1, "
    "--tiling, --offload or --quantize; in training with a smaller data.size, more "
    "optimization.accumulate or optimization.checkpointing"
)
SHORT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


def out_of_memory(error: BaseException) -> str | None:
    """Return one line about what needs less memory if an error is of too little; else None."""
    told = isinstance(error, MemoryError) or any(
        words in str(error).lower() for words in SHORT_OF_MEMORY
    )
    return SAVING.format(first_line(error)) if told else None


def first_line(error: BaseException) -> str:
    """Return another error's message as one line, without error number and file names."""
    message = (
        (isinstance(error, OSError) and error.strerror)
        or str(error).strip()
        or type(error).__name__
    )
    line = message.splitlines()[0]
    return line if len(line) <= 200 else f"{line[:199]}…"
