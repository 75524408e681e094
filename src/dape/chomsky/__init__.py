"""The Chomsky-hierarchy benchmark: fifteen tasks in which position is everything."""
