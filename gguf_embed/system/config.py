"""What a user chose once for all: a small TOML file that they may edit too.

model = "qwen3-embedding-0.6b"   # of the commands that name none
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from gguf_embed.errors import BadOption
from gguf_embed.system.files import printable, write_whole
from gguf_embed.system.paths import config_home

_MODEL = re.compile(r"^[ \t]*model[ \t]*=.*\n?", re.MULTILINE)


def config_path() -> Path:
    """Where the file is, if there is one."""
    return config_home() / "config.toml"


def default_model() -> str | None:
    """The model of commands that name none; None where none was chosen. Raises BadOption."""
    path = config_path()
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unusable(path, str(error)) from error
    import tomllib  # few have such a file

    try:
        model = tomllib.loads(text).get("model")
    except tomllib.TOMLDecodeError as error:
        raise _unusable(path, str(error)) from error
    if model is not None and not (isinstance(model, str) and model.strip()):
        raise _unusable(path, f"model is {model!r}, not a name")
    return model


def choose_default(model: str | None) -> Path:
    """Keep it as the default, None: no more; what else is in the file stays. Raises OutputFailed.

    Raises BadOption where the file is damaged.
    """
    path = config_path()
    default_model()
    text = path.read_text("utf-8") if path.exists() else ""
    line = "" if model is None else f"model = {json.dumps(model)}\n"
    write_whole(path, line + _MODEL.sub("", text, count=1), make_folder=True)
    return path


def _unusable(path: Path, why: str) -> BadOption:
    return BadOption(f"{printable(path)} cannot be used: {why}; mend or remove it")
