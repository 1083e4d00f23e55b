"""The processor: an image is one token, which holds the colour of its middle."""

import numpy as np
import torch
from torch import Tensor

from train.data.chat_template import ChatTemplate, RoleForm, Segment, Special
from train.data.encoding import Medium, Tokens
from train.data.images import load_picture, picture_size
from train.data.text import TextProcessor
from train.schema import Changes, file_of


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
        size = picture_size(file_of(segment.content))
        tokens.media.append(Medium("image", segment.content, size, begin, begin + 1, np.array([begin])))

    def _units(self, medium: Medium) -> int:
        return 1

    def _decoded(self, medium: Medium, changes: Changes | None) -> tuple[Tensor, Tensor]:
        width, height = medium.size
        picture = load_picture(file_of(medium.source))
        colour = (changes.picture(picture) if changes else picture).getpixel((width // 2, height // 2))
        return torch.tensor([colour]) / 255, torch.tensor([1])
