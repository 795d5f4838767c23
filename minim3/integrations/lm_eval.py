"""minim3 models in EleutherAI's lm-evaluation-harness, under the model name "minim3".

    from minim3.integrations import lm_eval as _
    lm_eval.simple_evaluate(model="minim3", model_args="pretrained=PATH", tasks=["arc_easy"])

or the harness's own command line with that name registered:

    python -m minim3.integrations.lm_eval run --model minim3 --model_args pretrained=PATH --tasks arc_easy

Needs `pip install lm-eval`.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "lm_eval":
        raise
    raise ValueError("lm-eval is not installed: pip install lm-eval") from error

from minim3.evaluation.scoring import BATCH_SIZE, Pair, loglikelihoods
from minim3.inference.engine import Engine
from minim3.inference.request import SamplingParams
from minim3.loading import load
from minim3.processing.chat import END_THINK
from minim3.processing.detokenizer import IncrementalDetokenizer
from minim3.processing.processor import MiniMaxM3VLProcessor

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from minim3.model.causal_lm import CausalLM

logger = logging.getLogger(__name__)
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("minim3")
class MiniMaxM3LM(TemplateLM):  # type: ignore[misc]
    """A model for the harness; batches are packed, so that no score depends on padding.

    Args:
        pretrained: a checkpoint folder or hub id (None: pocket), or a loaded model with its `processor`.
        batch_size: sequences that run at once; "auto" is as good as any number here.
        max_length: tokens of a sequence, at most; default: what the model takes. Longer contexts lose their beginning,
            as in the harness's own models.
        max_gen_toks: tokens to generate where a task does not say.
        thinking_mode: with `apply_chat_template`: enabled, adaptive, or (default) disabled, where the answer follows
            the prompt at once. Thoughts are no part of an answer.
        dtype, quantization: see `minim3.load`. device: None is the first GPU, else the CPU. The harness's command line
            says "cuda" unless told otherwise; where there is none that is the CPU too, with a line in the log.
    """

    def __init__(
        self,
        pretrained: "str | Path | CausalLM | None" = None,
        processor: MiniMaxM3VLProcessor | None = None,
        *,
        dtype: str = "auto",
        device: str | None = None,
        quantization: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        thinking_mode: str = "disabled",
    ) -> None:
        super().__init__()
        if pretrained is None or isinstance(pretrained, (str, Path)):
            self.model, self.processor = load(
                pretrained, None if dtype == "auto" else dtype, _device(device), quantization=quantization,
                require_tokenizer=True,
            )  # fmt: skip
            self.model.pack_for_inference()
            self._name = str(pretrained or "pocket")
        elif processor is None:
            raise ValueError("a loaded model needs its processor: MiniMaxM3LM(model, processor)")
        else:
            self.model, self.processor = pretrained, processor  # type: ignore[assignment]
            self._name = "minim3"
        self._device = self.model.device
        self.batch_size = BATCH_SIZE if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)
        positions = self.model.text_config.max_position_embeddings
        self.max_length = positions if max_length is None else int(max_length)
        if not 2 <= self.max_length <= positions:
            raise ValueError(f"max_length is {self.max_length}; the model takes 2 to {positions} tokens")
        self.max_gen_toks = int(max_gen_toks)
        self.thinking_mode = thinking_mode

    @property
    def eot_token_id(self) -> int:
        ids = self.processor.tokenizer.eos_token_ids
        if not ids:
            raise ValueError("the checkpoint names no token that ends a text (eos_token)")
        return ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the token that begins texts, else the one that ends them."""
        bos: int | None = self.model.text_config.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The checkpoint's own, for the harness's records; "" where the built-in rendering is used."""
        return (self.processor.chat_template or "") if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.processor.apply_chat_template(
            chat_history, thinking_mode=self.thinking_mode, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Control tokens that stand in the string count: chat templates come as text. No token is added."""
        return self.processor.tokenizer.encode(string, allow_special=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _text, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a text of {len(continuation)} tokens is to be scored, the model takes {self.max_length}"
                )
            room = self.max_length + 1 - len(continuation)
            pairs.append(Pair(context[-room:], continuation))
        scores = tqdm(
            loglikelihoods(self.model, pairs, batch_size=self.batch_size), total=len(pairs), disable=disable_tqdm,
            desc="Running loglikelihood requests",
        )  # fmt: skip
        found = []
        for (text, _context, _continuation), score in zip(requests, scores, strict=True):
            found.append((score.logprob, score.is_greedy))
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, found[-1])
        return found

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Each text whole, in windows of `max_length` that do not overlap but for one token."""
        totals = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm, desc="Running texts"):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1,
            )  # fmt: skip
            parts = [(None, *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Answers without the stop text; greedy unless a task asks for sampling (then seeded by its place)."""
        tokenizer = self.processor.tokenizer
        engine = Engine(self.model, max_running=self.batch_size)
        running = []
        for seed, (context, given) in enumerate(request.args for request in requests):
            options = normalize_gen_kwargs(given, self.max_gen_toks)
            until, new_tokens = [stop for stop in options.pop("until") if stop], options.pop("max_gen_toks")
            sampling = {name: options.pop(name) for name in _SAMPLING if name in options}
            if options:
                raise ValueError(f"{', '.join(options)} cannot be asked for; known: until, {', '.join(_SAMPLING)}")
            if new_tokens >= self.max_length:
                raise ValueError(f"{new_tokens} tokens are to be generated, the model takes {self.max_length} in all")
            params = SamplingParams(
                max_new_tokens=new_tokens, eos_token_ids=tokenizer.eos_token_ids, stop=tuple(until), seed=seed,
                **sampling,
            )  # fmt: skip
            ids = (self.tok_encode(context) or [self.prefix_token_id])[new_tokens - self.max_length :]
            running.append(engine.add_request(ids, params, detokenizer=IncrementalDetokenizer(tokenizer)))
        with tqdm(total=len(running), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for event in engine.stream():
                bar.update(event.finish_reason is not None)
        answers = []
        end_think = tokenizer.token_to_id(END_THINK)
        for request, (context, given) in zip(running, (request.args for request in requests), strict=True):
            answer = request.text
            if end_think in request.output_ids:
                last = len(request.output_ids) - 1 - request.output_ids[::-1].index(end_think)
                answer = tokenizer.decode(request.output_ids[last + 1 :], skip_special_tokens=True).lstrip()
                answer = postprocess_generated_text(answer, list(request.params.stop), None)
            answers.append(answer)
            self.cache_hook.add_partial("generate_until", (context, given), answer)
        return answers


def _device(name: str | None) -> str:
    if torch.cuda.is_available():
        return name or "cuda"
    if name is not None and name.startswith("cuda"):
        logger.warning("there is no CUDA device here: the model runs on the CPU")
        return "cpu"
    return name or "cpu"


def run_task(
    model: "CausalLM",
    processor: MiniMaxM3VLProcessor,
    task: str,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> list[tuple[str, float, float | None, int]]:
    """One task of the harness, by name or by its YAML file: (metric, value, standard error, samples) of each figure.

    Raises ValueError for a task that the harness does not know.
    """
    path = Path(task)
    is_file = path.suffix in (".yaml", ".yml")
    if is_file and not path.is_file():
        raise ValueError(f"task lm_eval: {path} does not exist")
    manager = TaskManager(include_path=str(path.parent) if is_file else None, include_defaults=not is_file)
    if not is_file and not manager.match_tasks([task]):
        raise ValueError(f"lm_eval has no task {task!r}: lm-eval ls tasks lists them; a YAML file can be named too")
    found = simple_evaluate(
        model=MiniMaxM3LM(model, processor, batch_size=batch_size), tasks=[str(path) if is_file else task],
        task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=1000,
        random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
    )  # fmt: skip
    assert found is not None, "one process gets the results"
    figures: list[tuple[str, float, float | None, int]] = []
    several = len(found["results"]) > 1
    for subtask, result in found["results"].items():
        samples = found["n-samples"].get(subtask, {}).get("effective", 0)
        for key, value in result.items():
            metric, _, of_filter = key.partition(",")
            if isinstance(value, (int, float)) and of_filter and not metric.endswith("_stderr"):
                error = result.get(f"{metric}_stderr,{of_filter}")
                shown = metric if of_filter == "none" else f"{metric} ({of_filter})"
                prefix = f"{subtask}: " if several else ""
                figures.append((prefix + shown, float(value), error if isinstance(error, float) else None, samples))
    return figures


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    sys.exit(cli_evaluate())
