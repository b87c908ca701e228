"""Reinforcement learning: one GRPO trainer for text, audio and images, its rewards, sandbox, environments and tasks."""
