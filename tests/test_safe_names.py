"""Names from outside: only what may become a path does, and nothing else is touched."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from fakehub import FakeHub
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from hypothesis import example, given
from hypothesis import strategies as st

from gguf_embed.errors import (
    BadInput,
    BadModelFile,
    BadOption,
    FetchFailed,
    GgufEmbedError,
    ModelNotFound,
    OutputFailed,
)
from gguf_embed.gguf.imatrix import read_imatrix
from gguf_embed.store import download, failures, hub, local, names
from gguf_embed.store.local import Places, Source
from gguf_embed.store.safe_names import Named, fault, inside, is_safe

REPO = "someone/model-GGUF"
DATA = b"GGUF" + bytes(1000)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    for name in [*os.environ]:
        if name.upper().endswith("_PROXY") or name.startswith(("HF_", "OLLAMA_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(failures, "BACKOFF_S", (0.01,) * 2)
    close_session()
    with FakeHub() as server:
        yield server
    close_session()


@pytest.fixture
def at(fake: FakeHub, tmp_path: Path) -> Places:
    return Places(
        endpoint=fake.url,
        cache=tmp_path / "hf" / "hub",
        store=tmp_path / "home" / "models",
        ollama=(),
        offline=False,
    )


BAD = (
    *("", ".", "..", "../x.gguf", "a/../../x.gguf", "/etc/x.gguf", "a//x.gguf", "a/./x.gguf"),
    *("a\\x.gguf", "..\\x.gguf", "C:\\x.gguf", "C:x.gguf", "x.gguf:stream", "\\\\host\\x.gguf"),
    *("x\0.gguf", "x\n.gguf", "\x7f.gguf", "x\udce9.gguf", "con.gguf", "a/NUL", "com1.gguf"),
    *("x.gguf.", "x.gguf ", " x.gguf", "a ./x.gguf", "x" * 300, "a/" * 600 + "x", "x?.gguf", "*"),
)


@pytest.mark.parametrize("name", BAD)
def test_names_that_may_not_become_paths(name: str):
    for kind in ("file", "revision", "repository"):
        assert fault(kind, name), kind


@pytest.mark.parametrize("value", [None, 5, b"x.gguf", ["x"]])
def test_what_is_no_text_is_no_name(value: object):
    assert fault("file", value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("file", name) for name in ("a.gguf", "sub/a b (1)+.gguf", "Größe-Q8_0.gguf", ".x.gguf")),
        *(("file", name) for name in ("console.gguf", "origin.json.gguf", "a..b.gguf")),
        *(("revision", name) for name in ("main", "refs/pr/1", "v1.0", "a" * 40)),
        *(("repository", name) for name in ("a/b", "A.b/c_d-e", "a/" + "b" * 96)),
    ],
)
def test_names_as_they_are_pass(kind: Named, name: str):
    assert fault(kind, name) is None


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("file", name) for name in ("origin.json", "sub/ORIGIN.json")),
        *(("repository", name) for name in ("a", "a/b/c", "a--b/c", "a/b..c", "-a/b", "a/b.git")),
    ],
)
def test_names_of_one_kind_alone(kind: Named, name: str):
    assert fault(kind, name)


PIECES = st.sampled_from(
    ("..", ".", "/", "\\", "C:", "a", "b.gguf", "\0", " ", "~", "\n", "\u2215", "\uff0e")
)


@given(
    st.sampled_from(("file", "revision", "repository")), st.lists(PIECES).map("".join) | st.text()
)
@example("file", "a/..")
def test_what_passes_stays_in_its_folder(kind: Named, name: str):
    if not is_safe(kind, name):
        return
    for flavour in (PurePosixPath, PureWindowsPath):
        path = flavour(name)
        assert not path.is_absolute()
        assert not path.drive
        assert ".." not in path.parts
        assert flavour("folder", name).parts[0] == "folder"
        assert len(flavour("folder", name).parts) == name.count("/") + 2
    os.fsencode(name)


# -- a Hub that lists what it likes ---------------------------------------------------------------


def everything_under(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BAD if name and "\udce9" not in name])
def test_a_listing_cannot_reach_outside(
    fake: FakeHub, at: Places, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
):
    """Neither asked for by the name of the repository, nor by a Source that anyone made up."""
    mine = tmp_path / "x.gguf"  # where `../` from the snapshot's folder may lead
    mine.write_text("a user's own file")
    bad = name if name.lower().endswith(".gguf") else f"{name}/x.gguf"
    fake.add(REPO, {bad: DATA, "good-Q8_0.gguf": DATA + b"1"})
    before = everything_under(tmp_path)
    found = names.sources(REPO, at=at)
    assert [source.file for source in found] == ["good-Q8_0.gguf"]
    assert "passed over" in caplog.text
    made_up = Source(name="x", repo=REPO, file=bad)
    assert local.located(made_up, at) is made_up
    for call in (download.fetch, hub.remote_info, hub.remote_header):
        with pytest.raises(BadOption, match="cannot name a file"):
            call(made_up, at=at)
    assert everything_under(tmp_path) == before
    assert download.fetch(found[0], at=at).read_bytes() == DATA + b"1"
    assert mine.read_text() == "a user's own file"


@pytest.mark.parametrize("target", ["{outside}/x.gguf", "../../../../../../x.gguf"])
def test_a_users_file_of_another_size_survives(
    fake: FakeHub, at: Places, tmp_path: Path, target: str
):
    """It was deleted: a snapshot's entry of the wrong size is."""
    mine = tmp_path / "x.gguf"
    mine.write_text("a user's own file")
    file = target.format(outside=tmp_path)
    fake.add(REPO, {file: DATA})
    with suppress(GgufEmbedError):
        download.fetch(Source(name="x", repo=REPO, file=file), at=at)
    assert mine.read_text() == "a user's own file"
    assert not mine.is_symlink()


@pytest.mark.parametrize("what", ["snapshot", "blobs", "refs"])
def test_links_in_the_cache_lead_nowhere(fake: FakeHub, at: Places, tmp_path: Path, what: str):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "m.gguf").write_text("a user's own file")
    commit = fake.add(REPO, {"sub/m.gguf": DATA})
    folder = local.cache_folder(at.cache, REPO)
    link = {"snapshot": f"snapshots/{commit}/sub", "blobs": "blobs", "refs": "refs"}[what]
    (folder / link).parent.mkdir(parents=True)
    (folder / link).symlink_to(outside)
    source = replace(names.resolve(f"hf:{REPO}/sub/m.gguf", at=at), path=None)
    with pytest.raises(OutputFailed, match=r"leads out of .* nothing was written"):
        download.fetch(source, at=at)
    assert everything_under(outside) == {"m.gguf": b"a user's own file"}


def test_a_cache_that_is_a_link_itself_works(fake: FakeHub, at: Places, tmp_path: Path):
    fake.add(REPO, {"m.gguf": DATA})
    (tmp_path / "elsewhere").mkdir()
    at.cache.parent.mkdir()
    at.cache.symlink_to(tmp_path / "elsewhere")
    path = download.fetch(names.resolve(f"hf:{REPO}/m.gguf", at=at), at=at)
    assert path.read_bytes() == DATA
    assert inside(at.cache, path)


@pytest.mark.parametrize("revision", ["../../x", "/x", "a\\b", "..", "x\0"])
def test_a_revision_cannot_either(fake: FakeHub, at: Places, tmp_path: Path, revision: str):
    fake.add(REPO, {"m.gguf": DATA})
    source = Source(name="x", repo=REPO, file="m.gguf", revision=revision)
    with pytest.raises(BadOption, match="cannot name a revision"):
        download.fetch(source, at=at)
    assert everything_under(tmp_path) == {}


def test_our_own_record_is_no_model(at: Places, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    carried = tmp_path / "carried.gguf"
    carried.write_bytes(DATA)
    sha256 = hashlib.sha256(DATA).hexdigest()
    for file in ("origin.json", "sub/Origin.JSON", "../x.gguf"):
        with pytest.raises(BadOption, match="cannot name a stored model"):
            local.install(carried, Source(name="m", file=file, sha256=sha256), at)
    assert not at.store.exists()
    stored = local.install(carried, Source(name="m", file="m.gguf", sha256=sha256), at)
    assert stored.path is not None
    record = stored.path.parent / "origin.json"
    said = json.loads(record.read_text())
    record.write_text(json.dumps({**said, "file": "origin.json"}))
    assert stored.path not in [source.path for source in local.local_models(at)]
    assert "own record" in caplog.text


# -- a network that answers for everybody --------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [b"<html>Please log in</html>", b"[]", b"{}", b"null", b'{"id": 5}']
)
def test_a_captive_portal_is_no_hub(at: Places, page: bytes):
    """Status 200, whatever is asked: as a hotel's network answers."""
    with socket.create_server(("127.0.0.1", 0)) as portal:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(page)}\r\n"
        answer = head.encode() + b"Connection: close\r\n\r\n" + page

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client, _ = portal.accept()
                    with client:
                        client.recv(65536)
                        client.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        there = replace(at, endpoint=f"http://127.0.0.1:{portal.getsockname()[1]}")
        for name in (REPO, f"hf:{REPO}/m.gguf"):
            with pytest.raises(FetchFailed, match=r"no Hugging Face Hub") as caught:
                download.fetch(names.resolve(name, at=there), at=there)
            assert "HF_ENDPOINT" in str(caught.value)


# -- what a path can be --------------------------------------------------------------------------


def test_what_is_no_file_is_refused_at_once(at: Places, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.gguf")
    for path, why in (
        (tmp_path / "pipe.gguf", "is a pipe or a device"),
        (Path("/dev/zero"), "is a pipe or a device"),
        (tmp_path, "is a directory"),
        (tmp_path / os.fsdecode(b"\xe9.gguf"), r"\\xe9\.gguf does not exist"),
    ):
        with pytest.raises(ModelNotFound, match=why) as caught:
            names.resolve(path, at=at)
        str(caught.value).encode()  # can be printed
    with pytest.raises(BadModelFile, match="a pipe or a device"):
        read_imatrix(tmp_path / "pipe.gguf")


def test_a_name_that_is_not_utf_8_is_a_file_like_any_other(at: Places, tmp_path: Path):
    path = tmp_path / os.fsdecode(b"\xe9-Q8_0.gguf")
    path.write_bytes(DATA)
    source = names.resolve(path, at=at)
    assert (source.path, source.quant) == (path, "Q8_0")
    source.label_with_size.encode()


def test_a_part_of_a_split_model_says_which_to_pass(at: Places, tmp_path: Path):
    parts = [tmp_path / f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for part in parts[:2]:
        part.write_bytes(DATA)
    with pytest.raises(ModelNotFound, match=r"m-00003-of-00003\.gguf is not beside it.*--merge"):
        names.resolve(parts[0], at=at)
    parts[2].write_bytes(DATA)
    with pytest.raises(BadInput, match=r"part 2 of 3 .* pass the first, .*m-00001-of-00003\.gguf"):
        names.resolve(parts[1], at=at)
    assert names.resolve(parts[0], at=at).path == parts[0]
