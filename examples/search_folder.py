"""The paragraphs of a folder's text files that answer a question, the best first.

python examples/search_folder.py docs "how do I use this without internet?"
"""

import sys
from pathlib import Path

from gguf_embed import Embedder


def search(folder: Path, question: str, top: int = 3) -> list[tuple[float, str, str]]:
    """(cosine, file, paragraph) of the nearest."""
    found = [
        (path.name, paragraph.strip())
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".md", ".txt")
        for paragraph in path.read_text("utf-8").split("\n\n")
        if len(paragraph.split()) > 5
    ]
    with Embedder.open() as embedder:
        vectors = embedder.encode_document([text for _, text in found], truncate="end")
        scores = vectors @ embedder.encode_query([question])[0]
    best = scores.argsort()[::-1][:top]
    return [(float(scores[i]), *found[i]) for i in best]


if __name__ == "__main__":
    for score, name, text in search(Path(sys.argv[1]), sys.argv[2]):
        print(f"{score:.3f}  {name}: {' '.join(text.split())[:90]}")
