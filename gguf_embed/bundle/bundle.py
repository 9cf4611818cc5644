"""All that a machine without internet needs for one model, in one folder, with its own proof.

    written = write(names.resolve("qwen3-embedding:0.6b"), Path("carry"))  # on a connected machine
    opened = unbundle(Path("carry"))                                     # on the other one

    README.md      how to install from the folder
    SHA256SUMS     the hash of every other file, as sha256sum writes and checks it
    bundle.json    what model it is, where it comes from, who made the folder, sizes
    card.toml      what the catalog knows of the model, where it knows it
    LICENCE.txt    its name and address, and its text where we have it
    canaries.json  texts and the vectors that they had here
    model/         the GGUF
    wheels/        the Python packages

The hashes tell a damaged or changed file, not a forger, who would write new ones: whoever must
rule that out compares the hash of SHA256SUMS, which both commands show.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from platform import machine, python_version, system
from typing import Any, Final, TypeAlias, cast

import numpy as np

from gguf_embed import __version__
from gguf_embed.bundle import wheels
from gguf_embed.catalog import catalog
from gguf_embed.catalog.card import ModelCard
from gguf_embed.engine import canaries
from gguf_embed.engine import opening as choice
from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.opening import Settings, found_file
from gguf_embed.errors import (
    BadInput,
    BadModelFile,
    BadOption,
    FetchFailed,
    GgufEmbedError,
    NativeFailed,
    OutputFailed,
)
from gguf_embed.gguf import quants
from gguf_embed.gguf.header import Header, read_header
from gguf_embed.lab.metrics import CosineStats, cosine_stats, cosines
from gguf_embed.machine import probe as hardware
from gguf_embed.store import download, hub, names
from gguf_embed.store import local as store
from gguf_embed.store.local import ORIGIN_KEYS, Places, Source, file_sha256, mib
from gguf_embed.system.files import check_free, free_bytes, whole_folder
from gguf_embed.vectors import Vectors

Status: TypeAlias = Callable[[str], None]

SUMS: Final = "SHA256SUMS"
FORMAT: Final = 1
# Cosine between the vectors of two machines. Over the paths of one machine (flash attention,
# repacked weights, tapped or pooled, alone or in a batch) the least was 0.99999 with weights of 16
# and 32 bits, and 0.9994 with quantized ones (all-MiniLM-L6-v2 and a random Qwen3, Q8_0 to Q2_K).
# Other CPUs and GPUs are given more than ten times that. Wrong pooling or a lost end token is below
# 0.6 with the same two models.
MIN_COSINE: Final = dict.fromkeys(quants.EXACT, 0.999)
MIN_COSINE_QUANTIZED: Final = 0.99

_LINE: Final = re.compile(r"([0-9a-f]{64})  (.+)")
# What is written here; no part begins with a dot, so none leads out of the folder.
_INSIDE: Final = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*", re.ASCII)
_VENV: Final = "~/gguf-embed"  # not in the folder, where it would be what is not part of it
_TEXT_BYTES: Final = 64 * 2**20  # the most that is read into memory of a file from elsewhere
# llama.cpp's own pooling without what makes it fast: the vectors that every fast path must give.
_PLAIN: Final = Settings(flash_attn=False, repack=False, tap=False, n_contexts=1, tune=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence:
    """What is known of a model's licence; None: not known."""

    name: str | None
    url: str | None
    commercial: bool | None  # whether commercial use is permitted


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A complete bundle; `sums_sha256` stands for every byte of it."""

    folder: Path
    source: Source
    licence: Licence
    n_files: int
    n_bytes: int
    sums_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A model that was carried here: `name` is what it is called from now on, without network."""

    name: str
    source: Source  # with its place on this machine
    licence: Licence
    canaries: CosineStats  # carried vectors against those of this machine
    n_canaries: int
    min_cosine: float  # what was asked of each canary
    n_files: int  # that were verified
    sums_sha256: str


# --------------------------------------------------------------------------------- writing


def write(
    source: Source,
    target: Path,
    *,
    packages_for: str | None = wheels.HERE,
    progress: download.Progress | None = None,
    on_status: Status | None = None,
    at: Places | None = None,
) -> Written:
    """Fetch `source` if need be, and write its bundle as `target`, which appears whole or not.

    `packages_for` is the wheel tag of a machine unlike this one; None carries no Python packages.
    Raises BadOption for a target that is in use, DoesNotFit (the disk), OutputFailed, and what
    fetching and embedding raise.
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
    with _appearing(target) as folder:
        if packages_for is not None:  # first: they fail sooner than gigabytes move
            wheels.collect(folder / "wheels", packages_for, on_status=say)
        # Who calls this has shown the licence, as the command line does.
        path = download.fetch(source, progress=progress, accept_licence=True, at=at)
        _check_room(target, path.stat().st_size)
        source, licence = _fill(folder, source, path, at, say)
        about: dict[str, object] = {
            "format": FORMAT,
            "model": {key: getattr(source, key) for key in ORIGIN_KEYS},
            "licence": {key: getattr(licence, key) for key in ("name", "url", "commercial")},
            "packages_for": packages_for,
            "made_by": _versions(),
        }
        (folder / "README.md").write_text(_readme(source, licence, packages_for), encoding="utf-8")
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
    copy = folder / "model" / re.sub(r"[^\w.+-]|^\W", "_", path.name, flags=re.ASCII)
    copy.parent.mkdir()
    shutil.copyfile(path, copy)
    source = _carried(source, header, copy)
    card = source.card or catalog.by_header(header)  # as `unbundle` will find it
    licence = _licence(source, header, at)
    if card is not None:
        shutil.copyfile(catalog.models_dir() / f"{card.id}.toml", folder / "card.toml")
    (folder / "LICENCE.txt").write_text(_licence_text(source, licence), encoding="utf-8")
    say(f"embedding {len(canaries.ALL)} canaries")
    vectors = _embed(copy, card, canaries.ALL, _PLAIN)
    carried = {"texts": canaries.ALL, "vectors": vectors.tolist()}
    _write_json(folder / "canaries.json", carried)
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
    for card, file in store.catalog_files():
        if file.sha256 == sha256:
            source = store.from_card(card, file)
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
        file=source.file if _INSIDE.fullmatch(source.file) else copy.name,
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
        "machine": f"{system()} {machine()}, {hardware.probe().cpu_model}",
    }


def _readme(source: Source, licence: Licence, packages_for: str | None) -> str:
    versions = _versions()
    python = ".".join(versions["python"].split(".")[:2])
    if packages_for is None:
        install = "Install gguf-embed on the machine first: this folder holds no Python packages."
        command = "gguf-embed"
    else:
        command = f"{_VENV}/bin/gguf-embed"
        install = f"""\
Python {python} is needed, of a system like the one below, and nothing from the network:

    python{python} -m venv {_VENV}
    {_VENV}/bin/pip install --no-index --find-links wheels "gguf-embed[cli]"

On Windows `py -{python} -m venv`, and `Scripts` in place of `bin`."""
    if packages_for not in (None, wheels.HERE):
        install += f"""

The packages are for {packages_for}. llama.cpp is compiled by that command, in some minutes,
and needs a C++ compiler (Debian: build-essential, Fedora: gcc-c++, macOS: xcode-select --install,
Windows: Visual Studio Build Tools). For a GPU put llama.cpp's flag in front of it:
CMAKE_ARGS="-DGGML_CUDA=on"."""
    elif packages_for:
        install += f"""

llama.cpp was compiled on this machine, for its CPU:
{versions["machine"]}.
A CPU that lacks what this one has is told on first use; then make the bundle again with
`--for PLATFORM`, which carries the source in place of the binary."""
    return f"""\
# {source.label}, for a machine without internet

Made by gguf_embed {__version__}. Licence: {licence.name or "not known"}; see LICENCE.txt.

Is every byte as it was? (macOS: `shasum -a 256 -c {SUMS}`)

    sha256sum --quiet -c {SUMS}

{install}

Then the model, which is verified, installed, and proved by the vectors of a few texts:

    {command} unbundle .

It says under which name the model works from now on, offline.
"""


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def _seal(folder: Path, about: dict[str, object]) -> tuple[int, int]:
    """Write bundle.json, then the manifest over all that there is; how many files and bytes it is.

    Every file is on disk when this returns, so that the name that comes next says so.
    """
    paths = sorted(_files(folder)[0])
    about["sizes"] = {path: (folder / path).stat().st_size for path in paths}
    _write_json(folder / "bundle.json", about)
    paths = sorted([*paths, "bundle.json"])
    lines = [f"{file_sha256(folder / path)}  {path}\n" for path in paths]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")
    for path in (*paths, SUMS):
        with (folder / path).open("rb+") as file:
            os.fsync(file.fileno())
    n_bytes = sum((folder / path).stat().st_size for path in (*paths, SUMS))
    return len(paths) + 1, n_bytes


# ------------------------------------------------------------------------------ unbundling


def unbundle(folder: Path, *, on_status: Status | None = None, at: Places | None = None) -> Opened:
    """Verify a bundle, prove its model by the canaries, then install it into our store.

    Opens no socket. Raises BadInput for what is no bundle, FetchFailed for one that is not as it
    was written (every such file is named), NativeFailed where this machine gives other vectors;
    nothing is installed then.
    """
    say = on_status or wheels.silent
    at = replace(at or hub.places(), offline=True)
    say(f"verifying {folder}")
    n_files, about = _verified(folder)
    say(f"embedding the canaries of {about.source.label}")
    header = read_header(about.path)
    vectors = _embed(
        about.path,
        about.source.card or catalog.by_header(header),
        about.texts,
        Settings(tune=False),
    )
    min_cosine = min(MIN_COSINE.get(t, MIN_COSINE_QUANTIZED) for t in header.matrix_types)
    _check_canaries(about, vectors, min_cosine)
    say("installing")
    stored = _installed(about, at)
    return Opened(
        name=_name(stored, at),
        source=stored,
        licence=about.licence,
        canaries=cosine_stats(vectors, about.vectors),
        n_canaries=len(about.texts),
        min_cosine=min_cosine,
        n_files=n_files,
        sums_sha256=file_sha256(folder / SUMS),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _About:
    """What a bundle says of itself, checked."""

    source: Source
    path: Path  # of the GGUF
    licence: Licence
    texts: tuple[str, ...]
    vectors: Vectors


def _verified(folder: Path) -> tuple[int, _About]:
    """The number of files, all as the manifest says, and what the bundle says of itself."""
    sums = _read_sums(folder)
    found, faults = _files(folder)
    faults += [f"{path} is missing" for path in sorted(sums.keys() - found)]
    extra = sorted(found - sums.keys() - {SUMS})
    faults += [f"{path} is not part of it: remove it" for path in extra]
    wrong: dict[str, str] = {}
    for path in sorted(sums.keys() & found):
        try:
            sha256 = file_sha256(folder / path)
        except OSError as error:
            faults.append(f"{path} cannot be read ({error.strerror or error})")
            continue
        if sha256 != sums[path]:
            wrong[path] = sha256
    sizes = {} if "bundle.json" in wrong else _sizes(folder)
    faults += [
        f"{path} was changed or damaged: sha256 {sha256}, {(folder / path).stat().st_size} bytes, "
        f"expected {sums[path]}, {sizes.get(path, 'unknown')} bytes"
        for path, sha256 in wrong.items()
    ]
    if faults:
        shown = "; ".join(faults[:10])
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise FetchFailed(
            f"{folder} is not as it was written: {shown}{more}. Nothing was installed; carry it "
            "here again"
        )
    return len(found), _about(folder, sums)


def _sizes(folder: Path) -> dict[str, object]:
    """What each file should have, for messages only."""
    with suppress(FetchFailed):
        sizes = _read_json(folder / "bundle.json").get("sizes")
        if isinstance(sizes, dict):
            return cast("dict[str, object]", sizes)
    return {}


def _read_sums(folder: Path) -> Mapping[str, str]:
    """Path -> sha256, of paths that stay inside the folder."""
    manifest = folder / SUMS
    if manifest.is_symlink() or not manifest.is_file():
        what = "holds no" if folder.is_dir() else "is not a folder with"
        raise BadInput(
            f"{folder} {what} {SUMS}, so it is no bundle, or one that was not finished; make it "
            "with gguf-embed bundle MODEL -o DIR"
        )
    sums: dict[str, str] = {}
    for number, line in enumerate(_text(manifest).splitlines(), 1):
        match = _LINE.fullmatch(line)
        path = match[2] if match else ""
        if match is None or path in sums or path == SUMS:
            raise FetchFailed(
                f"{manifest}, line {number}: {line[:200]!r} is not a hash, two spaces and a file "
                "that no other line names; nothing was installed"
            )
        if not _INSIDE.fullmatch(path):
            raise FetchFailed(
                f"{manifest}, line {number}: {path!r} leads out of the folder or is no name that "
                "bundle writes; nothing was installed"
            )
        sums[path] = match[1]
    return sums


def _files(folder: Path) -> tuple[set[str], list[str]]:
    """The files of a folder at any depth, and what is neither file nor folder; follows no link."""
    files: set[str] = set()
    odd: list[str] = []
    pending = [folder]
    while pending:
        for entry in sorted(pending.pop().iterdir()):
            path, mode = entry.relative_to(folder).as_posix(), entry.lstat().st_mode
            if stat.S_ISDIR(mode):
                pending.append(entry)
            elif stat.S_ISREG(mode):
                files.add(path)
            else:
                kind = "a symbolic link" if stat.S_ISLNK(mode) else "a device or a pipe"
                odd.append(f"{path} is {kind}, not a file")
    return files, odd


def _about(folder: Path, sums: Mapping[str, str]) -> _About:
    """What bundle.json and canaries.json say, which may come from anybody."""
    try:
        said = _read_json(folder / "bundle.json")
        if said["format"] != FORMAT:
            raise ValueError(f"format {said['format']!r}, this gguf_embed {__version__} knows 1")
        source = Source(**{key: _origin(key, said["model"][key]) for key in ORIGIN_KEYS})
        paths = [path for path, sha256 in sums.items() if sha256 == source.sha256]
        if len(paths) != 1:
            raise ValueError(f"{len(paths)} files have the model's sha256, {source.sha256}")
        told = said["licence"]
        licence = Licence(
            name=_kind(told["name"], str, type(None)),
            url=_kind(told["url"], str, type(None)),
            commercial=_kind(told["commercial"], bool, type(None)),
        )
        carried = _read_json(folder / "canaries.json")
        texts = tuple(_kind(text, str) for text in carried["texts"])
        vectors = np.array(carried["vectors"], np.float64)
        if not texts or vectors.shape[:1] != (len(texts),) or vectors.ndim != 2:
            raise ValueError(f"{len(texts)} canary texts, vectors of shape {vectors.shape}")
        if not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3):
            raise ValueError("the vector of a canary is not of length 1")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FetchFailed(
            f"{folder}: bundle.json or canaries.json is not what bundle writes: "
            f"{type(error).__name__}: {error}; nothing was installed"
        ) from error
    _check_known(source)
    return _About(
        source=replace(source, card=store.card_of(source)),
        path=folder / paths[0],
        licence=licence,
        texts=texts,
        vectors=vectors.astype(np.float32),
    )


_NAMES: Final = {
    "name": r"[^\x00-\x1f]{1,300}",
    "quant": quants.PATTERN,
    "repo": r"\w[\w.-]*/\w[\w.-]*",
    "revision": r"(\w[\w.-]*(/\w[\w.-]*)*)?",  # none of the built-in file
    "file": _INSIDE.pattern,
    "sha256": store.SHA256.pattern,
}
_OPTIONAL: Final = frozenset({"quant", "repo"})


def _origin(key: str, value: object) -> Any:
    """One field of the model's origin: some of them become paths and names on this machine."""
    if key == "n_bytes":
        return _kind(value, int)
    if value is None and key in _OPTIONAL:
        return None
    if not re.fullmatch(_NAMES[key], _kind(value, str), re.ASCII | re.IGNORECASE):
        raise ValueError(f"model.{key} is {value!r}")
    return value


def _kind(value: Any, *kinds: type) -> Any:
    """The value, of one of these very types."""
    if type(value) not in kinds:
        raise TypeError(f"{value!r} is a {type(value).__name__}")
    return value


def _check_known(source: Source) -> None:
    """A file that claims to be one of the catalog must have the hash that the catalog knows."""
    for card, file in store.catalog_files():
        same = (file.repo, file.name) == (source.repo or "", source.file)
        if same and file.sha256 not in (None, source.sha256):
            raise FetchFailed(
                f"it says it is {card.id} {file.quant} ({source.file}), but that has sha256 "
                f"{file.sha256}, and this {source.sha256}; nothing was installed"
            )


def _check_canaries(about: _About, vectors: Vectors, min_cosine: float) -> None:
    if vectors.shape != about.vectors.shape:
        raise FetchFailed(
            f"{about.source.label} gives vectors of {vectors.shape[1]} values, its canaries have "
            f"{about.vectors.shape[1]}: they are of another model; nothing was installed"
        )
    values = cosines(vectors, about.vectors)
    worst = int(values.argmin())
    if values[worst] < min_cosine:
        n_far = int((values < min_cosine).sum())
        raise NativeFailed(
            f"{about.source.label} does not give here the vectors that it gave where it was "
            f"bundled: {n_far} of {len(values)} canaries differ, the cosine of "
            f"{about.texts[worst][:40]!r} is {values[worst]:.4f} and must be {min_cosine}; nothing "
            "was installed. gguf-embed doctor tells whether this llama.cpp works here"
        )


def _installed(about: _About, at: Places) -> Source:
    for card, file in store.catalog_files():
        if file.builtin and file.sha256 == about.source.sha256:
            return store.from_card(card, file)  # it came with the package
    return store.install(about.path, about.source, at)


def _name(stored: Source, at: Places) -> str:
    """The shortest name that means this very file from now on; its path where none does."""
    spellings: list[str] = []
    for name in (stored.name, stored.repo):
        spellings += [name, f"{name}:{stored.quant}"] if name else []
    if stored.repo:
        spellings.append(f"hf:{stored.repo}/{stored.file}")
    for name in spellings:
        with suppress(GgufEmbedError):
            if names.resolve(name, at=at).path == stored.path:
                return name
    return str(stored.path)


# ------------------------------------------------------------------------------ both of them


def _embed(path: Path, card: ModelCard | None, texts: Sequence[str], settings: Settings) -> Vectors:
    """One vector per text, each embedded alone: quantized weights differ a little with company."""
    chosen = choice.choose_file(path, card, hardware.probe(), settings)
    with Embedder(found_file(chosen, path, settings), settings) as embedder:
        return np.stack([embedder.encode(text, truncate="end") for text in texts])


def _text(path: Path) -> str:
    """A small text file from elsewhere."""
    try:
        if (n_bytes := path.stat().st_size) > _TEXT_BYTES:
            raise ValueError(f"{n_bytes} bytes, {_TEXT_BYTES} at most are read")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FetchFailed(f"{path} cannot be read: {error}; nothing was installed") from error


def _read_json(path: Path) -> dict[str, Any]:
    """An object; raises FetchFailed."""
    try:
        said = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise FetchFailed(f"{path} is not JSON: {error}; nothing was installed") from error
    if not isinstance(said, dict):
        raise FetchFailed(f"{path} holds no JSON object; nothing was installed")
    return cast("dict[str, Any]", said)
