"""What a model's file does not say: the cards in models/."""

BUILTIN = "all-minilm-l6-v2"  # ships in the package
