"""Data sources for reinforcement learning: prompts with what is needed to score an answer."""
