"""Where position enters a Transformer: one file per place, and the schemes that combine them."""
