"""The Chomsky-hierarchy benchmark: fifteen tasks on strings, for encodings."""
