"""Before a run: what it would trip over, what it will learn from, what it will take."""
