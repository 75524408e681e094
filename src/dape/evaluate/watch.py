"""How far a measurement is, for whoever wants to know."""


class Watch:
    """Hears of the progress of a measurement; this one keeps silent."""

    def begin(self, tokens: int) -> None:
        """Hear how many tokens all models are fed."""

    def advance(self, tokens: int) -> None:
        """Hear how many tokens a forward was fed."""

    def announce(self, name: str, length: int, outcome: str) -> None:
        """Hear in a few words what came of a model at a length."""

    def note(self, text: str) -> None:
        """Hear of something else that the user should know."""


def repeated(run: str) -> str:
    """Return what a user hears of a run that is given more than once."""
    return f"{run} is given more than once, and counted once"


SILENT = Watch()
