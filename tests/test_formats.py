"""Reading texts with their places; writing vectors whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_embed.errors import BadInput, BadOption, OutputFailed
from gguf_embed.io.read import check_keep, read
from gguf_embed.io.read import given as given_texts
from gguf_embed.io.record import Reading, Record
from gguf_embed.io.sources import find
from gguf_embed.io.write import NPY_HEADER_BYTES, RowContent, npy_header, open_writer

TEXTS = [
    "plain",
    "",
    "  ",
    "naïve café",
    "日本語",
    "🙂 a\u0301",
    "tab\there",
    "\x00\x1b",
    "\u2028x\x0b",
]


def texts_of(path: Path | str, data: bytes = b"", **reading: object) -> list[str]:
    return [r.text for r in records_of(path, data, **reading)]


def records_of(path: Path | str, data: bytes = b"", **reading: object) -> list[Record]:
    field = reading.get("field")
    sources = find([str(path)], field=field if isinstance(field, str) else None)
    return list(read(sources, Reading(**reading), stdin=io.BytesIO(data)))  # type: ignore[arg-type]


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# -- .txt ------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_lines_are_texts_and_row_i_is_line_i(tmp_path: Path, end: str, bom: bytes, last: bool):
    data = bom + end.join(TEXTS).encode() + (end.encode() if last else b"")
    records = records_of(write(tmp_path / "a.txt", data))
    assert [r.text for r in records] == TEXTS
    assert [r.position for r in records] == list(range(1, len(TEXTS) + 1))
    assert records[4].id == f"{tmp_path / 'a.txt'}:5"
    assert records[-1].read_bytes == len(data)


# Any text without line feeds; a line that ends in CR would be read as one with a CRLF end.
line = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"))


@given(st.lists(line, min_size=1))
def test_every_line_comes_back(tmp_path_factory: pytest.TempPathFactory, lines: list[str]):
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    # A line break of two bytes, so that a text's own mark at the start is not taken for the file's.
    write(path, b"\xef\xbb\xbf" + "".join(f"{text}\r\n" for text in lines).encode())
    assert texts_of(path) == lines


def test_a_lone_carriage_return_ends_no_line(tmp_path: Path):
    assert texts_of(write(tmp_path / "a.txt", "a\rb\n\nc")) == ["a\rb", "", "c"]


def test_empty_files_hold_no_lines_but_are_one_whole_text(tmp_path: Path):
    path = write(tmp_path / "a.txt", "")
    assert texts_of(path) == []
    assert texts_of(path, whole_file=True) == [""]


def test_whole_file_is_one_text_without_the_last_line_end(tmp_path: Path):
    path = write(tmp_path / "a.md", b"\xef\xbb\xbf# A\r\n\r\nb\r\n")
    assert texts_of(path, whole_file=True) == ["# A\n\nb"]


def test_reading_is_lazy(tmp_path: Path):
    path = write(tmp_path / "a.txt", b"good\n\xff\n")
    rows = read(find([str(path)]), Reading(), stdin=io.BytesIO())
    assert next(rows).text == "good"
    with pytest.raises(BadInput):
        next(rows)


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("a.txt", b"ok\r\n"),
        ("a.md", b"ok\n"),
        ("a.jsonl", b'{"text": ""}\n'),
        ("a.csv", b"text\n"),
        ("a.txt", b"\xef\xbb\xbfok\n"),
    ],
)
@pytest.mark.parametrize(
    ("bad", "at"),
    [
        (b"b\xe9d\n", 1),
        (b"\xc3", 0),
        (b"a\xed\xa0\x80\n", 1),  # a surrogate is no UTF-8
    ],
)
def test_bytes_that_are_no_utf8_are_named(
    tmp_path: Path, name: str, before: bytes, bad: bytes, at: int
):
    path = write(tmp_path / name, before + bad)
    where = rf"{name}, line 2: .* 0x{bad[at]:02x} at offset {len(before) + at} of the file"
    with pytest.raises(BadInput, match=where):
        texts_of(path)


def test_a_byte_order_mark_counts_in_the_offset(tmp_path: Path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfab\xff")
    with pytest.raises(BadInput, match=r"line 1: .* offset 5 "):
        texts_of(path)


def test_utf16_is_recognized(tmp_path: Path):
    path = write(tmp_path / "a.txt", "hello".encode("utf-16"))
    with pytest.raises(BadInput, match=r"offset 0 .*iconv -f UTF-16 -t UTF-8"):
        texts_of(path)


# -- standard input and given texts ----------------------------------------------------------


def test_standard_input_is_lines_json_or_one_text():
    assert texts_of("-", b"a\nb\n") == ["a", "b"]
    assert texts_of("-", b"a\nb\n", whole_file=True) == ["a\nb"]
    assert texts_of("-", b'{"t": "x"}\n', field="t") == ["x"]
    (record,) = records_of("-", b"a")
    assert (record.id, record.source, record.position) == ("-:1", "-", 1)


def test_standard_input_can_be_read_once():
    with pytest.raises(BadOption, match="twice"):
        find(["-", "-"])


def test_given_texts_are_numbered_and_checked():
    assert [r.id for r in given_texts(["a", "b"])] == ["--text:1", "--text:2"]
    with pytest.raises(BadInput, match=r"--text 2: character 1 is the lone surrogate U\+DCFF"):
        list(given_texts(["a", "b\udcff"]))  # what Python makes of an argument that is no UTF-8


# -- .jsonl and .csv -------------------------------------------------------------------------


@given(st.lists(st.tuples(line, line)))
def test_json_lines_come_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    write(path, "".join(json.dumps({"id": i, "body": t}) + "\n\n" for i, t in rows))
    records = records_of(path, field="body", id_field="id")
    assert [(r.id, r.text) for r in records] == rows
    assert [r.position for r in records] == [1 + 2 * n for n in range(len(rows))]


# csv's own reader cannot tell CR in a field from CRLF once lines are joined again.
cell = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"))


@given(st.lists(st.tuples(cell, cell)))
def test_csv_rows_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]):
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows(rows)
    assert [(r.id, r.text) for r in records_of(path, id_field="id")] == rows


def test_csv_positions_are_the_lines_where_rows_begin(tmp_path: Path):
    path = write(tmp_path / "a.csv", 'text,n\n"two\nlines",1\n\nlast,2\n')
    assert [(r.position, r.text) for r in records_of(path)] == [(2, "two\nlines"), (5, "last")]


def test_a_csv_text_may_be_long(tmp_path: Path):
    path = write(tmp_path / "a.csv", f"text\n{'x' * 200_000}\n")
    assert [len(text) for text in texts_of(path)] == [200_000]


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        (
            "a.jsonl",
            '{"body": "x", "n": 1}\n',
            "line 1: no field 'text'; .* 'body', 'n'; .*--field",
        ),
        ("a.jsonl", "{}\n", "line 1: no field 'text'; the fields are none"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', "line 2: field 'text' holds a number"),
        ("a.jsonl", '{"text": null}\n', "line 1: field 'text' holds null"),
        ("a.jsonl", '\n{"text": "x"\n', "line 2: not JSON: .*one object per line"),
        ("a.jsonl", '["x"]\n', "line 1: holds a list, not an object"),
        ("a.jsonl", '"x"\n', "line 1: holds a text, not an object"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: not JSON"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}\n", "line 1: not JSON"),
        ("a.jsonl", '{"text": "a\\ud83d b"}\n', r"line 1: character 1 .*lone surrogate U\+D83D"),
        ("a.csv", "body,n\n", r"line 1: no field 'text'; the fields are 'body', 'n'"),
        ("a.csv", "text\na,b\n", "line 2: 2 columns where the header has 1"),
        ("a.csv", "text,n\na\n", "line 2: 1 columns where the header has 2"),
        ("a.csv", 'text\nok\n"open\nand\nmore\n', "line 3: not CSV"),
        ("a.csv", 'text\n"a"b\n', "line 2: not CSV"),
        ("a.csv", "text,text\n", "line 1: two columns are named 'text'"),
    ],
)
def test_rows_that_are_no_texts_are_named(tmp_path: Path, name: str, data: str, complaint: str):
    with pytest.raises(BadInput, match=f"{name}, {complaint}"):
        texts_of(write(tmp_path / name, data))


def test_a_wrong_id_field_is_told_as_such(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", '{"text": "x", "key": true}\n')
    with pytest.raises(BadInput, match=r"no field 'id'; .*'text', 'key'; name one with --id-field"):
        records_of(path, id_field="id")
    with pytest.raises(BadInput, match="field 'key' holds true or false, not"):
        records_of(path, id_field="key")


def test_numbers_may_be_ids(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", '{"text": "x", "id": 7}\n')
    assert records_of(path, id_field="id")[0].id == "7"


def test_a_csv_of_a_header_or_of_nothing_has_no_texts(tmp_path: Path):
    assert texts_of(write(tmp_path / "a.csv", "text\n")) == []
    assert texts_of(write(tmp_path / "b.csv", "")) == []


# -- finding files ---------------------------------------------------------------------------


def test_a_directory_gives_its_texts_sorted(tmp_path: Path):
    for name in ["b.txt", "a.MD", "sub/c.jsonl", "sub/deep/d.csv", "x.py", ".git/e.txt", ".f.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, "")
    names = [str(Path(s.name).relative_to(tmp_path)) for s in find([str(tmp_path)])]
    assert names == ["a.MD", "b.txt", "sub/c.jsonl", "sub/deep/d.csv"]


def test_a_directory_without_texts_is_refused(tmp_path: Path):
    write(tmp_path / "x.py", "")
    with pytest.raises(BadInput, match=r"no \.txt, .* \(1 other file\)"):
        find([str(tmp_path)])


def test_a_missing_file_names_what_is_near(tmp_path: Path):
    write(tmp_path / "notes.txt", "")
    with pytest.raises(BadInput, match=r"nots\.txt: no such file .*; near it: notes\.txt"):
        find([str(tmp_path / "nots.txt")])
    with pytest.raises(BadInput, match="there is no directory"):
        find([str(tmp_path / "absent" / "a.txt")])


def test_an_unknown_ending_is_refused(tmp_path: Path):
    path = write(tmp_path / "a.rst", "x")
    with pytest.raises(
        BadInput, match=r"ending \.rst is not one of \.txt, .*--include '\*\.rst'.*- < "
    ):
        find([str(path)])


def test_what_the_system_refuses_is_told(tmp_path: Path):
    path = write(tmp_path / "a.txt", "x")
    with pytest.raises(BadInput, match=r"a\.txt/b\.txt: cannot be read: Not a directory"):
        find([str(path / "b.txt")])
    loop = tmp_path / "loop"
    loop.mkdir()
    (loop / "b.txt").symlink_to(loop / "b.txt")
    with pytest.raises(BadInput, match=r"b\.txt: cannot be read: Too many levels"):
        find([str(loop)])


def test_a_directory_that_cannot_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Permission bits do not stop root, so the refusal is the only thing played here.
    closed = tmp_path / "closed"
    closed.mkdir()
    listing = os.scandir

    def scandir(path: str) -> Iterator[os.DirEntry[str]]:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", path)
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(BadInput, match=r"closed: cannot be read: Permission denied"):
        find([str(tmp_path)])


def test_a_name_that_is_no_utf8_can_be_shown(tmp_path: Path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))
    (record,) = records_of(write(path, "x"))
    assert record.source == f"{tmp_path}/\\xff.txt"


def test_bytes_read_add_up_over_the_sources(tmp_path: Path):
    a, b = write(tmp_path / "a.txt", "one\ntwo\n"), write(tmp_path / "b.txt", "x\n")
    sources = find([str(a), str(b)])
    assert sources.total_bytes == 10
    rows = list(read(sources, Reading(), stdin=io.BytesIO()))
    assert [r.read_bytes for r in rows] == [4, 8, 10]
    assert find([str(a), "-"]).total_bytes is None


def test_other_files_of_a_directory_are_counted_and_can_be_taken(tmp_path: Path):
    for name in ["a.md", "b.rst", "sub/c.rst", "d.html", "Makefile", ".hidden.rst"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "Title\n\ntext")
    sources = find([str(tmp_path)])
    assert len(sources) == 1
    assert sources.remark == (
        "4 other files passed over (.rst, no ending, .html); "
        "--include '*.rst' takes such files as text"
    )
    taken = find([str(tmp_path)], include=["*.rst", "Make*"])
    names = [str(Path(source.name).relative_to(tmp_path)) for source in taken]
    assert names == ["Makefile", "a.md", "b.rst", "sub/c.rst"]
    assert taken.remark == (
        "1 other file passed over (.html); --include '*.html' takes such files as text"
    )
    assert find([str(tmp_path)], include=["*"]).remark is None
    (record,) = read(find([str(tmp_path / "b.rst")], include=["*.rst"]), Reading())
    assert (record.text, record.position, record.last_position) == ("Title\n\ntext", 1, 3)


@pytest.mark.parametrize("pattern", ["*.tex", "", "/", "."])
def test_a_pattern_that_takes_nothing_is_refused(tmp_path: Path, pattern: str):
    write(tmp_path / "a.md", "x")
    with pytest.raises(BadOption, match=f"--include {pattern!r}".replace("*", r"\*")):
        find([str(tmp_path)], include=[pattern])


def test_a_pipe_is_read_once_as_standard_input_is(tmp_path: Path):
    for name, field, data, texts in [
        ("pipe", None, b"a\n\nb\n", ["a", "", "b"]),
        ("pipe2", "t", b'{"t": "x"}\n', ["x"]),
        ("pipe.md", None, b"# A\n\nb\n", ["# A\n\nb"]),
    ]:
        os.mkfifo(tmp_path / name)
        sources = find([str(tmp_path / name)], field=field)  # does not wait for a writer
        assert sources.total_bytes is None
        writer = threading.Thread(target=(tmp_path / name).write_bytes, args=(data,))
        writer.start()
        assert [r.text for r in read(sources, Reading(field=field))] == texts
        writer.join()


def test_devices_are_refused_and_what_nobody_named_is_never_opened(tmp_path: Path):
    write(tmp_path / "a.txt", "x")
    os.mkfifo(tmp_path / "b.txt")  # opening it would wait for ever
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    sources = find([str(tmp_path)])
    assert [Path(source.name).name for source in sources] == ["a.txt"]
    assert sources.remark is not None
    assert sources.remark.startswith("2 other files passed over (.txt)")
    with pytest.raises(BadInput, match=r"c\.txt: is a device or a socket; name a file"):
        find([str(tmp_path / "c.txt")])


def test_a_closed_standard_input_is_told():
    with pytest.raises(BadInput, match=r"standard input\) is closed"):
        list(read(find(["-"]), Reading(), stdin=None))


# -- the place of a text, and what stays with it -----------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "lines"),
    [
        ("a.txt", "x\ny\n", [(1, 1), (2, 2)]),
        ("a.md", "# A\n\nb\nc\n\n# D\ne\n", [(1, 4), (6, 7)]),
        ("a.jsonl", '{"text": "x"}\n\n{"text": "y"}\n', [(1, 1), (3, 3)]),
        ("a.csv", 'text,n\n"two\nlines",1\n\nlast,2\n', [(2, 3), (5, 5)]),
    ],
)
def test_a_text_knows_its_lines(tmp_path: Path, name: str, data: str, lines: list[tuple[int, int]]):
    records = records_of(write(tmp_path / name, data))
    assert [(r.position, r.last_position) for r in records] == lines


def test_a_whole_file_ends_at_its_last_line(tmp_path: Path):
    (record,) = records_of(write(tmp_path / "a.txt", "x\ny\nz"), whole_file=True)
    assert (record.position, record.last_position) == (1, 3)
    (record,) = records_of(write(tmp_path / "b.txt", ""), whole_file=True)
    assert (record.position, record.last_position) == (1, 1)


def test_fields_stay_with_their_text(tmp_path: Path):
    path = write(tmp_path / "a.csv", "id,text,author,year\n7,x,Ann,1999\n")
    (record,) = records_of(path, keep=("year", "author"))
    assert record.fields == {"year": "1999", "author": "Ann"}
    (record,) = records_of(path, keep_all=True)
    assert record.fields == {"id": "7", "author": "Ann", "year": "1999"}
    assert records_of(path)[0].fields == {}
    path = write(tmp_path / "a.jsonl", '{"text": "x", "tags": ["a", 1, null]}\n')
    assert records_of(path, keep=("tags",))[0].fields == {"tags": ["a", 1, None]}


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_field_to_keep_must_be_there(tmp_path: Path, name: str):
    data = "text,n\n" if name == "a.csv" else '{"text": "x", "n": 1}\n'
    complaint = rf"{name}, line 1: no field 'year'; .*'text', 'n'; name one with --keep"
    with pytest.raises(BadInput, match=complaint):
        records_of(write(tmp_path / name, data), keep=("year",))


def test_lines_have_no_fields_to_keep(tmp_path: Path):
    plain = find([str(write(tmp_path / "a.txt", "x"))])
    for reading in (Reading(keep=("year",)), Reading(keep_all=True)):
        with pytest.raises(BadOption, match=r"only \.jsonl, \.csv and tables have fields"):
            check_keep(plain, reading)
        check_keep(find([str(write(tmp_path / "a.csv", "text,year\n"))]), reading)
    check_keep(plain, Reading())


# -- writing ---------------------------------------------------------------------------------

ABOUT = {"model": "m"}


def rows(n: int) -> list[Record]:
    return [
        Record(id=f"é{i}", text="", source="s", position=i + 1, last_position=i + 2)
        for i in range(n)
    ]


def save(path: Path, *blocks: np.ndarray, dim: int) -> None:
    with open_writer(str(path), stdout=io.BytesIO()) as writer:
        for block in blocks:
            writer.write(rows(len(block)), block.astype(np.float32), [False] * len(block))
        writer.finish(dim=dim, about=ABOUT)


@given(sizes=st.lists(st.integers(0, 5), max_size=4), dim=st.integers(1, 5000))
@settings(max_examples=25, deadline=None)
def test_blocks_become_one_array(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], dim: int
):
    path = tmp_path_factory.getbasetemp() / "a.npy"
    blocks = [np.random.default_rng(n).normal(size=(n, dim)) for n in sizes]
    save(path, *blocks, dim=dim)
    loaded = np.load(path)
    assert loaded.dtype == np.float32
    assert loaded.shape == (sum(sizes), dim)
    expected = np.concatenate([np.empty((0, dim)), *blocks]).astype(np.float32)
    np.testing.assert_array_equal(loaded, expected)


def test_the_header_holds_more_rows_than_any_disk():
    header = npy_header((10**18, 10**6))
    assert len(header) == NPY_HEADER_BYTES
    version = np.lib.format.read_magic(file := io.BytesIO(header))
    assert version == (1, 0)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    assert (shape, fortran, dtype) == ((10**18, 10**6), False, np.dtype("<f4"))
    assert len(npy_header((0, 1))) == NPY_HEADER_BYTES


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
@settings(deadline=None)
def test_json_lines_give_each_float_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
):
    path = tmp_path_factory.getbasetemp() / "a.jsonl"
    save(path, np.array([values]), dim=len(values))
    row = json.loads(path.read_text("utf-8"))
    np.testing.assert_array_equal(np.float32(row["vector"]), np.float32(values))
    assert {key: row[key] for key in row if key != "vector"} == {
        "id": "é0",
        "source": "s",
        "position": 1,
        "last_position": 2,
        "truncated": False,
    }


def test_standard_output_gets_rows_at_once():
    class Pipe(io.BytesIO, io.RawIOBase):  # type: ignore[misc]
        pass

    sent = Pipe()
    with open_writer("-", stdout=io.BufferedWriter(sent)) as writer:
        writer.write(rows(1), np.ones((1, 2), np.float32), [True])
        assert json.loads(sent.getvalue())["truncated"] is True
        writer.finish(dim=2, about=ABOUT)
    assert sent.getvalue().count(b"\n") == 1


def test_the_description_lies_beside_the_file(tmp_path: Path):
    save(tmp_path / "a.npy", np.ones((1, 2)), dim=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "a.npy.meta.json"]
    assert json.loads((tmp_path / "a.npy.meta.json").read_text()) == ABOUT


def test_the_file_obeys_the_umask(tmp_path: Path):
    before = os.umask(0o027)
    try:
        save(tmp_path / "a.npy", np.ones((1, 2)), dim=2)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.npy").stat().st_mode) == 0o640


def test_a_link_keeps_pointing_at_its_file(tmp_path: Path):
    (tmp_path / "real").mkdir()
    real = tmp_path / "real" / "a.npy"
    (tmp_path / "a.npy").symlink_to(real)
    save(tmp_path / "a.npy", np.ones((1, 2)), dim=2)
    assert (tmp_path / "a.npy").is_symlink()
    assert np.load(real).shape == (1, 2)


def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path: Path):
    save(tmp_path / "a.npy", np.zeros((2, 2)), dim=2)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail() -> None:
        with open_writer(str(tmp_path / "a.npy"), stdout=io.BytesIO()) as writer:
            writer.write(rows(1), np.ones((1, 2), np.float32), [False])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_without_finish_there_is_no_file(tmp_path: Path):
    with open_writer(str(tmp_path / "a.jsonl"), stdout=io.BytesIO()) as writer:
        writer.write(rows(1), np.ones((1, 2), np.float32), [False])
    assert list(tmp_path.iterdir()) == []


def test_a_description_that_cannot_be_replaced_stops_before_the_file(tmp_path: Path):
    save(tmp_path / "a.npy", np.zeros((2, 2)), dim=2)
    meta = tmp_path / "a.npy.meta.json"
    meta.unlink()
    meta.mkdir()
    with pytest.raises(OutputFailed, match=r"a\.npy\.meta\.json: is a directory or a device"):
        save(tmp_path / "a.npy", np.ones((1, 2)), dim=2)
    assert np.load(tmp_path / "a.npy").shape == (2, 2)
    assert len(list(tmp_path.iterdir())) == 2


def test_places_that_cannot_be_written_are_refused_at_once(tmp_path: Path):
    write(tmp_path / "file", "")
    (tmp_path / "d.npy").mkdir()
    (tmp_path / "null.npy").symlink_to("/dev/null")
    for name, complaint in [
        ("absent/a.npy", r"No such file or directory; make its directory first: mkdir -p .*absent"),
        ("file/a.npy", "Not a directory; choose another name"),
        ("d.npy", "is a directory or a device"),
        ("null.npy", "is a directory or a device"),
    ]:
        with pytest.raises(OutputFailed, match=complaint):
            save(tmp_path / name, dim=2)


def test_the_ending_must_say_the_format(tmp_path: Path):
    for name in ["a.txt", "a", "a.npz"]:
        with pytest.raises(BadOption, match=r"use NAME\.npy"):
            save(tmp_path / name, dim=2)


def test_an_input_is_never_the_output(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", "{}")
    (tmp_path / "b.jsonl").symlink_to(path)
    inputs = find([str(path)])
    with (
        pytest.raises(BadOption, match="is also an input"),
        open_writer(str(tmp_path / "b.jsonl"), stdout=io.BytesIO(), inputs=inputs),
    ):
        pass
    assert path.read_text() == "{}"


def test_a_row_holds_what_was_asked_for(tmp_path: Path):
    fields = {"n": 1, "half": "\ud83d", "é": ["x"]}
    record = Record(id="i", text="été", source="s", position=1, last_position=3, fields=fields)
    for content, more in [
        (RowContent(), {}),
        (RowContent(text=True), {"text": "été"}),
        (RowContent(text=True, fields=True), {"text": "été", "fields": fields}),
    ]:
        path = tmp_path / "a.jsonl"
        with open_writer(str(path), stdout=None, content=content) as writer:
            writer.write([record], np.zeros((1, 2), np.float32), [False])
            writer.finish(dim=2, about=ABOUT)
        row = json.loads(path.read_text("utf-8"))
        assert row == {
            "id": "i",
            "source": "s",
            "position": 1,
            "last_position": 3,
            "truncated": False,
            **more,
            "vector": [0, 0],
        }


def test_an_array_has_no_place_for_texts(tmp_path: Path):
    for content in (RowContent(text=True), RowContent(fields=True)):
        with (
            pytest.raises(BadOption, match=r"a\.npy: an array has no place for texts or fields"),
            open_writer(str(tmp_path / "a.npy"), stdout=None, content=content),
        ):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_closed_standard_output_is_refused_before_any_work():
    with (
        pytest.raises(OutputFailed, match="standard output: is closed; name a file"),
        open_writer("-", stdout=None),
    ):
        pass


def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path):
    for left in [".a.npy.01234567.tmp", ".a.npy.meta.json.01234567.tmp"]:
        write(tmp_path / left, "half")
    save(tmp_path / "a.npy", np.ones((1, 2)), dim=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "a.npy.meta.json"]
