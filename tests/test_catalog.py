from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_embed.catalog import catalog
from gguf_embed.catalog.card import ModelCard
from gguf_embed.catalog.card_file import load_cards
from gguf_embed.catalog.catalog import by_header, find, nearest
from gguf_embed.errors import BadOption, GgufEmbedError, ModelNotFound
from gguf_embed.gguf import layout
from gguf_embed.gguf.header import Header, read_header
from gguf_embed.store.names import sources
from gguf_embed.vectors import Pooling

CARDS = catalog.cards()
IDS = [card.id for card in CARDS]
WEB = "Given a web search query, retrieve relevant passages that answer the query"


def card(name: str) -> ModelCard:
    found = find(name)
    assert found is not None, name
    return found


# The facts that make a wrong vector when they are wrong, a second time and by hand:
# (pooling, causal, add_eos, eos_id, query prompt, document prompt, dim, max_seq_length)
QWEN3 = (Pooling.LAST, True, True, 151643, f"Instruct: {WEB}\nQuery:", "")
GTE = (Pooling.LAST, False, True, 151643, f"Instruct: {WEB}\nQuery: ", "")
JINA = ("Query: ", "Document: ")
NOMIC = ("search_query: ", "search_document: ")
BGE_QUERY = "Represent this sentence for searching relevant passages: "
GEMMA_QUERY = "task: search result | query: "
EMBEDDERS = {
    "all-minilm-l6-v2": (Pooling.MEAN, False, True, 102, "", "", 384, 256),
    "bge-m3": (Pooling.CLS, False, True, 2, "", "", 1024, 8192),
    "embeddinggemma-300m": (
        *(Pooling.MEAN, False, True, 1, GEMMA_QUERY, "title: none | text: "),
        *(768, 2048),
    ),
    "granite-embedding-311m-multilingual-r2": (
        *(Pooling.CLS, False, None, None, "", ""),
        *(768, 32768),
    ),
    "granite-embedding-english-r2": (Pooling.CLS, False, None, None, "", "", 768, 8192),
    "gte-qwen2-1.5b-instruct": (*GTE, 1536, 32768),
    "gte-qwen2-7b-instruct": (*GTE, 3584, 32768),
    "jina-embeddings-v5-text-nano": (Pooling.LAST, False, None, None, *JINA, 768, 8192),
    "jina-embeddings-v5-text-small": (Pooling.LAST, True, None, None, *JINA, 1024, 32768),
    "multilingual-e5-large": (Pooling.MEAN, False, True, 2, "query: ", "passage: ", 1024, 512),
    "multilingual-e5-large-instruct": (
        *(Pooling.MEAN, False, True, 2, f"Instruct: {WEB}\nQuery: ", ""),
        *(1024, 512),
    ),
    "multilingual-e5-small": (Pooling.MEAN, False, True, 2, "query: ", "passage: ", 384, 512),
    "mxbai-embed-large-v1": (Pooling.CLS, False, True, 102, BGE_QUERY, "", 1024, 512),
    "nomic-embed-text-v1.5": (Pooling.MEAN, False, True, 102, *NOMIC, 768, 2048),
    "nomic-embed-text-v2-moe": (Pooling.MEAN, False, True, 2, *NOMIC, 768, 512),
    "qwen3-embedding-0.6b": (*QWEN3, 1024, 32768),
    "qwen3-embedding-4b": (*QWEN3, 2560, 32768),
    "qwen3-embedding-8b": (*QWEN3, 4096, 32768),
    "snowflake-arctic-embed-l-v2.0": (Pooling.CLS, False, True, 2, "query: ", "", 1024, 8192),
}
RERANKERS = {
    "bge-reranker-v2-m3",
    "qwen3-reranker-0.6b",
    "qwen3-reranker-4b",
    "qwen3-reranker-8b",
}


# The user brings the file; models/build_e5_small.py makes it.
WITHOUT_FILES = {"multilingual-e5-small"}


def test_every_known_model_has_a_card():
    assert set(IDS) == set(EMBEDDERS) | RERANKERS


@pytest.mark.parametrize(("name", "facts"), EMBEDDERS.items(), ids=EMBEDDERS)
def test_facts_that_decide_the_vector(name, facts):
    c = card(name)
    assert facts == (
        *(c.pooling, c.causal, c.add_eos, c.eos_id),
        *(c.prompt("query"), c.prompt("document"), c.dim, c.max_seq_length),
    )
    assert c.kind == "embedder"


def test_lengths_that_vectors_may_be_cut_to():
    assert {c.id: c.mrl_min for c in CARDS if c.mrl_min} == {
        "qwen3-embedding-0.6b": 32,
        "qwen3-embedding-4b": 32,
        "qwen3-embedding-8b": 32,
    }
    assert {c.id: c.mrl_dims for c in CARDS if c.mrl_dims} == {
        "embeddinggemma-300m": (512, 256, 128),
        "granite-embedding-311m-multilingual-r2": (512, 384, 256, 128),
        "jina-embeddings-v5-text-nano": (512, 256, 128, 64, 32),
        "jina-embeddings-v5-text-small": (768, 512, 256, 128, 64, 32),
        "nomic-embed-text-v1.5": (512, 256, 128, 64),
        "nomic-embed-text-v2-moe": (256,),
        "snowflake-arctic-embed-l-v2.0": (256,),
    }


def test_only_jina_forbids_commercial_use():
    restricted = {c.id: c.licence for c in CARDS if not c.commercial}
    assert restricted == {
        "jina-embeddings-v5-text-nano": "CC-BY-NC-4.0",
        "jina-embeddings-v5-text-small": "CC-BY-NC-4.0",
    }


@pytest.mark.parametrize("name", sorted(RERANKERS))
def test_rerankers_have_a_template_in_place_of_prompts(name):
    c = card(name)
    assert (c.kind, c.pooling, c.dim, dict(c.prompts)) == ("reranker", Pooling.RANK, 1, {})
    with pytest.raises(BadOption, match="none, it is a reranker"):
        c.prompt("query")
    if c.family == "qwen3-reranker":
        assert c.rerank_template == (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the "
            "Query and the Instruct provided. Note that the answer can only be "
            '"yes" or "no".<|im_end|>\n'
            "<|im_start|>user\n<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}"
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
        assert (c.default_task, c.causal, c.add_eos) == (WEB, True, False)
    else:
        assert (c.rerank_template, c.causal, c.eos_id) == (None, False, 2)


@pytest.mark.parametrize("c", CARDS, ids=IDS)
def test_scores_name_a_public_source(c):
    for score in c.scores:
        assert score.source in {
            "QwenLM/Qwen3-Embedding README",
            "embeddings-benchmark/results f4cc6c8",
        }
        # Means over a part of the tasks cannot be compared.
        assert score.tasks in {None, "41/41", "130/131"}
    assert c.scores or c.id in WITHOUT_FILES
    assert len({(s.benchmark, s.source) for s in c.scores}) == len(c.scores)


def test_scores_against_the_published_table():
    scores = {(s.benchmark, s.source): s.value for s in card("qwen3-embedding-8b").scores}
    assert scores["MTEB(eng, v2) mean", "QwenLM/Qwen3-Embedding README"] == 75.22
    assert scores["MTEB(eng, v2) mean", "embeddings-benchmark/results f4cc6c8"] == 75.23
    assert scores["MTEB(Multilingual, v2) STS", "embeddings-benchmark/results f4cc6c8"] == 81.08


# --- files


@pytest.mark.parametrize("c", CARDS, ids=IDS)
def test_files_are_pinned_or_said_not_to_be(c):
    assert bool(c.files) == (c.id not in WITHOUT_FILES)
    for file in c.files:
        if file.builtin:
            assert (c.id, file.repo, file.revision) == (catalog.BUILTIN, "", "")
        else:
            assert re.fullmatch(r"[0-9a-f]{40}|main", file.revision)
            assert file.pinned == (file.revision != "main")
    # Only the community conversions of gte-Qwen2 have no known commit.
    assert all(file.pinned for file in c.files) == (c.family != "gte-qwen2-instruct")


@pytest.mark.parametrize("name", sorted(WITHOUT_FILES))
def test_a_model_without_files_says_what_to_do(name: str, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(
        ModelNotFound, match=r"known, but no GGUF of it is; make one .* its path"
    ) as e:
        sources(name)
    (command,) = re.findall(r"`python (\S+) --outtype f16 -o \S+\.gguf`", str(e.value))
    assert (Path(__file__).parents[1] / command).is_file()


@pytest.mark.parametrize("c", CARDS, ids=IDS)
def test_best_quality_first(c):
    ranks = [layout.QUANTS.index(file.quant) for file in c.files]
    assert ranks == sorted(set(ranks))


def test_file_by_quantization():
    c = card("qwen3-embedding-8b")
    file = c.file("q4_k_m")
    assert (file.repo, file.name, file.n_bytes, file.sha256) == (
        "Qwen/Qwen3-Embedding-8B-GGUF",
        "Qwen3-Embedding-8B-Q4_K_M.gguf",
        4676804928,
        "3fcd3febec8b3fd64435204db75bf0dd73b91e8d0661e0331acfe7e7c3120b85",
    )
    assert c.file("F16").n_bytes is None  # no source states it
    with pytest.raises(BadOption, match="'Q3_K_M'; known quantizations: F16, Q8_0, Q6_K"):
        c.file("Q3_K_M")


def test_builtin_file_is_the_one_described():
    path = catalog.builtin_path()
    file = card(catalog.BUILTIN).file("Q8_0")
    assert file.builtin
    assert file.name == path.name
    assert file.n_bytes == path.stat().st_size
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


LAID_OUT = [c for c in CARDS if c.shape and c.architecture in layout.ARCHITECTURES]


@pytest.mark.parametrize("c", LAID_OUT, ids=lambda c: c.id)
def test_shape_gives_the_published_number_of_parameters(c):
    n, n_vocab = c.shape.n_embd, c.shape.n_vocab
    in_file = sum(prod(t.shape) for t in layout.tensors(c.shape, "F16"))
    if c.architecture != "bert":
        # Without a reranker's rows of the output matrix; the 8B reranker has all of that matrix.
        untied = n_vocab * n if c.id == "qwen3-reranker-8b" else 0
        assert c.parameters == in_file - c.shape.n_cls_out * n + untied
        return
    # The pooler, or in a reranker its dense layer, and the first two positions of XLM-R.
    pooler = 0 if c.kind == "reranker" else n * n + n
    unused = 2 * n if c.eos_token == "</s>" and c.id != "multilingual-e5-small" else 0
    assert c.parameters == in_file + pooler + unused


@pytest.mark.parametrize("c", LAID_OUT, ids=lambda c: c.id)
def test_file_sizes_are_the_tensors_and_a_header(c):
    for file in c.files:
        if file.n_bytes is None or c.id == "mxbai-embed-large-v1":
            continue  # the one file that is older than float32 position tables
        weights = sum(t.n_bytes for t in layout.tensors(c.shape, file.quant))
        assert 300_000 < file.n_bytes - weights < 7_000_000, file


# --- names


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("qwen3-embedding:8b", "qwen3-embedding-8b"),
        ("QWEN3-Embedding:0.6B", "qwen3-embedding-0.6b"),
        ("Qwen/Qwen3-Embedding-4B", "qwen3-embedding-4b"),
        ("qwen/qwen3-embedding-4b-gguf", "qwen3-embedding-4b"),
        ("mradermacher/Qwen3-Embedding-0.6B-GGUF", "qwen3-embedding-0.6b"),
        ("qwen3-reranker:4b", "qwen3-reranker-4b"),
        ("all-minilm", "all-minilm-l6-v2"),
        ("all-minilm:latest", "all-minilm-l6-v2"),
        (" all-MiniLM-L6-v2\n", "all-minilm-l6-v2"),
        ("bge-m3:latest", "bge-m3"),
        ("gpustack/bge-m3-GGUF", "bge-m3"),
        ("nomic-embed-text", "nomic-embed-text-v1.5"),
        ("nomic-embed-text-v2-moe", "nomic-embed-text-v2-moe"),
        ("mxbai-embed-large", "mxbai-embed-large-v1"),
        ("snowflake-arctic-embed2", "snowflake-arctic-embed-l-v2.0"),
        ("embeddinggemma", "embeddinggemma-300m"),
        ("google/embeddinggemma-300m", "embeddinggemma-300m"),
        ("jinaai/jina-embeddings-v5-text-small-retrieval-GGUF", "jina-embeddings-v5-text-small"),
    ],
)
def test_names_that_people_type(typed, expected):
    assert card(typed).id == expected


@pytest.mark.parametrize("name", ["qwen3-embedding", "qwen3:8b", "", "Qwen/Qwen3-0.6B", "models"])
def test_no_card_for_other_names(name):
    assert find(name) is None


@given(st.sampled_from(CARDS).flatmap(lambda c: st.tuples(st.just(c), st.sampled_from(c.names))))
def test_every_name_leads_back_in_any_case(pair):
    c, name = pair
    assert find(name.upper()) == find(name.lower()) == find(name) == c


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("qwen3-embedding", ("qwen3-embedding-0.6b", "qwen3-embedding-4b", "qwen3-embedding-8b")),
        ("qwen3-embeding-8b", ("qwen3-embedding-8b",)),
        ("Qwen/Qwen3-Embedding-8B-Q4_K_M-GGUF", ("qwen3-embedding-8b",)),
        ("minilm-l6", ("all-minilm-l6-v2",)),
        ("e5-large", ("multilingual-e5-large-instruct", "multilingual-e5-large")),
        ("nomic-embed-txt", ("nomic-embed-text-v1.5",)),
    ],
)
def test_nearest_names_the_likely_models_first(typed, expected):
    assert nearest(typed)[: len(expected)] == expected


def test_nearest_is_silent_when_nothing_is_near():
    assert nearest("zzzzzzzz") == ()
    assert nearest("") == ()
    assert len(nearest("embedding")) == 3
    assert len(nearest("embedding", 5)) == 5


# --- prompts


@given(st.text())
def test_task_is_put_in_as_it_is(task):
    assert card("qwen3-embedding-8b").prompt("query", task) == f"Instruct: {task}\nQuery:"
    assert card("gte-qwen2-7b-instruct").prompt("query", task) == f"Instruct: {task}\nQuery: "


def test_prompts_that_do_not_exist_or_take_no_task():
    with pytest.raises(BadOption, match="no prompt 'passage'; its prompts: 'query', 'document'"):
        card("qwen3-embedding-8b").prompt("passage")
    with pytest.raises(BadOption, match="'document' of qwen3-embedding-8b is fixed"):
        card("qwen3-embedding-8b").prompt("document", "Find code")
    with pytest.raises(BadOption, match="'query' of bge-m3 is fixed"):
        card("bge-m3").prompt("query", "Find code")
    assert card("nomic-embed-text").prompt("clustering") == "clustering: "


def test_a_card_is_a_plain_value():
    c = card("qwen3-embedding-8b")
    assert json.loads(json.dumps(asdict(c)))["prompts"] == dict(c.prompts)
    assert replace(c) == c
    assert len({hash(c) for c in CARDS}) == len(CARDS)


# --- recognizing a file by its header


def header(c: ModelCard, name: str | None, **changes: object) -> Header:
    """The header that a converter would write for that model, named so, with changes."""
    arch = c.architecture
    shape = c.shape
    metadata: dict[str, object] = {
        "general.architecture": arch,
        f"{arch}.block_count": shape.n_layer if shape else 12,
        f"{arch}.embedding_length": shape.n_embd if shape else c.dim,
        f"{arch}.vocab_size": shape.n_vocab if shape else 250048,
        f"{arch}.pooling_type": int(c.pooling),
    }
    if name is not None:
        metadata["general.name"] = name
    metadata |= {key.replace("__", ".").replace("ARCH", arch): v for key, v in changes.items()}
    known = {key: value for key, value in metadata.items() if value is not None}
    return Header(
        source="test.gguf", version=3, metadata=known, tensors=(), header_bytes=0, file_bytes=None
    )


@pytest.mark.parametrize("c", CARDS, ids=IDS)
def test_a_conversion_is_recognized_by_its_name_and_shape(c):
    repo_name = c.source_repo.partition("/")[2]
    as_titled = repo_name.replace("-", " ").title()  # what llama.cpp's converter makes of it
    packaged = (f"{repo_name}-GGUF", f"{repo_name}-Q4_K_M", f"another/{repo_name}-f16-GGUF")
    for name in (repo_name, as_titled, c.source_repo, *packaged):
        assert by_header(header(c, name)) == c
    assert by_header(header(c, None)) is None
    assert by_header(header(c, f"{repo_name} medical")) is None
    assert by_header(header(c, repo_name, ARCH__embedding_length=c.dim + 64)) is None
    assert by_header(header(c, repo_name, general__architecture="t5")) is None


@pytest.mark.parametrize(
    ("name", "as_seen"),
    [
        # general.name of published files, from logs in public issues
        ("qwen3-embedding-0.6b", "Qwen3 Embedding 0.6b"),  # ollama #17285
        ("bge-m3", "Bge M3"),  # xorbitsai/inference #5001
        ("nomic-embed-text-v1.5", "nomic-embed-text-v1.5"),
        ("jina-embeddings-v5-text-small", "Jina Embeddings v5 Text Small Retrieval"),
        ("embeddinggemma-300m", "embeddinggemma-300m-qat-q8_0-unquantized"),
    ],
)
def test_names_in_published_files(name, as_seen):
    assert by_header(header(card(name), as_seen)) == card(name)


def test_basename_serves_only_where_there_is_no_name_and_no_finetune():
    c = card("qwen3-embedding-4b")
    assert by_header(header(c, None, general__basename="Qwen3-Embedding")) == c
    finetune = {"general__basename": "Qwen3-Embedding", "general__finetune": "Medical"}
    assert by_header(header(c, None, **finetune)) is None
    assert by_header(header(c, "My Model", general__basename="Qwen3-Embedding")) is None
    assert by_header(header(c, None, general__basename=7)) is None


def test_models_of_one_shape_are_told_apart():
    embedding = card("qwen3-embedding-0.6b")
    reranker = card("qwen3-reranker-0.6b")
    chat = {"ARCH__vocab_size": 151936, "ARCH__pooling_type": None}
    assert by_header(header(embedding, "Qwen3 0.6B", **chat)) is None
    assert by_header(header(embedding, "Qwen3 Embedding 0.6B", **chat)) is None
    assert by_header(header(reranker, "Qwen3 Reranker 0.6B")) == reranker
    # A reranker converted as a plain decoder is still that reranker: its users must be told.
    plain = header(reranker, "Qwen3 Reranker 0.6B", ARCH__pooling_type=None)
    assert by_header(plain) == reranker
    e5, bge = card("multilingual-e5-large"), card("bge-m3")
    assert by_header(header(e5, "Multilingual E5 Large")) == e5
    assert by_header(header(e5, "Bge M3")) is None  # pooling disagrees
    assert by_header(header(bge, "Multilingual E5 Large")) is None
    assert by_header(header(e5, "Multilingual E5 Large", ARCH__pooling_type=None)) == e5


def test_file_that_does_not_say_it_is_bidirectional_gets_the_fact():
    gte = card("gte-qwen2-7b-instruct")
    old = header(gte, "gte-Qwen2-7B-instruct", ARCH__pooling_type=None)
    assert old.causal  # what llama.cpp would do
    found = by_header(old)
    assert found is not None
    assert not found.causal


def test_vocabulary_without_its_padding_is_the_same_model():
    nomic = card("nomic-embed-text-v1.5")
    assert nomic.shape is not None
    for n_vocab, expected in ((30522, nomic), (30528, nomic), (30464, None), (30529, None)):
        assert by_header(header(nomic, nomic.id, ARCH__vocab_size=n_vocab)) == expected


def test_builtin_file_is_recognized():
    found = read_header(catalog.builtin_path())
    builtin = by_header(found)
    assert builtin == card(catalog.BUILTIN)
    assert (builtin.pooling, builtin.causal) == (found.pooling, found.causal)
    assert (builtin.add_bos, builtin.bos_id) == (found.add_bos, found.bos_id)
    assert (builtin.add_eos, builtin.eos_id) == (found.add_eos, found.eos_id)
    assert builtin.file("Q8_0").quant == found.quant


# --- reading cards

VALID = """\
title = "A"
kind = "embedder"
aliases = ["a:1b"]
source_repo = "owner/a"
licence = "MIT"
commercial = true
architecture = "qwen3"
parameters = 10
pooling = "LAST"
causal = true
add_eos = true
eos_token = "<e>"
eos_id = 5
task_prompt = "Do {task}: "
default_task = "it"
dim = 64
mrl_min = 32
max_seq_length = 128
languages = "English"
scores = [{ benchmark = "B", value = 1.5, source = "S", tasks = "1/1" }]

[prompts]
document = ""

[shape]
n_layer = 2
n_embd = 64
n_head = 4
n_head_kv = 2
head_dim = 16
n_ff = 128
n_vocab = 300
n_ctx_train = 128

[[repos]]
repo = "owner/a-GGUF"
revision = "0123456789012345678901234567890123456789"
files = [
    { quant = "Q4_0", name = "a-q4_0.gguf", bytes = 7 },
    { quant = "F16", name = "sub/a.gguf" },
]
"""


def load(directory: Path, text: str, name: str = "a") -> ModelCard:
    (directory / f"{name}.toml").write_text(text, encoding="utf-8")
    return next(c for c in load_cards(directory) if c.id == name)


def test_a_valid_card(tmp_path):
    c = load(tmp_path, VALID)
    assert (c.id, c.pooling, c.family, c.build, c.notes) == ("a", Pooling.LAST, None, None, "")
    assert dict(c.prompts) == {"query": "Do it: ", "document": ""}
    assert [(f.quant, f.name, f.n_bytes) for f in c.files] == [
        ("F16", "sub/a.gguf", None),
        ("Q4_0", "a-q4_0.gguf", 7),
    ]
    assert c.names == ("a", "a:1b", "owner/a", "owner/a-GGUF")
    assert c.shape == layout.Shape(
        architecture="qwen3",
        n_layer=2,
        n_embd=64,
        n_head=4,
        n_head_kv=2,
        head_dim=16,
        n_ff=128,
        n_vocab=300,
        n_ctx_train=128,
    )


HASH = "0123456789" * 4
FAULTS = [  # (text, what it becomes, what the error says after the file's name)
    ('kind = "embedder"', "kind = 'embeder'", "kind: 'embeder' is none of embedder, reranker"),
    ('title = "A"', "", "title: is missing"),
    ('title = "A"', "title = 1", "title: expected str, got int 1"),
    ('title = "A"', 'title = "A"\ncolour = "red"', "colour: unknown key"),
    ("causal = true", "causal = 1", "causal: expected bool, got int 1"),
    ("dim = 64", "dim = true", "dim: expected int, got bool True"),
    ("dim = 64", "dim = 0", "dim: must be above 0, got 0"),
    ("dim = 64", "dim = 65", "dim: 65 is not shape.n_embd, 64"),
    ("parameters = 10", "parameters = -1", "parameters: must be above 0"),
    ('["a:1b"]', '["a:1b", 2]', r"aliases[1]: expected str, got int 2"),
    ('["a:1b"]', '"a:1b"', "aliases: expected list, got str"),
    ('"owner/a"', '"a"', "source_repo: 'a' is not"),
    (
        'pooling = "LAST"',
        'pooling = "last"',
        "pooling: 'last' is none of NONE, MEAN, CLS, LAST, RANK",
    ),
    ('pooling = "LAST"', 'pooling = "RANK"', "pooling: RANK is not for a model of kind embedder"),
    ("eos_id = 5", "", "eos_id: needs its token's text"),
    ('eos_token = "<e>"\neos_id = 5', "", "eos_id: is missing"),
    ('default_task = "it"', "", "default_task: is missing"),
    ("Do {task}: ", "Do: ", "task_prompt: has no {task}"),
    ('document = ""', 'document = ""\nquery = "q"', "prompts.query: follows from task_prompt"),
    ('document = ""', "", "prompts.document: is missing"),
    ('document = ""', "document = 1", "prompts.document: expected str, got int 1"),
    ("mrl_min = 32", "mrl_min = 64", "mrl: 64 is not between 0 and dim, 64"),
    ("mrl_min = 32", "mrl_min = 0", "mrl_min: must be above 0"),
    ("mrl_min = 32", "mrl_dims = [128]", "mrl: 128 is not between 0 and dim, 64"),
    ("mrl_min = 32", "mrl_dims = [16, 32]", "mrl_dims: longest first, each once"),
    ("mrl_min = 32", "mrl_min = 32\nmrl_dims = [16]", "mrl_min: a list of lengths or a least"),
    (
        "max_seq_length = 128",
        "max_seq_length = 129",
        "max_seq_length: above shape.n_ctx_train",
    ),
    ("value = 1.5", "value = 101.0", "scores[0].value: must be from 0 to 100, got 101.0"),
    ('source = "S"', 'sauce = "S"', "scores[0].source: is missing"),
    ("tasks =", "task =", "scores[0].task: unknown key"),
    ("n_head_kv = 2", "n_head_kv = 3", "shape.n_head_kv: does not divide n_head"),
    ("n_ff = 128", "", "shape.n_ff: is missing"),
    ("n_ff = 128", "n_ff = 128\nn_fff = 1", "shape.n_fff: unknown key"),
    ("n_ff = 128", "n_ff = 128\nn_cls_out = 2", "shape.n_cls_out: 2 in a model of kind"),
    ("0123456789012345678901234567890123456789", "9eba04c5", "repos[0].revision: '9eba04c5' is"),
    ('repo = "owner/a-GGUF"', 'repo = "owner/a-GGUF"\nsha = ""', "repos[0].sha: unknown key"),
    ("bytes = 7", "bytes = 7.5", "repos[0].files[0].bytes: expected int, got float 7.5"),
    ("bytes = 7", f'sha256 = "{HASH}"', "repos[0].files[0].sha256: expected 64 hex digits, got 40"),
    ("bytes = 7", f'sha256 = "{"G" * 64}"', "repos[0].files[0].sha256: expected 64 hex digits"),
    ("bytes = 7", "size = 7", "repos[0].files[0].size: unknown key"),
    ('"Q4_0"', '"q4_0"', "repos[0].files[0].quant: 'q4_0' is none of F16"),
    ('"Q4_0"', '"F16"', "repos: F16 appears 2 times"),
    ("a-q4_0.gguf", "a-q4_0.bin", "repos[0].files[0].name: 'a-q4_0.bin' is not"),
    ("[prompts]", "[prompts", "Expected ']'"),
    ('kind = "embedder"', 'kind = "reranker"', "prompts: a reranker has a template instead"),
    ('task_prompt = "Do {task}: "\ndefault_task', "default_task", "prompts.query: is missing"),
    ("languages", 'rerank_template = "{query}{document}"\nlanguages', "rerank_template: needs a"),
]


@pytest.mark.parametrize(("text", "becomes", "says"), FAULTS, ids=[f[2][:40] for f in FAULTS])
def test_a_fault_is_named_by_file_and_key(tmp_path, text, becomes, says):
    assert VALID.count(text) >= 1
    with pytest.raises(GgufEmbedError) as caught:
        load(tmp_path, VALID.replace(text, becomes, 1))
    assert str(caught.value).startswith("a.toml: ")
    assert says in str(caught.value)


def test_two_cards_may_not_share_a_name(tmp_path):
    load(tmp_path, VALID)
    other = VALID.replace("owner/a", "owner/b").replace('"a:1b"', '"A:1B"')
    with pytest.raises(GgufEmbedError, match=r"b\.toml: the name 'A:1B' is also one of a\.toml"):
        load(tmp_path, other, "b")


def test_a_directory_without_cards(tmp_path):
    with pytest.raises(GgufEmbedError, match=r"no model cards .* reinstall gguf-embed"):
        load_cards(tmp_path)


@pytest.mark.slow
def test_import_reads_nothing():
    code = "from gguf_embed.catalog import catalog; assert catalog.cards.cache_info().misses == 0"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_two_numbers_have_two_names():
    """sentence-transformers cuts MiniLM's texts at 256 tokens; its file takes 512."""
    minilm = card("all-minilm-l6-v2")
    assert (minilm.max_seq_length, minilm.n_ctx_train) == (256, 512)
    assert read_header(catalog.builtin_path()).n_ctx_train == minilm.n_ctx_train
    assert card("nomic-embed-text-v2-moe").n_ctx_train is None  # no shape known: the file says
