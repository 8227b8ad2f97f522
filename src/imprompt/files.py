"""Whether results can be written, asked before anything is computed."""

import tempfile
from pathlib import Path

from imprompt.errors import SettingError, first_line


def check_folder(folder: Path) -> None:
    """Raise SettingError unless files can be made in `folder`, or where it is to be made. Leaves nothing there."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise SettingError(f"{place} is a file; results need a folder")
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise SettingError(f"{place} may not be written to ({first_line(error)}); give another place") from error
