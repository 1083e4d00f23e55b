"""What requests to vLLM's server may not do."""

import pytest

from train.inference.vllm_plugin.options import refuse_options


@pytest.mark.parametrize("name", ["subfolder", "cache_dir", "revision", "token", "long_audio", "truncation"])
def test_a_request_sets_no_option_of_what_loads_files(name: str) -> None:
    with pytest.raises(ValueError, match=f"mm_processor_kwargs has '{name}', which a request may not set"):
        refuse_options({name: "../elsewhere"})


def test_a_request_without_options_is_served() -> None:
    refuse_options({})
