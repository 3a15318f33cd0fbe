"""A checkpoint's processor and the settings in, the form of the features out: preprocessing, prompt, layout and binding. Loads no weights."""

from collections.abc import Sequence
from typing import Any

from vla_lib.core.errors import UserError
from vla_lib.features.binding import make_binding
from vla_lib.features.pixels import IMAGE_BACKEND, PixelRecipe
from vla_lib.features.pooling import Pooling, layout_for
from vla_lib.features.prompt import Prompt
from vla_lib.features.vlm import Checkpoint

TEXT_TOKENS = "mean over the tokens after the last picture"


class FeatureForm:
    """What the model is shown and how its hidden states are pooled; the same object serves the cache builder and live use."""

    def __init__(self, processor: Any, views: Sequence[str], pooling: str, height: int, width: int):
        if not views or len(set(views)) != len(views):
            raise UserError(f"--views needs one or more different views, got {list(views)}.")
        self.views = tuple(views)
        self.pooling = Pooling.parse(pooling)
        self.recipe = PixelRecipe.of(processor.image_processor, height, width)
        self.layout = layout_for(self.pooling, self.views, height, width, self.recipe.factor)
        self.prompt = Prompt(processor, self.views, processor.image_token)

    def binding(self, checkpoint: Checkpoint, layer: int, tick_stride: int, dtype: str) -> dict[str, Any]:
        """The binding of features in this form: `layer` decoder layers of `checkpoint`, one tick every `tick_stride` action steps."""
        import transformers

        return make_binding(
            source=checkpoint.source,
            model=checkpoint.name,
            weights_sha256=checkpoint.sha256,
            family=checkpoint.family,
            layer=layer,
            depth=checkpoint.depth,
            hidden_size=checkpoint.hidden_size,
            pooling=str(self.pooling),
            image_resize_height=self.recipe.height,
            image_resize_width=self.recipe.width,
            image_backend=IMAGE_BACKEND,
            views=self.views,
            prompt=self.prompt.template(),
            text_tokens=TEXT_TOKENS,
            tick_stride=tick_stride,
            dtype=dtype,
            transformers=transformers.__version__,
            layout=self.layout.to_dict(),
        )
