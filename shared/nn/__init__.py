"""Modules that several networks are made of: Mamba blocks and token mixers."""
