"""Where the result of a job goes, where it is made, and what an earlier run has left there."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from gguf_embed.cli import console
from gguf_embed.errors import BadInput, BadOption
from gguf_embed.io.lance import check_table, is_table

if TYPE_CHECKING:
    from gguf_embed.cli.task import Task
    from gguf_embed.plan.settings import RunSettings

WORK: Final = ".job"  # the ending of the folder in which what is no folder of shards is made


def is_folder(output: str) -> bool:
    """Whether it is to be a folder of shards."""
    if is_table(output):
        return False
    return output.endswith(("/", os.sep)) or (output != "-" and Path(output).is_dir())


def failed_beside(output: Path) -> Path:
    """The side file of a result that is one file."""
    return output.with_name(output.name + ".failed.jsonl")


class Place:
    """Where the result goes, and where it is made."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.output = Path(args.output)
        self.whole = is_folder(args.output)  # the folder is the result
        self.table = is_table(args.output)
        self.resume: bool = args.resume
        self.folder = self.output if self.whole else self.output.with_name(self.output.name + WORK)
        self.failed = self.folder / "failed.jsonl" if self.whole else failed_beside(self.output)
        self.to_stdout = args.output == "-"

    def check(self, task: Task) -> None:
        """Refuse what cannot be. Raises BadOption."""
        from gguf_embed.io.write import check_name

        if self.to_stdout:
            return
        if self.table:
            self._check_table()
            return
        if not self.whole:
            check_name(self.output, task.content, task.sources.files)
            return
        for source in task.sources:
            if source.path is not None and source.path.resolve().is_relative_to(
                self.folder.resolve()
            ):
                raise BadOption(
                    f"-o {console.plain(str(self.output))}: holds the input "
                    f"{source.name}; choose another folder"
                )

    def _check_table(self) -> None:
        check_table(self.output)
        # With a job under way it may be that job's own: the run was killed before it could tidy.
        if self.output.exists() and not (self.resume and self.folder.exists()):
            raise BadOption(
                f"-o {console.plain(str(self.output))}: is there already, and no table is written "
                "over; remove it, or name another"
            )


def run_before(args: argparse.Namespace, folder: Path) -> RunSettings | None:
    """How the model ran when the job there began; None where there is none, or nothing is known."""
    from gguf_embed.jobs import manifest
    from gguf_embed.plan.settings import RunSettings

    if not args.resume or args.server is not None:
        return None
    try:
        header = manifest.parse((folder / manifest.NAME).read_bytes(), manifest.NAME).header
    except (OSError, BadInput):  # told when the folder is taken
        return None
    names = {each.name for each in fields(RunSettings)}
    if header is None or not names <= header.run.keys():
        return None
    return RunSettings(**{name: cast(Any, header.run[name]) for name in names})
