"""After a run, and during it: a page that shows how it goes, and a page that compares runs."""
