"""The commands and their options. Bodies import what they run when they run, so that `--help` is instant."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import minim3
from minim3.cli.errors import run_guarded


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Thinking(StrEnum):
    adaptive = "adaptive"
    enabled = "enabled"
    disabled = "disabled"


class Format(StrEnum):
    bf16 = "bf16"
    fp32 = "fp32"
    mxfp8 = "mxfp8"


class KVCacheDtype(StrEnum):
    auto = "auto"
    fp8 = "fp8"


class Quantization(StrEnum):
    auto = "auto"
    none = "none"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"
    mxfp8 = "mxfp8"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"minim3 {minim3.__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", metavar="PATH|HUB", help="Checkpoint folder or hub id; default: pocket.")
]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of the weights; auto is float32 on a CPU.")]
QuantizationOption = Annotated[
    Quantization,
    typer.Option("--quantization", help="Hold weights in fewer bits; auto: as stored, on a CPU (docs/weights.md)."),
]
Adapter = Annotated[
    str | None, typer.Option("--adapter", metavar="PATH|HUB", help="LoRA folder to merge into the weights.")
]
Threads = Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads.")]
Seed = Annotated[int | None, typer.Option(min=0, metavar="N", help="Makes random choices repeatable.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")]
ThinkingOption = Annotated[Thinking, typer.Option("--thinking", help="Whether the model thinks before it answers.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, metavar="N", help="Most tokens of an answer.")]
Temperature = Annotated[float | None, typer.Option(metavar="X", help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float | None, typer.Option(metavar="P", help="Sample from the likeliest tokens that reach P.")]
TopK = Annotated[int | None, typer.Option(metavar="K", help="Sample from the k most likely tokens; 0 is all.")]
MinP = Annotated[float | None, typer.Option(metavar="P", help="Drop tokens less likely than P times the likeliest.")]
RepetitionPenalty = Annotated[float | None, typer.Option(metavar="X", help="Above 1 discourages repeating.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always take the most likely token.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Text that ends the answer (repeatable).")]

# Plain help texts and errors: the same in a pipe as in a terminal, and nothing of rich is loaded for them.
app = typer.Typer(
    name="minim3", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: Version = False) -> None:
    """Run, inspect, convert and train MiniMax-M3 models."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="What to ask; - reads it from stdin.")
    ] = None,
    image: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Picture (repeatable).")] = None,
    video: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Video (repeatable).")] = None,
    model: Model = None,
    adapter: Adapter = None,
    system: System = None,
    thinking: ThinkingOption = Thinking.adaptive,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    greedy: Greedy = False,
    stop: Stop = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object when the answer is complete.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it stands, without the chat format; print all tokens.")
    ] = False,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    quantization: QuantizationOption = Quantization.auto,
    threads: Threads = None,
    seed: Seed = None,
    version: Version = False,
) -> None:
    """Answer one prompt, with pictures and videos, on stdout."""
    from minim3.cli.generate import run_generate
    from minim3.cli.session import LoadOptions, SamplingOptions

    sampling = SamplingOptions(
        max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, greedy, tuple(stop or ()), seed
    )
    run_generate(
        prompt, image or [], video or [], LoadOptions(model, device, dtype.value, threads, quantization, adapter),
        sampling, system=system, thinking=thinking.value, as_json=json, raw=raw,
    )  # fmt: skip


@app.command()
def chat(
    model: Model = None,
    adapter: Adapter = None,
    system: System = None,
    thinking: ThinkingOption = Thinking.adaptive,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    greedy: Greedy = False,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    quantization: QuantizationOption = Quantization.auto,
    threads: Threads = None,
    seed: Seed = None,
    version: Version = False,
) -> None:
    """Talk to the model; /help lists what can be typed."""
    from minim3.cli.chat import run_chat
    from minim3.cli.session import LoadOptions, SamplingOptions

    sampling = SamplingOptions(max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, greedy, (), seed)
    options = LoadOptions(model, device, dtype.value, threads, quantization, adapter)
    run_chat(options, sampling, system=system, thinking=thinking.value)


@app.command()
def info(
    source: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Checkpoint folder, config.json or hub id; default: pocket.")
    ] = None,
    context: Annotated[int | None, typer.Option(metavar="TOKENS", help="Tokens to size the cache for.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="PATH|HUB", help="The same as MODEL.")] = None,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    version: Version = False,
) -> None:
    """Sizes, parameters and memory of a checkpoint.

    Reads its config and the headers of its files only.
    """
    from minim3.cli.info import run_info

    if source is not None and model is not None:
        raise ValueError(f"two models were given, {source} and --model {model}: pass one")
    run_info(source or model, context, device, dtype.value, json)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint folder or hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    format: Annotated[Format, typer.Option(help="Of the weights in DST.")] = Format.bf16,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest file, e.g. 5GB, 500MB.")] = "5GB",
    adapter: Adapter = None,
    version: Version = False,
) -> None:
    """Write a checkpoint in another number format, or with an adapter merged."""
    from minim3.cli.convert import parse_size, run_convert

    run_convert(source, destination, format.value, parse_size(max_shard_size), adapter)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. optim.lr=1e-4")] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the newest checkpoint of the output folder, or refuse a folder with one.")
    ] = True,
    export: Annotated[
        bool, typer.Option("--export", help="Train no further: write the newest checkpoint in the released layout.")
    ] = False,
    format: Annotated[Format | None, typer.Option(help="The same as export.format=...")] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="The same as device=...")] = None,
    threads: Threads = None,
    seed: Seed = None,
    version: Version = False,
) -> None:
    """Train by a recipe; run again, it goes on."""
    from minim3.cli.train import run_train

    options = {"export.format": format and format.value, "device": device, "threads": threads, "seed": seed}
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    stopped_by = run_train(recipe, [*(overrides or []), *given], resume=resume, export=export)
    if stopped_by is not None:
        raise typer.Exit(128 + stopped_by)


@app.command()
def demo(
    model: Model = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The picture.")] = Path("demo.png"),
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    quantization: QuantizationOption = Quantization.auto,
    threads: Threads = None,
    seed: Seed = None,
    version: Version = False,
) -> None:
    """Ask three questions about a fresh picture."""
    from minim3.cli.demo import run_demo
    from minim3.cli.session import LoadOptions

    run_demo(LoadOptions(model, device, dtype.value, threads, quantization), output, seed)


@app.command()
def serve(
    source: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id; default: pocket.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="PATH|HUB", help="The same as MODEL.")] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="0.0.0.0: reachable from outside.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0: any free one.")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Ask for this key (repeatable); or MINIM3_API_KEY.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Keys, one a line.")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Web pages of others that may call (repeatable; *).")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(metavar="NAME", help="What clients call the model.")] = None,
    thinking: Annotated[
        Thinking, typer.Option("--thinking", help="Of requests that do not say.")
    ] = Thinking.adaptive,
    page: Annotated[bool, typer.Option(help="Serve the chat page at /.")] = True,
    look_inside: Annotated[bool, typer.Option(help="Let the page ask what an answer attended to.")] = True,
    max_running: Annotated[int, typer.Option(min=1, metavar="N", help="Requests that run at once.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=0, metavar="N", help="Requests that wait; then 429.")] = 256,
    max_tokens_per_step: Annotated[
        int, typer.Option(min=1, metavar="N", help="Lower: smoother streams. Higher: faster prompts.")
    ] = 512,
    num_pages: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Pages of the cache; default: it grows as needed.")
    ] = None,
    speculative_tokens: Annotated[
        int, typer.Option(min=0, metavar="N", help="Draft N tokens a step with the model's MTP modules.")
    ] = 0,
    kv_cache_dtype: Annotated[
        KVCacheDtype, typer.Option(help="Keys and values: the model's dtype; 8 bits, with some loss.")
    ] = KVCacheDtype.auto,
    cuda_graphs: Annotated[bool, typer.Option(help="On a GPU, hold steps of decoding as CUDA graphs.")] = True,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Most a request may ask for.")] = None,
    request_timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Longest a request may take.")] = 600.0,
    drain_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Longest a stopping server waits for its requests.")
    ] = 60.0,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch pictures from http(s) URLs.")] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="Fetch from these only (repeatable; .example.com).")
    ] = None,
    limit: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Any other limit (docs/serving.md; repeatable).")
    ] = None,
    allow_priority: Annotated[bool, typer.Option("--allow-priority", help="Requests may set priority.")] = False,
    ignore_unknown_fields: Annotated[
        bool, typer.Option("--ignore-unknown-fields", help="Accept fields nobody knows.")
    ] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log what is asked and answered.")] = False,
    log_level: Annotated[str, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")] = "info",
    log_format: Annotated[
        str, typer.Option(metavar="FORMAT", help="json or text; default: text at a terminal.")
    ] = "auto",
    replicas: Annotated[int, typer.Option(min=1, metavar="N", help="Servers behind Ray Serve (extra cluster).")] = 1,
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    quantization: QuantizationOption = Quantization.auto,
    threads: Threads = None,
    version: Version = False,
) -> None:
    """Serve a model to OpenAI clients, with a chat page (docs/serving.md)."""
    from minim3.cli.serve import read_keys, read_limits, run_serve
    from minim3.cli.session import LoadOptions

    if source is not None and model is not None:
        raise ValueError(f"two models were given, {source} and --model {model}: pass one")
    settings = {
        "host": host, "port": port, "api_keys": read_keys(api_key or [], api_key_file),
        "cors_origins": tuple(cors_origin or ()), "model_name": served_model_name, "thinking": thinking.value,
        "page": page, "look_inside": look_inside, "max_running": max_running, "max_waiting": max_waiting,
        "max_tokens_per_step": max_tokens_per_step, "num_pages": num_pages,
        "speculative_tokens": speculative_tokens, "kv_cache_dtype": kv_cache_dtype.value, "cuda_graphs": cuda_graphs,
        "max_new_tokens": max_new_tokens,
        "request_seconds": request_timeout, "drain_seconds": drain_timeout, "allow_urls": allow_urls,
        "allowed_hosts": tuple(allowed_host or ()), "allow_priority": allow_priority,
        "ignore_unknown_fields": ignore_unknown_fields, "log_prompts": log_prompts, "log_level": log_level,
        **read_limits(limit or []),
    }  # fmt: skip
    options = LoadOptions(source or model, device, dtype.value, threads, quantization, adapter)
    code = run_serve(options, settings, replicas=replicas, log_format=log_format)
    if code:
        raise typer.Exit(code)


@app.command("inspect")
def inspect_answer(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] PROMPT",
            help="Checkpoint folder or hub id (default: pocket), and what to ask; - reads it from stdin.",
        ),
    ],
    image: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Picture (repeatable).")] = None,
    video: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Video (repeatable).")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Report to write: FILE.html, or FILE.json.")
    ] = Path("inspect.html"),
    layers: Annotated[
        str | None, typer.Option(metavar="N,N-N", help="Layers to show in detail, e.g. 0,4,10-19; default: all.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Most tokens of prompt and answer.")] = 4096,
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="PATH|HUB", help="The same as MODEL.")] = None,
    adapter: Adapter = None,
    system: System = None,
    thinking: ThinkingOption = Thinking.adaptive,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    greedy: Greedy = False,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    quantization: QuantizationOption = Quantization.auto,
    threads: Threads = None,
    seed: Seed = None,
    version: Version = False,
) -> None:
    """Answer one prompt, and report which blocks were selected and which experts ran (docs/inspect.md)."""
    from minim3.cli.inspect import parse_layers, run_inspect
    from minim3.cli.session import LoadOptions, SamplingOptions

    if len(words) > (1 if model is not None else 2):
        raise ValueError(f"{len(words)} arguments were given: pass [MODEL] PROMPT, the prompt in quotes")
    source = words[0] if len(words) == 2 else model
    run_inspect(
        words[-1], image or [], video or [],
        LoadOptions(source, device, dtype.value, threads, quantization, adapter),
        SamplingOptions(
            max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, greedy=greedy, seed=seed
        ),
        output, system=system, thinking=thinking.value, layers=parse_layers(layers), max_tokens=max_tokens,
    )  # fmt: skip


@app.command("eval")
def evaluate(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] TASK...",
            help="Checkpoint folder or hub id (default: pocket); perplexity:FILE, choice:FILE.jsonl, exact:FILE.jsonl, "
            "needle, retrieval, pocket, lm_eval:TASK.",
        ),
    ],
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="PATH|HUB", help="The same as MODEL.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="First N questions or documents; prompts a cell (needle).")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, metavar="N", help="Most sequences that run at once.")] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N", help="Tokens of needle and retrieval prompts, e.g. 1024,4096.")
    ] = None,
    depths: Annotated[
        str | None, typer.Option(metavar="P,P", help="Where the fact stands, in percent, e.g. 0,50,100.")
    ] = None,
    keys: Annotated[int | None, typer.Option(min=2, metavar="N", help="Facts in a retrieval prompt (16).")] = None,
    window: Annotated[
        int | None, typer.Option(min=2, metavar="TOKENS", help="Perplexity: tokens seen at once (4096).")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, metavar="TOKENS", help="Perplexity: how far the window moves (half of it).")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    thinking: Annotated[
        Thinking | None, typer.Option("--thinking", help="exact: adaptive; needle, retrieval: disabled.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Questions and prompts as they stand, without the chat format.")
    ] = False,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON too.")] = None,
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    quantization: QuantizationOption = Quantization.auto,
    threads: Threads = None,
    seed: Seed = 0,
    version: Version = False,
) -> None:
    """Measure a model: perplexity, choice, exact answers, retrieval (docs/evaluation.md)."""
    from minim3.cli.eval import EvalOptions, parse_list, run_eval
    from minim3.cli.session import LoadOptions

    percents = parse_list(depths, "depths", float, "0,50,100")
    options = EvalOptions(
        limit, batch_size, seed or 0, parse_list(lengths, "lengths", int, "1024,4096"),
        None if percents is None else tuple(percent / 100 for percent in percents), keys, window, stride,
        max_new_tokens, None if thinking is None else thinking.value, raw,
    )  # fmt: skip
    run_eval(words, LoadOptions(model, device, dtype.value, threads, quantization, adapter), options, json)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (failed), 2 (bad input), 130 (Ctrl-C)."""
    return run_guarded(lambda: app(arguments, prog_name="minim3", standalone_mode=False))
