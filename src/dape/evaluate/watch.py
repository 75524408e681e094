"""The progress of a measurement, for an observer."""


class Watch:
    """A receiver of the progress of a measurement; the base class ignores everything."""

    def begin(self, tokens: int) -> None:
        """Receive the total number of input tokens, over all models."""

    def advance(self, tokens: int) -> None:
        """Receive the number of input tokens of a forward pass."""

    def announce(self, name: str, length: int, outcome: str) -> None:
        """Receive the outcome of a model at a length, in a few words."""

    def note(self, text: str) -> None:
        """Receive any other note for the user."""


def repeated(run: str) -> str:
    """Return the note about a run given more than once."""
    return f"{run} is given more than once, and counted once"


SILENT = Watch()
