"""Adapters: what they compute, how they are trained, saved, loaded and merged."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minim3 import kernels
from minim3.checkpoint import Placement, read_adapter, write_checkpoint
from minim3.checkpoint.adapter import CONFIG_FILE, TENSOR_FILE
from minim3.checkpoint.adapter_names import TARGET_GROUPS
from minim3.model.adapter import (
    adapted_modules,
    adapter_factors,
    adapter_parameters,
    attach_adapter,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
)
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration
from minim3.model.decoding import DecodingModel
from minim3.model.lora import LoraExperts, LoraSettings
from minim3.model.moe import MiniMaxM3Experts
from minim3.model.quantization import quantize_model
from tests.tiny_models import media_prompt, random_ids, randomize, text_config, text_model, vl_model

TESTS = Path(__file__).parent
EVERYWHERE = tuple(TARGET_GROUPS)
WITHOUT_MTP = tuple(group for group in EVERYWHERE if group != "mtp")


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> None:
    """Factors that matter: a fresh adapter changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model).values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 * parameter.shape[-1] ** -0.5)


def adapted(
    model: Any, targets: tuple[str, ...] = WITHOUT_MTP, rank: int = 3, alpha: float = 4.0, **options: Any
) -> Any:
    attach_adapter(model, targets=targets, rank=rank, alpha=alpha, **options)
    fill(model)
    return model


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


# What an adapter computes


@settings(max_examples=12, deadline=None)
@given(
    targets=st.lists(st.sampled_from(EVERYWHERE), min_size=1, unique=True),
    rank=st.integers(1, 5),
    alpha=st.floats(0.5, 8),
    rslora=st.booleans(),
)
def test_an_adapter_is_the_sum_of_weight_and_product(
    targets: list[str], rank: int, alpha: float, rslora: bool
) -> None:
    """A wrong scale, a swapped half of gate and up, or an expert with another's factors gives other logits."""
    model = vl_model(num_mtp_modules=1).double()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapted(model, tuple(targets), rank, alpha, rslora=rslora)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in media_prompt().items()}
    with torch.no_grad():
        out = model(**inputs, output_mtp_logits=True)
    scale = alpha / (rank**0.5 if rslora else rank)
    expected = dict(before)
    for name, module in adapted_modules(model):
        for weight, (a_name, b_name) in module.factor_names.items():
            a, b = module.get_parameter(a_name), module.get_parameter(b_name)
            if weight == "w13":
                a, b = a.unflatten(1, (2, -1)), b.unflatten(1, (2, -1))
                change = (b @ a).flatten(1, 2)
            else:
                change = b @ a
            expected[f"{name}.{weight}"] = before[f"{name}.{weight}"] + scale * change
    plain = vl_model(num_mtp_modules=1).double()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(expected[name])
        want = plain(**inputs, output_mtp_logits=True)
    torch.testing.assert_close(out.logits, want.logits, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(out.mtp_per_depth_logits, want.mtp_per_depth_logits, atol=1e-9, rtol=1e-9)


def test_a_fresh_adapter_changes_nothing_and_freezes_the_rest() -> None:
    model, inputs = vl_model(), media_prompt()
    before = logits(model, inputs)
    attach_adapter(model, targets=WITHOUT_MTP, rank=4, alpha=8)
    torch.testing.assert_close(logits(model, inputs), before, atol=1e-5, rtol=1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapter_parameters(model))
    assert all("lora_" in name for name in trained)
    remove_adapter(model)
    assert torch.equal(logits(model, inputs), before)
    assert not adapter_parameters(model)
    assert {type(m) for m in model.modules()} == {type(m) for m in vl_model().modules()}


@pytest.mark.parametrize("stacks", [("w13",), ("w2",), ("w13", "w2")])
def test_gradients_of_expert_factors(stacks: tuple[str, ...]) -> None:
    """The short cut through the factors has the gradients of the long way over the summed stacks, idle experts too."""
    base = MiniMaxM3Experts(text_config(num_local_experts=5)).double()
    randomize(base, 1)
    model = LoraExperts(base, {stack: LoraSettings(2, 3.0) for stack in stacks})
    model.requires_grad_(False)
    for names in model.factor_names.values():
        for name in names:
            factor = model.get_parameter(name)
            with torch.no_grad():
                factor.copy_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(len(name))))
            factor.requires_grad_(True)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)])  # expert 4 has nothing to do
    weights = torch.rand(9, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(9, 32, generator=generator, dtype=torch.float64)
    inputs = [x, weights, *(model.get_parameter(n) for names in model.factor_names.values() for n in names)]

    def summed(stack: str) -> Tensor:
        weight = getattr(base, stack)
        if stack not in stacks:
            return weight
        a, b = model.factors_of(stack)
        if stack == "w2":
            return weight + 1.5 * b @ a
        return weight + 1.5 * (b.unflatten(1, (2, -1)) @ a.unflatten(1, (2, -1))).flatten(1, 2)

    want = kernels.grouped_experts(
        x, summed("w13"), summed("w2"), ids, weights, alpha=base.alpha, limit=base.limit, implementation="reference"
    )
    got = model(x, ids, weights)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    gradients = (torch.autograd.grad((out * slope).sum(), inputs) for out in (got, want))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-9)


def test_dropout_is_of_training_alone() -> None:
    model = adapted(vl_model(), dropout=0.5)
    inputs = media_prompt()
    once = logits(model, inputs)
    assert torch.equal(once, logits(model, inputs))
    model.train()
    torch.manual_seed(0)
    dropped = logits(model, inputs)
    assert (dropped - once).abs().max() > 1e-2
    torch.manual_seed(0)
    assert torch.equal(logits(model, inputs), dropped)


# Inference


@pytest.mark.parametrize("packed", [False, True])
def test_merged_equals_base_and_adapter(packed: bool) -> None:
    """In the plain forward, with packed weights, and in the steps of decoding, which have code of their own."""
    model, inputs = adapted(vl_model()), media_prompt()
    before = logits(model, inputs)
    base = logits(vl_model(), inputs)
    assert (before - base).abs().max() > 0.1
    if packed:
        model.pack_for_inference()
        torch.testing.assert_close(logits(model, inputs), before, atol=1e-5, rtol=1e-5)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    merge_adapter(model)
    assert not list(adapted_modules(model))
    if packed:
        model.pack_for_inference()
    torch.testing.assert_close(logits(model, inputs), before, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=12), tokens)
    assert DecodingModel.of(model.text_model) is not None
    assert not torch.equal(vl_model().generate(**inputs, do_sample=False, max_new_tokens=12), tokens)


def test_decoding_with_an_adapter_beside_the_weights_equals_the_whole_forward() -> None:
    targets = ("attention", "indexer", "mlp", "shared_experts", "experts")
    model, never_packed = adapted(text_model(), targets), adapted(text_model(), targets)
    tokens = model.generate(random_ids(1, 20), do_sample=False, max_new_tokens=8)
    expected = logits(never_packed, {"input_ids": tokens})[0].argmax(-1)
    assert torch.equal(tokens[0, 20:], expected[19:-1])


def test_weights_packed_before_do_not_hide_an_adapter() -> None:
    """A joint product of before holds the same weights, and would go on without the changes."""
    model, inputs = vl_model(), media_prompt()
    model.pack_for_inference()
    base = logits(model, inputs)
    adapted(model)
    plain = adapted(vl_model())
    torch.testing.assert_close(logits(model, inputs), logits(plain, inputs), atol=1e-5, rtol=1e-5)
    model.pack_for_inference()
    remove_adapter(model)
    torch.testing.assert_close(logits(model, inputs), base, atol=1e-5, rtol=1e-5)


# On disk


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` is a checkpoint, `adapter` one of everything, `transformers` the same under other names."""
    path = tmp_path_factory.mktemp("lora")
    model = vl_model()
    model.save_pretrained(path / "base")
    adapted(model)
    save_adapter(model, path / "adapter", base=path / "base")
    save_adapter(model, path / "transformers", naming="transformers")
    return path


def test_the_files_are_those_of_peft_under_released_names(folders: Path) -> None:
    config = json.loads((folders / "adapter" / CONFIG_FILE).read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["bias"]) == (3, 4, "none")
    tensors = load_file(folders / "adapter" / TENSOR_FILE)
    released = load_file(folders / "base" / "model.safetensors")
    modules = {re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", key) for key in tensors}
    assert "language_model.model.layers.1.block_sparse_moe.experts.3.w1" in modules
    assert "language_model.model.layers.2.self_attn.index_q_proj" in modules
    for module in modules:
        a, b = (tensors[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
        assert (b.shape[0], a.shape[1]) == tuple(released[f"{module}.weight"].shape), module
        assert a.shape[0] == b.shape[1] == 3


@settings(max_examples=8, deadline=None)
@given(targets=st.lists(st.sampled_from(EVERYWHERE), min_size=1, unique=True), rank=st.integers(1, 4), data=st.data())
def test_saved_and_loaded_is_the_same_bits(
    targets: list[str], rank: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("adapter")
    rslora = data.draw(st.booleans())
    model = adapted(vl_model(num_mtp_modules=1), tuple(targets), rank, 0.3, rslora=rslora)
    save_adapter(model, path)
    again = vl_model(num_mtp_modules=1)
    load_adapter(again, path)
    mine, theirs = adapter_parameters(model), adapter_parameters(again)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert [m.lora for _, m in adapted_modules(model)] == [m.lora for _, m in adapted_modules(again)]


@settings(max_examples=8, deadline=None)
@given(targets=st.lists(st.sampled_from(WITHOUT_MTP), min_size=1, unique=True), rslora=st.booleans())
def test_fusing_for_transformers_is_exact(
    targets: list[str], rslora: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Blocks on a diagonal at twice the rank: the same change, whatever the scale."""
    path = tmp_path_factory.mktemp("adapter")
    model, inputs = adapted(vl_model(), tuple(targets), 2, 3.0, rslora=rslora), media_prompt()
    save_adapter(model, path, naming="transformers")
    keys = load_file(path / TENSOR_FILE).keys()
    assert not any(re.search(r"\.(gate|up)_proj\.|experts\.\d", key) for key in keys)
    again = vl_model()
    load_adapter(again, path)
    torch.testing.assert_close(logits(again, inputs), logits(model, inputs), atol=1e-5, rtol=1e-5)


def test_ranks_that_differ_by_module_are_kept(tmp_path: Path) -> None:
    """Rank and alpha of one module in the config, those of others in its patterns."""
    model = vl_model()
    from minim3.model.adapter import _attach

    names = ["language_model.model.layers.0.self_attn.q_proj.weight", "multi_modal_projector.linear_1.weight"]
    names += ["language_model.model.layers.1.self_attn.q_proj.weight"]
    _attach(model, dict(zip(names, [LoraSettings(2, 3.0), LoraSettings(4, 8.0), LoraSettings(2, 3.0)])))
    fill(model)
    save_adapter(model, tmp_path)
    again, inputs = vl_model(), media_prompt()
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@pytest.mark.parametrize("name", ["adapter", "transformers"])
def test_merged_on_loading(folders: Path, name: str) -> None:
    inputs = media_prompt()
    expected = logits(adapted(vl_model()), inputs)
    load = MiniMaxM3SparseForConditionalGeneration.from_pretrained
    model = load(folders / "base", adapter=folders / name)
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=1e-5)
    assert not list(adapted_modules(model))
    # The text part alone, for which changes of the vision part do not matter.
    ids = {"input_ids": random_ids(1, 30)}
    text = MiniMaxM3SparseForCausalLM.from_pretrained(folders / "base", adapter=folders / name)
    torch.testing.assert_close(logits(text, ids), logits(model, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stack", ["w13", "w2"])
def test_merged_into_stacks_that_are_stored_whole(folders: Path, stack: str) -> None:
    """As transformers stores them, where one tensor of a checkpoint takes the factors of many modules."""
    name = f"language_model.model.layers.1.block_sparse_moe.experts.{stack}"
    adapter, before = read_adapter(folders / "adapter"), vl_model().get_parameter(name).detach()
    model = adapted(vl_model())
    merge_adapter(model)
    after = model.get_parameter(name)
    torch.testing.assert_close(adapter.merged(Placement(name), before), after, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(adapter.merged(Placement(name, 2), before[2]), after[2], atol=1e-6, rtol=1e-6)
    assert ((after - before).abs().amax((1, 2)) > 1e-2).all(), "every expert changes"


@pytest.mark.parametrize("format", ["int8", "mxfp8"])
def test_merged_before_quantized(folders: Path, format: str, tmp_path: Path) -> None:
    """Also where the base is stored as MXFP8, whose bytes would otherwise be kept as they are."""
    load, source = MiniMaxM3SparseForConditionalGeneration.from_pretrained, folders / "base"
    if format == "mxfp8":
        write_checkpoint(load(source), tmp_path, format="mxfp8")
        source = tmp_path
    model = load(source, adapter=folders / "adapter", quantization=format, dtype=torch.float32)
    expected = load(source, dtype=torch.float32)
    unchanged = logits(expected, media_prompt())
    load_adapter(expected, folders / "adapter")
    merge_adapter(expected)
    quantize_model(expected, format)
    assert torch.equal(logits(model, media_prompt()), logits(expected, media_prompt()))
    assert (logits(model, media_prompt()) - unchanged).abs().max() > 0.1


@pytest.mark.parametrize("format", ["fp32", "bf16", "mxfp8"])
def test_convert_merges(folders: Path, tmp_path: Path, format: str) -> None:
    """The same files as merging in memory and saving."""
    from minim3.cli.convert import run_convert

    run_convert(str(folders / "base"), tmp_path / "converted", format, 10**9, str(folders / "adapter"))
    model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(folders / "base")
    load_adapter(model, folders / "adapter")
    merge_adapter(model)
    model.save_pretrained(tmp_path / "saved", format=format)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("converted", "saved"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key].view(torch.uint8), two[key].view(torch.uint8)) for key in one)


def test_the_command_line_merges(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`minim3 generate --adapter` answers as the converted model; a foreign adapter is one line."""
    import minim3
    from minim3.cli.app import main

    model, _ = minim3.load()
    adapted(model, ("attention", "mlp", "experts"), alpha=16.0)
    save_adapter(model, tmp_path / "adapter")
    arguments = ["--format", "fp32", "--adapter", str(tmp_path / "adapter")]
    assert main(["convert", str(minim3.loading.POCKET), str(tmp_path / "merged"), *arguments]) == 0
    ask = ["generate", "What is 3 plus 4?", "--greedy", "--max-new-tokens", "8", "--device", "cpu"]
    answers = []
    for options in ([], ["--adapter", str(tmp_path / "adapter")], ["--model", str(tmp_path / "merged")]):
        capsys.readouterr()
        assert main([*ask, *options]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[1] == answers[2]
    assert answers[1] != answers[0]
    for command in (ask, ["chat"]):
        assert main([*command, "--adapter", str(folders / "adapter")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "does not fit the model: " in line


# What does not fit


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | values))


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / TENSOR_FILE)
    change(tensors)
    save_file(tensors, folder / TENSOR_FILE)


Q_PROJ = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
BROKEN = {
    "no config": (lambda p: (p / CONFIG_FILE).unlink(), f"has no {CONFIG_FILE}"),
    "no tensors": (lambda p: (p / TENSOR_FILE).unlink(), f"has no {TENSOR_FILE}"),
    "pickled": (lambda p: (p / TENSOR_FILE).rename(p / "adapter_model.bin"), "pickled adapter_model.bin is not read"),
    "torn": (lambda p: (p / TENSOR_FILE).write_bytes((p / TENSOR_FILE).read_bytes()[:-9]), "not a complete"),
    "kind": (lambda p: change_config(p, peft_type="IA3"), "peft_type is 'IA3'"),
    "dora": (lambda p: change_config(p, use_dora=True), "use_dora is True"),
    "bias": (lambda p: change_config(p, bias="all"), "bias is 'all'"),
    "changed base": (lambda p: change_config(p, init_lora_weights="pissa_niter_4"), "which changes the base too"),
    "saved modules": (lambda p: change_config(p, modules_to_save=["lm_head"]), "modules_to_save"),
    "rank": (lambda p: change_config(p, r=7), "but rank 7"),
    "no rank": (lambda p: change_config(p, r="many"), "r is 'many'"),
    "half a pair": (lambda p: change_tensors(p, lambda t: t.pop(f"{Q_PROJ}.lora_B.weight")), "has no lora_B"),
    "module missing": (
        lambda p: change_tensors(p, lambda t: [t.pop(f"{Q_PROJ}.lora_{x}.weight") for x in "AB"]),
        "1 missing .*: model.layers.0.self_attn.q_proj.weight",
    ),
    "unknown module": (
        lambda p: change_tensors(
            p, lambda t: [t.update({f"{Q_PROJ}x.lora_{x}.weight": t.pop(f"{Q_PROJ}.lora_{x}.weight")}) for x in "AB"]
        ),
        "1 not part of this model: model.layers.0.self_attn.q_projx.weight",
    ),
    "shape": (
        lambda p: change_tensors(p, lambda t: t.update({f"{Q_PROJ}.lora_B.weight": torch.zeros(5, 3)})),
        r"wrong shape: model.layers.0.self_attn.q_proj.weight changes \[5, 32\], the model has \[64, 32\]",
    ),
    "stray tensor": (
        lambda p: change_tensors(p, lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)})),
        "lm_head.weight is no lora_A or lora_B",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_adapter_is_one_clear_error(folders: Path, tmp_path: Path, what: str) -> None:
    shutil.copytree(folders / "adapter", tmp_path / "broken")
    damage, message = BROKEN[what]
    damage(tmp_path / "broken")
    with pytest.raises(ValueError, match=message) as raised:
        MiniMaxM3SparseForConditionalGeneration.from_pretrained(folders / "base", adapter=tmp_path / "broken")
    assert str(tmp_path / "broken") in str(raised.value)
    with pytest.raises(ValueError, match=message):
        load_adapter(vl_model(), tmp_path / "broken")


def test_an_adapter_of_other_weights_is_refused(folders: Path, tmp_path: Path) -> None:
    """Same shapes, other weights (the base trained anew): everything fits, and the answers would be nonsense."""
    other = vl_model(seed=1)
    with pytest.raises(ValueError, match=rf"belongs to other weights.*{re.escape(str(folders / 'base'))}"):
        load_adapter(other, folders / "adapter")
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="belongs to other weights"):
        MiniMaxM3SparseForConditionalGeneration.from_pretrained(tmp_path, adapter=folders / "adapter")
    load_adapter(other, folders / "adapter", check_base=False)
    # The same checkpoint in another format is the same base, and so is one with an adapter merged.
    base = MiniMaxM3SparseForConditionalGeneration.from_pretrained(folders / "base")
    adapted(base, ("attention",))
    merge_adapter(base)
    write_checkpoint(base, tmp_path, format="mxfp8")
    load_adapter(MiniMaxM3SparseForConditionalGeneration.from_pretrained(tmp_path), folders / "adapter")


def test_an_adapter_replaces_an_adapter_and_nothing_else(folders: Path, tmp_path: Path) -> None:
    model = adapted(vl_model(), ("attention",))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt and no adapter_config\.json"):
        save_adapter(model, tmp_path)
    save_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "a")
    plain = vl_model()
    with pytest.raises(ValueError, match="it is not a checkpoint"):
        plain.save_pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    ("target", "nearest"),
    [("atention", "attention"), ("q_prj", "q_proj"), ("expert", "experts"), ("self_attn.qproj", "self_attn.q_proj")],
)
def test_an_unknown_target_names_its_nearest_match(target: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"target '{target}' names nothing .*did you mean '{nearest}'"):
        attach_adapter(vl_model(), targets=(target,), rank=1, alpha=1)


def test_targets_that_a_model_lacks_or_cannot_have() -> None:
    with pytest.raises(ValueError, match="'projector' names nothing in this model: it has no such part"):
        attach_adapter(text_model(), targets=("attention", "projector"), rank=1, alpha=1)
    with pytest.raises(ValueError, match="tied to the embedding"):
        attach_adapter(text_model(tie_word_embeddings=True), targets=("lm_head",), rank=1, alpha=1)
    quantized = text_model()
    quantize_model(quantized, "int8")
    with pytest.raises(ValueError, match="quantized weights take no adapter"):
        attach_adapter(quantized, targets=("attention",), rank=1, alpha=1)
    with pytest.raises(ValueError, match="has an adapter"):
        attach_adapter(adapted(text_model(), ("attention",)), targets=("attention",), rank=1, alpha=1)
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapter(text_model(), "unused")


@pytest.mark.parametrize("target", ["layers.1.self_attn.q_proj", "experts.w2", "linear_1", "index_k_proj"])
def test_ends_of_names_are_targets(target: str) -> None:
    model = adapted(vl_model(), (target,))
    modules = adapted_modules(model)
    names = {f"{name}.{weight}".removesuffix(".weight") for name, module in modules for weight in module.factor_names}
    assert names
    assert all(name.endswith("." + target) for name in names)
    assert len(adapter_factors(model)) >= len(names)


def test_a_model_with_an_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    """Saving it would write names that no loader knows."""
    with pytest.raises(ValueError, match="carries an adapter"):
        adapted(vl_model()).save_pretrained(tmp_path / "model")
