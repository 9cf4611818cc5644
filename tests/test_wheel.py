"""What a user installs works without the checkout: models, catalog, data and commands are in it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# pip fetches what builds a wheel.
pytestmark = [pytest.mark.network, pytest.mark.native]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files as pip would lay them out."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", str(ROOT)]
    subprocess.run([*command, "--wheel-dir", str(folder)], check=True)
    (wheel,) = folder.glob("gguf_embed-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_models_and_licence_are_inside(unpacked: Path):
    inside = {path.name for path in (unpacked / "gguf_embed" / "models").iterdir()}
    source = {
        path.name for path in (ROOT / "models").iterdir() if path.suffix in (".toml", ".gguf")
    }
    assert source <= inside
    assert "LICENSE-all-minilm-l6-v2.txt" in inside


def test_it_embeds_and_searches_far_from_the_checkout(unpacked: Path, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("The cat sleeps.\nPay the rent on Friday.\n")
    code = (
        f"import sys; sys.path.insert(0, {str(unpacked)!r})\n"
        "import gguf_embed; from gguf_embed.cli import main\n"
        f"assert gguf_embed.__file__.startswith({str(unpacked)!r}), gguf_embed.__file__\n"
        "sys.exit(main(['search', 'when is money due?', 'notes.txt', '--top', '1', '--no-tune']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Pay the rent" in done.stdout
