"""The folders of the tiny models, a module for each architecture."""
