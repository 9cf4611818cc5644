"""Reference vectors of the tiny models, computed by transformers in float32.

Run from `tests/` where torch and transformers are installed (extra `reference`):

    python -m reference.make_reference [NAME ...]

It writes one `reference/NAME.npz` per case: the texts, their token ids (by `tokenizers`),
the vectors, the hash of the weights and what made it all. Nothing of llama.cpp takes part.
Before anything is written, the models are shown to be worth comparing: other texts, a lost
end token, wrong positions and a wrong attention mask must each move the vectors.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import tiny
from reference.network import Network
from tiny import Array, Pooling, TinyModel

HERE = Path(__file__).parent

SHORT = (
    "a",
    "yes",
    "The river bank of the money",
    "The money bank of the river",
    "The cat sat on the mat.",
    "The dog sat on the mat.",
    "On the mat sat the cat, not the dog!",
    "Which boat is on the water?",
    "Instruct: Given a web search query, retrieve relevant passages\nQuery:bread",
    "bread bread bread bread bread bread bread bread bread bread",
    "  two  spaces,\ttabs\nand newlines  ",
    "Über die Brücke läuft der Fuß - déjà vu, façade",
    "猫がマットの上に座っていた。",
    "3.14 is not 22/7; 1,000 + 1 = 1001 🙂",
    "An oven in the house and flour for the bread: with water it is a query, "
    "with fish it is an answer.",
)
PROMPT = "Instruct: answer the query\nQuery: "
PROMPTED = (PROMPT + SHORT[4], PROMPT + SHORT[7])
# Longer than every microbatch the tests use, different at both ends.
LONG = (
    "The fish was in the river. " + "The boat and the water, bread from the oven; " * 60,
    "The boat and the water, bread from the oven; " * 60 + "The fish was in the river.",
)
CUT_TO = 64  # tokens that a truncated text keeps, special ones included
MEDIUM = ("The boat and the water, bread from the oven; " * 12 + "The end.",)
DECOMPOSED = ("Cafe\u0301 au lait, A\u030angstro\u0308m and \u1112\u1161\u11ab\u1100\u116e\u11a8",)
PAIRS = tuple(
    tiny.RERANK_TEMPLATE.format(query=query, document=document)
    for query in ("bread", "Which boat is on the water?")
    for document in ("The flour for the bread", "A river with a boat", "The cat sat on the mat.")
)


Change = Callable[[TinyModel], TinyModel]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and the texts it is compared on; `write` takes a path and an `outtype`."""

    write: Callable[..., TinyModel]
    texts: Sequence[str]
    # What an engine could get wrong of this family, beside what it could of all: name -> the
    # model with that mistake.
    mistakes: Mapping[str, Change] = field(default_factory=dict)


def configured(**changes: object) -> Change:
    """The same weights, other settings."""
    return lambda model: replace(model, config={**model.config, **changes})


FAMILY_TEXTS = (*SHORT, *PROMPTED, *MEDIUM, *DECOMPOSED)
DECODER_TEXTS = (*SHORT, *PROMPTED, *LONG)
CASES: Mapping[str, Case] = {
    "qwen3-last": Case(write=tiny.write_qwen3, texts=DECODER_TEXTS),
    "qwen3-mean": Case(write=partial(tiny.write_qwen3, pooling=Pooling.MEAN), texts=DECODER_TEXTS),
    "qwen3-reranker": Case(write=tiny.write_qwen3_reranker, texts=PAIRS),
    "qwen2-bidirectional": Case(
        write=tiny.write_qwen2_bidirectional, texts=(*SHORT, *PROMPTED, *MEDIUM)
    ),
    "bert-cls": Case(write=tiny.write_bert, texts=(*SHORT, *PROMPTED)),
    "bert-mean": Case(write=partial(tiny.write_bert, pooling=Pooling.MEAN), texts=SHORT),
    "xlmr-cls": Case(write=tiny.write_xlmr, texts=(*SHORT, *PROMPTED)),
    "xlmr-mean": Case(write=partial(tiny.write_xlmr, pooling=Pooling.MEAN), texts=SHORT),
    "modernbert-gelu": Case(
        write=tiny.write_modernbert,
        texts=FAMILY_TEXTS,
        mistakes={
            "window ignored": configured(local_attention=4096),
            "other activation": configured(hidden_activation="silu"),
            "all layers turned alike": configured(local_rope_theta=160_000.0),
        },
    ),
    "modernbert-silu": Case(
        write=partial(tiny.write_modernbert, activation="silu", pooling=Pooling.CLS),
        texts=FAMILY_TEXTS,
        mistakes={
            "window ignored": configured(local_attention=4096),
            "other activation": configured(hidden_activation="gelu"),
        },
    ),
    "embeddinggemma-dense": Case(
        write=tiny.write_embeddinggemma,
        texts=FAMILY_TEXTS,
        mistakes={
            "window ignored": configured(sliding_window=4096),
            "dense layers lost": lambda model: replace(model, dense=()),
        },
    ),
    "nomic-bert": Case(
        write=tiny.write_nomic_bert,
        texts=FAMILY_TEXTS,
        mistakes={"other activation": configured(hidden_act="gelu")},
    ),
    "nomic-bert-moe": Case(
        write=tiny.write_nomic_bert_moe,
        texts=FAMILY_TEXTS,
        mistakes={
            "shares sum to 1": configured(norm_topk_prob=True),
            "an expert less": configured(num_experts_per_tok=1),
        },
    ),
    "eurobert-mean": Case(write=tiny.write_eurobert, texts=FAMILY_TEXTS),
    "eurobert-last": Case(
        write=partial(tiny.write_eurobert, pooling=Pooling.LAST), texts=FAMILY_TEXTS
    ),
    "llama-embed": Case(
        write=tiny.write_llama_embed,
        texts=FAMILY_TEXTS,
        mistakes={
            "not stretched": configured(
                rope_parameters={"rope_type": "default", "rope_theta": 250_000.0}
            )
        },
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What `NAME.npz` holds.

    `vectors` is (n_texts, dim), L2-normalized; for a reranker P(yes), P(no). `cut` is (2, dim):
    `LONG[0]` without its end and without its start, `CUT_TO` tokens with the special ones.
    """

    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    vectors: Array
    cut: Array
    weights_sha256: str
    provenance: Mapping[str, object]


def load(name: str) -> Reference:
    """The stored reference of a case."""
    with np.load(HERE / f"{name}.npz", allow_pickle=False) as stored:
        about = json.loads(str(stored["about"]))
        ids = np.split(stored["ids"], np.cumsum(stored["lengths"])[:-1])
        return Reference(
            texts=about.pop("texts"),
            ids=[row.tolist() for row in ids],
            vectors=stored["vectors"],
            cut=stored["cut"],
            weights_sha256=about.pop("weights_sha256"),
            provenance=about,
        )


def save(name: str, reference: Reference) -> None:
    about = {
        **reference.provenance,
        "weights_sha256": reference.weights_sha256,
        "texts": list(reference.texts),
    }
    np.savez_compressed(
        HERE / f"{name}.npz",
        vectors=reference.vectors,
        cut=reference.cut,
        ids=np.concatenate([np.asarray(row, np.int32) for row in reference.ids]),
        lengths=np.array([len(row) for row in reference.ids], np.int32),
        about=np.array(json.dumps(about, ensure_ascii=False)),
    )


def compute(case: Case) -> Reference:
    """Tokenize and embed the texts of a case with tokenizers, torch and transformers."""
    import tokenizers
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        model = case.write(Path(folder) / "model.gguf")
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(model.tokenizer))
    ids = [tokenizer.encode(text).ids for text in case.texts]
    network = Network(model)
    long = tokenizer.encode(LONG[0], add_special_tokens=False).ids
    whole = tokenizer.encode(LONG[0]).ids
    n_before = next(at for at in range(len(whole)) if whole[at : at + len(long)] == long)
    before, after = whole[:n_before], whole[n_before + len(long) :]
    kept = CUT_TO - len(before) - len(after)
    return Reference(
        texts=case.texts,
        ids=ids,
        vectors=np.stack([network.embed(row) for row in ids]),
        cut=np.stack(
            [network.embed(before + part + after) for part in (long[:kept], long[-kept:])]
        ),
        weights_sha256=model.weights_sha256,
        provenance={
            "made_by": "tests/reference/make_reference.py",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "seed": 0,
            "attention": "eager, float32, one text at a time",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
    )


def sensitivity(case: Case, reference: Reference) -> dict[str, float]:
    """How much each mistake moves the vectors: the smallest 1 - cosine over the texts.

    Over the short texts of a few words: one token of a thousand changes little by right.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = case.write(Path(folder) / "model.gguf")
    network = Network(model)
    rows = [row for row, ids in enumerate(reference.ids) if 6 <= len(ids) <= 64]
    mistakes: dict[str, Callable[[Sequence[int]], Array]] = {
        "end token lost": lambda ids: network.embed(ids[:-1]),
        "positions all 0": lambda ids: network.embed(ids, positions=[0] * len(ids)),
        "positions doubled": lambda ids: network.embed(
            ids, positions=[2 * p % 126 for p in range(len(ids))]
        ),
        "other attention mask": lambda ids: network.embed(ids, causal=not network.causal),
    }
    if model.pooling is not Pooling.LAST and not network.causal:
        mistakes["first token lost"] = lambda ids: network.embed(ids[1:])
    if network.kind in ("bert", "xlm-roberta"):  # rotated positions may all be shifted
        mistakes["positions shifted by 1"] = lambda ids: network.embed(
            ids, positions=range(1, len(ids) + 1)
        )
    mistakes |= {name: Network(change(model)).embed for name, change in case.mistakes.items()}
    # What only a longer text shows is looked for there.
    long_rows = [row for row, ids in enumerate(reference.ids) if len(ids) >= 20]
    moved = {
        name: min(
            1.0 - float(reference.vectors[row] @ mistake(reference.ids[row]))
            for row in (long_rows if name in case.mistakes else rows)
        )
        for name, mistake in mistakes.items()
    }
    cosines = reference.vectors @ reference.vectors.T
    moved["another text"] = 1.0 - float((cosines - 2 * np.eye(len(cosines))).max())
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the references anew.")
    parser.add_argument("names", nargs="*", default=list(CASES), metavar="NAME")
    for name in parser.parse_args().names:
        case = CASES[name]
        reference = compute(case)
        if reference.vectors.shape[1] > 2:  # a reranker's are probabilities, not vectors
            moved = sensitivity(case, reference)
            print(name, {mistake: round(by, 4) for mistake, by in moved.items()})
            # Ten times what the tests allow between llama.cpp and transformers.
            if min(moved.values()) < 1e-3:
                raise SystemExit(f"{name}: a mistake would pass unseen; change its weights' scale")
        save(name, reference)


if __name__ == "__main__":
    main()
