"""Weights in bf16, int8, 4-bit groups and MXFP8 beside fp32: speed, memory, and what they cost in quality.

"bfloat16" is that dtype throughout the model, every other format holds weights alone and computes in fp32.

Speed: single products, and a random model of about 600 M parameters of the proportions of `model.json`, made on the
spot and read from a checkpoint in each format. fp32 and the other format are held at once and take turns, a burst of
steps each; the median of the bursts, and of their ratios, is reported. Quality: pocket answers the same fresh questions
in each format, and its perplexity is taken on the right answers.
"""

import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.report import Claim, arguments, publish
from minim3.inference.engine import Engine
from minim3.inference.request import SamplingParams
from minim3.loading import load
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM
from minim3.model.quantization import weight_bytes
from minim3.model.weight_formats import WeightMatrix, quantize
from minim3.pocket import evaluate

DTYPES = {"fp32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = ("bfloat16", "bf16", "int8", "int4", "mxfp8")
BARS = {"int8": 1.5, "int4": 2.0}  # decode of one sequence at 256 tokens, over fp32
CONTEXT, PROMPT, BATCH = 256, 1024, 8
STEPS = 8  # of a burst
PRODUCT_ROWS = (1, 8, 32, 256)
PRODUCT_SIZE = 1024  # rows and columns of the weight of a single product
NUM_PRODUCTS = 24  # weights of that size, gone through in turn, so that none waits in a near cache


def options_of(format: str) -> dict[str, Any]:
    """How `format` is asked for when a model is loaded."""
    return {"dtype": DTYPES[format]} if format in DTYPES else {"dtype": torch.float32, "quantization": format}


def config() -> dict[str, Any]:
    """591 M parameters: twice the width of `model.json`, three layers more, experts twice as wide and as many."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / "model.json").read_text())
    sparse = [0] + [1] * 10
    found |= {"vocab_size": 16384, "hidden_size": 1024, "num_hidden_layers": 11, "moe_layer_freq": sparse}
    found |= {"dense_intermediate_size": 2048, "intermediate_size": 512, "shared_intermediate_size": 512}
    found["num_local_experts"] = 32
    found["sparse_attention_config"] |= {"sparse_attention_freq": sparse, "sparse_disable_index_value": sparse}
    return found


def make_checkpoint(folder: Path) -> int:
    """Random bf16 weights of a fixed seed; returns their number."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = MiniMaxM3SparseForCausalLM.from_config(config(), dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            else:
                parameter.zero_()
        for buffer in model.buffers():
            buffer.zero_()
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def seconds(runs: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Wall time of each of `runs`, which take turns, in each round after one to warm up."""
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, times in zip(runs, found, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return [times[1:] for times in found]


def ratio(base: Sequence[float], other: Sequence[float]) -> float:
    """How many times as quick the other is: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(base, other, strict=True))


@torch.inference_mode()
def product_claims(rounds: int) -> list[Claim]:
    weights = [torch.randn(PRODUCT_SIZE, PRODUCT_SIZE) / PRODUCT_SIZE**0.5 for _ in range(NUM_PRODUCTS)]
    held = {format: [quantize(weight, format) for weight in weights] for format in FORMATS[1:]}
    half = [weight.bfloat16() for weight in weights]

    claims = []
    for num_rows in PRODUCT_ROWS:
        x = torch.randn(num_rows, PRODUCT_SIZE)
        runs: list[Callable[[], object]] = [partial(linears, x, weights), partial(linears, x.bfloat16(), half)]
        runs += [partial(quantized_products, x, matrices) for matrices in held.values()]
        base, *others = seconds(runs, rounds)
        name = f"product of {num_rows} x {PRODUCT_SIZE} with {PRODUCT_SIZE} x {PRODUCT_SIZE}"
        claims.append(Claim(f"{name}, fp32", None, 1e6 * statistics.median(base) / NUM_PRODUCTS, "us"))
        for format, times in zip(FORMATS, others, strict=True):
            claims.append(Claim(f"{name}, {format} over fp32", None, ratio(base, times), "x"))
    return claims


def linears(x: Tensor, weights: Sequence[Tensor]) -> None:
    for weight in weights:
        F.linear(x, weight)


def quantized_products(x: Tensor, matrices: Sequence[WeightMatrix]) -> None:
    """From fp32 to fp32, casts included."""
    for matrix in matrices:
        matrix.product(matrix.prepare(x)).float()


def running(model: Any, num_sequences: int, length: int, new_tokens: int) -> Engine:
    """An engine that has read its prompts, and will decode for so many steps."""
    engine = Engine(model, max_tokens_per_step=4096)
    ids = torch.randint(3, 16000, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for n in range(num_sequences):
        engine.add_request(ids[n:] + ids[:n], SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
    engine.step()
    return engine


def burst(engine: Engine) -> None:
    for _ in range(STEPS):
        engine.step()


def decode_claims(models: dict[str, Any], num_sequences: int, rounds: int) -> list[Claim]:
    """Rates of fp32 and one other format, which take turns."""
    engines = [running(model, num_sequences, CONTEXT, (rounds + 2) * STEPS) for model in models.values()]
    times = seconds([partial(burst, engine) for engine in engines], rounds)
    (_, base), (format, other) = zip(models, times, strict=True)
    of = f"decode, {num_sequences} sequence{'s' if num_sequences > 1 else ''} at {CONTEXT} tokens"
    rates = [num_sequences * STEPS / statistics.median(one) for one in (base, other)]
    bar = BARS.get(format) if num_sequences == 1 else None
    return [
        Claim(f"{of}, fp32 (beside {format})", None, rates[0], "tokens/s"),
        Claim(f"{of}, {format}", None, rates[1], "tokens/s"),
        Claim(f"{of}, {format} over fp32", bar, ratio(base, other), "x"),
    ]


def prefill_claims(models: dict[str, Any], rounds: int) -> list[Claim]:
    runs = [partial(running, model, 1, PROMPT, 1) for model in models.values()]
    (_, base), (format, other) = zip(models, seconds(runs, rounds), strict=True)
    return [
        Claim(f"prefill, {PROMPT} tokens, {format}", None, PROMPT / statistics.median(other), "tokens/s"),
        Claim(f"prefill, {PROMPT} tokens, {format} over fp32", None, ratio(base, other), "x"),
    ]


def model_claims(rounds: int, formats: Sequence[str]) -> list[Claim]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        claims = [Claim("parameters of the random model", None, make_checkpoint(folder) / 1e6, "M")]

        def loaded(format: str) -> Any:
            gc.collect()
            start = time.perf_counter()
            model = MiniMaxM3SparseForCausalLM.from_pretrained(folder, **options_of(format))
            claims.append(Claim(f"loading, {format}", None, time.perf_counter() - start, "s"))
            size = sum(weight_bytes(model).values()) / 2**20
            claims.append(Claim(f"weights in memory, {format}", None, size, "MiB"))
            return model

        base = loaded("fp32")
        for format in formats:
            models = {"fp32": base, format: loaded(format)}
            claims += decode_claims(models, 1, rounds)
            claims += decode_claims(models, BATCH, min(rounds, 3))
            claims += prefill_claims(models, min(rounds, 2))
            del models
    return claims


@torch.inference_mode()
def perplexity(model: Any, processor: Any, cases: Sequence[evaluate.Case]) -> float:
    """exp of the mean negative log-likelihood of the tokens of the right answers, the end of the turn included."""
    loss, count = 0.0, 0
    for case in cases:
        picture, text = case.prompt()
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if picture is not None:
            content.insert(0, {"type": "image", "image": picture})
        prompt = [{"role": "user", "content": content}]
        start = processor.apply_chat_template(prompt)["input_ids"].shape[1]
        whole = [*prompt, {"role": "assistant", "content": case.question.answer}]
        inputs = dict(processor.apply_chat_template(whole, add_generation_prompt=False))
        ids = inputs["input_ids"][0]
        # What the template puts after the end of a turn is never generated, and was never trained.
        stop = start + ids[start:].tolist().index(processor.tokenizer.eos_token_id) + 1
        logits = model(**inputs).logits[0, start - 1 : stop - 1].float()
        loss += float(F.cross_entropy(logits, ids[start:stop], reduction="sum"))
        count += stop - start
    return math.exp(loss / count)


class Answers:
    """The answers of a model, and all of them in order."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._answer = evaluate.model_answers(model, processor)
        self.given: list[str] = []

    def __call__(self, prompts: Sequence[evaluate.Prompt]) -> Sequence[str]:
        answers = list(self._answer(prompts))
        self.given += answers
        return answers


def pocket_claims(num_pictures: int, num_text: int, num_perplexity: int, path: str | None) -> list[Claim]:
    claims: list[Claim] = []
    known: dict[str, float] = {}
    plain: list[str] = []
    asked = {"pictures": num_pictures, "text": num_text}
    cases = {
        "pictures": evaluate.fresh_questions(1, num_perplexity),
        "text": evaluate.fresh_text_tasks(1, num_perplexity),
    }
    for format in ("fp32", *FORMATS):
        model, processor = load(path, **options_of(format))
        answers = Answers(model, processor)
        report = evaluate.evaluate(answers, num_pictures, 0, num_text_tasks=num_text)
        plain = plain or answers.given
        for part, num in asked.items():
            right, value = report[part]["accuracy"], perplexity(model, processor, cases[part])
            right_before, value_before = known.setdefault(f"{part} right", right), known.setdefault(part, value)
            claims.append(Claim(f"pocket, {part}: right of {num}, {format}", None, right, "%"))
            claims.append(
                Claim(f"pocket, {part}: perplexity of {num_perplexity} right answers, {format}", None, value, "")
            )
            if format != "fp32":
                claims.append(Claim(f"pocket, {part}: right, {format} less fp32", None, right - right_before, "points"))
                more = 100 * (value / value_before - 1)
                claims.append(Claim(f"pocket, {part}: perplexity, {format} above fp32", None, more, "%"))
        if format != "fp32":
            same = 100 * sum(a == b for a, b in zip(plain, answers.given, strict=True)) / len(plain)
            claims.append(Claim(f"pocket: answers equal to those in fp32, {format}", None, same, "%"))
    return claims


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="bursts of each side")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS, help="of the random model")
    parser.add_argument("--pictures", type=int, default=400, help="picture questions to pocket")
    parser.add_argument("--text", type=int, default=90, help="text tasks to pocket")
    parser.add_argument("--perplexity", type=int, default=100, help="questions of each of the two for perplexity")
    parser.add_argument("--model", help="checkpoint to ask in the place of pocket")
    parser.add_argument("--part", choices=("products", "model", "pocket"), help="one part alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    claims: list[Claim] = []
    if options.part in (None, "products"):
        claims += product_claims(options.rounds)
    if options.part in (None, "model"):
        claims += model_claims(options.rounds, options.formats)
    if options.part in (None, "pocket"):
        claims += pocket_claims(options.pictures, options.text, options.perplexity, options.model)
    publish(claims, options.json)


if __name__ == "__main__":
    main()
