"""Files of published models, on this disk or the hub (huggingface.co), and whether they are whole."""
import functools
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from configurator import ROOT

BY_HAND = ". Files may be put anywhere by hand: give --checkpoint FILE, --vae FOLDER, --text_encoder FOLDER"


@functools.cache
def reach_hub():
    """Return whether the hub answers. If not, let its library use only its cache, as it would try for a long time."""
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=3)
    except Exception:  # of the library below
        constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


def local(name):
    """Return a file or folder on this disk, which may also lie beside the scripts, or None."""
    return next((path for path in (Path(name), ROOT / name) if path.exists()), None)


def load_pretrained(architecture, name, others="", **options):
    """Return a model of transformers; ValueError if weights are missing, or left over that are not like `others`."""
    from transformers.utils import logging
    logging.set_verbosity_error()  # it would report the others
    logging.disable_progress_bar()
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = architecture.from_pretrained(name, **options)
    for what in ("missing", "unexpected", "mismatched"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in report[f"{what}_keys"])
        if keys := [key for key in keys if not re.match(rf"({others})$|.*position_i(ds|ndex)$", key)]:
            raise ValueError(f"{len(keys)} {what} weights of {architecture.__name__}: {', '.join(keys[:3])}")
    return model.eval().requires_grad_(False)


def load_tokenizer(architecture, name):
    """Return a tokenizer of transformers; ValueError if files are missing, where transformers makes an empty one."""
    tokenizer = architecture.from_pretrained(name)
    if len(tokenizer) < len({*tokenizer.all_special_tokens}) + 3:  # it knows no words
        raise ValueError(f"{name} has no tokenizer: its files (tokenizer.json, vocab.json and such) are missing")
    return tokenizer


def fetch(name, files):
    """Fetch files of the repository of a hub id, ORG/NAME or ORG/NAME/MORE, and return its folder on this disk."""
    answers = reach_hub()
    try:
        return Path(huggingface_hub.snapshot_download("/".join(str(name).split("/")[:2]), allow_patterns=files))
    except (OSError, ValueError) as error:  # the hub's errors are one or the other
        why = str(error).strip().splitlines()[0] if answers else "it does not answer"
        raise ValueError(f"{name} is neither here nor can it be fetched from the hub ({why}){BY_HAND}") from None
