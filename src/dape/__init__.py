"""Data-adaptive positional encoding."""
