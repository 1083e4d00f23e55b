"""The processor: an image is one token, which holds the colour of its middle."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.data.chat_template import ChatTemplate, RoleForm, Segment, Special
from train.data.encoding import Medium, Tokens
from train.data.images import image_size
from train.data.text import TextProcessor
from train.schema import file_of


class FourthProcessor(TextProcessor):
    template = ChatTemplate(
        roles={
            "user": RoleForm(("Q: ",), ("\n",)),
            "assistant": RoleForm(("A: ",), (Special("<|turn_end|>"),)),
        }
    )

    def _lay_out_medium(self, tokens: Tokens, segment: Segment) -> None:
        begin = len(tokens.ids)
        tokens.extend(self._encoder.special("<|image_pad|>"))
        size = image_size(file_of(segment.content))
        tokens.media.append(Medium("image", segment.content, size, begin, begin + 1, np.array([begin])))

    def _units(self, medium: Medium) -> int:
        return 1

    def _features(self, medium: Medium, decoded: Any) -> tuple[Tensor, Tensor]:
        width, height = medium.size
        colour = decoded.getpixel((width // 2, height // 2))
        return torch.tensor([colour]) / 255, torch.tensor([1])
