"""vLLM's plugin: it serves model folders of architecture MegrezO, with images and recordings.

vLLM finds `register` by the entry point group `vllm.general_plugins`, and calls it in each of its processes.
"""

ARCHITECTURE = "MegrezO"
"""As a model folder's config.json names it."""


def register() -> None:
    """Tell transformers and vLLM about the model, whose own module is imported when it is served."""
    from vllm import ModelRegistry

    import train.auto  # noqa: F401

    ModelRegistry.register_model(ARCHITECTURE, "train.inference.vllm_plugin.model:ServedMegrezO")
