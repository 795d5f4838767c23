"""Where the weights of a model come from and go to: construction, casting, saving, tying, packing for inference."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from minim3.checkpoint import read_config
from minim3.config import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration
from minim3.model.moe import build_moe_config
from tests.tiny_models import media_prompt, random_ids, text_config, text_model, vl_config, vl_model


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def router_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor for name, tensor in model.state_dict().items()
        if name.endswith(("block_sparse_moe.gate.weight", "e_score_correction_bias"))
    }  # fmt: skip


# Construction


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_from_config_draws_every_weight(dtype: torch.dtype) -> None:
    """Empty memory that nobody fills looks like a working model now and then."""
    torch.manual_seed(0)
    model = MiniMaxM3SparseForConditionalGeneration.from_config(
        vl_config(num_mtp_modules=1, initializer_range=0.05), dtype=dtype
    )
    assert isinstance(model.config, MiniMaxM3VLConfig)
    assert isinstance(model.text_config, MiniMaxM3VLTextConfig)
    assert (model.dtype, model.device) == (dtype, torch.device("cpu"))
    router = torch.float64 if dtype == torch.float64 else torch.float32
    assert {tensor.dtype for tensor in router_tensors(model).values()} == {router}
    for name, tensor in model.state_dict().items():
        last = name.split(".")[-2]
        if name.endswith((".bias", "_bias")):
            assert not tensor.any(), name
        elif "norm" in last and "layer_norm" not in last and "layrnorm" not in last:
            assert not tensor.any(), f"{name}: a Gemma norm is neutral at 0"
        elif "norm" in last:
            assert (tensor == 1).all(), name
        else:
            assert 0.04 < tensor.double().std() < 0.06, name
            assert tensor.dtype == (router if "gate.weight" in name and "moe" in name else dtype), name
    torch.manual_seed(0)
    again = MiniMaxM3SparseForConditionalGeneration.from_config(model.config, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_dtypes_by_name_and_none_that_weights_cannot_have(tmp_path: Path) -> None:
    """A name, as transformers takes it, ended in a TypeError from deep inside; so did an integer dtype."""
    text_model(torch_dtype="bfloat16").save_pretrained(tmp_path, format="bf16")
    load = MiniMaxM3SparseForCausalLM.from_pretrained
    wanted = [("float16", torch.float16), ("auto", torch.bfloat16), (None, torch.bfloat16), (torch.float32,) * 2]
    for given, dtype in wanted:
        assert load(tmp_path, dtype=given).dtype == dtype
    for wrong in ("int8", "float33", torch.int8):
        with pytest.raises(ValueError, match="weights are float32"):
            load(tmp_path, dtype=wrong)


def test_initialize_weights_redraws_and_casts() -> None:
    model = text_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.initialize_weights(buffer_device=torch.device("cpu"), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in router_tensors(model).values()} == {torch.float32}
    assert not any(torch.equal(tensor.float(), before[name]) for name, tensor in model.state_dict().items())
    model.model.init_weights()
    assert model.dtype == torch.bfloat16


def test_a_moe_config_that_disagrees_is_refused() -> None:
    config = text_config()
    MiniMaxM3SparseForCausalLM(config, build_moe_config(config, torch.float32))
    with pytest.raises(ValueError, match="moe_config"):
        MiniMaxM3SparseForCausalLM(config, build_moe_config(text_config(routed_scaling_factor=9.0), torch.float32))


def test_a_text_config_does_not_make_a_vision_model() -> None:
    with pytest.raises(ValueError, match="MiniMaxM3SparseForCausalLM"):
        MiniMaxM3SparseForConditionalGeneration(text_config())  # type: ignore[arg-type]


@torch.no_grad()
def test_cast_keeps_the_router_in_fp32_and_bf16_close() -> None:
    model = vl_model()
    prompt = media_prompt()
    expected = model(**prompt).logits
    for cast in (lambda m: m.cast(torch.bfloat16), lambda m: m.to(torch.bfloat16), lambda m: m.half().bfloat16()):
        half = cast(copy.deepcopy(model))
        assert half.dtype == torch.bfloat16
        assert {tensor.dtype for tensor in router_tensors(half).values()} == {torch.float32}
        for name, tensor in router_tensors(half).items():
            assert torch.equal(tensor, router_tensors(model)[name]), f"{name} went through bf16"
    got = half(**prompt).logits
    assert got.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(got.float(), expected, dim=-1).median() > 0.99


# Saving and loading


@pytest.mark.parametrize("kind", ["text", "whole"])
@pytest.mark.parametrize(("format", "tolerance"), [(None, 0.0), ("fp32", 0.0), ("bf16", 2**-8), ("mxfp8", 2**-3)])
@torch.no_grad()
def test_save_and_load(kind: str, format: str | None, tolerance: float, tmp_path: Path) -> None:
    """fp32 exactly, the others as close as their mantissa; the router exactly in all."""
    model = text_model(num_mtp_modules=1) if kind == "text" else vl_model(num_mtp_modules=1)
    model.save_pretrained(tmp_path, format=format)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert not again.training
    assert again.text_config.num_mtp_modules == 1
    assert again.text_config.layer_types == model.text_config.layer_types
    for name, tensor in model.state_dict().items():
        loaded = again.state_dict()[name]
        bound = 0.0 if name in router_tensors(model) else tolerance * tensor.abs().max()
        assert (loaded - tensor).abs().max() <= bound, name
    if not tolerance:
        inputs = {"input_ids": random_ids(2, 30)} if kind == "text" else media_prompt()
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    as_saved = type(model).from_pretrained(tmp_path)
    assert as_saved.dtype == (torch.float32 if format in (None, "fp32") else torch.bfloat16)


@torch.no_grad()
def test_the_text_part_of_a_whole_checkpoint(tmp_path: Path) -> None:
    model = vl_model()
    model.save_pretrained(tmp_path / "whole")
    text = MiniMaxM3SparseForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    ids = random_ids(1, 30)
    assert torch.equal(text(ids).logits, model(ids).logits)
    text.save_pretrained(tmp_path / "text")
    assert isinstance(read_config(tmp_path / "text"), MiniMaxM3VLTextConfig)
    with pytest.raises(ValueError, match="has no vision part"):
        MiniMaxM3SparseForConditionalGeneration.from_pretrained(tmp_path / "text")


@torch.no_grad()
def test_tied_embeddings(tmp_path: Path) -> None:
    """One tensor under two names: in memory, in the file, after loading, and in training."""
    for model in (text_model(tie_word_embeddings=True), vl_model(tie_word_embeddings=True)):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
        again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
        ids = random_ids(1, 20)
        assert torch.equal(again(ids).logits, model(ids).logits)
        model.cast(torch.bfloat16)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    untied = text_model()
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight


@torch.no_grad()
def test_getters_and_setters() -> None:
    for model in (text_model(), vl_model()):
        ids = random_ids(1, 10)
        before = model(ids).logits
        model.set_output_embeddings(nn.Linear(32, 70, bias=False))
        assert model(ids).logits.shape == (1, 10, 70)
        assert model.lm_head is model.get_output_embeddings()
        model.set_input_embeddings(nn.Embedding(70, 32))
        assert model.get_input_embeddings().num_embeddings == 70
        assert (model(ids).logits[..., :64] - before).abs().max() > 0.1
        assert model(torch.full((1, 3), 69)).logits.shape == (1, 3, 70)


# Packing for inference


@pytest.fixture
def packed() -> MiniMaxM3SparseForCausalLM:
    model = text_model(3)
    model.pack_for_inference()
    return model


IDS = random_ids(2, 30, seed=8)


def logits_unpacked(model: MiniMaxM3SparseForCausalLM) -> Tensor:
    """Of a model built anew from the same state."""
    fresh = MiniMaxM3SparseForCausalLM(model.config).cast(model.dtype)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        return fresh(IDS).logits


@torch.no_grad()
def test_packing_changes_no_value(packed: MiniMaxM3SparseForCausalLM) -> None:
    plain = text_model(3)
    attention = packed.model.layers[1].self_attn
    assert attention._packed is not None
    assert attention._packed.is_current(attention)
    assert packed.model.layers[0].self_attn._packed is not None, "a layer with full attention packs q, k and v"
    assert packed.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(packed.state_dict()[name], tensor), name
    close(packed(IDS).logits, plain(IDS).logits)


def change_weights(model: MiniMaxM3SparseForCausalLM) -> None:
    attention = model.model.layers[1].self_attn
    attention.k_proj.weight.mul_(1.5)
    attention.indexer.index_q_proj.weight.add_(0.1)


def change_norms(model: MiniMaxM3SparseForCausalLM) -> None:
    attention = model.model.layers[1].self_attn
    attention.q_norm.weight.add_(0.7)
    attention.indexer.index_k_norm.weight.sub_(0.4)


def load_others(model: MiniMaxM3SparseForCausalLM) -> None:
    model.load_state_dict(text_model(4).state_dict())


def assign_others(model: MiniMaxM3SparseForCausalLM) -> None:
    model.load_state_dict(text_model(4).state_dict(), assign=True)


def change_gates(model: MiniMaxM3SparseForCausalLM) -> None:
    moe = model.model.layers[1].block_sparse_moe
    moe.shared_experts.gate_proj.weight.mul_(3)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(model.model.layers[0].mlp.up_proj.weight * 2)


def change_layer_norms(model: MiniMaxM3SparseForCausalLM) -> None:
    model.model.layers[0].input_layernorm.weight.add_(0.5)
    model.model.layers[1].post_attention_layernorm.weight = nn.Parameter(torch.full((32,), 0.3))
    model.model.norm.weight.sub_(0.2)


def replace_a_projection(model: MiniMaxM3SparseForCausalLM) -> None:
    attention = model.model.layers[0].self_attn
    hidden_size = attention.q_proj.in_features
    attention.q_proj = nn.Linear(hidden_size, attention.q_proj.out_features, bias=False)


def replace_one_parameter(model: MiniMaxM3SparseForCausalLM) -> None:
    attention = model.model.layers[1].self_attn
    attention.v_proj.weight = nn.Parameter(attention.v_proj.weight * 2)


def cast(model: MiniMaxM3SparseForCausalLM) -> None:
    model.cast(torch.float64)


@pytest.mark.parametrize(
    "change",
    [
        change_weights, change_norms, change_gates, change_layer_norms, load_others, assign_others,
        replace_a_projection, replace_one_parameter, cast,
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_a_packed_model_never_runs_on_weights_of_before(
    packed: MiniMaxM3SparseForCausalLM, change, again: bool
) -> None:
    """Training goes on after an evaluation, a state is loaded, a module replaced: the packed copy must not survive."""
    with torch.no_grad():
        before = packed(IDS).logits
        change(packed)
        if again:
            packed.pack_for_inference()
        got = packed(IDS).logits
    close(got, logits_unpacked(packed), 1e-4)
    if change is not cast:
        assert (got - before).abs().max() > 1e-3, "the case changes something"


def test_training_goes_on_in_a_packed_model(packed: MiniMaxM3SparseForCausalLM) -> None:
    optimizer = torch.optim.SGD(packed.parameters(), lr=0.3)
    for _ in range(2):
        optimizer.zero_grad()
        output = packed(IDS, labels=IDS, output_indexer_kl=True)
        (output.loss + sum(output.indexer_kl)).backward()
        optimizer.step()
    with torch.no_grad():
        close(packed(IDS).logits, logits_unpacked(packed), 1e-4)


@torch.no_grad()
def test_a_packed_model_can_be_copied_and_saved(packed: MiniMaxM3SparseForCausalLM, tmp_path: Path) -> None:
    clone = copy.deepcopy(packed)
    change_weights(packed)
    close(clone(IDS).logits, text_model(3)(IDS).logits)
    packed.save_pretrained(tmp_path)
    again = MiniMaxM3SparseForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    close(again(IDS).logits, packed(IDS).logits)


@torch.no_grad()
def test_models_that_cannot_be_packed_run_unpacked() -> None:
    for changes in ({"index_head_dim": 8}, {"use_qk_norm": False}):
        model = text_model(**changes)
        expected = model(IDS).logits
        model.pack_for_inference()
        assert model.model.layers[1].self_attn._packed is None
        close(model(IDS).logits, expected)


def test_a_model_made_in_inference_mode_packs_too() -> None:
    with torch.inference_mode():
        model = text_model(3)
        expected = model(IDS).logits
        model.pack_for_inference()
        close(model(IDS).logits, expected)
        change_norms(model)
        model.pack_for_inference()
        close(model(IDS).logits, logits_unpacked(model))
