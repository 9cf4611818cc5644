"""Fails where the tests reach fewer branches of a room than they should.

    python tests/coverage_floor.py build/coverage.json 95

Which files count is in pyproject.toml, `[tool.coverage.run]`.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def shares(report: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(branches reached, branches) of each room; the files of the package itself are "ground"."""
    rooms: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for name, file in report["files"].items():
        parts = name.replace("\\", "/").split("/")
        room = parts[1] if len(parts) > 2 else "ground"
        reached, branches = rooms[room]
        summary = file["summary"]
        rooms[room] = (
            reached + summary["covered_branches"],
            branches + summary["num_branches"],
        )
    return dict(rooms)


def main(path: str, floor: str) -> int:
    """Print the share of each room; 1 where one is under the floor."""
    report = json.loads(Path(path).read_text("utf-8"))
    below = False
    for room, (reached, branches) in sorted(shares(report).items()):
        share = 100 * reached / branches if branches else 100.0
        low = share < float(floor)
        below |= low
        print(
            f"{room:10} {reached:5} of {branches:5} branches {share:6.1f} %{' LOW' if low else ''}"
        )
    if below:
        print(f"at least {floor} % of the branches of each room must be reached by a test")
    return int(below)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
