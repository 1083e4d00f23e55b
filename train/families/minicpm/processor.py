"""The processor of MiniCPM-2B: text alone."""

from train.data.text import TextProcessor
from train.families.minicpm.template import MINICPM_TEMPLATE


class MiniCPMProcessor(TextProcessor):
    """MiniCPM-2B's."""

    template = MINICPM_TEMPLATE
