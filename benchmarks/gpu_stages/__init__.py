"""The stages of gpu.py: each a function that measures, and gives figures with what is accepted of them."""
