"""The processor of Megrez-3B-Instruct: text alone."""

from train.data.text import TextProcessor
from train.families.megrezo.template import MEGREZ_TEMPLATE


class MegrezTextProcessor(TextProcessor):
    """Megrez-3B-Instruct's."""

    template = MEGREZ_TEMPLATE
