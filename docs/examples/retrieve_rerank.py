"""Retrieve and rerank: fast vectors find candidates, a slower model that reads both orders them.

The structure is that of sentence-transformers' example; the import line is the one that differs.
The reranker is fetched once, or is the file that is given: retrieve_rerank.py MODEL
"""

import sys

from gguf_embed.integrations.sentence_transformers import CrossEncoder, SentenceTransformer, util

bi_encoder = SentenceTransformer("all-MiniLM-L6-v2")
bi_encoder.max_seq_length = 256
cross_encoder = CrossEncoder(sys.argv[1] if len(sys.argv) > 1 else "qwen3-reranker:0.6b")

passages = [
    "The flour for the bread comes from the mill at the river.",
    "Bread rises because yeast makes gas of sugar.",
    "The mill at the river has been closed since the flood.",
    "Yeast is kept in a cool place.",
    "A boat on the water brings the flour to the town.",
    "The oven must be hot before the bread goes in.",
]
corpus_embeddings = bi_encoder.encode(passages, show_progress_bar=False)


def search(query: str) -> None:
    """Print what the first stage finds, and what the second makes of it."""
    print("\nQuery:", query)
    question_embedding = bi_encoder.encode(query)
    (hits,) = util.semantic_search(question_embedding, corpus_embeddings, top_k=4)
    scores = cross_encoder.predict([(query, passages[hit["corpus_id"]]) for hit in hits])
    for hit, score in zip(hits, scores, strict=True):
        hit["cross-score"] = float(score)
    for title, key in (("Bi-encoder", "score"), ("Cross-encoder", "cross-score")):
        print(title)
        for hit in sorted(hits, key=lambda hit: hit[key], reverse=True)[:3]:
            print(f"\t{hit[key]:.3f}\t{passages[hit['corpus_id']]}")


search("Why does bread rise?")
search("Where does the flour come from?")
