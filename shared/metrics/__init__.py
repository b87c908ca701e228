"""Evaluation protocols, each with a version."""
