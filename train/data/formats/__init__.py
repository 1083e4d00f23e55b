"""Record formats: a small class each. A format is added by adding its class, and an instance of it here."""

from train.data.formats.format import RecordFormat
from train.data.formats.llava import Llava
from train.data.formats.megrez import Megrez
from train.data.formats.openai import OpenAI

FORMATS: tuple[RecordFormat, ...] = (Llava(), Megrez(), OpenAI())
"""The first that recognises a record reads it."""
