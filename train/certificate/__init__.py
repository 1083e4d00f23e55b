"""What the project promises, shown on a user's own records and model: `certify.py` is the way in."""
