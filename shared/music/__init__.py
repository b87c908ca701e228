"""Questions, descriptions and chains of thought about a user's own music, from what tools measure of it."""
