"""Model families: a folder each, with a declaration that `registry.FAMILIES` names."""
