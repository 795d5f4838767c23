"""Pictures and videos in a text model: features in the place of placeholders, and the model without a head."""

import torch
from torch import Tensor, nn

from minim3.config import MiniMaxM3VLConfig
from minim3.model.decoder import MiniMaxM3TextModel, initialize
from minim3.model.moe import MoEConfig
from minim3.model.padding import PaddedLayout
from minim3.model.vision import MiniMaxM3VisionModel, build_projectors


class VisionLanguage(nn.Module):
    """The vision tower, the projectors, and how their features enter the packed embeddings.

    A class that has it builds the parts with `_build_vision` and says how ids are embedded.
    """

    config: MiniMaxM3VLConfig

    def _build_vision(self, config: MiniMaxM3VLConfig, backend: str | None) -> None:
        if not isinstance(config, MiniMaxM3VLConfig) or config.vision_config is None:
            raise ValueError(
                f"{type(self).__name__} needs a config with a vision part, got a {type(config).__name__} without: "
                "use MiniMaxM3SparseForCausalLM for text-only models"
            )
        self.config = config
        self.vision_tower = MiniMaxM3VisionModel(config.vision_config, backend)
        self.multi_modal_projector, self.patch_merge_mlp = build_projectors(config)

    def embed_tokens_packed(self, input_ids: Tensor) -> Tensor:
        raise NotImplementedError

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        """The text that stands for the i-th picture or video of a prompt before it is expanded."""
        if modality not in ("image", "video"):
            raise ValueError(f"modality must be 'image' or 'video', got {modality!r}")
        return f"]<]{modality}[>["

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor | list[list[int]]) -> Tensor:
        """Patches `[N, C * T * P * P]` of pictures, grids `[n, 3]` -> one feature a placeholder token, `[N / 4, H]`."""
        projected = self.multi_modal_projector(self.vision_tower(pixel_values, image_grid_thw))
        assert self.config.vision_config is not None
        merge = self.config.vision_config.spatial_merge_size**2
        return self.patch_merge_mlp(projected.view(-1, merge * projected.shape[-1]))

    def get_video_features(self, pixel_values_videos: Tensor, video_grid_thw: Tensor | list[list[int]]) -> Tensor:
        """The same for videos: a grid row a chunk of at most a few temporal patches, attended to by itself."""
        return self.get_image_features(pixel_values_videos, video_grid_thw)

    def embed_multimodal(
        self,
        *,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
    ) -> list[Tensor]:
        """The features `[tokens, H]` of each picture, then of each video chunk: one tensor a grid row."""
        assert self.config.vision_config is not None
        merge = self.config.vision_config.spatial_merge_size**2
        found: list[Tensor] = []
        for pixels, grid in ((pixel_values, image_grid_thw), (pixel_values_videos, video_grid_thw)):
            given = _given(pixels, grid)
            if given is not None:
                found += self.get_image_features(*given).split((given[1].prod(-1) // merge).tolist())
        return found

    def embed_packed(
        self,
        input_ids: Tensor,
        *,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        image_order: Tensor | None = None,
        video_order: Tensor | None = None,
    ) -> Tensor:
        """Packed ids `[T]` and their media -> embeddings `[T, H]`.

        image_order: int64 `[uses]`, the row of `image_grid_thw` that each successive picture of the ids shows, so that
        several documents may share one picture; by default each row is used once, in order. video_order: the same for
        the rows of `video_grid_thw`, the chunks of clips.
        """
        return self._embed(
            input_ids, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw, image_order, video_order
        )[0]

    def _embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_grid_thw: Tensor | None,
        pixel_values_videos: Tensor | None,
        video_grid_thw: Tensor | None,
        image_order: Tensor | None = None,
        video_order: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Embeddings `[T, H]`, picture features and video features."""
        for what, pixels, grid in (
            ("pixel_values", pixel_values, image_grid_thw),
            ("pixel_values_videos", pixel_values_videos, video_grid_thw),
        ):
            if (pixels is None) != (grid is None):
                present, absent = ("grid", "patches") if pixels is None else ("patches", "grid")
                raise ValueError(f"{what}: there is a {present} tensor without {absent}; pass both or neither")
        embeds = self.embed_tokens_packed(input_ids)
        images = videos = None
        given = _given(pixel_values, image_grid_thw)
        if given is not None:
            images = self._in_order(self.get_image_features(*given), given[1], image_order)
        embeds = splice_features(embeds, input_ids, self.config.image_token_index, images, "image")
        given = _given(pixel_values_videos, video_grid_thw)
        if given is not None:
            videos = self._in_order(self.get_video_features(*given), given[1], video_order)
        return splice_features(embeds, input_ids, self.config.video_token_index, videos, "video"), images, videos

    def _in_order(self, features: Tensor, grid: Tensor, order: Tensor | None) -> Tensor:
        """The features `[tokens, H]` of the grid rows that `order` lists; None: of every row, in order."""
        if order is None:
            return features
        assert self.config.vision_config is not None
        merge = self.config.vision_config.spatial_merge_size**2
        rows = features.split((grid.prod(-1) // merge).tolist())
        return torch.cat([rows[row] for row in order.tolist()])


def _given(pixels: Tensor | None, grid: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Both, None where there is nothing; patches without a row, or a row without patches, the tower refuses."""
    if pixels is None or grid is None or not (len(pixels) or len(grid)):
        return None
    return pixels, torch.as_tensor(grid)


def splice_features(
    embeds: Tensor, input_ids: Tensor, token_id: int, features: Tensor | None, modality: str, *, start: int = 0,
    exact: bool = True,
) -> Tensor:  # fmt: skip
    """Put `features` `[n, H]` in the place of the embeddings `[T, H]` of the tokens `token_id`, in order.

    A chunk of a prompt takes the features from `start` on, with `exact=False`. Raises ValueError when counts differ.
    """
    places = (input_ids == token_id).nonzero().squeeze(1)
    available = 0 if features is None else features.shape[0] - start
    if (places.numel() != available) if exact else (places.numel() > available):
        raise ValueError(
            f"the prompt has {places.numel()} {modality} placeholder tokens (id {token_id}), but the {modality}s given "
            f"make {available} features: every placeholder needs one feature"
        )
    if features is None or not places.numel():
        return embeds
    taken = features[start : start + places.numel()].to(embeds.dtype)
    return embeds.index_copy(0, places, taken)


class MiniMaxM3VLModel(VisionLanguage):
    """The backbone without a head: ids and media -> hidden states."""

    def __init__(
        self, config: MiniMaxM3VLConfig, moe_config: MoEConfig | None = None, backend: str | None = None
    ) -> None:
        super().__init__()
        self._build_vision(config, backend)
        self.language_model = MiniMaxM3TextModel(config.text_config, backend, moe_config=moe_config)
        if self.language_model.embed_tokens.weight.device.type != "meta":
            initialize(self, config.text_config.initializer_range)

    def embed_tokens_packed(self, input_ids: Tensor) -> Tensor:
        return self.language_model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        *,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Ids `[B, S]` and media -> hidden states `[B, S, H]` after the final norm, zero at padding."""
        layout = PaddedLayout.from_masks(input_ids.shape[0], input_ids.shape[1], attention_mask, padding_mask)
        ids = layout.pack(input_ids)
        embeds, _, _ = self._embed(ids, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        return layout.unpack(self.language_model.forward_packed(embeds, layout.batch(ids.device, position_ids)))
