"""Rewards: verifiers by name, how they read an answer, the processes they work in, and shapings of a whole step."""
