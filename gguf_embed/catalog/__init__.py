"""What a model's file does not say: the cards in models/."""
