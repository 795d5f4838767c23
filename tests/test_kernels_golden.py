"""The selection of blocks equals the numbers an independent implementation computed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minim3 import kernels
from minim3.kernels.reference import build_block_sparse_attn_bias

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "selection_cases.json").read_text())


@pytest.mark.parametrize("implementation", [i for i in kernels.implementations() if i != "triton"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_selection_equals_golden(case: int, implementation: str) -> None:
    tensors = load_file(GOLDEN / "selection_mxfp8.safetensors")
    spec = CASES[case]
    tokens, block_size = spec["tokens"], spec["block_size"]
    index_q, index_k = tensors[f"case{case}.index_q"], tensors[f"case{case}.index_k"]
    selection = {
        name: spec[name] for name in ("block_size", "topk_blocks", "init_blocks", "local_blocks", "score_type")
    }
    ids = kernels.select_blocks(
        index_q, index_k, [0, tokens], [0, tokens], implementation=implementation, **selection
    )
    mask = torch.zeros(tokens, ids.shape[1], -(-tokens // block_size) + 1, dtype=torch.uint8)
    mask.scatter_(-1, torch.where(ids < 0, mask.shape[-1] - 1, ids).long(), 1)
    assert torch.equal(mask[..., :-1], tensors[f"case{case}.selected"])

    bias = build_block_sparse_attn_bias(
        index_q[None], index_k[None, :, None], num_q_heads=2 * spec["index_heads"], **selection
    )
    keep = tensors[f"case{case}.selected"].bool().repeat_interleave(block_size, -1)[..., :tokens].transpose(0, 1)
    keep = (keep & torch.ones(tokens, tokens, dtype=torch.bool).tril()).repeat_interleave(2, 0)
    assert torch.equal(bias[0] == 0, keep)
    assert torch.equal(bias[0] == float("-inf"), ~keep)
