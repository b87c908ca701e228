"""Checkpoints from elsewhere, converted once into folders of transformers."""
