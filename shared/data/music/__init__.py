"""Music made from real scores: what is written is known exactly, so every question has a right answer."""
