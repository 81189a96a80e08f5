"""Meta-learning: networks that learn to tell new classes apart from a few images of each; free of Ray."""
