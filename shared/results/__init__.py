"""Tables of published values, measured values, and their join."""
