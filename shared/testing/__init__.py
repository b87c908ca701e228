"""Helpers for tests: tolerances by name, tiny configurations."""
