"""Files written whole."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path


def write_atomically(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Replace ``path`` in one step: after a crash or on a full disk it holds the old content or the new.

    Args:
        path: the file to write; its folder exists.
        content: its new bytes.
        keep: where the old file goes. A crash may leave it there while ``path`` is missing.

    Raises OSError if it could not be written; ``path`` is then as before.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the folder may be read-only or gone
            part.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict) -> None:
    """Replace ``path``, like ``write_atomically``, with indented JSON, which knows no NaN (ValueError)."""
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
