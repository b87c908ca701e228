"""Objectives: what a recipe minimises."""
