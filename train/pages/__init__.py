"""HTML pages that need nothing beside themselves: no scripts, no network, light and dark, wide and narrow."""
