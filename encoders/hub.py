"""Files of published models on the hub (huggingface.co)."""
import functools
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

BY_HAND = ". Files may be put anywhere by hand: give --checkpoint FILE, --vae FOLDER, --text_encoder FOLDER"


@functools.cache
def reach_hub():
    """Return whether the hub answers. If not, set its library to its cache alone, as it would try for long."""
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=3)
    except Exception:  # of the library below
        constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


def fetch(name, files):
    """Fetch files of the repository of a hub id, ORG/NAME or ORG/NAME/MORE, and return its folder on this disk."""
    answers = reach_hub()
    try:
        return Path(huggingface_hub.snapshot_download("/".join(str(name).split("/")[:2]), allow_patterns=files))
    except (OSError, ValueError) as error:  # the hub's errors are one or the other
        why = str(error).strip().splitlines()[0] if answers else "it does not answer"
        raise ValueError(f"{name} is neither here nor can it be fetched from the hub ({why}){BY_HAND}") from None
