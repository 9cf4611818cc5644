"""Inputs by their URI: what pyarrow and fsspec read is read; where it lies changes nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gguf_embed import BadInput, BadOption, cli
from gguf_embed.io import remote
from gguf_embed.io.read import read
from gguf_embed.io.record import Reading
from gguf_embed.io.sources import find


@pytest.fixture
def there(tmp_path: Path) -> str:
    """A folder of files, as a URI."""
    (tmp_path / "sub").mkdir()
    table = pyarrow.table({"text": ["one", "two"]})
    for name in ("rows-1.parquet", "rows-2.parquet", "sub/rows-3.parquet"):
        pyarrow.parquet.write_table(table, tmp_path / name)
    (tmp_path / "notes.txt").write_text("a line\nanother\n")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    (tmp_path / "picture.png").write_bytes(b"x")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / ".hidden" / "more.txt").write_text("not asked for")
    return f"file://{tmp_path}"


def names(uri: str, there: str) -> list[str]:
    return [each.name.removeprefix(f"{there}/") for each in find([uri])]


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("/rows-*.parquet", ["rows-1.parquet", "rows-2.parquet"]),
        ("/**/*.parquet", ["rows-1.parquet", "rows-2.parquet", "sub/rows-3.parquet"]),
        ("/su*/rows-*", ["sub/rows-3.parquet"]),
        ("/notes.txt", ["notes.txt"]),
        ("/sub", ["sub/rows-3.parquet"]),
        (
            "/",
            [
                *("notes.txt", "rows-1.parquet", "rows-2.parquet"),
                "rows.jsonl.gz",
                "sub/rows-3.parquet",
            ],
        ),
    ],
)
def test_files_folders_and_patterns(there: str, after: str, expected: list[str]):
    assert names(there + after, there) == expected
    if after == "/":
        assert find([there]).passed_over == (".png",)


def test_the_records_are_those_of_the_files(there: str, tmp_path: Path):
    def records(name: str) -> list[tuple[str, str, int, int]]:
        return [
            (each.id.replace(there, str(tmp_path)), each.text, each.position, each.read_bytes)
            for each in read(find([name]), Reading())
        ]

    assert records(there) == records(str(tmp_path))
    assert len(records(there)) == 9
    assert find([there]).total_bytes == find([str(tmp_path)]).total_bytes


def test_fsspec_reads_what_pyarrow_does_not_know():
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://here/rows.txt", "wb") as file:
        file.write(b"kept in memory\n")
    (record,) = read(find(["memory://here/*.txt"]), Reading())
    assert (record.text, record.source) == ("kept in memory", "memory://here/rows.txt")


@pytest.mark.parametrize(
    ("after", "hint"),
    [
        ("/rows-9.parquet", "no such file or folder"),
        ("/none-*.parquet", "no file is of this pattern"),
        ("/picture.png", "the ending .png is not one of"),
        ("/.hidden/none", "no such file or folder"),
        ("/pictures", "no .txt, .md, .jsonl, .csv, .parquet, .arrow file there or below"),
    ],
)
def test_what_is_not_there_is_named(there: str, after: str, hint: str):
    with pytest.raises(BadInput, match=hint) as caught:
        find([there + after])
    assert after in str(caught.value)


@pytest.mark.parametrize("scheme", ["nosuch", "s3"])
def test_keys_are_not_shown(scheme: str):
    uri = f"{scheme}://KEY:SECRET@bucket/rows.parquet?nosuch=1"
    with pytest.raises(BadInput, match=r"^\w+://bucket/rows\.parquet: cannot be read") as caught:
        remote.find(uri)
    assert "SECRET" not in str(caught.value)


def test_without_pyarrow_it_says_so(there: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(BadInput, match=r"takes pyarrow: pip install 'gguf-embed\[arrow\]'"):
        find([there])


def test_results_are_files_of_this_machine(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    for out in ("s3://bucket/vectors/", "s3://bucket/v.npy"):
        assert cli.main(["embed", there, "-o", out, "--resume"]) == BadOption.exit_code
        assert "embed_dataset(...).write_parquet(URI)" in capsys.readouterr().err
    assert not (tmp_path / "s3:").exists()


@pytest.mark.native
def test_a_job_reads_them(there: str, tmp_path: Path):
    out = tmp_path / "out"
    words = ["--field", "text", "--no-tune", "-o", f"{out}/", "--quiet"]
    assert cli.main(["embed", f"{there}/**/*.parquet", *words]) == 0
    last = json.loads((out / "manifest.jsonl").read_text().splitlines()[-1])
    assert last["n_rows"] == 6
    table = pyarrow.parquet.read_table(out / "part-00000.parquet")
    assert table["source"].to_pylist()[-1] == f"{there}/sub/rows-3.parquet"
