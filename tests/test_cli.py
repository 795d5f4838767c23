"""The command line: commands on tiny random checkpoints, its errors (one line, exit code 2), counts and conversion."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import minim3
from minim3.cli import session as session_module
from minim3.cli import show
from minim3.cli.app import main
from minim3.cli.chat import Chat
from minim3.cli.convert import parse_size
from minim3.cli.session import SamplingOptions, choose_device, sampling_params
from minim3.config import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, MiniMaxM3VLVisionConfig
from minim3.inference.cache import bytes_per_token
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration
from minim3.model.counts import FORMATS, cache_bytes_per_token, count_parameters, describe_layers
from minim3.processing.image import MiniMaxM3VLImageProcessor
from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.processing.tokenizer import Tokenizer
from minim3.processing.video import MiniMaxM3VLVideoProcessor

SPARSE, FULL = "minimax_m3_sparse", "full_attention"
MAX_POSITIONS = 700


def text_config(**changes: Any) -> MiniMaxM3VLTextConfig:
    fields: dict[str, Any] = {
        "vocab_size": 450, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "max_position_embeddings": MAX_POSITIONS,
        "intermediate_size": 16, "dense_intermediate_size": 32, "shared_intermediate_size": 24,
        "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": (FULL, SPARSE, SPARSE),
        "mlp_layer_types": ("dense", "sparse", "sparse"), "index_n_heads": 2, "index_head_dim": 8,
        "index_block_size": 8, "index_topk_blocks": 4,
    }  # fmt: skip
    return MiniMaxM3VLTextConfig(**(fields | changes))


def vl_config(tokenizer: Tokenizer, **changes: Any) -> MiniMaxM3VLConfig:
    image, video = tokenizer.token_to_id("]<]image[>["), tokenizer.token_to_id("]<]video[>[")
    assert image is not None
    assert video is not None
    return MiniMaxM3VLConfig(
        text_config=text_config(eos_token_id=tokenizer.eos_token_id, **changes),
        vision_config=MiniMaxM3VLVisionConfig(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40
        ),
        image_token_index=image, video_token_index=video, projector_hidden_size=20,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tokenizer_json: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint folder with random weights, and no generation config: it answers greedily."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    tokenizer = Tokenizer(tokenizer_json)
    torch.manual_seed(7)
    MiniMaxM3SparseForConditionalGeneration.from_config(vl_config(tokenizer)).save_pretrained(folder)
    MiniMaxM3VLProcessor(MiniMaxM3VLImageProcessor(), tokenizer, MiniMaxM3VLVideoProcessor()).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """The same folder, to be spoilt."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "a picture.png"
    Image.fromarray(np.arange(60 * 90 * 3, dtype=np.uint8).reshape(60, 90, 3)).save(file)
    return file


Run = Any


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls the command line; returns exit code, stdout and stderr."""
    monkeypatch.delenv("MINIM3_TRACEBACK", raising=False)

    def call(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def assert_refused(result: tuple[int, str, str], *fragments: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that says what is wrong."""
    code, out, err = result
    assert (code, out) == (2, ""), result
    assert err.startswith("minim3: ")
    assert err.count("\n") == 1
    for fragment in fragments:
        assert fragment in err


# --- start-up --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--version"]])
def test_help_and_version_do_not_import_torch(arguments: list[str]) -> None:
    """`minim3 --help` taking three seconds."""
    program = f"import sys; from minim3.cli.app import main; sys.exit(main({arguments}) or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_version_and_no_command(run: Run) -> None:
    assert run("--version") == (0, f"minim3 {minim3.__version__}\n", "")
    code, out, _ = run()
    assert code == 2
    for command in ("generate", "chat", "info", "convert", "train", "eval", "demo"):
        assert command in out


# --- counts ----------------------------------------------------------------------------------------------------------


def released_config() -> dict[str, Any]:
    """The published sizes of the released model, in its own dialect."""
    freq = [0] * 3 + [1] * 57
    text = {
        "model_type": "minimax_m3", "vocab_size": 200064, "hidden_size": 6144, "num_hidden_layers": 60,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "rotary_dim": 64, "rope_theta": 5e6,
        "max_position_embeddings": 524288, "intermediate_size": 3072, "dense_intermediate_size": 12288,
        "shared_intermediate_size": 3072, "n_shared_experts": 1, "num_local_experts": 128, "num_experts_per_tok": 4,
        "moe_layer_freq": freq, "hidden_act": "swigluoai", "num_mtp_modules": 1,
        "sparse_attention_config": {
            "use_sparse_attention": True, "sparse_num_index_heads": 4, "sparse_index_dim": 128,
            "sparse_block_size": 128, "sparse_topk_blocks": 16, "sparse_init_block": 0, "sparse_local_block": 1,
            "sparse_score_type": "max", "sparse_attention_freq": freq, "sparse_disable_index_value": freq,
        },
    }  # fmt: skip
    vision = {
        "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120,
        "patch_size": 14, "img_token_compression_config": {"spatial_merge_size": 2, "temporal_patch_size": 2},
    }  # fmt: skip
    top = {"model_type": "minimax_m3_vl", "image_token_index": 200025, "video_token_index": 200026}
    return top | {"projector_hidden_size": 6144, "text_config": text, "vision_config": vision}


def test_info_counts_the_released_model_from_its_config_alone(run: Run, tmp_path: Path) -> None:
    """Published: 427 B parameters, 23.5 B active a token without embeddings and head."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(released_config()))
    for source in (file, tmp_path):
        code, out, _ = run("info", source, "--json", "--context", 131072)
        assert code == 0
        info = json.loads(out)
        assert round(info["parameters"]["total"] / 1e9) == 427
        assert round(info["parameters"]["active_per_token"] / 1e9, 1) == 23.5
        assert info["layers"] == "layers 0-2 full attention, dense MLP; 3-59 sparse attention, MoE"
        assert info["mtp_modules"] == {"in_config": 1, "in_weights": None}
        # 60 layers of 4 heads of 128, twice, and one index key of 128 in 57 of them, in 2 bytes each.
        assert info["cache"]["bf16"]["bytes_per_token"] == 60 * 2 * 4 * 128 * 2 + 57 * 128 * 2
        assert info["cache"]["bf16"]["kv_bytes"] == 131072 * 60 * 2 * 4 * 128 * 2
        assert info["weight_bytes"]["mxfp8"] < 0.53 * info["weight_bytes"]["bf16"]
    code, out, _ = run("info", file)
    assert code == 0
    assert "427.04 B" in out
    assert "23.50 B active a token" in out


@settings(max_examples=12, deadline=None)
@given(
    shared=st.sampled_from([0, 1]), bias=st.booleans(), norms=st.booleans(), tied=st.booleans(), mtp=st.integers(0, 2),
    moe=st.lists(st.booleans(), min_size=3, max_size=3), sparse=st.lists(st.booleans(), min_size=3, max_size=3),
)  # fmt: skip
def test_counts_are_those_of_the_model(
    shared: int, bias: bool, norms: bool, tied: bool, mtp: int, moe: list[bool], sparse: list[bool]
) -> None:
    """A part forgotten or counted twice, for any combination of layer kinds."""
    config = text_config(
        n_shared_experts=shared, use_routing_bias=bias, use_qk_norm=norms, tie_word_embeddings=tied,
        num_mtp_modules=mtp, layer_types=tuple(SPARSE if s else FULL for s in sparse),
        mlp_layer_types=tuple("sparse" if m else "dense" for m in moe),
    )  # fmt: skip
    with torch.device("meta"):
        model = MiniMaxM3SparseForCausalLM(config)
    expected = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    assert count_parameters(config).total == expected
    assert sum(cache_bytes_per_token(config)) == bytes_per_token(config, torch.bfloat16)


def test_counts_and_sizes_of_a_written_checkpoint(tiny: Path, tmp_path: Path) -> None:
    """The sizes that `info` promises for each format are those of the files."""
    config = MiniMaxM3VLConfig.from_pretrained(tiny)
    counts = count_parameters(config)
    tensors = load_file(tiny / "model.safetensors")
    assert counts.total == sum(tensor.numel() for tensor in tensors.values())
    model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(tiny)
    for format in FORMATS:
        model.save_pretrained(tmp_path / format, format=format)
        written = load_file(tmp_path / format / "model.safetensors")
        assert counts.num_bytes(format) == sum(tensor.nbytes for tensor in written.values())


def test_active_parameters_are_those_a_token_meets() -> None:
    kinds: dict[str, Any] = {"layer_types": (FULL,) * 3, "mlp_layer_types": ("sparse",) * 3, "n_shared_experts": 0}
    config = text_config(**kinds)
    every, some = count_parameters(config), count_parameters(text_config(num_local_experts=2, **kinds))
    # With as many experts as are chosen all are active: only the router's rows differ.
    router = 3 * (4 - 2) * (config.hidden_size + 1)
    assert every.active - router == some.active == some.total - 2 * config.vocab_size * config.hidden_size
    assert describe_layers(config) == "layers 0-2 full attention, MoE"


# --- info ------------------------------------------------------------------------------------------------------------


def test_info_never_reads_weights(run: Run, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("minim3.checkpoint.reader.CheckpointReader.read", forbidden)
    code, out, err = run("info", copy, "--json")
    assert (code, err) == (0, "")
    info = json.loads(out)
    assert info["files"]["parameters"] == info["parameters"]["total"]
    assert info["kernels"]["select_blocks"] in ("native", "portable", "reference", "triton")
    assert info["cache"]["context"] == MAX_POSITIONS
    assert_refused(run("info", copy, "--context", MAX_POSITIONS + 1), str(MAX_POSITIONS + 1), str(MAX_POSITIONS))


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate_streams_what_the_model_generates(run: Run, tiny: Path, picture: Path) -> None:
    """The answer on stdout is the model's own greedy continuation of the chat prompt, and nothing else is there."""
    arguments = ["generate", "what is there?", "--image", picture, "--model", tiny, "--max-new-tokens", 12, "--greedy"]
    code, out, err = run(*arguments, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    model, processor = minim3.load(tiny)
    content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "what is there?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}])
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=processor.tokenizer.eos_token_id)
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    assert answer["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert answer["usage"]["completion_tokens"] == len(new)
    assert answer["finish_reason"] == ("stop" if new[-1] in processor.tokenizer.eos_token_ids else "length")
    from minim3.processing.output import parse_output

    parsed = parse_output(new, processor.tokenizer)
    assert (answer["text"], answer["reasoning"]) == (parsed.content, parsed.reasoning)
    assert answer["timing"]["seconds"] >= answer["timing"]["seconds_to_first_token"] > 0

    code, streamed, _ = run(*arguments)
    assert (code, streamed.rstrip("\n")) == (0, answer["text"].rstrip("\n"))


def test_prompt_from_stdin_system_and_thinking(run: Run, tiny: Path) -> None:
    common = ["--model", tiny, "--max-new-tokens", 3, "--json"]
    given = json.loads(run("generate", "one two", *common)[1])
    piped = json.loads(run("generate", *common, stdin="one two\n")[1])
    dashed = json.loads(run("generate", "-", *common, stdin="one two\n")[1])
    assert given["text"] == piped["text"] == dashed["text"]
    with_system = json.loads(run("generate", "one two", "--system", "be brief", *common)[1])
    assert with_system["usage"]["prompt_tokens"] > given["usage"]["prompt_tokens"]
    thinking = json.loads(run("generate", "one two", "--thinking", "enabled", *common)[1])
    assert thinking["text"] == ""
    assert thinking["reasoning"]
    assert_refused(run("generate", *common, stdin=""), "empty")
    assert_refused(run("generate", *common, stdin=" \n"), "empty")
    assert_refused(run("generate", " ", *common), "the prompt is empty")


def test_sampling_is_repeatable_by_its_seed(run: Run, tiny: Path) -> None:
    common = ["generate", "go", "--model", tiny, "--max-new-tokens", 16, "--json", "--temperature", 1.5]
    first = json.loads(run(*common)[1])
    again = json.loads(run(*common, "--seed", first["seed"])[1])
    other = json.loads(run(*common)[1])
    assert first["text"] == again["text"]
    assert other["seed"] != first["seed"], "two runs without a seed draw the same numbers"
    assert other["text"] != first["text"]


def test_generation_config_rules_until_an_option_says_otherwise() -> None:
    defaults = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "max_new_tokens": 99}
    params = sampling_params(SamplingOptions(), defaults, (2,))
    assert (params.do_sample, params.temperature, params.top_p, params.top_k) == (True, 0.7, 0.9, 40)
    assert (params.max_new_tokens, params.eos_token_ids) == (99, (2,))
    params = sampling_params(SamplingOptions(top_k=0, max_new_tokens=5), defaults, ())
    assert (params.temperature, params.top_k, params.max_new_tokens) == (0.7, 0, 5)
    assert sampling_params(SamplingOptions(greedy=True), defaults, ()).greedy
    assert sampling_params(SamplingOptions(temperature=0.0), defaults, ()).greedy
    assert sampling_params(SamplingOptions(), {}, ()).greedy
    assert not sampling_params(SamplingOptions(temperature=1.0), {}, ()).greedy
    with pytest.raises(ValueError, match="--greedy takes no --top-k"):
        sampling_params(SamplingOptions(greedy=True, top_k=3), {}, ())


def test_stop_text_ends_the_answer_and_is_not_shown(run: Run, tiny: Path) -> None:
    common = ["generate", "go", "--model", tiny, "--max-new-tokens", 30, "--greedy", "--json", "--thinking", "disabled"]
    whole = json.loads(run(*common)[1])
    stop = whole["text"][4:7]
    cut = json.loads(run(*common, "--stop", stop)[1])
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["finish_reason"] == "stop"
    assert cut["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"]


def test_raw_continues_the_prompt_itself(run: Run, tiny: Path) -> None:
    """No chat format around it, and markers typed in it are control tokens."""
    answer = json.loads(run("generate", "]~b]ai\n", "--raw", "--model", tiny, "--max-new-tokens", 4, "--json")[1])
    tokenizer = Tokenizer.from_pretrained(tiny)
    assert answer["usage"]["prompt_tokens"] == len(tokenizer.encode("]~b]ai\n", allow_special=True))
    chat = json.loads(run("generate", "]~b]ai\n", "--model", tiny, "--max-new-tokens", 4, "--json")[1])
    assert chat["usage"]["prompt_tokens"] > answer["usage"]["prompt_tokens"]
    assert_refused(run("generate", "x", "--raw", "--system", "y", "--model", tiny), "--raw", "--system")


def test_pocket_is_the_model_when_none_is_named(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minim3.loading.POCKET", tiny)
    assert run("generate", "hi", "--max-new-tokens", 2)[0] == 0
    assert json.loads(run("info", "--json")[1])["source"] == str(tiny)
    assert_refused(run("info", tiny, "--model", tiny), "pass one")


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["generate", "hi", "--image", "nowhere.png"], ["nowhere.png"]),
        (["generate", "hi", "--video", "nowhere.mp4"], ["nowhere.mp4"]),
        (["generate", "hi", "--dtype", "int8"], ["int8", "bfloat16"]),
        (["generate", "hi", "--device", "tpu"], ["tpu", "cuda"]),
        (["generate", "hi", "--device", "cuda:99"], ["cuda:99", "no such device"]),
        (["generate", "hi", "--thinking", "hard"], ["hard", "adaptive"]),
        (["generate", "hi", "--temperature", "-1"], ["temperature", "-1"]),
        (["generate", "hi", "--top-p", "1.5"], ["top_p", "1.5"]),
        (["generate", "hi", "--max-new-tokens", "0"], ["max-new-tokens"]),
        (["generate", "hi", "--no-such-option"], ["--no-such-option"]),
        (["generate", "word " * 400], ["tokens", str(MAX_POSITIONS)]),
        (["generate", "look ]<]image[>[", "--raw"], ["1 image placeholder", "0 image"]),
        (["demo", "--output", "demo.jpg"], ["demo.jpg", ".png"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(
    run: Run, tiny: Path, arguments: list[str], fragments: list[str]
) -> None:
    assert_refused(run(*arguments, "--model", tiny), *fragments)


@pytest.mark.parametrize("command", ["generate hi --model", "info", "demo --model", "chat --model"])
def test_a_model_that_is_not_there(run: Run, tmp_path: Path, command: str) -> None:
    assert_refused(run(*command.split(), tmp_path / "nowhere"), "nowhere", "not exist")
    (tmp_path / "empty").mkdir()
    assert_refused(run(*command.split(), tmp_path / "empty"), "empty", "config.json")


def test_half_written_and_wrong_checkpoints_are_named(run: Run, copy: Path, tmp_path: Path) -> None:
    """A truncated file, a missing key, a wrong shape, an unknown key: each named, none a traceback."""
    weights = copy / "model.safetensors"
    tensors = load_file(weights)
    spoilt: list[tuple[dict[str, torch.Tensor], list[str]]] = [
        ({k: v for k, v in tensors.items() if not k.endswith("model.norm.weight")}, ["missing", "model.norm.weight"]),
        (tensors | {"language_model.lm_head.weight": torch.zeros(3, 5)}, ["lm_head.weight", "[3, 5]", "[450, 32]"]),
        (tensors | {"surprise": torch.zeros(1)}, ["surprise"]),
    ]
    for kept, fragments in spoilt:
        save_file(kept, weights)
        assert_refused(run("generate", "hi", "--model", copy), *fragments)
        assert_refused(run("convert", copy, tmp_path / "out"), *fragments)
        assert not (tmp_path / "out").exists()
    weights.write_bytes(weights.read_bytes()[:-1000])
    for command in (["generate", "hi", "--model", copy], ["info", copy], ["convert", copy, tmp_path / "out"]):
        assert_refused(run(*command), "model.safetensors", "complete")
    (copy / "config.json").write_text("{")
    assert_refused(run("info", copy), "config.json", "JSON")


def test_unreadable_picture_names_the_file(run: Run, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "broken.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n not a picture")
    assert_refused(run("generate", "hi", "--image", file, "--model", tiny), "broken.png")


def test_a_text_model_takes_no_picture(run: Run, picture: Path, tmp_path: Path, tokenizer_json: str) -> None:
    folder = tmp_path / "text"
    MiniMaxM3SparseForCausalLM.from_config(text_config()).save_pretrained(folder)
    MiniMaxM3VLProcessor(None, Tokenizer(tokenizer_json)).save_pretrained(folder)
    assert run("generate", "hi", "--model", folder, "--max-new-tokens", 2)[0] == 0
    assert_refused(run("generate", "hi", "--image", picture, "--model", folder), "text-only")


@pytest.mark.parametrize(
    ("error", "code", "fragment"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), 2, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "out of memory"),
        (MemoryError(), 2, "out of memory"),
        (KeyboardInterrupt(), 130, ""),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (RuntimeError("a bug\nof ours"), 1, "unexpected RuntimeError: a bug of ours (run with MINIM3_TRACEBACK=1"),
    ],
)
def test_exceptions_become_exit_codes(
    run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, fragment: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(session_module, "Engine", fail)
    result = run("generate", "hi", "--model", tiny)
    assert result[0] == code
    assert fragment in result[2]
    assert "Traceback" not in result[2]
    assert result[2].strip().count("\n") == 0
    if code != 130:
        monkeypatch.setenv("MINIM3_TRACEBACK", "1")
        with pytest.raises(type(error)):
            main(["generate", "hi", "--model", str(tiny)])


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_ends_cleanly(tiny: Path, tmp_path: Path) -> None:
    endless = tmp_path / "endless"  # an answer that cannot end before the signal comes, however slow the machine
    shutil.copytree(tiny, endless)
    model, processor = minim3.load(tiny, dtype=torch.float32)
    with torch.no_grad():  # the best token of all is above zero
        model.lm_head.weight[list(processor.tokenizer.eos_token_ids)] = 0.0
    model.save_pretrained(endless)
    config = json.loads((endless / "config.json").read_text())
    config.get("text_config", config)["max_position_embeddings"] = 1_000_000
    (endless / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "minim3", "generate", "hi", "--model", str(endless), "--stop", "never written"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command += ["--greedy", "--thinking", "disabled", "--max-new-tokens", "900000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
        # Tests that are started in the background ignore the signal, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)  # it is answering
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.stderr.read().strip() == b""
    assert process.returncode == 130


def test_choose_device() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("", "cpu:1", "cuda:", "cuda:x", "gpu", "mps:0"):
        with pytest.raises(ValueError, match="--device"):
            choose_device(name)


# --- what a terminal shows -------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_model_cannot_send_escape_sequences_to_the_terminal() -> None:
    """Generated text that moves the cursor or sets the window's title."""
    terminal, pipe = Terminal(), io.StringIO()
    text = "a\x1b]0;title\x07b\x9b2J\tc\nd é"
    show.write(terminal, text)
    show.write(pipe, text)
    assert pipe.getvalue() == text
    assert not {c for c in terminal.getvalue() if (ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160}
    assert terminal.getvalue().endswith("\tc\nd é")


# --- chat ------------------------------------------------------------------------------------------------------------


def test_chat_runs_a_script(run: Run, tiny: Path, picture: Path, tmp_path: Path) -> None:
    script = f"""
/system be brief
/image {picture}
/think disabled
what is this?
and now?
/save {tmp_path / "saved.json"}
/quit
never reached
"""
    code, out, err = run("chat", "--model", tiny, "--max-new-tokens", 4, "--greedy", stdin=script)
    assert code == 0, err
    assert f"{picture} (90 x 60)" in err
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert saved["messages"][1]["content"][0] == {"type": "image", "image": str(picture)}
    answers = [message["content"] for message in saved["messages"] if message["role"] == "assistant"]
    assert all(answer in out for answer in answers)
    # The second turn is answered with the first in view: the whole conversation, asked at once, gives the same.
    _, processor = minim3.load(tiny)
    model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(tiny)
    inputs = processor.apply_chat_template(saved["messages"][:-1], thinking_mode="disabled")
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=processor.tokenizer.eos_token_id)
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    from minim3.processing.output import parse_output

    assert parse_output(new, processor.tokenizer, "disabled").content == answers[1]


@pytest.mark.parametrize(
    ("line", "fragment"),
    [("/dance", "/help"), ("/image nowhere.png", "nowhere.png"), ("/think hard", "adaptive"), ("/save", "path")],
)
def test_chat_commands_are_checked(run: Run, tiny: Path, line: str, fragment: str) -> None:
    assert_refused(run("chat", "--model", tiny, stdin=line + "\n"), fragment)


def test_chat_does_not_overwrite_what_it_did_not_write(run: Run, tiny: Path, picture: Path) -> None:
    before = picture.read_bytes()
    assert_refused(run("chat", "--model", tiny, stdin=f"/save '{picture}'\n"), "exists")
    assert picture.read_bytes() == before


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = session_module.LoadOptions(str(tiny), "cpu", "auto", None)
    session = session_module.Session(options, SamplingOptions(max_new_tokens=50, greedy=True))
    chat = Chat(session, None, "disabled")
    written: list[str] = []

    def write(stream: Any, text: str) -> None:
        written.append(text)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(show, "write", write)
    assert chat.handle("go on and on")
    assert "stopped" in capsys.readouterr().err
    assert chat.messages[-1]["content"] == "".join(written)
    monkeypatch.undo()
    chat.session.stop = ()
    assert chat.handle("//and again")
    assert chat.messages[2]["content"][0]["text"] == "/and again"
    chat.handle("/reset")
    assert chat.messages == []


# --- convert ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_convert_writes_what_saving_the_loaded_model_writes(run: Run, tiny: Path, tmp_path: Path, format: str) -> None:
    code, out, err = run("convert", tiny, tmp_path / "new", "--format", format)
    assert (code, out) == (0, ""), err
    MiniMaxM3SparseForConditionalGeneration.from_pretrained(tiny).save_pretrained(tmp_path / "saved", format=format)
    new, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("new", "saved"))
    assert new.keys() == saved.keys()
    for key, tensor in saved.items():
        assert new[key].dtype == tensor.dtype
        assert torch.equal(new[key].view(torch.uint8), tensor.view(torch.uint8)), key
    assert (tmp_path / "new/config.json").read_text() == (tmp_path / "saved/config.json").read_text()
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (tiny / name).read_bytes()
    # MXFP8 in: what was quantized is read back as it is.
    code, _, err = run("convert", tmp_path / "new", tmp_path / "back", "--format", "fp32", "--max-shard-size", "100kB")
    assert code == 0, err
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    code, out, err = run("generate", "hi", "--model", tmp_path / "back", "--max-new-tokens", 2)
    assert code == 0, err


def test_convert_reads_stacked_experts(run: Run, tmp_path: Path, tokenizer_json: str) -> None:
    """A text checkpoint in which all experts are one tensor, and the shared expert's gate and up another."""
    folder = tmp_path / "text"
    MiniMaxM3SparseForCausalLM.from_config(text_config()).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    restacked = dict(tensors)
    for layer in (1, 2):
        moe = f"model.layers.{layer}.block_sparse_moe"
        mlp = f"model.layers.{layer}.mlp"
        parts = [[restacked.pop(f"{moe}.experts.{e}.w{w}.weight") for w in (1, 3, 2)] for e in range(4)]
        restacked[f"{mlp}.experts.gate_up_proj"] = torch.stack([torch.cat(part[:2]) for part in parts])
        restacked[f"{mlp}.experts.down_proj"] = torch.stack([part[2] for part in parts])
        shared = [restacked.pop(f"{moe}.shared_experts.{name}_proj.weight") for name in ("gate", "up")]
        restacked[f"{mlp}.shared_experts.gate_up_proj.weight"] = torch.cat(shared)
    save_file(restacked, folder / "model.safetensors")
    code, _, err = run("convert", folder, tmp_path / "new", "--format", "fp32")
    assert code == 0, err
    new = load_file(tmp_path / "new/model.safetensors")
    assert new.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(new[key], tensor.float()), key


def test_convert_refuses_to_overwrite_anything_but_a_checkpoint(run: Run, tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "photos"
    target.mkdir()
    (target / "holiday.jpg").write_text("dear")
    assert_refused(run("convert", tiny, target), "holiday.jpg")
    assert (target / "holiday.jpg").read_text() == "dear"
    assert_refused(run("convert", tiny, tiny), "same folder")
    assert_refused(run("convert", tiny, tmp_path / "x", "--format", "int4"), "int4")
    assert_refused(run("convert", tiny, tmp_path / "x", "--max-shard-size", "big"), "big")
    assert not (tmp_path / "x").exists()


def test_convert_leaves_nothing_when_it_fails(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of writing."""
    from minim3.checkpoint.reader import CheckpointReader

    read, count = CheckpointReader.read, 0

    def interrupted(self: CheckpointReader, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 20:
            raise KeyboardInterrupt
        return read(self, key, dtype)

    monkeypatch.setattr(CheckpointReader, "read", interrupted)
    assert run("convert", tiny, tmp_path / "new")[0] == 130
    assert list(tmp_path.iterdir()) == []


def test_parse_size() -> None:
    assert parse_size("5GB") == 5 * 10**9
    assert parse_size("1.5 mb") == 1_500_000
    assert parse_size("1000") == 1000
    for text in ("", "GB", "0", "-1GB", "5 parsecs"):
        with pytest.raises(ValueError, match="max-shard-size"):
            parse_size(text)


# --- demo and train --------------------------------------------------------------------------------------------------


def test_demo_draws_asks_and_judges(run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minim3.cli.demo.MAX_ANSWER_TOKENS", 3)
    pictures = []
    for name, seed in (("a.png", 5), ("b.png", 5), ("c.png", 6)):
        code, out, err = run("demo", "--model", tiny, "--output", tmp_path / name, "--seed", seed)
        assert code == 0, err
        assert str(tmp_path / name) in out
        assert out.count("\n> ") == out.count("  right\n") + out.count("  wrong: ") == 3
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_demo_says_right_only_when_it_is(run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minim3.cli import demo
    from minim3.processing.output import ParsedOutput

    questions: list[Any] = []
    draw_questions = demo.demo_questions

    def remember(*arguments: Any) -> list[Any]:
        questions.extend(draw_questions(*arguments))
        return list(questions)

    def answer(*_: object) -> ParsedOutput:
        question = questions.pop(0)
        return ParsedOutput(None, "a hippopotamus" if len(questions) == 1 else question.answer, (), "stop")

    monkeypatch.setattr(demo, "demo_questions", remember)
    monkeypatch.setattr(demo, "stream_answer", answer)
    code, out, _ = run("demo", "--model", tiny, "--output", tmp_path / "demo.png", "--seed", 5)
    assert code == 0
    assert out.endswith("2 of 3 right.\n")
    assert "wrong: the answer is" in out


def test_train_passes_overrides_and_reports_the_signal(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minim3.training import trainer

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output: out\nsteps: 3\nmodel: {start_from: x}\ndata: {processor: p, sources: [{name: 'a:b'}]}\n")
    seen: list[Any] = []

    def train(parsed: Any, *, resume: bool) -> trainer.TrainingResult:
        seen.append(parsed)
        return trainer.TrainingResult(1, signal.SIGINT if parsed.steps == 9 else None, None)

    monkeypatch.setattr(trainer, "train", train)
    assert run("train", recipe, "optim.lr=0.5", "--seed", 4)[0] == 0
    assert (seen[0].optim.lr, seen[0].seed) == (0.5, 4)
    assert run("train", recipe, "steps=9")[0] == 130
    assert_refused(run("train", recipe, "stepz=9"), "stepz", "steps")
    assert_refused(run("train", tmp_path / "none.yaml"), "none.yaml")
    recipe.write_text("steps: [1\nb: {")
    assert_refused(run("train", recipe), "recipe.yaml is not valid YAML", "line 2")


def test_train_exports_a_run_in_the_format_asked_for(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minim3.training import trainer

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output: {tmp_path}\nsteps: 3\nmodel: {{start_from: x}}\ndata: {{processor: p, sources: [{{name: 'a:b'}}]}}\n"
    )
    assert_refused(run("train", recipe, "--export"), "nothing to export", str(tmp_path / "checkpoints"))
    formats: list[str] = []

    def export_newest(parsed: Any) -> tuple[int, Path]:
        formats.append(parsed.export.format)
        return 2, tmp_path / "export"

    monkeypatch.setattr(trainer, "export_newest", export_newest)
    code, out, err = run("train", recipe, "--export", "--format", "mxfp8")
    assert (code, out, formats) == (0, "", ["mxfp8"])
    assert f"exported step 2 of 3 to {tmp_path / 'export'}" in err

    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert_refused(run("train", recipe, "--no-resume"), "already holds checkpoints")


def test_pocket_is_a_name_of_a_model_everywhere(run: Run, tmp_path: Path) -> None:
    """The help says "default: pocket": whoever types the name must not be told that there is no such folder."""
    code, out, _ = run("info", "pocket")
    assert code == 0
    assert out == run("info")[1]
    assert run("convert", "pocket", tmp_path / "copy")[0] == 0
