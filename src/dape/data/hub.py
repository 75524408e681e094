"""Whether the Hugging Face hub can be reached."""


def reachable(seconds: float = 10.0) -> bool:
    """Return whether the hub answers within `seconds`.

    Its own library retries each file of a name for half a minute before it says that there is no
    network.
    """
    from httpx import HTTPError
    from huggingface_hub import get_session
    from huggingface_hub.constants import ENDPOINT

    try:
        get_session().head(ENDPOINT, timeout=seconds)
    except (HTTPError, OSError):
        return False
    return True
