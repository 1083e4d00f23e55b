"""Model families: one small declaration each. `find` recognises a model folder's."""

from train.families.family import Family, find

__all__ = ["Family", "find"]
