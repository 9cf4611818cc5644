"""A bulk job on a Ray cluster of several nodes, one of which is killed: `pytest -m partners`."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("ray")

import pyarrow
import pyarrow.fs
import pyarrow.parquet
import ray
import ray.data
from ray.cluster_utils import Cluster

from gguf_embed import BadInput, BadOption, Embedder, Settings, cli
from gguf_embed.integrations.ray import embed_dataset
from gguf_embed.jobs import ray_model

pytestmark = [pytest.mark.partners, pytest.mark.native, pytest.mark.filterwarnings("default")]

N = 3000
COMMAND = ["--no-tune", "--threads", "1", "--field", "text", "--shard-rows", "100"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes, the driver's and another, with few processes: they share the cores of a machine.

    One CPU of Ray's count is for the model, the other for reading.
    """
    head = {"num_cpus": 2, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(num_cpus=2)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "in.parquet"
    texts = [f"text {n} says that the river {n % 7} is {'very ' * (n % 5)}wide" for n in range(N)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": [*range(N)]}), path)
    return path


def embed(*words: object, after: Sequence[str] = ()) -> int:
    return cli.main(["embed", *map(str, words), *COMMAND, *after])


def rows(folder: Path, n: int = N) -> tuple[list[int], np.ndarray]:
    """The positions and vectors of all shards in the manifest."""
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert lines[-1]["n_rows"] == n
    files = [pyarrow.parquet.read_table(folder / line["file"]) for line in lines[1:-1]]
    whole = pyarrow.concat_tables(files)
    return whole["position"].to_pylist(), np.stack(whole["vector"].to_numpy())


def test_two_nodes_one_killed(cluster: Cluster, table: Path, tmp_path: Path):
    """Every row once; the same bytes as on one machine, whose settings are the same here."""
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    assert embed(table, "-o", f"{alone}/", "--resume") == 0
    node = cluster.add_node(num_cpus=2)

    def kill() -> None:
        while len([*spread.glob("part-*")]) < 5:
            time.sleep(0.02)
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert embed(table, "-o", f"{spread}/", "--ray", "auto") == 0
    killer.join()
    positions, vectors = rows(spread)
    assert positions == rows(alone)[0]
    assert len({*positions}) == N
    np.testing.assert_allclose(vectors, rows(alone)[1], atol=1e-5)


def test_exact_is_the_same_to_the_bit(cluster: Cluster, table: Path, tmp_path: Path):
    """On equal machines, with any threads and shards, whatever was measured on each."""
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    more = ["--exact", "--shard-rows", "500"]
    assert embed(table, "-o", f"{alone}/", "--resume", after=["--exact", "--threads", "2"]) == 0
    assert embed(table, "-o", f"{spread}/", "--ray", "auto", after=more) == 0
    assert rows(spread)[0] == rows(alone)[0]
    np.testing.assert_array_equal(rows(spread)[1], rows(alone)[1])


def test_a_machine_that_joins_works(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Rows come through a pipe until a shard was made on the new machine."""
    pipe, out = tmp_path / "rows.jsonl", tmp_path / "out"
    os.mkfifo(pipe)
    node: Any = None
    n_rows = 0
    words = [pipe, "-o", f"{out}/", "--ray", "auto"]
    with (
        caplog.at_level(logging.DEBUG, "gguf_embed.jobs.ray_job"),
        ThreadPoolExecutor() as threads,
    ):
        done = threads.submit(embed, *words, after=["--debug"])
        with pipe.open("w") as file:
            while node is None or f"on node {node.node_id}" not in caplog.text:
                assert not done.done(), done.result()
                for _ in range(100):
                    n_rows += 1
                    file.write(json.dumps({"text": f"row {n_rows}"}) + "\n")
                file.flush()
                if n_rows == 500:
                    node = cluster.add_node(num_cpus=2)
        assert done.result() == 0
    cluster.remove_node(node)
    assert rows(out, n_rows)[0] == [*range(1, n_rows + 1)]


def test_a_driver_that_is_killed_goes_on(cluster: Cluster, table: Path, tmp_path: Path):
    """Its process, at once; another one goes on."""
    out = tmp_path / "out"
    words = ["embed", str(table), "-o", f"{out}/", "--ray", cluster.address, *COMMAND]
    process = subprocess.Popen([sys.executable, "-m", "gguf_embed", *words])
    while len([*out.glob("part-*")]) < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("part-0000[0-2]*")}
    assert embed(table, "-o", f"{out}/", "--ray", "auto", "--resume") == 0
    assert rows(out)[0] == [*range(1, N + 1)]
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept


def test_a_driver_that_starts_again_goes_on(
    cluster: Cluster, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    from gguf_embed.jobs.output import JobOutput

    add = JobOutput.add

    def dies(self: JobOutput, entry, data):  # type: ignore[no-untyped-def]
        if entry.index == 7:
            raise KeyboardInterrupt
        add(self, entry, data)

    with monkeypatch.context() as patch:
        patch.setattr(JobOutput, "add", dies)
        assert embed(table, "-o", f"{out}/", "--ray", "auto") == 130
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert len(kept) == 7
    assert embed(table, "-o", f"{out}/", "--ray", "auto", "--resume") == 0
    assert rows(out)[0] == [*range(1, N + 1)]
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept


def test_a_worker_that_crashes_is_replaced(cluster: Cluster, table: Path, tmp_path: Path):
    """As a fault of native code in its process ends it."""
    out = tmp_path / "out"
    killed: list[int] = []

    def kill() -> None:
        while len([*out.glob("part-*")]) < 4:
            time.sleep(0.02)
        mine = psutil.Process().children(recursive=True)
        workers = [each for each in mine if each.name().startswith("ray::Worker")]
        killed.append(workers[0].pid)
        workers[0].send_signal(signal.SIGSEGV)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert embed(table, "-o", f"{out}/", "--ray", "auto") == 0
    killer.join()
    assert len(killed) == 1
    assert rows(out)[0] == [*range(1, N + 1)]


def test_what_is_wrong_with_a_row_is_said_by_the_driver(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"text": "a " * 600}) + "\n")
    words = ["--ray", "auto", "--on-error", "stop"]
    assert embed(path, "-o", f"{tmp_path / 'out'}/", *words) == BadInput.exit_code
    assert "in.jsonl:1: 602 tokens" in capsys.readouterr().err


def test_a_dataset(cluster: Cluster, table: Path):
    dataset = ray.data.read_parquet(str(table), override_num_blocks=2).limit(500)
    settings = Settings(tune=False, n_threads=1, exact=True)  # blocks are cut otherwise
    made = embed_dataset(dataset, column="text", settings=settings, prompt="p: ").to_pandas()
    assert len(made) == 500
    with Embedder.open(settings=settings) as embedder:
        expected = embedder.encode(made["text"].tolist(), prompt="p: ")
    np.testing.assert_allclose(np.stack(made["vector"]), expected, atol=1e-5)
    with pytest.raises(Exception, match="no column 'txt'; the columns are text, n"):
        embed_dataset(dataset, column="txt", settings=settings).materialize()
    with pytest.raises(BadOption, match="workers="):
        embed_dataset(dataset, workers=(3, 1), settings=settings)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """The URI of a key in a bucket of an S3 server on this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    choices = (
        f"scheme=http&endpoint_override={host}:{port}&region=us-east-1&allow_bucket_creation=1"
    )
    filesystem, _ = pyarrow.fs.FileSystem.from_uri(f"s3://key:secret@texts/x?{choices}")
    filesystem.create_dir("texts")
    yield lambda key: f"s3://key:secret@texts/{key}?{choices}"
    server.stop()


def test_texts_and_vectors_in_a_bucket(
    cluster: Cluster, table: Path, tmp_path: Path, bucket: Callable[[str], str]
):
    """The job reads them; a dataset is read from there and written there."""
    settings = Settings(tune=False, n_threads=1, exact=True)  # blocks are cut otherwise
    ray.data.read_parquet(str(table), override_num_blocks=2).limit(200).repartition(
        2
    ).write_parquet(bucket("in"))
    out = tmp_path / "out"
    assert embed(bucket("in/*.parquet"), "-o", f"{out}/", "--ray", "auto") == 0
    n_of_each = rows(out, 200)[0]
    assert sorted(n_of_each) == sorted([*range(1, 101)] * 2)
    texts = ray.data.read_parquet(bucket("in"))
    embed_dataset(texts, settings=settings).write_parquet(bucket("out"))
    made = ray.data.read_parquet(bucket("out")).to_pandas().sort_values("n")
    assert made["n"].tolist() == [*range(200)]
    with Embedder.open(settings=settings) as embedder:
        expected = embedder.encode(made["text"].tolist())
    np.testing.assert_allclose(np.stack(made["vector"]), expected, atol=1e-5)


def test_a_file_comes_from_the_driver_and_is_verified(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ray_model, "PART_BYTES", 1 << 20)
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path / "home"))
    with Embedder.open(settings=Settings(tune=False)) as embedder:
        model = ray_model.ClusterModel.of(embedder, {}, isolated=False)
        data = embedder.path.read_bytes()
    elsewhere = ray_model.replace(model, path="/no/such/all-minilm-l6-v2-Q8_0.gguf")
    with elsewhere.open() as opened:
        assert opened.path.read_bytes() == data
        assert opened.path.is_relative_to(tmp_path / "home" / "cluster")
        assert opened.fingerprint().id == model.space
    other = ray_model.replace(elsewhere, space="0" * 16)
    with pytest.raises(BadOption, match="install the same version"):
        other.open()
