"""Files that a command is to write."""

from __future__ import annotations

from pathlib import Path

import click


def writable(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file that could not be written once all is done."""
    if path is not None:
        existed = path.exists()
        try:
            path.open("ab").close()
        except OSError as error:
            raise click.BadParameter(f"{path} cannot be written ({error.strerror}); name a file that can be") from error
        if not existed:
            path.unlink()
    return path
