"""What a request may ask of the processor by `mm_processor_kwargs`: nothing."""

from collections.abc import Mapping


def refuse_options(given: Mapping[str, object]) -> None:
    """ValueError if a request states any.

    vLLM would hand them on to what loads the processor's files, and that takes folders and Hub options too: a request
    would choose what the server reads. Nor would a request's `long_audio` act, since clips are read before.
    """
    if given:
        raise ValueError(
            f"mm_processor_kwargs has {', '.join(map(repr, sorted(given)))}, which a request may not set; "
            "leave it out, or give the server --mm-processor-kwargs"
        )
