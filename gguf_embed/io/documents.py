"""The text of a document: plain, Markdown, reStructuredText, HTML, PDF, Word, OpenDocument.

    document = read_document(path, path.read_bytes())

What is no plain text becomes Markdown: its headings are kept, its looks are not. The lines of such
a document are those of that text. PDF needs the extra `pdf`.
"""

from __future__ import annotations

import codecs
import io
import logging
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import PurePath
from typing import Final
from xml.etree import ElementTree

from gguf_embed.errors import BadInput
from gguf_embed.io.split import Kind, kind_of_file

MAX_XML_BYTES: Final = 1 << 28  # of a part of a Word document, unpacked: more is an attack


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text, and how it is cut."""

    text: str
    kind: Kind


def read_document(path: PurePath, data: bytes) -> Document:
    """The document in a file of that name. Raises BadInput with the reason, without the name."""
    convert = _CONVERTERS.get(path.suffix.lower())
    if convert is None:
        text = _decoded(data)
        kind = kind_of_file(path.name)
    else:
        text, kind = convert(data), "markdown"
    if not text.strip():
        raise BadInput("holds no text")
    # Half a character can come out of a PDF, and in no database.
    return Document(text=text.encode("utf-8", "replace").decode(), kind=kind)


def _decoded(data: bytes) -> str:
    """UTF-8 with or without its mark, UTF-16 with it; lines end in LF. Raises BadInput."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif b"\0" in data[:8192]:
        raise BadInput("is binary, no text")
    else:
        encoding = "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(
            f"line {line}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert it: iconv -f ISO-8859-1 -t UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


class _Html(HTMLParser):
    """Collects the visible text of a page, with headings, lists and code as Markdown has them."""

    _HIDDEN = frozenset(("script", "style", "template", "noscript", "svg", "head", "nav", "footer"))
    _BLOCKS = frozenset(
        (
            *("p", "div", "section", "article", "main", "header", "aside", "table", "tr", "ul"),
            *("ol", "dl", "dt", "dd", "blockquote", "figure", "form", "hr", "pre", "body"),
        )
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.title: list[str] = []
        self._hidden: list[str] = []
        self._pre = 0
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "title":
            self._in_title = True
        elif tag in self._HIDDEN and tag != "head":
            self._hidden.append(tag)
        elif re.fullmatch(r"h[1-6]", tag):
            self.parts.append("\n\n" + "#" * int(tag[1]) + " ")
        elif tag == "li":
            self.parts.append("\n- ")
        elif tag == "br":
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")
        elif tag == "pre":
            self._pre += 1
            self.parts.append("\n\n```\n")
        elif tag in self._BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        elif tag in self._hidden:
            while self._hidden.pop() != tag:
                pass
        elif tag == "pre" and self._pre:
            self._pre -= 1
            self.parts.append("\n```\n\n")
        elif tag in self._BLOCKS or re.fullmatch(r"h[1-6]", tag):
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title.append(data)
        elif not self._hidden:
            self.parts.append(data if self._pre else re.sub(r"\s+", " ", data))


def _html(data: bytes) -> str:
    found = re.search(rb"charset=[\"']?([\w-]+)", data[:2048])
    declared = found[1].decode("ascii") if found else "utf-8"
    try:
        text = data.decode(declared, "replace") if found else _decoded(data)
    except LookupError:
        text = _decoded(data)
    page = _Html()
    page.feed(text)
    page.close()
    body = _tidy("".join(page.parts))
    title = " ".join("".join(page.title).split())
    return body if not title or re.search(r"^# ", body, re.MULTILINE) else f"# {title}\n\n{body}"


def _pdf(data: bytes) -> str:
    try:
        import pypdf
    except ImportError:
        raise BadInput(
            "a PDF; reading it needs pypdf: pip install 'gguf-embed[pdf]', then index again"
        ) from None
    pages: list[str] = []
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # of what it mends, page after page
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise BadInput("a PDF that needs a password")
        for number, page in enumerate(reader.pages, 1):
            if text := _tidy(page.extract_text()):
                pages.append(f"# Page {number}\n\n{text}\n")
    except BadInput:
        raise
    except Exception as error:  # a damaged PDF raises whatever the reader stumbles over
        raise BadInput(f"a PDF that cannot be read: {type(error).__name__}: {error}") from error
    if not pages:
        raise BadInput("a PDF without text (scanned pages?)")
    return "\n".join(pages)


def _parts_of_zip(data: bytes, names: str) -> Iterator[ElementTree.Element]:
    """The XML parts of a packed document whose names match, in order. Raises BadInput."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            found = [each for each in packed.infolist() if re.fullmatch(names, each.filename)]
            for info in sorted(found, key=lambda each: (len(each.filename), each.filename)):
                if info.file_size > MAX_XML_BYTES:
                    raise BadInput(f"its part {info.filename} has {info.file_size} bytes")
                text = packed.read(info)
                if b"<!DOCTYPE" in text[:1024]:  # what such a file has no use for
                    raise BadInput("its XML has a document type; it is not read")
                yield ElementTree.fromstring(text)
    except (zipfile.BadZipFile, ElementTree.ParseError, NotImplementedError, RuntimeError) as error:
        raise BadInput(f"damaged: {error}") from error


def _office(data: bytes, *, names: str) -> str:
    """The paragraphs of Word, PowerPoint and OpenDocument parts; headings by their styles."""
    blocks: list[str] = []
    for root in _parts_of_zip(data, names):
        for node in root.iter():
            tag = node.tag.rpartition("}")[2]
            if tag in ("p", "h"):
                text = "".join(_runs(node)).strip()
                if text:
                    blocks.append("#" * _depth(node) + " " * bool(_depth(node)) + text)
    return "\n\n".join(blocks)


def _runs(paragraph: ElementTree.Element) -> Iterator[str]:
    office = paragraph.tag.startswith("{urn:oasis")  # OpenDocument: text lies in the tags
    for node in paragraph.iter():
        tag = node.tag.rpartition("}")[2]
        if tag in ("tab", "s"):
            yield " "
        elif tag in ("br", "line-break"):
            yield "\n"
        if (office or tag == "t") and node.text:
            yield node.text
        if office and node is not paragraph and node.tail:
            yield node.tail


def _depth(paragraph: ElementTree.Element) -> int:
    """1 to 6 of a heading, 0 of others."""
    for node in (paragraph, *paragraph.iter()):
        for key, value in node.attrib.items():
            name = key.rpartition("}")[2]
            if name == "outline-level" and value.isdigit():
                return min(int(value), 6)
            if name == "val" and (found := re.fullmatch(r"[Hh]eading ?([1-9])", value)):
                return min(int(found[1]), 6)
            if name == "val" and value == "Title":
                return 1
            if name == "type" and value in ("title", "ctrTitle"):
                return 1
    return 0


def _tidy(text: str) -> str:
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\n[ \t]+(?=\S)(?![^`]*```\n)", "\n", text) if "```" not in text else text
    return re.sub(r"\n{3,}", "\n\n", text).strip()


_WORD = r"word/document\.xml"
_SLIDES = r"ppt/slides/slide\d+\.xml"
_OPEN = r"content\.xml"

_CONVERTERS: Final[Mapping[str, Callable[[bytes], str]]] = {
    ".html": _html,
    ".htm": _html,
    ".xhtml": _html,
    ".pdf": _pdf,
    ".docx": lambda data: _office(data, names=_WORD),
    ".pptx": lambda data: _office(data, names=_SLIDES),
    ".odt": lambda data: _office(data, names=_OPEN),
    ".odp": lambda data: _office(data, names=_OPEN),
}
# Files of a folder that are documents without being asked for.
ENDINGS: Final = frozenset(
    (
        *_CONVERTERS,
        *(".md", ".markdown", ".mdx", ".qmd", ".txt", ".text", ".rst", ".org", ".adoc", ".tex"),
    )
)
