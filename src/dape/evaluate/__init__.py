"""Perplexity over length, and what a difference between two runs is worth."""
