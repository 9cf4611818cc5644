"""From names to verified files: against a local Hub, with the real huggingface_hub client."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import gguf as gguf_py
import huggingface_hub
import numpy as np
import pytest
from fakehub import CHUNK, FakeHub, Faults
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import close_session
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from gguf_embed.catalog import catalog
from gguf_embed.errors import (
    BadOption,
    DoesNotFit,
    FetchFailed,
    GgufEmbedError,
    ModelNotFound,
    OutputFailed,
)
from gguf_embed.gguf import header as gguf
from gguf_embed.gguf.cursor import FIRST_CHUNK_BYTES
from gguf_embed.store import download, failures, hub, names
from gguf_embed.store import local as store
from gguf_embed.store.local import Places, Source

pytestmark = pytest.mark.slow

REPO = "someone/tiny-embedder-GGUF"
FILE = "tiny-embedder-Q8_0.gguf"
NAME = f"hf:{REPO}/{FILE}"
QWEN = "Qwen/Qwen3-Embedding-0.6B-GGUF"
OTHER_QWEN = "mradermacher/Qwen3-Embedding-0.6B-GGUF"


def tiny_gguf(path: Path, *, n_rows: int = 4096, seed: int = 0) -> bytes:
    """A valid GGUF with one tensor of n_rows KiB."""
    writer = gguf_py.GGUFWriter(path, "bert")
    writer.add_name("tiny")
    writer.add_token_list([f"token{i}" for i in range(20_000)])
    rows = np.random.default_rng(seed).standard_normal((n_rows, 256), dtype=np.float32)
    writer.add_tensor("token_embd.weight", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_gguf(tmp_path_factory.mktemp("model") / "other.gguf", n_rows=1024, seed=1)


@pytest.fixture(autouse=True)
def _own_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No token, proxy, telemetry or setting of the machine that runs the tests; short waits."""
    for name in [*os.environ]:
        if name.upper().endswith("_PROXY") or name.startswith(("HF_", "HUGGING", "OLLAMA_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(failures, "BACKOFF_S", (0.01,) * 5)
    close_session()  # it holds the proxies of the environment in which it was made
    yield
    close_session()


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    with FakeHub() as server:
        yield server


@pytest.fixture
def at(fake: FakeHub, tmp_path: Path) -> Places:
    return Places(
        endpoint=fake.url,
        cache=tmp_path / "hf" / "hub",
        store=tmp_path / "home" / "models",
        ollama=(tmp_path / "ollama",),
        offline=False,
    )


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise AssertionError("the network was touched")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def partial_of(at: Places, data: bytes, repo: str = REPO) -> Path:
    name = f"{sha256_of(data)}.gguf_embed.incomplete"
    return store.cache_folder(at.cache, repo) / "blobs" / name


def left_over(at: Places) -> list[str]:
    """Every file of the cache but its locks and refs."""
    files = (path for path in at.cache.rglob("*") if path.is_file() or path.is_symlink())
    return [str(path) for path in files if not {".locks", "refs"} & set(path.parts)]


class Child:
    """gguf_embed in a process of its own, with `at` in its environment as a user would set it."""

    def __init__(self, code: str, at: Places, **env: str) -> None:
        kept = {key: os.environ[key] for key in ("PATH", "SYSTEMROOT") if key in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code],
            env={
                **kept,
                "HOME": str(at.cache.parent),
                "HF_ENDPOINT": at.endpoint,
                "HF_HOME": str(at.cache.parent),
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "GGUF_EMBED_HOME": str(at.store.parent),
                "OLLAMA_MODELS": str(at.ollama[0]),
                **env,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def output(self) -> str:
        out, err = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, err
        return out.strip()

    def kill_9(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=30)


FETCH = (
    f"from gguf_embed.store import download, names; print(download.fetch(names.resolve({NAME!r})))"
)


# ------------------------------------------------------------------------------- the fake


def test_the_fake_speaks_the_hubs_protocol(
    fake: FakeHub, at: Places, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything below rests on the fake, so the real client must be content with it."""
    commit = fake.add(REPO, {FILE: model, "README.md": b"# tiny"}, licence="mit")
    fake.add("someone/gated", {FILE: model}, gated=True)
    api = HfApi(endpoint=fake.url)

    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == commit
    assert info.card_data is not None
    assert info.card_data.license == "mit"
    by_path = {file.path: file for file in api.list_repo_tree(REPO)}
    assert by_path[FILE].lfs.sha256 == sha256_of(model)
    assert [file.path for file in api.get_paths_info(REPO, [FILE, "none"])] == [FILE]

    def download(repo: str, file: str = FILE, revision: str | None = None) -> str:
        return hf_hub_download(repo, file, revision=revision, endpoint=fake.url, cache_dir=at.cache)

    assert Path(download(REPO)).read_bytes() == model
    with pytest.raises(EntryNotFoundError):
        download(REPO, "none.gguf")
    with pytest.raises(RevisionNotFoundError):
        download(REPO, revision="v9")
    with pytest.raises(RepositoryNotFoundError):
        download("someone/none")
    with pytest.raises(GatedRepoError):
        download("someone/gated")
    monkeypatch.setenv("HF_TOKEN", fake.token)
    assert Path(download("someone/gated")).read_bytes() == model


# ------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "quant", "repo", "file", "revision"),
    [
        ("qwen3-embedding:0.6b", "Q8_0", QWEN, "Qwen3-Embedding-0.6B-Q8_0.gguf", "370f27d7"),
        ("Qwen3-Embedding-0.6B:f16", None, QWEN, "Qwen3-Embedding-0.6B-f16.gguf", "370f27d7"),
        ("qwen3-embedding:0.6b:F16", "f16", QWEN, "Qwen3-Embedding-0.6B-f16.gguf", "370f27d7"),
        (QWEN, None, QWEN, "Qwen3-Embedding-0.6B-Q8_0.gguf", "370f27d7"),
        (QWEN.lower(), "fp16", QWEN, "Qwen3-Embedding-0.6B-f16.gguf", "370f27d7"),
        (OTHER_QWEN, None, OTHER_QWEN, "Qwen3-Embedding-0.6B.Q6_K.gguf", "8c605f43"),
        (f"{QWEN}:F16", None, QWEN, "Qwen3-Embedding-0.6B-f16.gguf", "370f27d7"),
        (f"hf:{QWEN}/Qwen3-Embedding-0.6B-f16.gguf", None, QWEN, "", "370f27d7"),
        (f"hf:{QWEN}/Qwen3-Embedding-0.6B-f16.gguf@v1", None, QWEN, "", "v1"),
        ("hf:a.b/c_d/sub/e-Q4_K_M.gguf", None, "a.b/c_d", "sub/e-Q4_K_M.gguf", "main"),
        ("hf:a/b/c.gguf@refs/pr/1", None, "a/b", "c.gguf", "refs/pr/1"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_names(
    at: Places, name: str, quant: str | None, repo: str, file: str, revision: str
) -> None:
    source = names.resolve(name, quant, at=at)
    assert (source.repo, source.path) == (repo, None)
    assert source.file == (file or "Qwen3-Embedding-0.6B-f16.gguf")
    assert source.revision.startswith(revision)
    known = repo == QWEN and revision == "370f27d7"
    assert (source.sha256 is not None) == known
    assert (source.card is not None) == (repo in (QWEN, OTHER_QWEN))


@pytest.mark.usefixtures("no_network")
def test_the_builtin_model_is_here(at: Places) -> None:
    source = names.resolve("all-minilm-l6-v2", at=replace(at, offline=True))
    assert (source.where, source.path) == ("package", catalog.builtin_path())
    assert download.fetch(source, at=at) == catalog.builtin_path()


@pytest.mark.usefixtures("no_network")
def test_a_fetched_file_does_not_change_what_the_default_means(at: Places) -> None:
    card = catalog.find(catalog.BUILTIN)
    assert card is not None
    better = card.file("F16")
    folder = store.cache_folder(at.cache, better.repo) / "snapshots" / better.revision
    sparse(folder / better.name, 45_949_216)
    assert names.resolve(catalog.BUILTIN, "F16", at=at).where == "cache"
    assert names.resolve(catalog.BUILTIN, at=at).where == "package"


@pytest.mark.parametrize(
    ("name", "quant", "error", "says"),
    [
        ("qwen3-embeding-8b", None, ModelNotFound, "Did you mean qwen3-embedding-8b"),
        ("xyzzy", None, ModelNotFound, "Here are: all-minilm-l6-v2 Q8_0"),
        ("qwen3-embedding:0.6b", "Q5_0", ModelNotFound, "has no Q5_0; it has: F16 (1,142 MiB)"),
        ("qwen3-embedding:0.6b:Q8_0", "F16", BadOption, "says Q8_0, but F16"),
        ("a/b/c.gguf", None, ModelNotFound, "written hf:owner/repo/file.gguf"),
        ("a/b/c", None, BadOption, "hf:owner/repo/file.gguf"),
        ("hf:a/b/c.bin", None, BadOption, "hf:owner/repo/file.gguf"),
        ("hf:a/b/../../c.gguf", None, BadOption, "cannot name a file, it leads out of"),
        ("hf:a/b/c.gguf@x/../../y", None, BadOption, "cannot name a revision, it leads out of"),
        ("hf:a/b//c.gguf", None, BadOption, "cannot name a file, it is absolute"),
        ("hf:a/b/origin.json", None, BadOption, "that of our own record"),
        ("a--b/c", None, BadOption, "not of the form owner/name"),
        ("hf:a/b/c-00001-of-00002.gguf", None, BadOption, "llama-gguf-split --merge"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_names_that_mean_nothing(
    at: Places, name: str, quant: str | None, error: type[GgufEmbedError], says: str
) -> None:
    with pytest.raises(error) as caught:
        names.resolve(name, quant, at=at)
    assert says in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_a_known_model_without_a_known_file(at: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    card = catalog.find("bge-m3")
    assert card is not None
    monkeypatch.setattr(catalog, "find", lambda _: replace(card, files=()))
    with pytest.raises(ModelNotFound, match=r"convert_hf_to_gguf.py from BAAI/bge-m3 and pass"):
        names.resolve("bge-m3", at=at)


@given(name=st.text(st.sampled_from("aQ8_0:/@.-~ \\\0\u00e9\n") | st.characters(), max_size=12))
@example(name="a" * 5000)
@example(name="a" * 5000 + ".gguf")
@example(name="\0.gguf")
@settings(max_examples=200, deadline=None)
def test_any_name_is_understood_or_refused(name: str) -> None:
    nowhere = Path("no such folder")
    offline = Places(endpoint="", cache=nowhere, store=nowhere, ollama=(), offline=True)
    with suppress(GgufEmbedError):
        names.resolve(name, at=offline)


def test_paths(at: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "models"
    here.mkdir()
    file = here / "mine-fp16.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.chdir(here)
    (here / "mine").write_bytes(b"GGUF")
    for name in (file, str(file), "mine-fp16.gguf", "./mine-fp16.gguf"):
        source = names.resolve(name, at=at)
        assert source.path is not None
        assert source.path.samefile(file)
        assert (source.where, source.quant, source.n_bytes) == ("file", "F16", 4)
        assert download.fetch(source, at=at) == source.path
    assert names.resolve("mine", at=at).path == Path("mine")
    assert names.resolve("../models/mine", at=at).path == Path("../models/mine")
    (here / "bge-m3").touch()  # a known name stays what it is
    assert names.resolve("bge-m3", at=at).repo is not None
    monkeypatch.chdir(tmp_path)
    assert names.resolve("models/mine", at=at).path == Path("models/mine")  # no repository
    with pytest.raises(BadOption, match="one file"):
        names.resolve(file, "Q8_0", at=at)
    with pytest.raises(ModelNotFound, match=r"does not exist; .* holds mine-fp16\.gguf"):
        names.resolve(here / "mein-fp16.gguf", at=at)
    with pytest.raises(ModelNotFound, match=r"is a directory.* holds mine-fp16\.gguf"):
        names.resolve(here, at=at)


def test_an_unknown_repository_is_listed(
    fake: FakeHub, at: Places, model: bytes, other_model: bytes
) -> None:
    fake.add(
        REPO,
        {
            "README.md": b"",
            "tiny-q4_k_m.gguf": other_model,
            "sub/tiny.F16.gguf": model,
            "big-Q8_0-00001-of-00002.gguf": model,
        },
    )
    found = names.sources(REPO, at=at)
    assert [source.file for source in found] == ["sub/tiny.F16.gguf", "tiny-q4_k_m.gguf"]
    assert [source.quant for source in found] == ["F16", "Q4_K_M"]
    assert [source.n_bytes for source in found] == [len(model), len(other_model)]
    assert found[0].sha256 == sha256_of(model)
    assert names.resolve(f"{REPO}:q4_k_m", at=at) == found[1]
    with pytest.raises(ModelNotFound, match=r"has no Q2_K; it has: F16 \(4 MiB\), Q4_K_M"):
        names.resolve(REPO, "Q2_K", at=at)
    fake.add("someone/split", {"big-Q8_0-00001-of-00002.gguf": model})
    with pytest.raises(ModelNotFound, match="only split ones among its 1 files"):
        names.resolve("someone/split", at=at)


def test_what_is_here_is_used_without_asking(
    fake: FakeHub, at: Places, model: bytes, other_model: bytes
) -> None:
    fake.add(REPO, {FILE: model, "tiny-Q4_K_M.gguf": other_model})
    path = download.fetch(names.resolve(REPO, "Q8_0", at=at), at=at)
    changed = model[::-1]
    fake.add(REPO, {FILE: changed})
    before = len(fake.requests)
    for name in (REPO, f"{REPO}:Q8_0", NAME, f"{REPO}@main"):
        source = names.resolve(name, at=at)
        assert (source.path, source.where) == (path, "cache")
    assert len(fake.requests) == before
    # Another revision is asked for, and so is the list of all files.
    newest = fake.repos[REPO].branches["main"]
    source = names.resolve(f"{REPO}@{newest}", at=at)
    assert (source.path, source.sha256) == (None, sha256_of(changed))
    assert names.sources(REPO, at=at)[0].path is None


# ----------------------------------------------------------------------- what is here


def sparse(path: Path, n_bytes: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(n_bytes)
    return path


def ollama_has(root: Path, name: str, sha256: str, n_bytes: int) -> Path:
    """As `ollama pull` leaves it."""
    manifest = root / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:00", "size": 1},
        {
            "mediaType": "application/vnd.ollama.image.model",
            "digest": f"sha256:{sha256}",
            "size": n_bytes,
        },
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return sparse(root / "blobs" / f"sha256-{sha256}", n_bytes)


@pytest.mark.usefixtures("no_network")
def test_an_ollama_blob_with_the_same_hash_is_used(at: Places) -> None:
    wanted = catalog.find(QWEN)
    assert wanted is not None
    file = wanted.file("Q8_0")
    assert file.sha256 is not None
    assert file.n_bytes is not None
    blob = at.ollama[0] / "blobs" / f"sha256-{file.sha256}"
    sparse(blob, file.n_bytes - 1)
    assert names.resolve("qwen3-embedding:0.6b", at=at).path is None  # not the whole file
    sparse(blob, file.n_bytes)
    source = names.resolve("qwen3-embedding:0.6b", at=at)
    assert (source.where, source.path, source.quant) == ("ollama", blob, "Q8_0")
    assert download.fetch(source, at=at) == blob


def test_an_ollama_blob_is_found_when_the_hub_tells_the_hash(
    fake: FakeHub, at: Places, model: bytes
) -> None:
    fake.add(REPO, {FILE: model})
    blob = at.ollama[0] / "blobs" / f"sha256-{sha256_of(model)}"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(model)
    assert download.fetch(names.resolve(NAME, at=at), at=at) == blob
    assert fake.bytes_served == 0


def test_local_models(fake: FakeHub, at: Places, model: bytes, other_model: bytes) -> None:
    fake.add(REPO, {FILE: model})
    cached = download.fetch(names.resolve(NAME, at=at), at=at)
    fake.add(REPO, {FILE: model, "README.md": b"newer"})  # the same bytes in a second snapshot
    download.fetch(names.resolve(f"{NAME}@{fake.repos[REPO].branches['main']}", at=at), at=at)
    sparse(cached.parent / "big-Q8_0-00001-of-00002.gguf", 10)  # a part is no model
    carried = at.cache.parent / "carried.gguf"
    carried.write_bytes(other_model)
    wanted = Source(
        name="mine", quant="Q4_K_M", file="mine-Q4_K_M.gguf", sha256=sha256_of(other_model)
    )
    stored = store.install(carried, wanted, at)
    qwen = catalog.find("qwen3-embedding-0.6b")
    assert qwen is not None
    ollama_has(at.ollama[0], "registry.ollama.ai/library/nomic/latest", "ab" * 32, 10)
    ollama_has(at.ollama[0], "hf.co/a/b/Q4_K_M", str(qwen.file("Q8_0").sha256), 20)
    ollama_has(at.ollama[0], "registry.ollama.ai/library/removed/latest", "cd" * 32, 1).unlink()
    (at.ollama[0] / "manifests" / "registry.ollama.ai" / "library" / "broken").mkdir()
    (at.ollama[0] / "manifests" / "registry.ollama.ai" / "library" / "broken" / "x").write_text("{")

    found = store.local_models(replace(at, offline=True))
    by_where = {source.where: source for source in found}
    assert [source.where for source in found] == ["package", "store", "cache", "ollama", "ollama"]
    assert by_where["cache"].path is not None
    assert by_where["cache"].path.samefile(cached)
    assert by_where["cache"].sha256 == sha256_of(model)
    assert by_where["cache"].label == f"{REPO} Q8_0"
    assert by_where["store"] == stored
    assert [source.name for source in found if source.where == "ollama"] == [
        "hf.co/a/b:Q4_K_M",
        "nomic:latest",
    ]
    assert found[-2].card == qwen  # by its hash
    assert found[-2].quant == "Q8_0"
    assert names.resolve("nomic:latest", at=at).path == found[-1].path
    assert names.resolve("mine", at=at) == stored


def test_install_takes_only_the_right_file(at: Places, tmp_path: Path, model: bytes) -> None:
    file = tmp_path / "carried.gguf"
    file.write_bytes(model[:-1] + b"\0")
    wanted = Source(name="mine", repo=REPO, file=FILE, sha256=sha256_of(model))
    with pytest.raises(FetchFailed, match="not stored"):
        store.install(file, wanted, at)
    assert not [path for path in at.store.rglob("*") if path.is_file()]
    file.write_bytes(model)
    stored = store.install(file, wanted, at)
    assert stored.path is not None
    assert stored.path.read_bytes() == model
    assert store.install(file, wanted, at) == stored  # again is no harm
    # Found offline by the name that it came from, and by its hash under any other.
    offline = replace(at, offline=True)
    assert names.resolve(NAME, at=offline).path == stored.path
    assert names.resolve(REPO, at=offline).path == stored.path
    same = Source(name="x", repo="another/repo", file="y.gguf", sha256=wanted.sha256)
    assert download.fetch(same, at=offline) == stored.path


def test_a_damaged_origin_is_reported_and_left_out(
    at: Places, caplog: pytest.LogCaptureFixture
) -> None:
    for name, text in (("a", "{"), ("b", "[]"), ("c", '{"name": 1}')):
        (at.store / name).mkdir(parents=True)
        (at.store / name / "origin.json").write_text(text)
    assert [source.where for source in store.local_models(at)] == ["package"]
    assert len(caplog.records) == 3


# --------------------------------------------------------------------------- fetching


def test_fetch_makes_the_standard_cache(
    fake: FakeHub, at: Places, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = fake.add(REPO, {f"sub/{FILE}": model})
    monkeypatch.setenv("HF_TOKEN", fake.token)
    seen: list[tuple[int, int]] = []
    path = download.fetch(
        names.resolve(f"hf:{REPO}/sub/{FILE}", at=at),
        progress=lambda done, total: seen.append((done, total)),
        at=at,
    )
    assert path.read_bytes() == model
    assert fake.bytes_served == len(model)
    assert (seen[0], seen[-1]) == ((0, len(model)), (len(model), len(model)))
    assert seen == sorted(seen)
    assert path.readlink() == Path(f"../../../blobs/{sha256_of(model)}")
    assert not list(at.cache.rglob("*.incomplete"))
    # The Hub got the token, its storage did not.
    assert {r.authorization for r in fake.requests if not r.storage} == {f"Bearer {fake.token}"}
    assert {r.authorization for r in fake.requests if r.storage} == {None}

    # Other tools find it without network, by branch and by commit.
    asked = len(fake.requests)
    for revision in (None, commit):
        found = hf_hub_download(
            REPO, f"sub/{FILE}", revision=revision, cache_dir=at.cache, local_files_only=True
        )
        assert Path(found) == path
    scanned = huggingface_hub.scan_cache_dir(at.cache)
    assert not scanned.warnings
    assert scanned.size_on_disk == len(model)
    assert len(fake.requests) == asked


def test_what_the_real_client_fetched_is_used(fake: FakeHub, at: Places, model: bytes) -> None:
    fake.add(REPO, {FILE: model})
    theirs = hf_hub_download(REPO, FILE, endpoint=fake.url, cache_dir=at.cache)
    asked = len(fake.requests)
    source = names.resolve(NAME, at=at)
    assert (source.where, source.path) == ("cache", Path(theirs))
    assert len(fake.requests) == asked


def test_the_same_bytes_under_another_commit_are_not_fetched_again(
    fake: FakeHub, at: Places, model: bytes
) -> None:
    fake.add(REPO, {FILE: model})
    first = download.fetch(names.resolve(NAME, at=at), at=at)
    commit = fake.add(REPO, {FILE: model, "README.md": b""})
    second = download.fetch(names.resolve(f"{NAME}@{commit}", at=at), at=at)
    assert first.parent.name != second.parent.name == commit
    assert second.samefile(first)
    assert fake.bytes_served == len(model)
    # Where the hash is known beforehand, the Hub need not even be asked.
    pinned = Source(name="x", repo=REPO, revision="0" * 40, file=FILE, sha256=sha256_of(model))
    assert download.fetch(pinned, at=replace(at, offline=True)).samefile(first)


def test_killed_twice_and_resumed(fake: FakeHub, at: Places, model: bytes) -> None:
    fake.add(REPO, {FILE: model})
    partial = partial_of(at, model)
    for hold_at in (len(model) // 3, 2 * len(model) // 3):
        faults = fake.faults = Faults(hold_at=hold_at)
        child = Child(FETCH, at)
        assert faults.held.wait(30)
        wait_until(lambda at_least=hold_at - CHUNK: partial.stat().st_size >= at_least)
        child.kill_9()
        assert partial.stat().st_size < len(model)
    fake.faults = Faults()
    path = Path(Child(FETCH, at).output())
    assert path.read_bytes() == model
    assert not partial.exists()
    assert len(model) <= fake.bytes_served <= 1.05 * len(model)
    ranges = [r.byte_range for r in fake.requests if r.storage]
    assert ranges[0] is None
    assert all(ranges[1:])


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_at_once_fetch_once(fake: FakeHub, at: Places, model: bytes) -> None:
    fake.add(REPO, {FILE: model})
    faults = fake.faults = Faults(hold_at=len(model) // 2)
    first = Child(FETCH, at)
    assert faults.held.wait(30)
    second = Child(FETCH, at)
    wait_until(lambda: len(fake.seen("HEAD")) >= 2)  # it knows what it wants, and waits
    time.sleep(0.3)
    faults.hold_at = None
    faults.released.set()
    assert first.output() == second.output()
    assert fake.bytes_served == len(model)
    assert len([r for r in fake.requests if r.storage]) == 1


SMALL = np.random.default_rng(2).bytes(300_000)
_cuts = st.lists(st.integers(1, 100_000) | st.just(0), max_size=8)


@given(cuts=_cuts, ignore_ranges=st.booleans())
@example(cuts=[100, 0, 0, 0, 0, 1, 0, 0, 0, 0], ignore_ranges=False)
@settings(max_examples=20, deadline=None)
def test_cut_connections_are_taken_up_again(cuts: list[int], ignore_ranges: bool) -> None:
    """Wherever they are cut; and with ranges not one byte comes twice."""
    assume(ignore_ranges is False or len(cuts) <= 4)
    assume("00000" not in "".join("0" if cut == 0 else "1" for cut in cuts))
    with FakeHub() as fake, tempfile.TemporaryDirectory() as folder:
        fake.add(REPO, {FILE: SMALL})
        fake.faults.cut_after.extend(cuts)
        fake.faults.ignore_ranges = ignore_ranges
        nowhere = Path(folder, "none")
        at = Places(endpoint=fake.url, cache=Path(folder), store=nowhere, ollama=(), offline=False)
        assert download.fetch(names.resolve(NAME, at=at), at=at).read_bytes() == SMALL
        assert ignore_ranges or fake.bytes_served == len(SMALL)


def test_a_connection_that_stays_cut_is_an_error_and_what_came_is_kept(
    fake: FakeHub, at: Places, model: bytes
) -> None:
    fake.add(REPO, {FILE: model})
    fake.faults.cut_after.extend([100_000] + [0] * 5)
    with pytest.raises(
        FetchFailed, match=r"127\.0\.0\.1.*again and again.*what came so far is kept"
    ):
        download.fetch(names.resolve(NAME, at=at), at=at)
    assert len([r for r in fake.requests if r.storage]) == 6
    assert partial_of(at, model).read_bytes() == model[:100_000]
    fake.faults = Faults()
    assert download.fetch(names.resolve(NAME, at=at), at=at).read_bytes() == model
    assert fake.bytes_served == len(model)


def test_busy_servers_are_waited_for(
    fake: FakeHub, at: Places, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add(REPO, {FILE: model})
    monkeypatch.setattr(failures, "BACKOFF_S", (1.0, 2.0, 4.0, 8.0, 16.0))
    waits: list[float] = []
    monkeypatch.setattr(failures.time, "sleep", waits.append)
    in_20_s = formatdate(time.time() + 20, usegmt=True)
    fake.faults.answers.extend([(429, {"Retry-After": "7"}), (503, {}), (500, {})])
    fake.faults.storage_answers.extend([(503, {}), (429, {"Retry-After": in_20_s}), (408, {})])
    assert download.fetch(names.resolve(NAME, at=at), at=at).read_bytes() == model
    assert waits[:4] == [7.0, 2.0, 4.0, 1.0]
    assert 15 < waits[4] <= 20
    assert waits[5:] == [4.0]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((503, {}), r"has an error of its own \(503\).*HF_ENDPOINT"),
        ((429, {"Retry-After": "0"}), r"too many requests.*HF_TOKEN"),
    ],
)
def test_patience_ends(
    fake: FakeHub, at: Places, model: bytes, answer: tuple[int, dict[str, str]], says: str
) -> None:
    fake.add(REPO, {FILE: model})
    fake.faults.answers.extend([answer] * 100)
    with pytest.raises(FetchFailed, match=says):
        download.fetch(names.resolve(NAME, at=at), at=at)
    assert len(fake.faults.answers) == 94


def test_an_hour_is_not_waited(fake: FakeHub, at: Places, model: bytes) -> None:
    fake.add(REPO, {FILE: model})
    fake.faults.answers.append((429, {"Retry-After": "3600"}))
    with pytest.raises(FetchFailed, match="wait 3600 s"):
        download.fetch(names.resolve(NAME, at=at), at=at)


def test_a_server_without_ranges_begins_anew(fake: FakeHub, at: Places, model: bytes) -> None:
    fake.add(REPO, {FILE: model})
    fake.faults.ignore_ranges = True
    fake.faults.cut_after.extend([1_000_000, 500_000, 2_000_000])
    path = download.fetch(names.resolve(NAME, at=at), at=at)
    assert path.read_bytes() == model
    assert fake.bytes_served == 3_500_000 + len(model)


def test_a_server_without_ranges_that_always_cuts_is_given_up(
    fake: FakeHub, at: Places, model: bytes
) -> None:
    fake.add(REPO, {FILE: model})
    fake.faults.ignore_ranges = True
    fake.faults.cut_after.extend([1_000_000] * 100)
    with pytest.raises(FetchFailed):
        download.fetch(names.resolve(NAME, at=at), at=at)
    assert len(fake.faults.cut_after) == 94


def test_bytes_of_another_range_are_not_taken(fake: FakeHub, at: Places, model: bytes) -> None:
    fake.add(REPO, {FILE: model})
    fake.faults.cut_after.append(1_000_000)
    fake.faults.wrong_ranges = 100
    with pytest.raises(FetchFailed, match=r"asked for bytes=1000000-.*gave 'bytes 999999-"):
        download.fetch(names.resolve(NAME, at=at), at=at)
    assert partial_of(at, model).read_bytes() == model[:1_000_000]
    fake.faults.wrong_ranges = 2
    assert download.fetch(names.resolve(NAME, at=at), at=at).read_bytes() == model


def test_a_stalled_transfer_is_taken_up_again(
    fake: FakeHub, at: Places, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add(REPO, {FILE: model})
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    stalling = fake.faults = Faults(hold_at=1_000_000)

    def recover(done: int, total: int) -> None:
        if stalling.held.is_set():
            fake.faults = Faults()

    source = names.resolve(NAME, at=at)
    assert download.fetch(source, progress=recover, at=at).read_bytes() == model
    assert fake.bytes_served == len(model)


def test_wrong_bytes_are_never_in_place(fake: FakeHub, at: Places, model: bytes) -> None:
    fake.add(REPO, {FILE: model})
    fake.faults.tamper_at = 2_000_000
    with pytest.raises(FetchFailed, match=rf"expected {len(model)} and {sha256_of(model)}"):
        download.fetch(names.resolve(NAME, at=at), at=at)
    assert left_over(at) == []
    assert fake.bytes_served == len(model)


def test_a_file_that_does_not_end_is_cut_off(fake: FakeHub, at: Places, model: bytes) -> None:
    fake.add(REPO, {FILE: model})
    fake.faults.extra_bytes = 64 * 2**20
    with pytest.raises(FetchFailed, match=rf"expected {len(model)} and"):
        download.fetch(names.resolve(NAME, at=at), at=at)
    assert left_over(at) == []
    assert fake.bytes_served < 32 * 2**20  # what the sockets between them hold


@pytest.mark.parametrize("start", [b"not what it should be", None])
def test_a_damaged_start_is_thrown_away(
    fake: FakeHub, at: Places, model: bytes, start: bytes | None
) -> None:
    """A partial file with other bytes, or longer than the file."""
    fake.add(REPO, {FILE: model})
    partial = partial_of(at, model)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(start or model + b"more")
    assert download.fetch(names.resolve(NAME, at=at), at=at).read_bytes() == model
    assert not partial.exists()


def test_a_complete_start_needs_no_bytes(fake: FakeHub, at: Places, model: bytes) -> None:
    """Killed after the last byte and before the rename."""
    fake.add(REPO, {FILE: model})
    partial = partial_of(at, model)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(model)
    assert download.fetch(names.resolve(NAME, at=at), at=at).read_bytes() == model
    assert fake.bytes_served == 0


def test_a_file_that_changed_between_runs_is_not_mixed(
    fake: FakeHub, at: Places, model: bytes, other_model: bytes
) -> None:
    fake.add(REPO, {FILE: model})
    fake.faults.cut_after.extend([500_000] + [0] * 5)
    with pytest.raises(FetchFailed):
        download.fetch(names.resolve(NAME, at=at), at=at)
    fake.faults = Faults()
    fake.add(REPO, {FILE: other_model})
    assert download.fetch(names.resolve(NAME, at=at), at=at).read_bytes() == other_model


def test_a_file_that_changes_during_a_fetch_stays_the_one_begun(
    fake: FakeHub, at: Places, model: bytes, other_model: bytes
) -> None:
    commit = fake.add(REPO, {FILE: model})
    fake.faults.cut_after.append(500_000)

    def push(done: int, total: int) -> None:
        if done == 500_000:
            fake.add(REPO, {FILE: other_model})

    path = download.fetch(names.resolve(NAME, at=at), progress=push, at=at)
    assert path.read_bytes() == model
    assert path.parent.name == commit


def test_another_file_than_the_known_one_is_refused_before_it_moves(
    fake: FakeHub, at: Places, model: bytes
) -> None:
    commit = fake.add(REPO, {FILE: model})
    for known in (
        {"sha256": "ab" * 32},
        {"sha256": sha256_of(model), "n_bytes": len(model) + 1},
    ):
        source = Source(name="tiny", repo=REPO, file=FILE, **known)
        with pytest.raises(FetchFailed, match=rf"not the file that is known.*{FILE}@{commit}"):
            download.fetch(source, at=at)
    assert fake.bytes_served == 0


def test_a_mirror_without_hashes_is_held_to_the_known_one(
    fake: FakeHub, at: Places, model: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    fake.add(REPO, {FILE: model})
    fake.faults.no_hash = True
    wrong = Source(name="tiny", repo=REPO, file=FILE, sha256="ab" * 32)
    with pytest.raises(FetchFailed, match="it was deleted"):
        download.fetch(wrong, at=at)
    assert left_over(at) == []
    assert download.fetch(replace(wrong, sha256=sha256_of(model)), at=at).read_bytes() == model
    assert not caplog.records
    assert download.fetch(names.resolve(NAME, at=at), at=at).read_bytes() == model


def test_a_file_of_unknown_hash_is_said_to_be_unchecked(
    fake: FakeHub, at: Places, model: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    fake.add(REPO, {FILE: model})
    fake.faults.no_hash = True
    assert download.fetch(names.resolve(NAME, at=at), at=at).read_bytes() == model
    assert "only the size was checked" in caplog.text


def test_a_blob_of_the_wrong_size_is_replaced(fake: FakeHub, at: Places, model: bytes) -> None:
    fake.add(REPO, {FILE: model})
    path = download.fetch(names.resolve(NAME, at=at), at=at)
    path.resolve().write_bytes(model[:-5])
    known = Source(name="tiny", repo=REPO, file=FILE, n_bytes=len(model), sha256=sha256_of(model))
    assert download.fetch(known, at=at).read_bytes() == model


def test_without_links_the_file_itself_is_in_the_snapshot(
    fake: FakeHub, at: Places, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add(REPO, {FILE: model})
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True, raising=False)
    path = download.fetch(names.resolve(NAME, at=at), at=at)
    assert path.read_bytes() == model
    assert not path.is_symlink()
    assert left_over(at) == [str(path)]
    assert names.resolve(NAME, at=at).path == path
    assert [source.path for source in names.sources(REPO, at=at)] == [path]


# ------------------------------------------------------------------------------- disks


def test_too_little_disk_is_said_before(
    fake: FakeHub, at: Places, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add(REPO, {FILE: model})
    partial = partial_of(at, model)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(model[:1_000_000])
    rest = len(model) - 1_000_000
    free = io.StringIO()  # anything with an attribute
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    free.free = rest - 1  # type: ignore[attr-defined]
    with pytest.raises(DoesNotFit, match="HF_HOME") as caught:
        download.fetch(names.resolve(NAME, at=at), at=at)
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (rest, rest - 1)
    assert fake.bytes_served == 0
    free.free = rest  # type: ignore[attr-defined]
    download.fetch(names.resolve(NAME, at=at), at=at)


class FullDisk(download.Partial):
    """A disk that is full after so many bytes of one run, and takes few at a time."""

    room = 0

    def __enter__(self) -> FullDisk:
        super().__enter__()
        real, room = self._file, self.room

        class File(io.RawIOBase):
            def write(self, data: Any) -> int:
                nonlocal room
                if room == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                written = real.write(data[: min(room, 50_000)])  # less than was given
                room -= written
                return written

            def fileno(self) -> int:
                return real.fileno()

            def close(self) -> None:
                real.close()

        self._file = File()  # type: ignore[assignment]
        return self


def test_a_disk_that_fills_up_keeps_what_came(
    fake: FakeHub, at: Places, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add(REPO, {FILE: model})
    with monkeypatch.context() as patch:
        patch.setattr(FullDisk, "room", 1_000_001)
        patch.setattr(download, "Partial", FullDisk)
        with pytest.raises(OutputFailed, match=r"is full: .* MiB free, the file has 4 MiB; .*kept"):
            download.fetch(names.resolve(NAME, at=at), at=at)
    assert len([r for r in fake.requests if r.storage]) == 1  # trying again would be no use
    assert partial_of(at, model).read_bytes() == model[:1_000_001]
    monkeypatch.setattr(FullDisk, "room", 10 * len(model))
    monkeypatch.setattr(download, "Partial", FullDisk)
    assert download.fetch(names.resolve(NAME, at=at), at=at).read_bytes() == model
    assert fake.requests[-1].byte_range == "bytes=1000001-"


def test_a_cache_that_cannot_be_written(
    fake: FakeHub, at: Places, tmp_path: Path, model: bytes
) -> None:
    fake.add(REPO, {FILE: model})
    (tmp_path / "file").touch()
    with pytest.raises(OutputFailed, match=r"cannot be written.*HF_HOME"):
        download.fetch(names.resolve(NAME, at=at), at=replace(at, cache=tmp_path / "file" / "hub"))


# ------------------------------------------------------------------------ remote facts


@pytest.mark.parametrize("ignore_ranges", [False, True])
def test_remote_header(
    fake: FakeHub, at: Places, model: bytes, tmp_path: Path, ignore_ranges: bool
) -> None:
    fake.add(REPO, {FILE: model})
    fake.faults.ignore_ranges = ignore_ranges
    fake.faults.cut_after.append(1000)
    (tmp_path / FILE).write_bytes(model)
    local = gguf.read_header(tmp_path / FILE)
    source = names.resolve(NAME, at=at)
    remote = hub.remote_header(source, at=at)
    assert remote == replace(local, source=NAME)
    if not ignore_ranges:
        assert fake.bytes_served <= 1000 + 3 * FIRST_CHUNK_BYTES < len(model) / 4
    path = download.fetch(source, at=at)
    assert hub.remote_header(source, at=replace(at, offline=True)) == replace(
        local, source=str(path)
    )


def test_remote_info(fake: FakeHub, at: Places, model: bytes) -> None:
    commit = fake.add(REPO, {FILE: model}, licence="cc-by-nc-4.0", gated=True)
    source = names.resolve(NAME, at=at)
    assert hub.remote_info(source, at=at) == hub.RemoteInfo(
        commit=commit,
        n_bytes=len(model),
        sha256=sha256_of(model),
        licence="cc-by-nc-4.0",
        gated=True,
    )
    assert len(fake.requests) == 1
    with pytest.raises(ModelNotFound, match=f"no file other.gguf at main; its GGUF files: {FILE}"):
        hub.remote_info(replace(source, file="other.gguf"), at=at)
    with pytest.raises(BadOption, match="on this machine"):
        hub.remote_info(names.resolve("all-minilm-l6-v2", at=at), at=at)


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("hf:someone/gated/x.gguf", FetchFailed, r"accept its terms at http.*/someone/gated.*HF_T"),
        ("hf:someone/private/x.gguf", ModelNotFound, "or it is private.*HF_TOKEN"),
        ("hf:someone/bge-m3-gguf/x.gguf", ModelNotFound, r"no repository .* \(known: bge-m3"),
        ("someone/none", ModelNotFound, "no repository someone/none"),
        (f"{NAME}@v9", ModelNotFound, f"no revision v9; see http.*/{REPO}/commits/main"),
        (f"hf:{REPO}/none.gguf", ModelNotFound, f"no file none.gguf .* GGUF files: {FILE}"),
    ],
)
def test_what_the_hub_refuses(
    fake: FakeHub, at: Places, model: bytes, name: str, error: type[Exception], says: str
) -> None:
    fake.add(REPO, {FILE: model})
    fake.add("someone/gated", {"x.gguf": model}, gated=True)
    fake.add("someone/private", {"x.gguf": model}, private=True)
    with pytest.raises(error, match=says):
        download.fetch(names.resolve(name, at=at), at=at)
    with pytest.raises(error, match=says):
        hub.remote_header(names.resolve(name, at=at), at=at)


def test_tokens(fake: FakeHub, at: Places, model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.add(REPO, {FILE: model}, gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(FetchFailed, match="HF_TOKEN is wrong or expired"):
        download.fetch(names.resolve(NAME, at=at), at=at)
    monkeypatch.setenv("HF_TOKEN", fake.token)
    assert download.fetch(names.resolve(NAME, at=at), at=at).read_bytes() == model


def test_a_server_that_is_no_hub(fake: FakeHub, at: Places) -> None:
    fake.faults.answers.append((200, {"ETag": '"0123456789"'}))
    with pytest.raises(FetchFailed, match="HF_ENDPOINT"):
        download.fetch(names.resolve(NAME, at=at), at=at)


@pytest.mark.parametrize("header", ["X-Repo-Commit", "X-Linked-ETag"])
def test_a_server_cannot_name_files_outside_the_cache(
    fake: FakeHub, at: Places, header: str
) -> None:
    answer = {"X-Repo-Commit": "a" * 40, "X-Linked-ETag": "b" * 64, "X-Linked-Size": "10"}
    fake.faults.answers.append(
        (302, {**answer, header: "../../../../x", "Location": fake.storage_url})
    )
    with pytest.raises(FetchFailed, match="no Hugging Face Hub"):
        download.fetch(names.resolve(NAME, at=at), at=at)
    assert not at.cache.exists()


def test_signed_addresses_are_in_no_message(
    fake: FakeHub, at: Places, model: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    fake.add(REPO, {FILE: model})
    fake.faults.storage_answers.extend([(503, {}), (403, {})])
    with pytest.raises(FetchFailed, match=r"forbids .*403.*HF_TOKEN") as caught:
        download.fetch(names.resolve(NAME, at=at), at=at)
    assert fake.storage_url in str(caught.value)
    assert "503" in caplog.text
    assert "signature" not in str(caught.value) + caplog.text


def test_the_clients_own_offline_mode_counts_too(
    at: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match="offline mode is on"):
        download.fetch(names.resolve(NAME, at=at), at=at)


def test_timeout(fake: FakeHub, at: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.faults.mute = True
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.05)
    with pytest.raises(FetchFailed, match=r"did not answer within .*HF_HUB_DOWNLOAD_TIMEOUT"):
        download.fetch(names.resolve(NAME, at=at), at=at)


def test_no_dns(at: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    nowhere = replace(at, endpoint="http://hub.invalid")
    with pytest.raises(FetchFailed, match=r"name hub\.invalid cannot be resolved.*bundle hf:"):
        download.fetch(names.resolve(NAME, at=nowhere), at=nowhere)


def test_nobody_listens(at: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection is an error at once, not after half a minute."""
    monkeypatch.setattr(failures.time, "sleep", lambda _: pytest.fail("waited"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and no listen
        nobody = replace(at, endpoint=f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(FetchFailed, match=r"no connection to 127\.0\.0\.1.*HF_ENDPOINT"):
            download.fetch(names.resolve(NAME, at=nobody), at=nobody)


def test_tls(fake: FakeHub, at: Places) -> None:
    tls = replace(at, endpoint=fake.url.replace("http:", "https:"))  # a server without TLS
    with pytest.raises(FetchFailed, match=r"no trusted TLS connection.*SSL_CERT_FILE"):
        download.fetch(names.resolve(NAME, at=tls), at=tls)


def test_proxies(fake: FakeHub, at: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """The password of a proxy is in no message."""
    proxy = fake.url.replace("http://", "http://me:secret@")
    shown = fake.url.replace("http://", "")
    monkeypatch.setenv("HTTPS_PROXY", proxy)  # knows no CONNECT
    away = replace(at, endpoint="https://huggingface.co")
    with pytest.raises(FetchFailed, match=f"proxy .*{shown}.*did not let through") as caught:
        download.fetch(names.resolve(NAME, at=away), at=away)
    assert "secret" not in str(caught.value)
    close_session()
    monkeypatch.delenv("HTTPS_PROXY")
    monkeypatch.setenv("HTTP_PROXY", proxy)
    fake.faults.answers.append((407, {}))
    away = replace(at, endpoint="http://hub.invalid")
    monkeypatch.setattr("fakehub._Handler.path", property(proxied_path, keep_path), raising=False)
    with pytest.raises(FetchFailed, match="wants a name and a password"):
        download.fetch(names.resolve(NAME, at=away), at=away)


def keep_path(handler: Any, value: str) -> None:
    handler.asked = value


def proxied_path(handler: Any) -> str:
    return handler.asked.removeprefix("http://hub.invalid")


# ----------------------------------------------------------------------------- offline


@pytest.mark.usefixtures("no_network")
def test_offline_says_what_is_here_and_how_to_bring_the_rest(at: Places) -> None:
    offline = replace(at, offline=True)
    source = names.resolve("qwen3-embedding:0.6b", "Q8_0", at=offline)
    ask: list[Callable[..., object]] = [download.fetch, hub.remote_header, hub.remote_info]
    for function in ask:
        with pytest.raises(ModelNotFound) as caught:
            function(source, at=offline)
        said = str(caught.value)
        assert "offline" in said
        assert "qwen3-embedding-0.6b Q8_0 (610 MiB) is not on this machine" in said
        assert "Here are: all-minilm-l6-v2 Q8_0." in said
        assert "gguf-embed bundle qwen3-embedding-0.6b --quant Q8_0 -o DIR" in said
    for name, bundle in ((REPO, f"bundle {REPO} -o"), (NAME, f"bundle {NAME} -o")):
        with pytest.raises(ModelNotFound, match=bundle):
            download.fetch(names.resolve(name, at=offline), at=offline)


def test_offline_never_touches_the_network(fake: FakeHub, at: Places, model: bytes) -> None:
    """As a user sets it: HF_HUB_OFFLINE, in a process that may open no socket."""
    fake.add(REPO, {FILE: model})
    path = download.fetch(names.resolve(NAME, at=at), at=at)
    asked = len(fake.requests)
    code = f"""
import socket
def refuse(*_, **__):
    raise SystemExit("the network was touched")
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.create_connection = socket.getaddrinfo = refuse
from gguf_embed.store import download, hub, names; from gguf_embed.store import local as store
from gguf_embed.errors import ModelNotFound
for name in ({NAME!r}, {REPO!r}, {REPO + ":Q8_0"!r}):
    path = download.fetch(names.resolve(name))
print(path)
assert names.sources({REPO!r})[0].path == path
assert hub.remote_header(names.resolve({NAME!r})).architecture == "bert"
assert [model.where for model in store.local_models(hub.places())] == ["package", "cache"]
for name in ("qwen3-embedding:8b", "someone/else", "hf:someone/else/x.gguf@v1"):
    try:
        download.fetch(names.resolve(name))
    except ModelNotFound as error:
        assert "offline" in str(error), error
    else:
        raise SystemExit(name)
"""
    assert Child(code, at, HF_HUB_OFFLINE="1").output() == str(path)
    assert len(fake.requests) == asked


def test_importing_reads_and_opens_nothing() -> None:
    code = "import sys, gguf_embed.store.hub; sys.exit('huggingface_hub' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
