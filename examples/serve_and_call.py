"""Start the server, have it embed through OpenAI's interface, and stop it.

python examples/serve_and_call.py "a text" "another"
"""

import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def served() -> Iterator[str]:
    """The address of a server on a free port, as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        command = [sys.executable, "-m", "gguf_embed", "serve", "--port", "0"]
        with said.open("w") as file, subprocess.Popen(command, stderr=file) as server:
            try:
                yield wait_for_address(said, server)
            finally:
                server.terminate()


def wait_for_address(said: Path, server: subprocess.Popen[bytes]) -> str:
    """What the server says that it listens on."""
    while server.poll() is None:
        for word in said.read_text("utf-8").split():
            if word.startswith("http://"):
                return word.rstrip(",;")
        time.sleep(0.05)
    raise SystemExit(said.read_text("utf-8"))


def embed(address: str, texts: Sequence[str]) -> list[list[float]]:
    """Their vectors, by any HTTP client."""
    request = urllib.request.Request(
        f"{address}/v1/embeddings",
        data=json.dumps({"model": "all-minilm-l6-v2", "input": list(texts)}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return [row["embedding"] for row in json.load(answer)["data"]]


if __name__ == "__main__":
    with served() as address:
        for text, vector in zip(sys.argv[1:], embed(address, sys.argv[1:]), strict=True):
            print(f"{text}: {len(vector)} numbers, the first is {vector[0]:.4f}")
