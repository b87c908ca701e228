"""A tutorial project: a byte-level language model, trained on text and then on chat."""
