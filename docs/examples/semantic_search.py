"""Semantic search: which sentences of a corpus answer a question?

The structure is that of sentence-transformers' example; the import line is the one that differs.
"""

from gguf_embed.integrations.sentence_transformers import SentenceTransformer, util

embedder = SentenceTransformer("all-MiniLM-L6-v2")

corpus = [
    "A baker takes the bread out of the oven.",
    "Somebody eats a slice of rye bread.",
    "The boat lies at the river bank.",
    "A woman plays the violin in the park.",
    "Two men carry a piano up the stairs.",
    "A leopard follows its prey through the grass.",
    "The cheetah runs behind a gazelle.",
    "A girl feeds the ducks at the pond.",
    "The train to the coast leaves at noon.",
]
corpus_embeddings = embedder.encode_document(corpus)

queries = [
    "A man is eating pasta.",
    "Someone makes music.",
    "A big cat is hunting.",
    "How do I get to the sea?",
]
query_embeddings = embedder.encode_query(queries)

top_k = min(3, len(corpus))
hits = util.semantic_search(query_embeddings, corpus_embeddings, top_k=top_k)
for query, found in zip(queries, hits, strict=True):
    print("\nQuery:", query)
    for hit in found:
        print(f"{corpus[hit['corpus_id']]} ({hit['score']:.2f})")
