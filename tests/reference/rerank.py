"""Reference scores of the tiny rerankers: the recipes of the model cards, in float32.

Run from `tests/` where torch and transformers are installed (extra `reference`):

    python -m reference.rerank

It writes `rerank-NAME.npz`: the scores of each query with each document, also cut to fit and with
another task, the token ids, the hash of the weights and what made it all. Nothing of llama.cpp
takes part. What an engine could get wrong of a pair must move the scores, or nothing is written.
"""

from __future__ import annotations

import datetime
import json
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from numpy.typing import NDArray
from tiny import TinyModel

HERE = Path(__file__).parent
Scores = NDArray[np.float64]

QUERIES = ("bread", "Which boat is on the water?", "Die Brücke, the house and the {document}")
DOCUMENTS = (
    "The flour for the bread",
    "A river with a boat on the water",
    "The cat sat on the mat.",
    "",
    "bread",
    "Über die Brücke läuft der Fuß\n\n- déjà vu, façade",
    "yes or no: the answer is not in this document",
    "the oven in the house is for the bread, the boat is on the water " * 2,
)
TASK = "Judge by the animal in the text"
DEFAULT_TASK = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A tiny reranker; `cut_to` tokens cut some of the documents, none of the queries."""

    write: Callable[..., TinyModel]
    cut_to: int
    takes_task: bool


CASES: Mapping[str, Case] = {
    "qwen3": Case(write=tiny.write_qwen3_reranker, cut_to=248, takes_task=True),
    "xlmr": Case(write=tiny.write_xlmr_reranker, cut_to=64, takes_task=False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What `rerank-NAME.npz` holds; scores are (n queries, n documents), from 0 to 1."""

    scores: Scores
    cut: Scores  # in `cut_to` tokens
    task: Scores  # with TASK, where one can be given
    ids: Sequence[Sequence[int]]  # of each pair, query by query
    weights_sha256: str
    provenance: Mapping[str, object]


class Recipe:
    """A tiny reranker in transformers, as its model card uses it."""

    def __init__(self, model: TinyModel) -> None:
        import tokenizers
        import torch
        import transformers

        settings = dict(model.config)
        self.kind = str(settings.pop("model_type"))
        state = {name: torch.from_numpy(weight) for name, weight in model.weights.items()}
        core = tokenizers.Tokenizer.from_str(json.dumps(model.tokenizer))
        self.tokenizer: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
        if self.kind == "qwen3":
            config = transformers.Qwen3Config(**settings, attn_implementation="eager")
            self.network: Any = transformers.Qwen3ForCausalLM(config)
            state = {f"model.{name}": weight for name, weight in state.items()}
            missing, unknown = self.network.load_state_dict(state, strict=False)
            assert (missing, unknown) == (["lm_head.weight"], []), "tied to the embedding"
        else:
            config = transformers.XLMRobertaConfig(
                **settings, num_labels=1, attn_implementation="eager"
            )
            self.network = transformers.XLMRobertaForSequenceClassification(config)
            state = {
                name if name.startswith("classifier.") else f"roberta.{name}": weight
                for name, weight in state.items()
            }
            self.network.load_state_dict(state, strict=True)
        self.network.eval()

    def ids(
        self, query: str, document: str, *, task: str = DEFAULT_TASK, max_length: int = 100_000
    ) -> list[int]:
        """The tokens of a pair."""
        if self.kind != "qwen3":
            # FlagEmbedding cuts the document only.
            made = self.tokenizer(
                [[query, document]], truncation="only_second", max_length=max_length
            )
            return list(made["input_ids"][0])
        # https://huggingface.co/Qwen/Qwen3-Reranker-0.6B, "Transformers Usage"
        prefix = (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the "
            'Query and the Instruct provided. Note that the answer can only be "yes" or "no".'
            "<|im_end|>\n<|im_start|>user\n"
        )
        suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        prefix_tokens = self.tokenizer.encode(prefix, add_special_tokens=False)
        suffix_tokens = self.tokenizer.encode(suffix, add_special_tokens=False)
        pair = f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}"
        made = self.tokenizer(
            [pair],
            padding=False,
            truncation="longest_first",
            return_attention_mask=False,
            max_length=max_length - len(prefix_tokens) - len(suffix_tokens),
        )
        return [*prefix_tokens, *made["input_ids"][0], *suffix_tokens]

    def score(self, ids: Sequence[int]) -> float:
        """Of the tokens of a pair."""
        import torch

        with torch.no_grad():
            logits = self.network(input_ids=torch.tensor([list(ids)])).logits[0]
        if self.kind != "qwen3":
            return float(torch.sigmoid(logits[0].double()))
        vocab = self.tokenizer.get_vocab()
        last = logits[-1].double()
        both = torch.stack([last[vocab["no"]], last[vocab["yes"]]])
        return float(torch.nn.functional.log_softmax(both, dim=0)[1].exp())

    def table(self, **how: Any) -> Scores:
        """Scores of each query with each document."""
        return np.array(
            [[self.score(self.ids(query, doc, **how)) for doc in DOCUMENTS] for query in QUERIES]
        )


def compute(case: Case) -> Reference:
    """All scores of a case, and the proof that a mistake would be seen."""
    import tokenizers
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        model = case.write(Path(folder) / "model.gguf")
    recipe = Recipe(model)
    scores = recipe.table()
    moved = sensitivity(recipe, scores)
    assert min(moved.values()) > 1e-3, f"a mistake would pass unseen: {moved}"
    return Reference(
        scores=scores,
        cut=recipe.table(max_length=case.cut_to),
        task=recipe.table(task=TASK) if case.takes_task else scores,
        ids=[recipe.ids(query, document) for query in QUERIES for document in DOCUMENTS],
        weights_sha256=model.weights_sha256,
        provenance={
            "made_by": "tests/reference/rerank.py",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "attention": "eager, float32, one pair at a time",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
    )


def sensitivity(recipe: Recipe, scores: Scores) -> dict[str, float]:
    """By how much each mistake moves the scores, in the middle over the pairs."""

    def by(change: Callable[[list[int]], Sequence[int]]) -> float:
        table = [
            [recipe.score(change(recipe.ids(query, doc))) for doc in DOCUMENTS] for query in QUERIES
        ]
        return float(np.median(np.abs(np.array(table) - scores)))

    moved = {
        "end lost": by(lambda ids: ids[:-1]),
        "start lost": by(lambda ids: ids[1:]),
        "another query": float(np.median(np.abs(scores[1:] - scores[:-1]))),
        "another document": float(np.median(np.abs(scores[:, 1:] - scores[:, :-1]))),
    }
    if recipe.kind == "qwen3":
        moved["another task"] = float(np.median(np.abs(recipe.table(task=TASK) - scores)))
        moved["yes and no"] = float(np.median(np.abs(1 - 2 * scores)))
    else:
        moved["one separator"] = by(lambda ids: [*ids[: ids.index(2)], *ids[ids.index(2) + 1 :]])
    return moved


def save(name: str, reference: Reference) -> None:
    about = {**reference.provenance, "weights_sha256": reference.weights_sha256}
    np.savez_compressed(
        HERE / f"rerank-{name}.npz",
        scores=reference.scores,
        cut=reference.cut,
        task=reference.task,
        ids=np.concatenate([np.asarray(row, np.int32) for row in reference.ids]),
        lengths=np.array([len(row) for row in reference.ids], np.int32),
        about=np.array(json.dumps(about, ensure_ascii=False)),
    )


def load(name: str) -> Reference:
    """The stored reference of a case."""
    with np.load(HERE / f"rerank-{name}.npz", allow_pickle=False) as stored:
        about = json.loads(str(stored["about"]))
        ids = np.split(stored["ids"], np.cumsum(stored["lengths"])[:-1])
        return Reference(
            scores=stored["scores"],
            cut=stored["cut"],
            task=stored["task"],
            ids=[row.tolist() for row in ids],
            weights_sha256=about.pop("weights_sha256"),
            provenance=about,
        )


def main() -> None:
    for name, case in CASES.items():
        reference = compute(case)
        print(name, np.round(reference.scores, 3).tolist())
        save(name, reference)


if __name__ == "__main__":
    main()
