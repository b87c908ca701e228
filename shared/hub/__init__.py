"""Checkpoints in and out: released layouts, names of other frameworks, export, conversion."""
