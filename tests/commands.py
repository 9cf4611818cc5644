"""Commands of the package, run in this process."""

from __future__ import annotations

import pytest

from gguf_embed import cli


def run_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = int(exit.code or 0)
    out, err = capsys.readouterr()
    return code, out, err
