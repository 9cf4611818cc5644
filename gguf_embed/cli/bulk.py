"""`gguf-embed embed` as a job: shards that stay, --resume, --dry-run."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gguf_embed.cli import console, manners, options, stop
from gguf_embed.cli.bulk_place import Place, failed_beside, is_folder, run_before
from gguf_embed.cli.bulk_report import print_forecast, print_report
from gguf_embed.cli.made_with import made_with
from gguf_embed.cli.task import Task, chunked, opened_model, prompt_of
from gguf_embed.errors import BadOption, NativeFailed
from gguf_embed.io.lance import is_table
from gguf_embed.io.vector_types import VECTOR_TYPES
from gguf_embed.jobs.cut import SHARD_ROWS

if TYPE_CHECKING:
    from gguf_embed.engine.embedder import Embedder
    from gguf_embed.engine.options import EncodeOptions
    from gguf_embed.io.record import UnreadableRow
    from gguf_embed.io.shards import ShardFormat
    from gguf_embed.jobs.cache import VectorCache
    from gguf_embed.jobs.cut import Cut
    from gguf_embed.jobs.forecast import Forecast
    from gguf_embed.jobs.job import Job, JobReport
    from gguf_embed.jobs.manifest import FailedPlace
    from gguf_embed.jobs.output import JobOutput
    from gguf_embed.jobs.ray_job import RayJob

TERMINATED: Final = 75
TERMINATED_S: Final = 4.0  # after SIGTERM, whatever is still at work


def add_options(parser: argparse.ArgumentParser) -> None:
    """--resume and its like."""
    group = parser.add_argument_group("long jobs")
    group.add_argument(
        "--resume",
        action="store_true",
        help="begin a job, or go on with one that was killed: the same command, the same result",
    )
    group.add_argument(
        "--other-bits",
        action="store_true",
        help="with --resume: go on also where the model does not run as when the job began; the "
        "last bits of vectors may differ",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="read and tokenize all of it, embed a sample, and tell what it will take",
    )
    group.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        help="a row that cannot be read or embedded: stop there, or go on and put it into "
        "failed.jsonl (default: skip in a job, else stop)",
    )
    options.add_cache(group)
    manners.add_option(group)
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="compute on the machines of a Ray cluster: auto, its address, or local (extra: ray)",
    )
    group.add_argument(
        "--vector-type",
        choices=VECTOR_TYPES,
        default="float32",
        metavar="TYPE",
        help="of vectors in .parquet and .lance: float32 (default), float16, int8 or binary",
    )
    group.add_argument(
        "--shard-rows",
        type=options.positive,
        default=SHARD_ROWS,
        metavar="N",
        help="rows of a shard, fewer of texts of more than 256 bytes: a kill costs what of one is "
        "done (default: %(default)s)",
    )


def wanted(args: argparse.Namespace) -> bool:
    """Whether this is a job. Raises BadOption for what a job cannot do."""
    folder = is_folder(args.output)
    if "://" in args.output:
        raise BadOption(
            f"-o {console.plain(args.output)}: results are files of this machine; name one, or "
            "write with Ray Data: embed_dataset(...).write_parquet(URI), docs/ray.md"
        )
    table = is_table(args.output)
    if args.vector_type != "float32" and not (folder or table):
        raise BadOption(
            f"--vector-type {args.vector_type}: is for a folder, -o DIR/, or a table, -o NAME.lance"
        )
    if args.vector_type == "int8" and table:
        raise BadOption("--vector-type int8: LanceDB does not search it; use float16 or binary")
    job: bool = args.resume or args.dry_run or folder or table
    if args.ray is not None:
        _check_ray(args, folder=folder)
    if job and args.late_chunking:
        raise BadOption("--late-chunking: is not for jobs; leave --resume and --dry-run out")
    if args.other_bits and not args.resume:
        raise BadOption("--other-bits: is for --resume; leave it out")
    if args.resume and args.output == "-":
        raise BadOption("--resume: goes on with a file or a folder; name one with -o")
    return job


def _check_ray(args: argparse.Namespace, *, folder: bool) -> None:
    if not folder:
        raise BadOption(f"--ray {args.ray}: is for a folder, -o DIR/")
    for name, given in (
        ("--cache", args.cache),
        ("--dry-run", args.dry_run),
        ("--server", args.server),
        ("--background", args.background),
    ):
        if given:
            raise BadOption(f"--ray {args.ray}: goes without {name}; leave one of them out")
    if importlib.util.find_spec("ray") is None:
        raise BadOption(
            "--ray: Ray is not installed; pip install 'gguf-embed[ray]', on all machines"
        )


def write_failed_beside(output: str, failed: Sequence[FailedPlace]) -> None:
    """NAME.failed.jsonl for NAME, or none where nothing failed."""
    from gguf_embed.jobs.output import write_failed

    path = failed_beside(Path(output))
    if failed:
        write_failed(path, failed)
    else:
        with suppress(OSError):
            path.unlink()


def run(args: argparse.Namespace, task: Task) -> int:
    """Do the job, or tell what it takes; returns the exit code."""
    began = time.monotonic()
    place = Place(args)
    place.check(task)
    if args.ray is not None:
        from gguf_embed.jobs.ray_job import connect

        connect(args.ray)
    isolated = options.isolated(args, task.total_bytes)
    try:
        with (
            stop.ends_within(TERMINATED_S, TERMINATED),
            opened_model(
                args, isolated=isolated, before=run_before(args, place.folder)
            ) as embedder,
        ):
            options.warn_dimensions(embedder, args.dimensions)
            work = _Work(embedder, args, task, place)
            if args.dry_run:
                print_forecast(work.forecast(), args, embedder)
                return 0
            opened = time.monotonic()
            report = work.run()
            print_report(
                report,
                work.made_with,
                args,
                dim=work.dim,
                failed_file=place.failed,
                open_s=opened - began,
                embed_s=time.monotonic() - opened,
            )
    except stop.Terminated:
        console.say("terminated; the same command with --resume goes on")
        return TERMINATED
    return NativeFailed.exit_code if report.n_failed else 0


class _Work:
    """A job with its model."""

    def __init__(
        self, embedder: Embedder, args: argparse.Namespace, task: Task, place: Place
    ) -> None:
        self.embedder = embedder
        self.args = args
        self.task = task
        self.place = place
        self.prompt = prompt_of(embedder, args)
        self.skips = args.on_error != "stop"
        self.made_with: dict[str, object] = {
            **made_with(embedder, self.prompt, args, chunks=task.chunks),
            "vector_type": args.vector_type,
        }
        self.form = self._form()
        self.schema = self._schema()

    @property
    def options(self) -> EncodeOptions:
        return {
            "prompt": self.prompt,
            "dimensions": self.args.dimensions,
            "normalize": not self.args.no_normalize,
            "truncate": self.args.truncate,
            "on_error": "skip" if self.skips else "raise",
        }

    def cuts(self) -> Iterator[Cut]:
        """The input, cut into shards."""
        from gguf_embed.jobs.cut import cut

        unreadable: list[UnreadableRow] = []
        records = self.task.records(self.args, unreadable.append if self.skips else None)
        if self.task.chunks:
            records = chunked(self.embedder, records, self.prompt, self.args)
        return cut(records, unreadable, shard_rows=self.args.shard_rows)

    def forecast(self) -> Forecast:
        """What it will take."""
        from gguf_embed.jobs.forecast import forecast

        return forecast(self.embedder, self.cuts(), self.form, self.options)

    def run(self) -> JobReport:
        """Do it."""
        from gguf_embed.jobs.manifest import Header
        from gguf_embed.jobs.output import open_output

        self.embedder.encode([], **self.options)  # checks them
        header = Header(
            made_with={**self.made_with, **self._choices()},
            run={**asdict(self.embedder.run_settings), **self._machine()},
        )
        with open_output(self.place.folder, header, resume=self.args.resume) as output:
            self._check_run(output.header.run, header.run)
            with (
                options.opened_cache(self.args) as cache,
                console.progress(
                    "embed", self.task.total_bytes, quiet=self.args.quiet, lines_s=60.0
                ) as bar,
            ):
                job = self._job(output, _Watch(bar), cache)
                try:
                    report = job.run(self.cuts())
                except BaseException:
                    n = len(output.entries)
                    console.say(f"{console.counted(n, 'shard')} done are kept")
                    raise
            if not self.place.whole:
                self._join(output, report)
        if not self.place.whole:
            shutil.rmtree(self.place.folder, ignore_errors=True)
        return report

    def _machine(self) -> dict[str, object]:
        """What else decides the last bits of vectors."""
        if self.args.server is not None:
            return {}
        from importlib.metadata import version  # slow to import

        from gguf_embed.machine.tested import cpu_id

        return {"cpu": cpu_id(), "llama_cpp_python": version("llama-cpp-python")}

    def _check_run(self, before: Mapping[str, object], now: Mapping[str, object]) -> None:
        """Refuse to mix bits of two ways to run, or say it. Raises BadOption."""
        from gguf_embed.jobs.manifest import differences

        unlike = "; ".join(differences(before, now))
        if not unlike:
            return
        if self.args.server is None and not self.args.other_bits:
            raise BadOption(
                f"--resume: the model does not run here as when the job began ({unlike}), and the "
                "last bits of vectors may differ: go on on such a machine and with the same "
                "options, or pass --other-bits"
            )
        console.say(
            f"the model does not run as when the job began ({unlike}): the last bits of vectors "
            "may be other than in an undisturbed run"
        )

    def _job(self, output: JobOutput, watch: _Watch, cache: VectorCache | None) -> Job | RayJob:
        """The work of one machine, or of many."""
        from gguf_embed.jobs.job import Job

        if self.args.ray is None:
            return Job(self.embedder, output, self.form, self.options, watch, cache)
        from gguf_embed.jobs.ray_job import RayJob
        from gguf_embed.jobs.ray_model import ClusterModel

        isolated = self.args.isolated is not False
        model = ClusterModel.of(self.embedder, self.options, isolated=isolated)
        return RayJob(model, output, self.form, watch)

    def _join(self, output: JobOutput, report: JobReport) -> None:
        """One file, or one table, of all shards."""
        from gguf_embed.io.lance import write_table
        from gguf_embed.io.write import join_parts
        from gguf_embed.jobs import manifest

        parts = [output.folder / entry.file for entry in output.entries]
        if self.schema is not None:
            done = hashlib.sha256((output.folder / manifest.NAME).read_bytes()).hexdigest()
            work = output.folder / ".table"
            write_table(self.place.output, parts, self.schema, job=done, work=work)
        else:
            totals = {
                "n_texts": report.n_rows,
                "n_truncated": report.n_truncated,
                "n_failed": report.n_failed,
            }
            join_parts(
                self.place.output,
                parts,
                shape=(report.n_rows, self.dim),
                about={**self.made_with, **totals},
            )
        failed = [each for entry in output.entries for each in entry.failed]
        write_failed_beside(self.args.output, failed)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.args.dimensions or self.embedder.dim

    def _choices(self) -> dict[str, object]:
        """What of the command decides the rows."""
        args = self.args
        return {
            "with_text": args.with_text,
            "keep": args.keep,
            "field": args.field,
            "id_field": args.id_field,
            "whole_file": args.whole_file,
            "shard_rows": args.shard_rows,
        }

    def _form(self) -> ShardFormat:
        from gguf_embed.io.shards import ArrayShards, LineShards, ParquetShards
        from gguf_embed.io.tables import kept_types

        task = self.task
        if self.place.output.suffix.lower() == ".npy" and not self.place.whole:
            return ArrayShards()
        if not self.place.whole and not self.place.table:
            return LineShards(content=task.content)
        types = kept_types(task.sources, task.reading) if task.content.fields else {}
        reading = task.reading
        return ParquetShards(
            dim=self.dim,
            vector_type=self.args.vector_type,
            content=task.content,
            chunks=task.chunks,
            kept=(tuple(types) or None) if reading.keep_all else reading.keep,
            kept_types=types,
            about=self.made_with,
        )

    def _schema(self) -> Any:
        """Of the table that is asked for, or None. Raises BadOption."""
        from gguf_embed.io.lance import table_schema
        from gguf_embed.io.shards import ParquetShards

        if not self.place.table:
            return None
        assert isinstance(self.form, ParquetShards)
        return table_schema(self.form.schema, self.place.output)


class _Watch:
    """Tells a person what happens."""

    def __init__(self, bar: console.ProgressBar) -> None:
        self._bar = bar

    def advance(self, n_texts: int, n_tokens: int, n_bytes: int) -> None:
        self._bar.advance(n_texts, n_tokens, n_bytes)

    def failed(self, row: FailedPlace) -> None:
        console.say(row.shown)
