"""Views and an instruction in, the text that a Qwen-VL model reads out: one template for caching, training and live use."""

from collections.abc import Sequence
from dataclasses import dataclass

from vla_lib.core.errors import UserError

SLOT = "{instruction}"
REQUEST = "The robot is to do this task: "


@dataclass(frozen=True)
class Prompt:
    """The chat template, applied once for every set of views that occurs; the instruction is filled in afterwards."""

    processor: object
    views: tuple[str, ...]
    image_token: str = "<|image_pad|>"

    def template(self, views: Sequence[str] | None = None) -> str:
        """The whole text for `views` (default: all), with `{instruction}` and one image token a view in it."""
        views = self.views if views is None else views
        content: list[dict[str, str]] = []
        for view in views:
            content += [{"type": "text", "text": f"{view}: "}, {"type": "image"}, {"type": "text", "text": "\n"}]
        content.append({"type": "text", "text": REQUEST + SLOT})
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        if text.count(SLOT) != 1 or text.count(self.image_token) != len(views):
            raise UserError(
                "The checkpoint's chat template does not keep the pictures and the text of a message; take a Qwen-VL checkpoint."
            )
        return text

    def render(self, views: Sequence[str], instruction: str) -> str:
        """The text for these views and this instruction, one image token a picture (the plain processor's input).

        Raises UserError where the instruction holds a special token.
        """
        if "<|" in instruction:
            raise UserError(
                f'The instruction "{instruction}" holds "<|", which the model reads as a special token; reword it in datasets.yaml.'
            )
        return self.template(views).replace(SLOT, instruction)

    def expand(self, views: Sequence[str], instruction: str, image_tokens: Sequence[int]) -> str:
        """`render` with each picture's image token repeated `image_tokens[i]` times (what the model reads)."""
        parts = self.render(views, instruction).split(self.image_token)
        return parts[0] + "".join(
            self.image_token * count + part for count, part in zip(image_tokens, parts[1:], strict=True)
        )
