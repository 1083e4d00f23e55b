"""Trackers: where the figures of a run can be watched beside metrics.jsonl. None of them ends a run."""
