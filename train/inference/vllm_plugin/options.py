"""What a request may ask of the processor by `mm_processor_kwargs`."""

from collections.abc import Mapping
from typing import Any

REQUEST_OPTIONS = ("long_audio",)


def request_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options as given; ValueError for one that a request may not set.

    vLLM hands them on to what loads the processor's files, which takes folders and Hub options too: a request would
    choose what the server reads.
    """
    if refused := sorted(given.keys() - set(REQUEST_OPTIONS)):
        raise ValueError(
            f"mm_processor_kwargs has {', '.join(map(repr, refused))}; "
            f"a request may set only {', '.join(REQUEST_OPTIONS)}"
        )
    return dict(given)
