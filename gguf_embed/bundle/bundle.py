"""All that a machine without internet needs for one model, in one folder, with its own proof.

    written = write(names.resolve("qwen3-embedding:0.6b"), Path("carry"))

What lies in the folder is told in `format`; `unbundle` reads it on the other machine.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from platform import machine, python_version, system
from typing import Final

from gguf_embed import __version__
from gguf_embed.bundle import check, wheels
from gguf_embed.bundle.canary_child import canary_vectors
from gguf_embed.bundle.check import SUMS, files_in
from gguf_embed.bundle.format import (
    ABOUT,
    CANARIES,
    Licence,
    Status,
    description_json,
    is_model_name,
    write_json,
)
from gguf_embed.catalog import catalog
from gguf_embed.engine import canaries
from gguf_embed.errors import (
    BadInput,
    BadModelFile,
    BadOption,
    FetchFailed,
    GgufEmbedError,
    OutputFailed,
)
from gguf_embed.gguf.header import Header, read_header
from gguf_embed.machine.probe import probe
from gguf_embed.store import download, hub, local
from gguf_embed.store.local import Places, Source, file_sha256, mib
from gguf_embed.system.files import check_free, free_bytes, whole_folder

_VENV: Final = "~/gguf-embed"  # not in the folder, where it would be what is not part of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A complete bundle; `sums_sha256` stands for every byte of it."""

    folder: Path
    source: Source
    licence: Licence
    n_files: int
    n_bytes: int
    sums_sha256: str


def write(
    source: Source,
    target: Path,
    *,
    packages_for: str | None = wheels.HERE,
    accept_licence: bool = False,
    progress: download.OnDownload | None = None,
    on_status: Status | None = None,
    at: Places | None = None,
) -> Written:
    """Fetch `source` if need be, and write its bundle as `target`, which appears whole or not.

    `packages_for` is the wheel tag of a machine unlike this one; None carries no Python packages.
    A model whose licence forbids commercial use is fetched only with `accept_licence`. Raises
    BadInput for such a one without it and for a reranker, BadOption for a target that is in use,
    DoesNotFit (the disk), OutputFailed, and what fetching and embedding raise.
    """
    say = on_status or wheels.silent
    at = at or hub.places()
    target = _free_target(target)
    if packages_for is not None:
        wheels.platform_tags(packages_for)
    room_bytes = wheels.ROOM_BYTES if packages_for else 0
    _check_room(target, (source.n_bytes or 0) + room_bytes)
    if source.card is not None and source.card.kind == "reranker":
        raise BadInput(
            f"{source.label} is a reranker: it gives no vectors that would prove it there; carry "
            "its file alone (gguf-embed pull)"
        )
    if not accept_licence and local.located(source, at).path is None:
        download.check_licence(source)
    llama: wheels.LlamaKind | None = None
    with _appearing(target) as folder:
        if packages_for is not None:  # first: they fail sooner than gigabytes move
            llama = wheels.collect(folder / "wheels", packages_for, on_status=say)
        path = download.fetch(source, progress=progress, accept_licence=accept_licence, at=at)
        _check_room(target, path.stat().st_size)
        source, licence = _fill(folder, source, path, at, say)
        about: dict[str, object] = {
            **description_json(source, licence),
            "packages_for": packages_for,
            "llama_cpp": llama,
            "made_by": _versions(),
        }
        shutil.copyfile(check.__file__, folder / "check.py")
        (folder / "README.md").write_text(
            _readme(source, licence, llama, packages_for), encoding="utf-8"
        )
        say("hashing")
        n_files, n_bytes = _seal(folder, about)
    return Written(
        folder=target,
        source=source,
        licence=licence,
        n_files=n_files,
        n_bytes=n_bytes,
        sums_sha256=file_sha256(target / SUMS),
    )


def _fill(
    folder: Path, source: Source, path: Path, at: Places, say: Status
) -> tuple[Source, Licence]:
    """The model with its papers and its proof; what it is called from now on, and its licence."""
    header = read_header(path)
    if header.split[1] > 1:
        raise BadModelFile(
            f"{path}: part of a model in {header.split[1]} files; join them with llama.cpp's "
            "llama-gguf-split --merge, and bundle the whole"
        )
    say(f"copying {source.label} ({mib(header.file_bytes or 0)})")
    # Ollama's files have no ending.
    name = path.name if path.suffix.lower() == ".gguf" else f"{path.name}.gguf"
    copy = folder / "model" / re.sub(r"[^\w.+-]|^\W", "_", name, flags=re.ASCII)
    copy.parent.mkdir()
    shutil.copyfile(path, copy)
    source = _carried(source, header, copy)
    card = source.card or catalog.by_header(header)  # as `unbundle` will find it
    licence = _licence(source, header, at)
    if card is not None:
        shutil.copyfile(catalog.models_dir() / f"{card.id}.toml", folder / "card.toml")
    (folder / "LICENCE.txt").write_text(_licence_text(source, licence), encoding="utf-8")
    say(f"embedding {len(canaries.ALL)} canaries")
    vectors = canary_vectors(copy, card, canaries.ALL, plain=True)
    write_json(folder / CANARIES, {"texts": canaries.ALL, "vectors": vectors.tolist()})
    return source, licence


def _free_target(target: Path) -> Path:
    """The real path of a folder that can become the bundle; raises BadOption or OutputFailed."""
    target = Path(os.path.realpath(target))
    if target.is_dir():
        if n := len(list(target.iterdir())):
            raise BadOption(f"-o {target}: holds {n} files or folders; name a new or empty folder")
        if target.is_mount():
            raise BadOption(
                f"-o {target}: is a disk's own root, which cannot appear at one stroke; name a "
                f"folder in it: {target / 'bundle'}"
            )
    elif target.exists():
        raise BadOption(f"-o {target}: is a file; name a new or empty folder")
    if not target.parent.is_dir():
        raise OutputFailed(
            f"{target}: there is no directory {target.parent}; make it: mkdir -p {target.parent}"
        )
    return target


def _check_room(target: Path, needed_bytes: int) -> None:
    what = f"{target}: the bundle"
    check_free(needed_bytes, target.parent, what, "make room, or name a folder on another disk")


@contextmanager
def _appearing(target: Path) -> Generator[Path]:
    """A folder to fill, which becomes `target` at the end and is gone on failure."""
    with whole_folder(target) as folder:
        try:
            yield folder
        except OSError as error:
            step = "check the permission of its directory"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                step = f"its disk has {mib(free_bytes(target.parent) or 0)} free, make room"
            raise OutputFailed(
                f"{target}: not written: {error.strerror or error}; {step}, or choose another -o"
            ) from error


def _carried(source: Source, header: Header, copy: Path) -> Source:
    """What the file will be called where it is carried to; raises FetchFailed for a wrong one."""
    sha256 = file_sha256(copy)
    if source.sha256 not in (None, sha256):
        raise FetchFailed(
            f"{source.path or source.label} has sha256 {sha256}, expected {source.sha256}: it was "
            "damaged on this disk; delete it and pull it again"
        )
    for card, file in local.catalog_files():
        if file.sha256 == sha256:
            source = local.from_card(card, file)
    name = source.name
    if source.where == "file" and source.path:
        name = source.path.stem
        if catalog.find(name) not in (None, catalog.by_header(header)):
            name = f"{name}-{sha256[:8]}"  # called like a model that it is not
    return replace(
        source,
        name=name,
        n_bytes=copy.stat().st_size,
        sha256=sha256,
        file=source.file if is_model_name(source.file) else copy.name,
        path=None,
        where=None,
    )


def _licence(source: Source, header: Header, at: Places) -> Licence:
    """From the catalog, else the file, else the repository's page."""
    card = source.card or catalog.by_header(header)
    if card is not None:
        return Licence(name=card.licence, url=card.licence_url, commercial=card.commercial)
    name, url = (header.metadata.get(f"general.license{end}") for end in ("", ".link"))
    said = name if isinstance(name, str) else None
    page = f"{at.endpoint}/{source.repo}" if source.repo else None
    if source.repo and not said and not at.offline:
        with suppress(GgufEmbedError):  # the file is here; its page need not be
            said = hub.remote_info(source, at=at).licence
    forbids = (said or "").lower().startswith("cc-by-nc")
    return Licence(
        name=said,
        url=url if isinstance(url, str) else page,
        commercial=False if forbids else None,
    )


def _licence_text(source: Source, licence: Licence) -> str:
    commercial = {
        True: "Commercial use is permitted.",
        False: "Commercial use is NOT permitted.",
        None: "Whether commercial use is permitted: read it.",
    }[licence.commercial]
    head = (
        f"{source.label}\n"
        f"Licence: {licence.name or 'not known: ask whoever made the file'}\n"
        f"{licence.url or ''}\n{commercial}\n"
    )
    if (licence.name or "").lower() != "apache-2.0":
        return head
    text = catalog.models_dir() / f"LICENSE-{catalog.BUILTIN}.txt"  # the licence's own, unfilled
    return f"{head}\n{text.read_text(encoding='utf-8')}"


def _versions() -> dict[str, str]:
    return {
        "gguf_embed": __version__,
        "llama_cpp_python": metadata.version(wheels.LLAMA),
        "python": python_version(),
        "machine": f"{system()} {machine()}, {probe().cpu_model}",
    }


def _readme(
    source: Source, licence: Licence, llama: wheels.LlamaKind | None, packages_for: str | None
) -> str:
    versions = _versions()
    python = ".".join(versions["python"].split(".")[:2])
    if llama is None:
        install = "Install gguf-embed on the machine first: this folder holds no Python packages."
        command = "gguf-embed"
    else:
        command = f"{_VENV}/bin/gguf-embed"
        install = f"""\
Python {python} is needed, of a system like the one below, and nothing from the network:

    python{python} -m venv {_VENV}
    {_VENV}/bin/pip install --no-index --find-links wheels "gguf-embed[cli]"

On Windows `py -{python} -m venv`, and `Scripts` in place of `bin`."""
    if llama == "portable":
        install += """

No compiler is needed. llama.cpp has a library for each kind of CPU, and takes the right one."""
        if packages_for != wheels.HERE:
            install += f"""
The packages are for {packages_for}."""
    elif llama == "source":
        install += f"""

The packages are for {packages_for}. llama.cpp is compiled by that command, in some minutes,
and needs a C++ compiler (Debian: build-essential, Fedora: gcc-c++, macOS: xcode-select --install,
Windows: Visual Studio Build Tools). For a GPU put llama.cpp's flag in front of it:
CMAKE_ARGS="-DGGML_CUDA=on"."""
    elif llama == "native":
        install += f"""

llama.cpp was compiled on this machine, for its CPU:
{versions["machine"]}.
A CPU that lacks what this one has is told on first use; then make the bundle again after
`make wheels`, or with `--for PLATFORM`, which carries the source in place of the binary."""
    return f"""\
# {source.label}, for a machine without internet

Made by gguf_embed {__version__}. Licence: {licence.name or "not known"}; see LICENCE.txt.

Is every byte as it was, and nothing added? Silence says yes. Look before you install anything.

    python{python} -I check.py

{install}

Then the model, which is verified, installed, and proved by the vectors of a few texts:

    {command} unbundle .

It says under which name the model works from now on, offline.
"""


def _seal(folder: Path, about: dict[str, object]) -> tuple[int, int]:
    """Write bundle.json, then the manifest over all that there is; how many files and bytes it is.

    Every file is on disk when this returns, so that the name that comes next says so.
    """
    paths = sorted(files_in(folder)[0])
    about["sizes"] = {path: (folder / path).stat().st_size for path in paths}
    write_json(folder / ABOUT, about)
    paths = sorted([*paths, ABOUT])
    lines = [f"{file_sha256(folder / path)}  {path}\n" for path in paths]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")
    for path in (*paths, SUMS):
        with (folder / path).open("rb+") as file:
            os.fsync(file.fileno())
    n_bytes = sum((folder / path).stat().st_size for path in (*paths, SUMS))
    return len(paths) + 1, n_bytes
