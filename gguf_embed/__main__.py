"""`python -m gguf_embed` is `gguf-embed`."""

from __future__ import annotations

import sys

from gguf_embed.cli import main

if __name__ == "__main__":
    sys.exit(main())
