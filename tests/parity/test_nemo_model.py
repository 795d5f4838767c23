"""The same text weights in NeMo Automodel and here: a checkpoint written by us, read by its state-dict adapter."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minim3.kernels.reference import build_block_sparse_attn_bias, select_blocks, selected_keys_mask, swiglu_oai
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM
from tests.tiny_models import random_ids, text_model


@pytest.fixture(scope="module")
def nemo() -> Iterator[ModuleType]:
    pytest.importorskip("nemo_automodel", reason="NeMo Automodel is not installed")
    module = pytest.importorskip("nemo_automodel.components.models.minimax_m3_vl.model")
    with torch.compiler.set_stance("force_eager"):  # it compiles a few small functions, for longer than the test runs
        yield module


def theirs_from(nemo: ModuleType, folder: Path) -> Any:
    """Their model with the weights of our checkpoint folder: config.json by their class, tensors by their adapter."""
    from nemo_automodel.components.models.common import BackendConfig

    backend = BackendConfig(attn="sdpa", linear="torch", rms_norm="torch", rope_fusion=False, experts="torch")
    config = nemo.MiniMaxM3VLTextConfig(**json.loads((folder / "config.json").read_text()))
    model = nemo.MiniMaxM3SparseForCausalLM(config, backend=backend).float()  # it builds itself in bf16
    state = model.state_dict_adapter.from_hf(load_file(folder / "model.safetensors"))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if "_extra_state" not in name]
    return model


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (0, {"num_mtp_modules": 1}),
        (1, {"num_mtp_modules": 2, "index_init_blocks": 1, "index_topk_blocks": 3}),
        (2, {"index_score_type": "lse", "scoring_func": "softmax", "swiglu_limit": 0.5, "routed_scaling_factor": 1.5}),
        (3, {"rotary_dim": 16, "n_shared_experts": 0, "num_key_value_heads": 1, "index_n_heads": 1,
             "layer_types": ("minimax_m3_sparse",) * 3}),
    ],
)  # fmt: skip
def test_logits_and_mtp_logits(nemo: ModuleType, seed: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """Init blocks, lse scores and softmax routing too, which transformers knows nothing of."""
    ours = text_model(seed, torch_dtype="float32", **changes)
    if ours.config.scoring_func == "softmax":  # theirs then ignores the correction bias
        for layer in ours.model.layers[1:]:
            layer.mlp.e_score_correction_bias.zero_()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "transformers ignores")
        ours.save_pretrained(tmp_path)
    theirs = theirs_from(nemo, tmp_path)
    ids = random_ids(2, 45, seed=seed)
    num_mtp = ours.config.num_mtp_modules
    with torch.no_grad():
        theirs.train(num_mtp > 0)  # it gives MTP logits in training mode only
        expected = theirs(ids)
        got = ours(ids, output_mtp_logits=num_mtp > 0)
    if num_mtp:
        assert len(got.mtp_per_depth_logits) == len(expected.mtp_per_depth_logits) == num_mtp
        for depth, (a, b) in enumerate(zip(got.mtp_per_depth_logits, expected.mtp_per_depth_logits)):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=lambda text, d=depth: f"MTP depth {d}: {text}")
        expected = expected.logits
    torch.testing.assert_close(got.logits, expected, atol=1e-4, rtol=1e-4)


def test_their_saved_checkpoint_loads_here(nemo: ModuleType, tmp_path: Path) -> None:
    """The other way round: what their adapter writes is what our reader takes."""
    from safetensors.torch import save_file

    ours = text_model(5, torch_dtype="float32", num_mtp_modules=1)
    ours.save_pretrained(tmp_path / "ours")
    theirs = theirs_from(nemo, tmp_path / "ours")
    written = theirs.state_dict_adapter.to_hf(theirs.state_dict())
    (tmp_path / "theirs").mkdir()
    save_file({key: tensor.contiguous() for key, tensor in written.items()}, tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "config.json").write_text((tmp_path / "ours" / "config.json").read_text())
    again = MiniMaxM3SparseForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("score_type", ["max", "lse"])
@pytest.mark.parametrize(("init_blocks", "topk_blocks"), [(0, 2), (1, 3), (2, 4)])
def test_selections(nemo: ModuleType, score_type: str, init_blocks: int, topk_blocks: int) -> None:
    from nemo_automodel.components.models.minimax_m3_vl.layers import build_block_sparse_attn_mask

    generator = torch.Generator().manual_seed(init_blocks)
    index_q = torch.randn(2, 53, 2, 16, generator=generator)
    index_k = torch.randn(2, 53, 1, 16, generator=generator)
    chosen = {
        "block_size": 4, "topk_blocks": topk_blocks, "init_blocks": init_blocks, "local_blocks": 1,
        "score_type": score_type,
    }  # fmt: skip
    expected = build_block_sparse_attn_mask(index_q, index_k, num_q_heads=4, **chosen)
    bias = build_block_sparse_attn_bias(index_q, index_k, num_q_heads=4, **chosen)
    assert torch.equal(bias == 0, expected)
    ids = select_blocks(index_q.flatten(0, 1), index_k.reshape(106, 16), [0, 53, 106], [0, 53, 106], **chosen)
    for row in range(2):
        keep = selected_keys_mask(ids[53 * row : 53 * (row + 1)], 53, 4).transpose(0, 1)
        assert torch.equal(keep & torch.ones(53, 53, dtype=torch.bool).tril(), expected[row, ::2])


def test_swiglu(nemo: ModuleType) -> None:
    from nemo_automodel.components.models.minimax_m3_vl import layers

    gate, up = torch.randn(2, 64) * 6
    for dtype in (torch.float32, torch.bfloat16):
        for limit in (7.0, 0.5, 0.0):
            expected = layers.swiglu_oai(gate.to(dtype), up.to(dtype), 1.702, limit)
            assert torch.equal(swiglu_oai(gate.to(dtype), up.to(dtype), 1.702, limit), expected)
