"""The door between padded `[B, S]` calls and the packed core: left, right and no padding agree by construction."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minim3.model.batch import ForwardBatch


@dataclass(frozen=True)
class PaddedLayout:
    """Which places of a `[B, S]` grid hold tokens.

    keep: int64 `[T]`, indices of the tokens in the flattened grid, or None when all B * S are tokens.
    lengths: tokens of each row that has any.
    """

    batch_size: int
    row_length: int
    lengths: tuple[int, ...]
    keep: Tensor | None

    @classmethod
    def from_masks(
        cls,
        batch_size: int,
        row_length: int,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> "PaddedLayout":
        """`attention_mask` `[B, S]`: true or nonzero at tokens. `padding_mask` `[B, S]`: true at padding.

        Raises ValueError for another shape, for a row with a hole in it, and when no token is left.
        """
        if row_length == 0 or batch_size == 0:
            raise ValueError(f"there are no tokens: the input is [{batch_size}, {row_length}]")
        real: Tensor | None = None
        for name, mask in (("attention_mask", attention_mask), ("padding_mask", padding_mask)):
            if mask is None:
                continue
            if tuple(mask.shape) != (batch_size, row_length):
                raise ValueError(
                    f"{name} has shape {list(mask.shape)}, the input is [{batch_size}, {row_length}]: "
                    "pass a 2-D mask of the input's own shape (the causal and sparse masks are the model's work)"
                )
            tokens = mask.bool() if name == "attention_mask" else ~mask.bool()
            real = tokens if real is None else real & tokens
        if real is None or bool(real.all()):
            return cls(batch_size, row_length, (row_length,) * batch_size, None)
        real = real.cpu()
        row_starts = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0].long()
        if int(row_starts.max()) > 1:
            row = int(row_starts.argmax())
            raise ValueError(
                f"row {row} of the attention mask has a hole: its tokens lie in {int(row_starts[row])} runs; "
                "padding may stand on the left or on the right of a row, not inside it"
            )
        lengths = tuple(length for length in real.sum(1).tolist() if length)
        if not lengths:
            raise ValueError("there are no tokens: the attention mask hides them all")
        keep = real.flatten().nonzero().squeeze(1)
        mask_device = attention_mask.device if attention_mask is not None else padding_mask.device  # type: ignore[union-attr]
        return cls(batch_size, row_length, lengths, keep.to(mask_device))

    def pack(self, x: Tensor) -> Tensor:
        """`[B, S, ...]` -> `[T, ...]`; a leading 1 is broadcast over the batch."""
        if x.shape[0] == 1 and self.batch_size > 1:
            x = x.expand(self.batch_size, *x.shape[1:])
        if tuple(x.shape[:2]) != (self.batch_size, self.row_length):
            raise ValueError(f"expected a tensor [{self.batch_size}, {self.row_length}, ...], got {list(x.shape)}")
        flat = x.flatten(0, 1)
        return flat if self.keep is None else flat.index_select(0, self.keep.to(x.device))

    def unpack(self, x: Tensor) -> Tensor:
        """`[T, ...]` -> `[B, S, ...]`, zero at padding."""
        if self.keep is not None:
            grid = x.new_zeros(self.batch_size * self.row_length, *x.shape[1:])
            x = grid.index_copy(0, self.keep.to(x.device), x)
        return x.view(self.batch_size, self.row_length, *x.shape[1:])

    def batch(self, device: torch.device, position_ids: Tensor | None = None) -> ForwardBatch:
        """The packed batch of this layout; `position_ids` `[B, S]` or `[1, S]` replace 0..length-1."""
        positions = None if position_ids is None else self.pack(position_ids).to(device)
        return ForwardBatch.packed(self.lengths, device, positions)


def run_packed(
    packed_forward: Callable[[Tensor, Tensor, ForwardBatch], Tensor],
    x: Tensor,
    freqs_cis: Tensor,
    attention_mask: Tensor | None,
    padding_mask: Tensor | None,
) -> Tensor:
    """Run `packed_forward(x [T, H], freqs_cis [T, rotary_dim], batch)` on padded `[B, S, ...]` tensors."""
    layout = PaddedLayout.from_masks(x.shape[0], x.shape[1], attention_mask, padding_mask)
    return layout.unpack(packed_forward(layout.pack(x), layout.pack(freqs_cis), layout.batch(x.device)))
