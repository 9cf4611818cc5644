"""Does a server keep to its own description? Property tests of schemathesis against /openapi.json.

    pip install schemathesis
    python benchmarks/serving_properties.py MODEL.gguf --reranker RERANKER.gguf --examples 100

Starts `gguf-embed serve` with an index of docs/ in a folder of its own. For every route, bodies are
made from its description, right ones and wrong ones: no answer may be a 500, and each must have a
status and a media type that the description has. Ends with the status of schemathesis.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from serving import free_port, started

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance"
DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers against the description.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--reranker", type=Path)
    parser.add_argument("--examples", type=int, default=100, help="of each route")
    parser.add_argument("--schemathesis", default="schemathesis", metavar="COMMAND")
    args = parser.parse_args()
    tool = shutil.which(args.schemathesis)
    if tool is None:
        raise SystemExit(f"{args.schemathesis} is not there: pip install schemathesis")
    ours = [sys.executable, "-m", "gguf_embed"]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        index = folder / "docs.index"
        subprocess.run(
            [*ours, "index", str(DOCS), "-o", str(index), "--model", str(args.model), "--quiet"],
            check=True,
        )
        port = free_port()
        command = [*ours, "serve", "--model", str(args.model), "--index", str(index)]
        command += ["--model", str(args.reranker)] if args.reranker else []
        command += ["--port", str(port), "--preload", "--quiet", "--timeout", "60"]
        started(stack, command, port, "/ready")
        checked = subprocess.run(
            [
                *(tool, "run", f"http://127.0.0.1:{port}/openapi.json", "--checks", CHECKS),
                *("--max-examples", str(args.examples), "--seed", "1"),
            ],
            cwd=folder,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
    sys.exit(checked.returncode)


if __name__ == "__main__":
    main()
