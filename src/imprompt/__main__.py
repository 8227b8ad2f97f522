"""Entry point of `python -m imprompt`, for launchers that start modules."""

from imprompt.cli import main

main()
