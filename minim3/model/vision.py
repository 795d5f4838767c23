"""The vision tower: a CLIP-like encoder over patches with 3D rotary positions, and the projector into the text model.

Shapes: N patches of all pictures and video chunks, one after another; V vision hidden size, H text hidden size.
Within a grid `(t, h, w)` patches come in merge order: every `merge x merge` square of patches is contiguous.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minim3 import kernels
from minim3.config import MiniMaxM3VLConfig, MiniMaxM3VLVisionConfig
from minim3.model.layers import apply_rotary


def grid_to_list(grid_thw: Tensor | list[list[int]]) -> list[tuple[int, int, int]]:
    """A grid tensor `[n, 3]` -> `(t, h, w)` tuples. Raises ValueError for another shape or a size below 1."""
    rows = grid_thw.tolist() if isinstance(grid_thw, Tensor) else grid_thw
    grids = []
    for row in rows:
        if not isinstance(row, (list, tuple)) or len(row) != 3 or min(row) < 1:
            raise ValueError(f"a grid must be [n, 3] with (t, h, w) of at least 1 each, got {row}")
        grids.append((int(row[0]), int(row[1]), int(row[2])))
    return grids


def patch_coordinates(grid_thw: list[tuple[int, int, int]], merge: int) -> Tensor:
    """int64 `[N, 3]`: (t, row, column) of every patch, in merge order; t starts at 0 in every grid."""
    coordinates = []
    for t, h, w in grid_thw:
        if h % merge or w % merge:
            raise ValueError(f"the grid {t}x{h}x{w} cannot be cut into {merge}x{merge} squares of patches")
        axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        cube = torch.stack(axes, dim=-1)
        squares = cube.view(t, h // merge, merge, w // merge, merge, 3).transpose(2, 3)
        coordinates.append(squares.reshape(-1, 3))
    return torch.cat(coordinates)


def vision_rotary_table(coordinates: Tensor, head_dim: int, theta: float) -> Tensor:
    """`freqs_cis`, fp32 `[N, 3 * axis_dim]`, of `[N, 3]` coordinates: cosines of t, row and column angles, then sines.

    An axis turns `axis_dim = 2 * (head_dim // 3 // 2)` channels; the channels beyond three axes pass.
    """
    axis_dim = 2 * (head_dim // 3 // 2)
    exponents = torch.arange(0, axis_dim, 2, dtype=torch.float32, device=coordinates.device) / axis_dim
    angles = (coordinates.float().unsqueeze(-1) * (1.0 / theta**exponents)).flatten(1)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class PatchEmbedding(nn.Module):
    """The patch convolution as a matrix product; its weight keeps the shape of a 3D convolution, `[V, C, T, P, P]`."""

    def __init__(self, config: MiniMaxM3VLVisionConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.weight = nn.Parameter(
            torch.empty(config.hidden_size, config.num_channels, config.temporal_patch_size, size, size)
        )

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1))


class VisionEmbeddings(nn.Module):
    def __init__(self, config: MiniMaxM3VLVisionConfig) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(config)


class VisionAttention(nn.Module):
    """Bidirectional attention among the patches of one picture or chunk."""

    def __init__(self, config: MiniMaxM3VLVisionConfig, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, freqs_cis: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary(q, freqs_cis), apply_rotary(k, freqs_cis)
        out, _ = kernels.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, causal=False, implementation=self.backend)
        return self.out_proj(out.flatten(-2))


class VisionMLP(nn.Module):
    def __init__(self, config: MiniMaxM3VLVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionEncoderLayer(nn.Module):
    def __init__(self, config: MiniMaxM3VLVisionConfig, backend: str | None = None) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config, backend)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, freqs_cis: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), freqs_cis, cu_seqlens)
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nn.Module):
    def __init__(self, config: MiniMaxM3VLVisionConfig, backend: str | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([VisionEncoderLayer(config, backend) for _ in range(config.num_hidden_layers)])


class VisionTransformer(nn.Module):
    """Patch embedding, a norm (`pre_layrnorm`, as the checkpoints spell it), encoder layers; no norm at the end."""

    def __init__(self, config: MiniMaxM3VLVisionConfig, backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = VisionEncoder(config, backend)

    def forward(self, pixel_values: Tensor, grid_thw: list[tuple[int, int, int]]) -> Tensor:
        device = self.pre_layrnorm.weight.device
        coordinates = patch_coordinates(grid_thw, self.config.spatial_merge_size).to(device)
        freqs_cis = vision_rotary_table(coordinates, self.config.head_dim, self.config.rope_theta)
        sizes = torch.tensor([0] + [t * h * w for t, h, w in grid_thw])
        cu_seqlens = sizes.cumsum(0).to(device=device, dtype=torch.int32)
        hidden = self.pre_layrnorm(self.embeddings.patch_embedding(pixel_values.to(device)))
        for layer in self.encoder.layers:
            hidden = layer(hidden, freqs_cis, cu_seqlens)
        return hidden


class MiniMaxM3VisionModel(nn.Module):
    """The tower under its released name, `vision_tower.vision_model`."""

    def __init__(self, config: MiniMaxM3VLVisionConfig, backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config, backend)

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor | list[list[int]]) -> Tensor:
        """Patches `[N, C * T * P * P]` and their grids `[n, 3]` -> hidden states `[N, V]` of the last layer.

        A video is passed as its chunks, a grid each. Raises ValueError when the grids and the patches differ in number.
        """
        grids = grid_to_list(image_grid_thw)
        patch = self.config.num_channels * self.config.temporal_patch_size * self.config.patch_size**2
        expected = sum(t * h * w for t, h, w in grids)
        if pixel_values.dim() != 2 or pixel_values.shape[1] != patch:
            raise ValueError(f"pixel values must be [patches, {patch}], got {list(pixel_values.shape)}")
        if pixel_values.shape[0] != expected:
            raise ValueError(f"the grids {grids} hold {expected} patches, pixel values have {pixel_values.shape[0]}")
        return self.vision_model(pixel_values, grids)


class MultiModalProjector(nn.Module):
    """Two linear layers with an exact GELU between: from `in_dim` through `projector_hidden_size` to the text model."""

    def __init__(self, in_dim: int, projector_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, projector_dim)
        self.linear_2 = nn.Linear(projector_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


def build_projectors(config: MiniMaxM3VLConfig) -> tuple[MultiModalProjector, MultiModalProjector]:
    """The projector of every patch, and the MLP that merges a square of projected patches into one text token."""
    assert config.vision_config is not None
    hidden, width = config.text_config.hidden_size, config.projector_hidden_size
    merge = config.vision_config.spatial_merge_size**2
    return (
        MultiModalProjector(config.vision_config.hidden_size, width, hidden),
        MultiModalProjector(hidden * merge, width, hidden),
    )
