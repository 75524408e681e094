"""Files of the Hugging Face hub, and a check of the connection."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dape.errors import UserError, first_line


def reachable(seconds: float = 10.0) -> bool:
    """Return whether the hub answers within `seconds`.

    Its own library retries each file of a name for half a minute before it says that there is no
    network.
    """
    from huggingface_hub import get_session
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import HfHubHTTPError

    failures: Any = HfHubHTTPError.__bases__  # OSError, and that of the HTTP library of the release
    try:
        get_session().head(ENDPOINT, timeout=seconds)
    except failures:
        return False
    return True


def fetch(load: Callable[..., Any], source: str, **options: Any) -> Any:
    """Return what a `from_pretrained` makes of a folder, or of a name on the hub.

    What the cache holds is not asked for again, and a hub that is not there is not waited for.
    Raises `UserError` if there is nothing to load.
    """
    try:
        return load(source, local_files_only=True, **options)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = first_line(error).rstrip(".")
    if Path(source).is_dir():
        raise UserError(f"{source} cannot be loaded: {reason}")
    if not reachable():
        raise UserError(
            f"no model {source!r}: there is no such folder, the Hugging Face cache has not all of "
            "it, and the hub cannot be reached; give the folder of a run or of a model"
        )
    try:
        return load(source, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"no model {source!r}: {first_line(error).rstrip('.')}") from None
