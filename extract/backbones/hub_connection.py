"""Asks once whether the model hub can be reached, since its client tries for a minute."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

_SECONDS = 3.0


def hub_host() -> str:
    """The host of the model hub, such as `huggingface.co`."""
    return urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT


def obstacle_to_hub() -> str:
    """Why the model hub cannot be reached; empty if it answers, or if a proxy is asked instead."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if getproxies():
        return ""
    try:
        socket.create_connection((hub_host(), urlsplit(constants.ENDPOINT).port or 443), timeout=_SECONDS).close()
    except OSError as error:
        return f"{hub_host()} cannot be reached ({error})"
    return ""


@contextmanager
def offline_without_hub() -> Iterator[str]:
    """Let the hub's client use its cache alone if the hub cannot be reached; yields why it cannot."""
    obstacle, before = obstacle_to_hub(), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or bool(obstacle)
    try:
        yield obstacle
    finally:
        constants.HF_HUB_OFFLINE = before
