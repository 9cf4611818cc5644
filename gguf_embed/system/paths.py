"""Where this package keeps what it learns about a machine and what it carries there."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from functools import cache
from pathlib import Path


def home() -> Path:
    """The package's own folder: $GGUF_EMBED_HOME, else one in the user's cache directory."""
    return _ours("LOCALAPPDATA", "AppData/Local", "Library/Caches", "XDG_CACHE_HOME", ".cache")


def portable_wheels() -> Path:
    """Wheels of llama-cpp-python for every CPU that were made here; `install.py` keeps them."""
    return home() / "wheels" / "portable"


def data_home() -> Path:
    """The user's data: $GGUF_EMBED_HOME, else where the system keeps what is no cache."""
    return _ours(
        "LOCALAPPDATA",
        "AppData/Local",
        "Library/Application Support",
        "XDG_DATA_HOME",
        ".local/share",
    )


def config_home() -> Path:
    """What the user chose: $GGUF_EMBED_HOME, else where the system keeps settings."""
    return _ours(
        "APPDATA",
        "AppData/Roaming",
        "Library/Application Support",
        "XDG_CONFIG_HOME",
        ".config",
    )


def _ours(windows: str, in_windows: str, in_macos: str, linux: str, in_linux: str) -> Path:
    """$GGUF_EMBED_HOME; else ours in the folder that a variable of the system names, or its usual
    one in the user's home.
    """
    if chosen := os.environ.get("GGUF_EMBED_HOME"):
        return Path(chosen)
    if sys.platform == "darwin":
        return user_home() / in_macos / "gguf_embed"
    variable, usual = (windows, in_windows) if sys.platform == "win32" else (linux, in_linux)
    return Path(os.environ.get(variable) or user_home() / usual) / "gguf_embed"


def user_home() -> Path:
    """The user's home; a private folder beside the temporary files where the system knows none.

    A container may run as a user id that has no entry in the list of users, without $HOME.
    """
    try:
        return Path.home()
    except RuntimeError:
        return _private_folder()


@cache
def _private_folder() -> Path:
    """A folder that only this user can write, the same in each run where that can be had."""
    user = os.getuid() if sys.platform != "win32" else 0
    folder = Path(tempfile.gettempdir()) / f"gguf_embed-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        # Somebody else may have made a folder of that name, to put in what they like.
        if stat.S_ISDIR(status.st_mode) and status.st_uid == user and not status.st_mode & 0o022:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="gguf_embed-"))
