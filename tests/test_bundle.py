"""Carrying a model across an air gap: whole, proved, and nothing that was changed on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from conftest import Write
from fakehub import FakeHub
from test_quantize import file_size_limit

from gguf_embed import cli
from gguf_embed.bundle import bundle, check, format, wheels
from gguf_embed.bundle.bundle import write
from gguf_embed.bundle.canary_child import canary_vectors
from gguf_embed.bundle.check import SUMS
from gguf_embed.bundle.format import Licence
from gguf_embed.bundle.unbundle import unbundle
from gguf_embed.catalog import catalog
from gguf_embed.catalog.card import ModelCard
from gguf_embed.engine import canaries
from gguf_embed.engine.embedder import Embedder
from gguf_embed.errors import (
    BadInput,
    BadModelFile,
    BadOption,
    DoesNotFit,
    FetchFailed,
    GgufEmbedError,
    NativeFailed,
    OutputFailed,
)
from gguf_embed.gguf.header import Header, read_header
from gguf_embed.plan.settings import Settings
from gguf_embed.store import download, names
from gguf_embed.store import local as store
from gguf_embed.store.local import Places, Source
from gguf_embed.system import files
from gguf_embed.vectors import Pooling as OurPooling
from gguf_embed.vectors import Vectors

pytestmark = pytest.mark.native

REPO = "someone/tiny-embedder-GGUF"
MODEL = "model/qwen3-Q8_0.gguf"


def fake_collect(folder: Path, platform: str, *, on_status: object) -> wheels.LlamaKind:
    folder.mkdir()
    (folder / "gguf_embed-0-py3-none-any.whl").write_text(f"for {platform}")
    return {wheels.HERE: "native", "win_amd64": "portable"}.get(platform, "source")


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip would bring; tests/test_wheels.py is about that."""
    monkeypatch.setattr(wheels, "collect", fake_collect)


def _remembered(known: dict[Any, Vectors]) -> Callable[..., Vectors]:
    """`canary_vectors`, which starts a child only for what is new in file or question."""

    def vectors(
        path: Path, card: ModelCard | None, texts: Sequence[str], *, plain: bool
    ) -> Vectors:
        asked = (hash_of(path), card and card.id, tuple(texts), plain)
        if asked not in known:
            known[asked] = canary_vectors(path, card, texts, plain=plain)
        return known[asked]

    return vectors


@pytest.fixture(scope="module", autouse=True)
def _children() -> Iterator[None]:
    """Most tests here carry the same few models."""
    remembered = _remembered({})
    with pytest.MonkeyPatch.context() as patch:
        for module in ("bundle", "unbundle"):
            patch.setattr(f"gguf_embed.bundle.{module}.canary_vectors", remembered)
        yield


def places(root: Path, endpoint: str = "http://127.0.0.1:9") -> Places:
    return Places(
        endpoint=endpoint,
        cache=root / "hf" / "hub",
        store=root / "home" / "models",
        ollama=(),
        offline=False,
    )


@pytest.fixture
def at(tmp_path: Path) -> Places:
    """The machine without internet."""
    return places(tmp_path / "there")


@pytest.fixture(scope="module")
def qwen3(tiny_model: Write) -> Path:
    return tiny_model("qwen3", "Q8_0")


@pytest.fixture(scope="module")
def written(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "carry"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wheels, "collect", fake_collect)
        write(names.resolve(qwen3), folder, at=places(folder.parent))
    return folder


@pytest.fixture
def carry(written: Path, tmp_path: Path) -> Path:
    """A bundle to do with as a test likes."""
    return Path(shutil.copytree(written, tmp_path / "carry"))


def hash_of(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def reseal(folder: Path) -> None:
    """Write the manifest anew over what is there, as a forger would."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{hash_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -------------------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    ("architecture", "outtype", "required"),
    [("qwen3", "Q8_0", 0.99), ("bert", "F32", 0.999), ("xlmr", "F16", 0.999)],
)
def test_a_file_arrives_under_its_name(
    tiny_model: Write, tmp_path: Path, at: Places, architecture: str, outtype: str, required: float
):
    path = tiny_model(architecture, outtype)
    made = write(names.resolve(path), tmp_path / "carry", at=at)
    opened = unbundle(tmp_path / "carry", at=at)
    assert opened.name == path.stem
    assert (opened.source.where, opened.source.sha256) == ("store", hash_of(path))
    assert opened.source.path
    assert opened.source.path.is_relative_to(at.store)
    assert opened.source.path.read_bytes() == path.read_bytes()
    assert names.resolve(opened.name, at=replace(at, offline=True)).path == opened.source.path
    assert opened.n_files == made.n_files == len(check.files_in(tmp_path / "carry")[0])
    assert opened.sums_sha256 == made.sums_sha256 == hash_of(tmp_path / "carry" / SUMS)
    assert opened.n_canaries == len(canaries.ALL)
    assert required == opened.min_cosine < opened.canaries.min <= opened.canaries.mean


def test_what_is_in_it(carry: Path, qwen3: Path):
    assert left_in(carry) == [
        *("LICENCE.txt", "README.md", "SHA256SUMS", "bundle.json", "canaries.json"),
        *("check.py", "model", "wheels"),
    ]
    assert (carry / MODEL).read_bytes() == qwen3.read_bytes()
    said = json.loads((carry / "bundle.json").read_text())
    assert said["model"]["sha256"] == hash_of(qwen3)
    assert said["sizes"][MODEL] == qwen3.stat().st_size
    assert (carry / "wheels" / "gguf_embed-0-py3-none-any.whl").read_text() == "for here"
    assert "not known: ask whoever made the file" in (carry / "LICENCE.txt").read_text()
    readme = (carry / "README.md").read_text()
    commands = [line.strip() for line in readme.splitlines() if line.startswith("    ")]
    assert commands == [
        f"python{sys.version_info[0]}.{sys.version_info[1]} -I check.py",
        f"python{sys.version_info[0]}.{sys.version_info[1]} -m venv ~/gguf-embed",
        '~/gguf-embed/bin/pip install --no-index --find-links wheels "gguf-embed[cli]"',
        "~/gguf-embed/bin/gguf-embed unbundle .",
    ]


def test_the_manifest_is_one_for_sha256sum(carry: Path):
    check = ["sha256sum", "--quiet", "--strict", "-c", SUMS]
    assert subprocess.run(check, cwd=carry, check=False).returncode == 0
    (carry / "README.md").write_text("changed")
    assert subprocess.run(check, cwd=carry, check=False, capture_output=True).returncode == 1


def test_the_folder_checks_itself_before_pip_looks_into_it(carry: Path):
    def check_it() -> tuple[int, str]:
        command = [sys.executable, "-I", "check.py"]
        done = subprocess.run(command, cwd=carry, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    assert check_it() == (0, "")
    faults = [add(carry), remove(carry)]
    (carry / "hashlib.py").write_text("raise SystemExit(0)")  # must not be what check.py imports
    code, said = check_it()
    assert code == 1
    assert all(fault in said for fault in faults)
    assert "hashlib.py is not part of it: remove it" in said


@pytest.mark.parametrize("name", ["qwen3", catalog.BUILTIN])
def test_the_vectors_carried_are_those_of_the_plainest_path(
    qwen3: Path, tmp_path: Path, at: Places, name: str
):
    """Short and longish texts in several languages, each alone."""
    source = names.resolve(qwen3 if name == "qwen3" else name)
    write(source, tmp_path / "carry", packages_for=None, at=at)
    said = json.loads((tmp_path / "carry" / "canaries.json").read_text())
    assert said["texts"] == list(canaries.ALL)
    assert min(map(len, canaries.LONG)) > 150 > max(map(len, canaries.SHORT))
    plain = Settings(flash_attn=False, repack=False, tap=False, n_contexts=1, tune=False)
    assert source.path
    with Embedder.open(source.path, settings=plain) as embedder:
        vectors = np.stack([embedder.encode(text, truncate="end") for text in canaries.ALL])
    assert np.abs(np.array(said["vectors"]) - vectors).max() < 1e-6


def test_the_built_in_model(tmp_path: Path, at: Places):
    folder = tmp_path / "carry"
    made = write(names.resolve(catalog.BUILTIN), folder, at=at)
    assert (folder / "card.toml").read_bytes() == (
        catalog.models_dir() / f"{catalog.BUILTIN}.toml"
    ).read_bytes()
    licence = (folder / "LICENCE.txt").read_text()
    assert "https://www.apache.org/licenses/LICENSE-2.0\nCommercial use is permitted." in licence
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in licence
    assert (made.licence.name, made.licence.commercial) == ("Apache-2.0", True)
    opened = unbundle(folder, at=at)
    assert (opened.name, opened.source.path) == (catalog.BUILTIN, catalog.builtin_path())
    assert not at.store.exists()  # it came with the package
    assert opened.licence == made.licence


def test_a_copy_of_a_known_file_is_known(tmp_path: Path, at: Places):
    copy = tmp_path / "renamed.gguf"
    shutil.copyfile(catalog.builtin_path(), copy)
    made = write(names.resolve(copy), tmp_path / "carry", packages_for=None, at=at)
    assert made.source.name == catalog.BUILTIN


@pytest.mark.parametrize(("licence", "commercial"), [("mit", None), ("cc-by-nc-4.0", False)])
def test_from_the_hub(
    qwen3: Path, tmp_path: Path, at: Places, licence: str, commercial: bool | None
):
    with FakeHub() as fake:
        fake.add(REPO, {"q8/tiny-Q8_0.gguf": qwen3.read_bytes()}, licence=licence)
        here = places(tmp_path / "here", fake.url)
        seen: list[tuple[int, int]] = []
        made = write(
            names.resolve(REPO, at=here),
            tmp_path / "carry",
            progress=lambda *bytes_here: seen.append(bytes_here),
            at=here,
        )
    assert seen[-1] == (qwen3.stat().st_size,) * 2
    page = f"{fake.url}/{REPO}"
    assert made.licence == Licence(name=licence, url=page, commercial=commercial)
    opened = unbundle(tmp_path / "carry", at=at)
    offline = replace(at, offline=True)
    for name in (REPO, f"{REPO}:Q8_0", f"hf:{REPO}/q8/tiny-Q8_0.gguf"):
        assert names.resolve(name, at=offline).path == opened.source.path
    assert (opened.name, opened.licence) == (REPO, made.licence)


def test_from_the_catalog(tiny_model: Write, tmp_path: Path, at: Places):
    """Its card says MEAN, the file CLS: the proof must be of what the name will give."""
    card = catalog.find(catalog.BUILTIN)
    assert card
    file = card.file("Q4_K_M")
    path = tiny_model("bert", "F32")
    with FakeHub() as fake:
        fake.add(file.repo, {file.name: path.read_bytes()})
        repo = fake.repos[file.repo]
        repo.commits[file.revision] = repo.commits.pop(repo.branches["main"])
        here = places(tmp_path / "here", fake.url)
        source = names.resolve(f"{catalog.BUILTIN}:Q4_K_M", at=here)
        write(replace(source, n_bytes=None), tmp_path / "carry", at=here)
    opened = unbundle(tmp_path / "carry", at=at)
    assert opened.name == f"{catalog.BUILTIN}:Q4_K_M"
    vectors = np.array(json.loads((tmp_path / "carry" / "canaries.json").read_text())["vectors"])
    settings = Settings(pooling=OurPooling.MEAN, tune=False)
    with Embedder.open(path, settings=settings) as embedder:
        assert np.allclose(vectors[0], embedder.encode(canaries.ALL[0]), atol=1e-3)


def test_a_path_to_a_file_of_the_catalog(
    tiny_model: Write, tmp_path: Path, at: Places, monkeypatch: pytest.MonkeyPatch
):
    """Known by its hash alone: the card applies there, so it must have applied to the canaries."""
    path = tiny_model("bert", "F32")
    card = catalog.find(catalog.BUILTIN)
    assert card
    file = replace(card.file("Q4_K_M"), sha256=hash_of(path))
    monkeypatch.setattr(store, "catalog_files", lambda: [(card, file)])
    assert catalog.by_header(read_header(path)) is None
    assert write(names.resolve(path), tmp_path / "carry", at=at).source.name == card.id
    assert unbundle(tmp_path / "carry", at=at).source.card == card


def test_a_file_called_like_a_model_that_it_is_not(qwen3: Path, tmp_path: Path, at: Places):
    path = tmp_path / "bge-m3.gguf"
    shutil.copyfile(qwen3, path)
    write(names.resolve(path), tmp_path / "carry", at=at)
    opened = unbundle(tmp_path / "carry", at=at)
    assert opened.name == f"bge-m3-{hash_of(qwen3)[:8]}"


@pytest.mark.parametrize("name", ["mein Modell (ä).gguf", ".hidden.gguf", "-x.gguf"])
def test_file_names_that_are_no_good_inside(qwen3: Path, tmp_path: Path, at: Places, name: str):
    path = tmp_path / name
    shutil.copyfile(qwen3, path)
    write(names.resolve(path), tmp_path / "carry", packages_for=None, at=at)
    opened = unbundle(tmp_path / "carry", at=at)
    assert names.resolve(opened.name, at=replace(at, offline=True)).path == opened.source.path


def test_without_and_for_other_packages(qwen3: Path, tmp_path: Path, at: Places):
    source = names.resolve(qwen3)
    write(source, tmp_path / "none", packages_for=None, at=at)
    assert not (tmp_path / "none" / "wheels").exists()
    assert "holds no Python packages" in (tmp_path / "none" / "README.md").read_text()
    write(source, tmp_path / "arm", packages_for="macosx_14_0_arm64", at=at)
    readme = (tmp_path / "arm" / "README.md").read_text()
    assert "for macosx_14_0_arm64" in readme
    assert "C++ compiler" in readme
    assert "for its CPU" not in readme
    write(source, tmp_path / "any", packages_for="win_amd64", at=at)
    readme = (tmp_path / "any" / "README.md").read_text()
    assert "No compiler is needed." in readme
    assert json.loads((tmp_path / "any" / "bundle.json").read_text())["llama_cpp"] == "portable"


def test_a_second_time_changes_nothing(carry: Path, at: Places):
    first, second = (unbundle(carry, at=at).source for _ in range(2))
    assert first == second
    assert left_in(at.store) == [first.sha256]


# ------------------------------------------------------------- what was changed on the way


def tamper(folder: Path) -> str:
    data = bytearray((folder / MODEL).read_bytes())
    data[len(data) // 2] ^= 1
    before = hash_of(folder / MODEL)
    (folder / MODEL).write_bytes(data)
    n = f"{len(data)} bytes"
    changed = hash_of(folder / MODEL)
    return f"{MODEL} was changed or damaged: sha256 {changed}, {n}, expected {before}, {n}"


def cut(folder: Path) -> str:
    path = folder / "wheels" / "gguf_embed-0-py3-none-any.whl"
    path.write_text("for")
    return r"wheels/gguf_embed-0-py3-none-any\.whl was .* 3 bytes, expected \w{64}, 8 bytes"


def change_the_description(folder: Path) -> str:
    edit(folder / "bundle.json", lambda said: said["sizes"].update({"bundle.json": 7}))
    return r"bundle\.json was .* \d+ bytes, expected \w{64}, unknown bytes"


def remove(folder: Path) -> str:
    (folder / "LICENCE.txt").unlink()
    return "LICENCE.txt is missing"


def add(folder: Path) -> str:
    (folder / "wheels" / "numpy-9.whl").write_text("evil")
    return "wheels/numpy-9.whl is not part of it: remove it"


def link(folder: Path) -> str:
    (folder / MODEL).rename(folder.parent / "elsewhere.gguf")
    (folder / MODEL).symlink_to(folder.parent / "elsewhere.gguf")
    return f"{MODEL} is a symbolic link, not a file"


def link_the_folder(folder: Path) -> str:
    (folder / "model").rename(folder.parent / "elsewhere")
    (folder / "model").symlink_to(folder.parent / "elsewhere")
    return "model is a symbolic link, not a file"


def pipe(folder: Path) -> str:
    (folder / "README.md").unlink()
    os.mkfifo(folder / "README.md")
    return "README.md is a device or a pipe, not a file"


def link_the_manifest(folder: Path) -> str:
    (folder / SUMS).rename(folder.parent / "sums")
    (folder / SUMS).symlink_to(folder.parent / "sums")
    return "is no bundle"


@pytest.mark.parametrize(
    "harm",
    [
        *(tamper, cut, change_the_description, remove, add),
        *(link, link_the_folder, pipe, link_the_manifest),
    ],
)
def test_a_changed_bundle_is_named_and_refused(
    carry: Path, at: Places, harm: Callable[[Path], str]
):
    with pytest.raises(GgufEmbedError, match=harm(carry)) as caught:
        unbundle(carry, at=at)
    assert caught.value.exit_code in (2, 6)
    assert not at.store.exists()


def test_everything_that_is_wrong_is_named(carry: Path, at: Places):
    faults = [tamper(carry), remove(carry), add(carry)]
    with pytest.raises(FetchFailed) as caught:
        unbundle(carry, at=at)
    assert all(fault in str(caught.value) for fault in faults)
    assert "Nothing was installed" in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        *("../evil", "/etc/passwd", "model/../../evil", "model/./x", "C:\\evil", "a\\b", "~/x"),
        *(".bashrc", "model//x", "model/", "ba\rd", "\x1b[2Jx"),
    ],
)
def test_a_manifest_that_leads_out_is_refused(carry: Path, at: Places, path: str):
    (carry.parent / "evil").write_text("x")
    with (carry / SUMS).open("a") as file:
        file.write(f"{sha256(b'x').hexdigest()}  {path}\n")
    with pytest.raises(FetchFailed, match=r"SHA256SUMS, line \d+"):
        unbundle(carry, at=at)
    assert not at.store.exists()


@pytest.mark.parametrize("line", ["x", f"{'0' * 64}  {SUMS}", "", f"{'0' * 64}  README.md"])
def test_lines_that_make_no_sense(carry: Path, at: Places, line: str):
    with (carry / SUMS).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(FetchFailed, match="is not a hash, two spaces and a file"):
        unbundle(carry, at=at)


@pytest.mark.parametrize("empty", [True, False])
def test_what_is_no_bundle(tmp_path: Path, at: Places, empty: bool):
    with pytest.raises(BadInput, match="is no bundle, or one that was not finished"):
        unbundle(tmp_path if empty else tmp_path / "none", at=at)


# ---------------------------------------------------- what somebody wrote with a manifest of it


def model(key: str, value: object) -> Callable[[Any], object]:
    return lambda said: said["model"].update({key: value})


BAD_ABOUT = [
    (model("file", "../../evil.gguf"), "model.file is '../../evil.gguf'"),
    (model("file", "/evil.gguf"), "model.file"),
    (model("sha256", "0" * 64), "0 files have the model's sha256, 0000"),
    (model("sha256", "../" * 21 + "x"), "model.sha256"),
    (model("repo", "../x"), "model.repo"),
    (model("revision", "../x"), "model.revision"),
    (model("quant", "\x1b[2J"), "model.quant"),
    (model("name", "a\nb"), "model.name"),
    (model("name", 7), "7 is a int"),
    (model("n_bytes", "7"), "is a str"),
    (lambda said: said.update(format=2), "format 2, this gguf_embed"),
    (lambda said: said.update(model=None), "TypeError"),
    (lambda said: said.pop("licence"), "KeyError: 'licence'"),
    (lambda said: said["licence"].update(commercial="no"), "'no' is a str"),
    (
        lambda said: said["model"].update(repo=None, file=catalog.builtin_path().name),
        "says it is all-minilm-l6-v2 Q8_0",
    ),
]
BAD_CANARIES = [
    (lambda said: said["vectors"].pop(), r"11 canary texts, vectors of shape \(10, 256\)"),
    (lambda said: said.update(texts=[], vectors=[]), "0 canary texts"),
    (lambda said: said["vectors"][0].pop(), "ValueError"),
    (lambda said: said["vectors"][0].__setitem__(0, float("nan")), "not of length 1"),
    (lambda said: said["vectors"][0].__setitem__(0, 1e300), "not of length 1"),
    (lambda said: said.update(vectors=[[0.0] * 256] * 11), "not of length 1"),
    (lambda said: said["texts"].__setitem__(0, 5), "5 is a int"),
    (lambda said: said.update(vectors=[[1.0]] * 11), "of 256 values, its canaries have 1"),
]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        *(("bundle.json", change, message) for change, message in BAD_ABOUT),
        *(("canaries.json", change, message) for change, message in BAD_CANARIES),
    ],
)
def test_a_forged_description_is_refused(
    carry: Path, at: Places, file: str, change: Callable[[Any], object], message: str
):
    edit(carry / file, change)
    reseal(carry)
    with np.errstate(over="ignore"), pytest.raises(FetchFailed, match=message):
        unbundle(carry, at=at)
    assert not at.store.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "holds no JSON object"),
        (b"\xff", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_description_that_is_no_json(carry: Path, at: Places, data: bytes | None, message: str):
    if data is None:
        (carry / "bundle.json").unlink()
    else:
        (carry / "bundle.json").write_bytes(data)
    reseal(carry)
    with pytest.raises(FetchFailed, match=message):
        unbundle(carry, at=at)


@pytest.mark.parametrize("file", ["origin.json", "q8/origin.json", "x", "x.gguf/.gguf", ".x.gguf"])
def test_a_model_that_is_called_like_another_file_of_the_store(carry: Path, at: Places, file: str):
    edit(carry / "bundle.json", model("file", file))
    reseal(carry)
    with pytest.raises(FetchFailed, match=f"model.file is '{re.escape(file)}'"):
        unbundle(carry, at=at)
    assert not at.store.exists()


def test_a_file_without_ending_gets_one(qwen3: Path, tmp_path: Path, at: Places):
    """As those of Ollama."""
    blob = tmp_path / "sha256-0123"
    shutil.copyfile(qwen3, blob)
    source = Source(name="tiny:latest", file=blob.name, path=blob, where="ollama")
    write(source, tmp_path / "carry", packages_for=None, at=at)
    arrived = unbundle(tmp_path / "carry", at=at)
    assert (arrived.source.name, arrived.source.file) == ("tiny:latest", "sha256-0123.gguf")


def hostile(data: bytes) -> bytes:
    """The same model with a negative epsilon, on which llama.cpp aborts its process."""
    key = b"qwen3.attention.layer_norm_rms_epsilon" + struct.pack("<I", 6)
    at = data.index(key) + len(key)
    return data[:at] + struct.pack("<f", -1.0) + data[at + 4 :]


def test_a_model_that_kills_its_process_does_not_kill_this_one(carry: Path, at: Places):
    (carry / MODEL).write_bytes(hostile((carry / MODEL).read_bytes()))
    edit(carry / "bundle.json", model("sha256", hash_of(carry / MODEL)))
    reseal(carry)
    with pytest.raises(BadModelFile):
        unbundle(carry, at=at)
    assert not at.store.exists()


@pytest.mark.parametrize(
    ("death", "error", "message"),
    [
        ("echo 'GGML_ASSERT(eps >= 0) failed' >&2; kill -ABRT $$", BadModelFile, "SIGABRT .*eps"),
        ("kill -KILL $$", NativeFailed, "its process gave no vectors: SIGKILL"),
        ("exit 0", NativeFailed, "its process gave no vectors"),
    ],
)
def test_how_the_child_ends_is_told(
    carry: Path,
    at: Places,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    death: str,
    error: type[GgufEmbedError],
    message: str,
):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{death}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr("gguf_embed.bundle.unbundle.canary_vectors", canary_vectors)
    with pytest.raises(error, match=message):
        unbundle(carry, at=at)
    assert not at.store.exists()


def test_a_text_file_that_would_fill_the_memory(
    carry: Path, at: Places, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(format, "MOST_BYTES", 2000)
    with pytest.raises(FetchFailed, match=r"canaries\.json cannot be read: .* 2000 at most"):
        unbundle(carry, at=at)


def test_other_vectors_than_were_carried(carry: Path, at: Places):
    """One text of eleven is enough: here, each has its neighbour's vector."""
    edit(carry / "canaries.json", lambda said: said["vectors"].append(said["vectors"].pop(0)))
    reseal(carry)
    with pytest.raises(NativeFailed, match=r"canaries differ, the cosine of '.*must be 0\.99; no"):
        unbundle(carry, at=at)
    assert not at.store.exists()


@pytest.mark.parametrize(("angle", "passes"), [(0.13, True), (0.15, False)])
def test_the_tolerance(carry: Path, at: Places, angle: float, passes: bool):
    """Of quantized weights: a cosine of 0.99 is an angle of 0.1415."""

    def turn(said: Any) -> None:
        vector = np.array(said["vectors"][3])
        aside = np.eye(len(vector))[0] - vector[0] * vector
        aside /= np.linalg.norm(aside)
        said["vectors"][3] = (np.cos(angle) * vector + np.sin(angle) * aside).tolist()

    edit(carry / "canaries.json", turn)
    reseal(carry)
    if passes:
        assert unbundle(carry, at=at).canaries.min < 0.995
    else:
        with pytest.raises(NativeFailed, match="1 of 11 canaries differ"):
            unbundle(carry, at=at)


def test_no_room_in_the_store(carry: Path, at: Places, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "free_bytes", lambda _: 1000)
    with pytest.raises(DoesNotFit, match="GGUF_EMBED_HOME"):
        unbundle(carry, at=at)
    assert not [*at.store.rglob("*.gguf"), *at.store.rglob("*.json")]


@pytest.mark.parametrize("name", ["qwen3-Q8_0", "someone/else"])
def test_unbundling_opens_no_socket(carry: Path, at: Places, name: str):
    """In a process that may open none, and that nobody told to be offline."""
    edit(carry / "bundle.json", model("name", name))
    reseal(carry)
    code = f"""
import socket
def refuse(*_, **__):
    raise SystemExit("the network was touched")
class Refuse:
    def __init__(self, *_, **__):
        refuse()
socket.socket, socket.create_connection, socket.getaddrinfo = Refuse, refuse, refuse
from gguf_embed.cli import main
raise SystemExit(main(["unbundle", {str(carry)!r}, "--json"]))
"""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env = {**kept, "GGUF_EMBED_HOME": str(at.store.parent), "HF_HOME": str(at.cache.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (home,) = at.store.glob("*/qwen3-Q8_0.gguf")
    assert json.loads(done.stdout)["file"] == str(home)
    # The other name would ask the Hub for a repository: only the path is of use offline.
    assert json.loads(done.stdout)["model"] == (name if "/" not in name else str(home))


# ------------------------------------------------------------------ nothing half-done appears


@pytest.fixture
def source(qwen3: Path) -> Source:
    return names.resolve(qwen3)


def test_targets_that_make_no_sense(
    source: Source, tmp_path: Path, at: Places, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, error, message in (
        ("full", BadOption, "holds 1 files or folders; name a new or empty folder"),
        ("file", BadOption, "is a file; name a new or empty folder"),
        ("none/carry", OutputFailed, r"there is no directory .*none; make it: mkdir -p"),
    ):
        with pytest.raises(error, match=message):
            write(source, tmp_path / name, at=at)
    with pytest.raises(BadOption, match="--for win32: not a platform of wheels"):
        write(source, tmp_path / "carry", packages_for="win32", at=at)
    assert left_in(tmp_path) == ["file", "full"]
    assert left_in(tmp_path / "full") == ["x"]
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda _: True)
    with pytest.raises(BadOption, match=r"disk's own root.*name a folder in it: .*disk/bundle"):
        write(source, tmp_path / "disk", at=at)


def test_an_empty_folder_and_a_link_to_one(source: Source, tmp_path: Path, at: Places):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    made = write(source, tmp_path / "link", packages_for=None, at=at)
    assert made.folder == tmp_path / "empty"
    assert (tmp_path / "link" / SUMS).exists()


@pytest.mark.parametrize("known", [True, False])
def test_a_full_disk_is_seen_before(
    source: Source, tmp_path: Path, at: Places, monkeypatch: pytest.MonkeyPatch, known: bool
):
    """Before anything is fetched, where the catalog knows the size; else before it is copied."""
    assert source.n_bytes
    needed = source.n_bytes + (wheels.ROOM_BYTES if known else 0)
    monkeypatch.setattr(files, "free_bytes", lambda _: needed - 1)
    if known:
        asked, source = "here", replace(source, path=None, repo=REPO)
    else:
        asked, source = None, replace(source, n_bytes=None)
    with pytest.raises(
        DoesNotFit, match=r"the bundle takes \d+ MiB, the disk of .* has \d+ MiB"
    ) as caught:
        write(source, tmp_path / "carry", packages_for=asked, at=at)
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (needed, needed - 1)
    assert left_in(tmp_path) == []


def test_a_disk_that_fills_up(source: Source, tmp_path: Path, at: Places):
    with (
        file_size_limit(100_000),
        pytest.raises(
            OutputFailed, match=r"carry: not written: File too large; its disk has .* MiB free"
        ),
    ):
        write(source, tmp_path / "carry", at=at)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("error", [FetchFailed, KeyboardInterrupt])
def test_a_failure_at_the_end_leaves_nothing(
    source: Source,
    tmp_path: Path,
    at: Places,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
):
    def fail(*_: object, **__: object) -> NoReturn:
        assert left_in(tmp_path) == [".carry.incomplete"]
        raise error

    monkeypatch.setattr(wheels, "collect", fail)
    with pytest.raises(error):
        write(source, tmp_path / "carry", at=at)
    assert left_in(tmp_path) == []


def test_killed_half_way(source: Source, tmp_path: Path, at: Places):
    """What is left is not accepted, and the next run clears it away."""
    code = f"""
import sys, time
from pathlib import Path
from gguf_embed.bundle import bundle, wheels
from gguf_embed.store import download, names
def hang(folder, about):
    print("hanging", flush=True)
    time.sleep(60)
wheels.collect = lambda folder, platform, *, on_status: folder.mkdir()
bundle._seal = hang
bundle.write(names.resolve({str(source.path)!r}), Path({str(tmp_path / "carry")!r}))
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout
    assert child.stdout.readline() == b"hanging\n"
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=20)
    assert left_in(tmp_path) == [".carry.incomplete"]
    assert (tmp_path / ".carry.incomplete" / MODEL).exists()
    with pytest.raises(BadInput, match="one that was not finished"):
        unbundle(tmp_path / ".carry.incomplete", at=at)
    write(source, tmp_path / "carry", at=at)
    assert left_in(tmp_path) == ["carry"]
    assert unbundle(tmp_path / "carry", at=at).name == "qwen3-Q8_0"


# ----------------------------------------------------------------------- what is not bundled


def test_a_reranker(tmp_path: Path, at: Places):
    with pytest.raises(BadInput, match="is a reranker: it gives no vectors"):
        write(names.resolve("qwen3-reranker-0.6b", at=at), tmp_path / "carry", at=at)


def test_a_licence_is_not_agreed_to_by_itself(
    tmp_path: Path, at: Places, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is fetched, packages included, before the caller agreed."""
    source = names.resolve("jina-embeddings-v5-nano:Q8_0", at=at)
    monkeypatch.setattr(wheels, "collect", None)
    with pytest.raises(BadInput, match=r"CC-BY-NC-4\.0, no commercial use.*--accept-licence"):
        write(source, tmp_path / "carry", at=at)
    with pytest.raises(FetchFailed):  # agreed to: on to the Hub, which is not there
        write(source, tmp_path / "carry", packages_for=None, accept_licence=True, at=at)


def test_a_part_of_a_model(
    source: Source, tmp_path: Path, at: Places, monkeypatch: pytest.MonkeyPatch
):
    assert source.path
    whole = read_header(source.path)
    first: Header = replace(whole, metadata={**whole.metadata, "split.no": 0, "split.count": 2})
    monkeypatch.setattr(bundle, "read_header", lambda _: first)
    with pytest.raises(BadModelFile, match="part of a model in 2 files"):
        write(source, tmp_path / "carry", at=at)
    assert left_in(tmp_path) == []


def test_a_file_that_its_own_disk_damaged(source: Source, tmp_path: Path, at: Places):
    with pytest.raises(FetchFailed, match=r"has sha256 \w{64}, expected 0{64}"):
        write(replace(source, sha256="0" * 64), tmp_path / "carry", at=at)
    assert left_in(tmp_path) == []


# ------------------------------------------------------------------------------- the commands


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at: Places):
    monkeypatch.setenv("GGUF_EMBED_HOME", str(at.store.parent))

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


Run = Callable[..., tuple[int, str, str]]


def test_the_commands_report(run: Run, qwen3: Path, tmp_path: Path):
    code, out, err = run("bundle", qwen3, "-o", tmp_path / "carry", "--json")
    made = json.loads(out)
    assert code == 0, err
    assert "copying" in err
    assert (made["model"], made["sha256"]) == ("qwen3-Q8_0", hash_of(qwen3))
    assert made["licence"] == {"name": None, "url": None, "commercial": None}
    code, out, err = run("unbundle", tmp_path / "carry", "--json")
    opened = json.loads(out)
    assert (code, opened["sums_sha256"]) == (0, made["sums_sha256"])
    assert opened["canaries"]["n"] == 11
    assert 0.99 == opened["canaries"]["required"] < opened["canaries"]["min_cosine"] <= 1
    assert (opened["n_files"], opened["n_bytes"]) == (made["n_files"], qwen3.stat().st_size)
    code, out, err = run("unbundle", tmp_path / "carry", "--quiet")
    assert (code, out, err) == (0, "", "")


def test_the_commands_in_words(run: Run, qwen3: Path, tmp_path: Path):
    code, out, _ = run("bundle", qwen3, "-o", tmp_path / "carry", "--for", "win_amd64")
    assert code == 0
    assert re.search(r"carry: qwen3-Q8_0 Q8_0, 8 files, [\d,]+ bytes\n  licence     not kn", out)
    assert (tmp_path / "carry" / "wheels").exists()
    code, out, _ = run("unbundle", tmp_path / "carry")
    assert code == 0
    assert out.startswith("qwen3-Q8_0 works here offline: ")
    assert "gguf-embed embed notes.txt --model qwen3-Q8_0 -o notes.npy" in out
    assert run("embed", "--text", "x", "--model", "qwen3-Q8_0", "--no-tune")[0] == 0


def test_the_commands_refuse_in_one_line(run: Run, qwen3: Path, tmp_path: Path):
    code, _, err = run("bundle", qwen3, "--quant", "Q4_0", "-o", tmp_path / "carry")
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = run("unbundle", tmp_path)
    assert (code, err.count("\n")) == (2, 2)
    run("bundle", qwen3, "-o", tmp_path / "carry", "--no-wheels")
    tamper(tmp_path / "carry")
    code, out, err = run("unbundle", tmp_path / "carry")
    assert (code, out) == (6, "")
    assert f"{MODEL} was changed or damaged" in err
    with pytest.raises(SystemExit, match="2"):
        run("bundle", qwen3, "-o", tmp_path / "c", "--no-wheels", "--for", "win_amd64")


@pytest.mark.parametrize("name", ["jina-embeddings-v5-text-small", "jina-embeddings-v5-nano:Q8_0"])
@pytest.mark.parametrize("command", ["bundle", "pull"])
def test_a_licence_is_agreed_to_first(
    run: Run, tmp_path: Path, command: str, name: str, monkeypatch: pytest.MonkeyPatch
):
    asked: list[object] = []

    def fetch(source: Source, **_: object) -> NoReturn:
        asked.append(source)
        raise FetchFailed("stop")

    monkeypatch.setattr(download, "fetch", fetch)
    output = ["-o", tmp_path / "carry"] if command == "bundle" else []
    code, _, err = run(command, name, *output)
    assert (code, asked) == (2, [])
    assert "CC-BY-NC-4.0, no commercial use https://creativecommons.org/" in err
    assert "--accept-licence" in err
    assert run(command, name, "--accept-licence", *output)[0] == 6
    assert len(asked) == 1
