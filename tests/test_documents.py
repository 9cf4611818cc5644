"""Which files of a folder are documents, and the texts in them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path, PurePath

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gguf_embed.errors import BadInput, BadOption
from gguf_embed.io.best import Best
from gguf_embed.io.documents import read_document
from gguf_embed.io.folder import Choice, list_folder
from gguf_embed.io.globs import compile_globs, is_ignored, matches, parse_ignore


def text_of(name: str, data: bytes | str) -> str:
    return read_document(PurePath(name), data.encode() if isinstance(data, str) else data).text


# -- patterns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("*.md", ["a.md", "x/y/a.md"], ["a.mdx", "a"]),
        ("docs", ["docs/a", "x/docs/y/a"], ["docs2/a", "adocs/b"]),
        ("docs/*.md", ["docs/a.md", "x/docs/a.md"], ["docs/x/a.md"]),
        ("docs/**/*.md", ["docs/a.md", "docs/x/y/a.md"], ["a.md"]),
        ("a?[b-d].txt", ["axb.txt"], ["axe.txt", "a/b.txt"]),
        ("[!a].txt", ["b.txt"], ["a.txt"]),
        ("x.[ch", ["x.[ch"], ["x.c"]),
        ("docs/**", ["docs/a", "docs/a/b"], ["docs"]),
        ("a\\*", ["a*"], ["ab"]),
    ],
)
def test_globs(pattern: str, yes: list[str], no: list[str]):
    globs = compile_globs("--include", [pattern])
    assert [path for path in yes if not matches(path, globs)] == []
    assert [path for path in no if matches(path, globs)] == []


def test_what_is_no_pattern():
    with pytest.raises(BadOption, match=r"--path '\./': is no pattern"):
        compile_globs("--path", ["./"])


def test_rules_of_gitignore():
    rules = parse_ignore("# a comment\n\n*.log\n!keep.log\n/top\nbuild/\n\\#c\n")
    levels = [("", rules), ("sub", parse_ignore("!b.log"))]

    def ignored(path: str, *, is_folder: bool = False) -> bool:
        return is_ignored(path, is_folder=is_folder, levels=levels)

    assert [
        path for path in ("a.log", "x/a.log", "top", "#c", "sub/a.log") if not ignored(path)
    ] == []
    assert [
        path for path in ("keep.log", "x/top", "build", "sub/b.log", "c") if ignored(path)
    ] == []
    assert ignored("build", is_folder=True)


TREE = (
    *("a.md", "b.md", "x y.log", "#c", "b", "docs/a.md", "docs/b.md", "docs/sub/b.md"),
    *("a/b.md", "a/sub/b.md", "a/docs/a.md", "a/docs/c.txt", "deep/docs/b/a.md", "docs/a/c"),
)
PATTERNS = st.sampled_from(
    (
        *("a", "*.md", "!b.md", "docs/", "/a", "docs/*.md", "**/b.md", "docs/**", "a/**/b.md"),
        *("# comment", "", "\\#c", "x y.log ", "[ab].md", "!docs/a.md", "*", "!a.md", "b*"),
    )
)


def ours(root: Path) -> set[str]:
    """The files that our rules leave, walking as list_folder does."""
    left: set[str] = set()

    def walk(folder: Path, name: str, levels: list) -> None:  # type: ignore[type-arg]
        if (folder / ".gitignore").exists():
            levels = [*levels, (name, parse_ignore((folder / ".gitignore").read_text()))]
        for path in folder.iterdir():
            own = f"{name}/{path.name}" if name else path.name
            if path.name.startswith(".git"):
                continue
            if not is_ignored(own, is_folder=path.is_dir(), levels=levels):
                if path.is_dir():
                    walk(path, own, levels)
                else:
                    left.add(own)

    walk(root, "", [])
    return left


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree in which each pattern has something to match."""
    root = tmp_path_factory.mktemp("repository")
    for name in TREE:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(top=st.lists(PATTERNS, max_size=6), inner=st.lists(PATTERNS, max_size=4))
@example(top=["*.md", "!b.md"], inner=["!a.md"])
def test_gitignore_is_read_as_git_reads_it(top: list[str], inner: list[str], repository: Path):
    (repository / ".gitignore").write_text("\n".join(top))
    (repository / "docs" / ".gitignore").write_text("\n".join(inner))
    command = ["git", "-c", "core.quotepath=off", "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True)
    found = {name for name in listed.stdout.split("\0") if name and ".gitignore" not in name}
    assert ours(repository) == found
    # A folder inside, of which the repository's own rules hold as well.
    levels = [("", parse_ignore("\n".join(top)))]
    for folder in ("docs", "a"):
        if not is_ignored(folder, is_folder=True, levels=levels):
            listing = list_folder(repository / folder, Choice(include=compile_globs("", ["*"])))
            inside = {name for name in found if name.startswith(f"{folder}/")}
            assert {f"{folder}/{each.name}" for each in listing.files} == inside


# -- folders -----------------------------------------------------------------------------------


def test_a_folder_is_listed(tmp_path: Path):
    for name in ("b.md", "a.txt", "sub/c.rst", "sub/d.bin", ".hidden/e.md", "sub/f.py", "g"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.md").symlink_to("nowhere")
    listing = list_folder(tmp_path, Choice(include=compile_globs("", ["*.py"])))
    assert [each.name for each in listing.files] == ["a.txt", "b.md", "sub/c.rst", "sub/f.py"]
    assert listing.passed_over == ["no ending", ".bin"]
    assert [name for name, _ in listing.unreadable] == ["gone.md"]
    with pytest.raises(BadInput, match="no such file or directory"):
        list_folder(tmp_path / "none", Choice())
    with pytest.raises(BadInput, match="is no file and no folder"):
        list_folder(Path(os.devnull), Choice())


def test_rules_above_a_folder_count_up_to_the_top_of_its_repository(tmp_path: Path):
    for name in ("docs/a.md", "docs/drafts/b.md", "docs/deep/c.md", "docs/deep/log.md"):
        (tmp_path / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repository" / name).touch()
    (tmp_path / ".gitignore").write_text("a.md\n")
    (tmp_path / "repository" / ".gitignore").write_text("docs/drafts\nlog.md\n")
    (tmp_path / "repository" / "docs" / ".gitignore").write_text("/c.md\n!deep/log.md\n")
    docs = tmp_path / "repository" / "docs"

    def listed(root: Path, **choice: bool) -> set[str]:
        return {each.name for each in list_folder(root, Choice(**choice)).files}

    everything = {"a.md", "drafts/b.md", "deep/c.md", "deep/log.md"}
    assert listed(docs) == everything  # no repository yet: only its own
    (tmp_path / "repository" / ".git").mkdir()
    assert listed(docs) == everything - {"drafts/b.md"}
    assert listed(docs / "deep") == {"c.md", "log.md"}
    assert listed(docs / "drafts") == {"b.md"}  # somebody has named it
    (tmp_path / "link").symlink_to(docs)
    assert listed(tmp_path / "link") == everything - {"drafts/b.md"}
    assert listed(docs, gitignore=False) == everything
    assert list_folder(docs, Choice()).n_ignored == 1
    (docs / ".git").touch()  # a submodule
    assert listed(docs) == everything


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "a.md").touch()
    (tmp_path / "sub" / ".gitignore").mkdir(parents=True)
    listing = list_folder(tmp_path, Choice())
    assert [each.name for each in listing.files] == ["a.md"]
    ((name, reason),) = listing.unreadable
    assert name == "sub"
    assert "cannot be read: Is a directory" in reason
    with pytest.raises(BadInput, match="sub: cannot be read"):
        list_folder(tmp_path / "sub", Choice())


# -- documents ---------------------------------------------------------------------------------


def test_plain_text():
    assert text_of("a.md", b"\xef\xbb\xbfone\r\ntwo\rthree") == "one\ntwo\nthree"
    assert text_of("a.txt", "zwei".encode("utf-16")) == "zwei"
    assert read_document(PurePath("a.py"), b"x = 1").kind == "code"
    for data, message in [
        (b"a\nb\xff", "line 2: not UTF-8: byte 0xff at offset 3"),
        (b"a\0b", "binary"),
        (b" \n", "no text"),
    ]:
        with pytest.raises(BadInput, match=message):
            text_of("a.txt", data)


def test_html_becomes_markdown():
    page = """<!doctype html><html><head><title>A  page</title><style>p {}</style></head><body>
<nav><a href="/">home</a></nav><h2>Boats &amp; ships</h2><p>A boat
floats.<br>It sails.</p><ul><li>keel<li>mast</ul><script>alert("x")</script>
<pre>x  =  1
y</pre></body></html>"""
    text = text_of("a.html", page)
    assert text.startswith("# A page\n\n## Boats & ships\n\nA boat floats.\nIt sails.")
    assert "- keel\n- mast" in text.replace("- keel \n", "- keel\n")
    assert "```\nx  =  1\ny\n```" in text
    assert "alert" not in text
    assert "home" not in text
    assert text_of("a.html", '<meta charset="odd"><td>a</td><td>b</td>') == "a b"
    latin = b'<meta charset="iso-8859-1"><p>caf\xe9</p>'
    assert text_of("a.htm", latin) == "café"


def packed(name: str, xml: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr(name, xml)
    return data.getvalue()


def test_office_files(monkeypatch: pytest.MonkeyPatch):
    word = (
        '<w:document xmlns:w="http://w"><w:body>'
        '<w:p><w:pPr><w:pStyle w:val="Heading2"/></w:pPr><w:r><w:t>Boats</w:t></w:r></w:p>'
        "<w:p><w:r><w:t>A boat</w:t></w:r><w:r><w:tab/><w:t>floats.</w:t></w:r></w:p>"
        "</w:body></w:document>"
    )
    assert text_of("a.docx", packed("word/document.xml", word)) == "## Boats\n\nA boat floats."
    slide = '<p:sld xmlns:p="p" xmlns:a="a"><a:p><a:r><a:t>Sails</a:t></a:r></a:p></p:sld>'
    assert text_of("a.pptx", packed("ppt/slides/slide1.xml", slide)) == "Sails"
    open_text = (
        '<o xmlns:t="urn:oasis:text"><t:h t:outline-level="1">Boats</t:h>'
        "<t:p>A <t:span>boat</t:span> floats.</t:p></o>"
    )
    assert text_of("a.odt", packed("content.xml", open_text)) == "# Boats\n\nA boat floats."
    titled = (
        '<w:document xmlns:w="http://w"><w:p><w:pStyle w:val="Title"/><w:t>Boats</w:t></w:p><w:p/>'
        '<w:p><w:ph type="title"/><w:t>Sails</w:t><w:br/><w:t>up</w:t></w:p></w:document>'
    )
    assert text_of("a.docx", packed("word/document.xml", titled)) == "# Boats\n\n# Sails\nup"
    with monkeypatch.context() as patched:
        patched.setattr("gguf_embed.io.documents.MAX_XML_BYTES", 9)
        with pytest.raises(BadInput, match=r"word/document\.xml has \d+ bytes"):
            text_of("a.docx", packed("word/document.xml", titled))
    for data, message in [
        (b"PK", "damaged"),
        (packed("word/document.xml", "<open"), "damaged"),
        (packed("word/document.xml", "<!DOCTYPE x []><x/>"), "document type"),
        (packed("other.xml", "<x/>"), "no text"),
    ]:
        with pytest.raises(BadInput, match=message):
            text_of("a.docx", data)


PDF = b"""%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 99 99]/Contents 4 0 R
/Resources<</Font<</F<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>>>>>endobj
4 0 obj<</Length 39>>stream
BT /F 9 Tf 9 9 Td (A boat floats.) Tj ET
endstream endobj
trailer<</Root 1 0 R/Size 5>>
startxref
0
%%EOF
"""


def test_pdf(monkeypatch: pytest.MonkeyPatch):
    pypdf = pytest.importorskip("pypdf")
    assert text_of("a.pdf", PDF) == "# Page 1\n\nA boat floats.\n"
    with pytest.raises(BadInput, match="a PDF that cannot be read"):
        text_of("a.pdf", b"%PDF-1.4 nothing")
    with pytest.raises(BadInput, match="a PDF without text"):
        text_of("a.pdf", PDF.replace(b"A boat floats.", b"              "))
    locked, data = pypdf.PdfWriter(), io.BytesIO()
    locked.add_blank_page(9, 9)
    locked.encrypt("word", algorithm="RC4-128")
    locked.write(data)
    with pytest.raises(BadInput, match="needs a password"):
        text_of("a.pdf", data.getvalue())
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(BadInput, match=r"pip install 'gguf-embed\[pdf\]'"):
        text_of("a.pdf", PDF)


# -- the best of many --------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9)), st.integers(1, 5))
def test_the_best_are_those_of_a_stable_sort(scores: list[int], n: int):
    best: Best[int] = Best(n)
    for order, score in enumerate(scores):
        best.add(score, order)
    expected = sorted(enumerate(scores), key=lambda each: (-each[1], each[0]))[:n]
    assert best.sorted() == [(score, order) for order, score in expected]
    assert best.n_seen == len(scores)
