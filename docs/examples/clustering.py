"""Clustering: groups of sentences that say about the same.

The structure is that of sentence-transformers' example; the import line is the one that differs.
"""

from gguf_embed.integrations.sentence_transformers import SentenceTransformer, util

model = SentenceTransformer("all-MiniLM-L6-v2")

sentences = [
    "How do I reset my password?",
    "I forgot my password and cannot log in.",
    "What can I do if I do not remember the password of my account?",
    "When does the parcel arrive?",
    "My parcel has not come yet.",
    "Where is the parcel that I ordered?",
    "Can I pay by credit card?",
    "Which cards do you take for a payment?",
    "The weather was fine all week.",
]
embeddings = model.encode(sentences, batch_size=64, show_progress_bar=False)

clusters = util.community_detection(embeddings, min_community_size=2, threshold=0.45)
for number, cluster in enumerate(clusters, start=1):
    print(f"\nCluster {number}, {len(cluster)} sentences")
    for row in cluster:
        print("\t", sentences[row])
