"""Nemotron-H: hybrid Mamba-2 and attention language models, pretrained on packed text."""
