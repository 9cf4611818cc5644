"""Where this package keeps what it learns about a machine and what it carries there."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def home() -> Path:
    """The package's own folder: $GGUF_EMBED_HOME, else one in the user's cache directory."""
    if chosen := os.environ.get("GGUF_EMBED_HOME"):
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "gguf_embed"
