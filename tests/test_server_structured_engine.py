"""Guides inside the engine: the same answer with and without speculation, alone or in company, and pages come back."""

import json
from typing import Any

import jsonschema
import pytest

from minim3.inference.engine import Engine
from minim3.inference.request import SamplingParams
from minim3.processing.output import parse_output
from minim3.server import structured
from minim3.server.settings import ServerSettings
from tests.running_servers import pocket

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "shapes": {"type": "array", "items": {"enum": ["circle", "square", "star"]}, "minItems": 1, "maxItems": 4},
        "count": {"type": "integer", "minimum": 0, "maximum": 40},
        "note": {"type": ["string", "null"], "maxLength": 12},
    },
    "required": ["shapes", "count"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "report", "parameters": SCHEMA}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


def run(mode: str, options: dict[str, Any], *, do_sample: bool, **engine_options: Any) -> list[list[int]]:
    """Four requests at once, and one without a guide among them."""
    model, processor = pocket()
    engine = Engine(model, **engine_options)
    requests = []
    for seed in range(5):
        message = {"role": "user", "content": f"What is in picture {seed}?"}
        inputs = processor.apply_chat_template([message], thinking_mode=mode)
        guide = None
        if seed != 2:
            guide = structured.make_guide(
                processor, model.text_config.vocab_size, ServerSettings(), thinking_mode=mode, **options
            )
        sampling: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "seed": seed} if do_sample else {}
        params = SamplingParams(max_new_tokens=150, eos_token_ids=processor.tokenizer.eos_token_ids, **sampling)
        requests.append(engine.add_request(inputs["input_ids"][0].tolist(), params, guide=guide))
    engine.run()
    engine.check_integrity()
    if "num_pages" in engine_options:
        assert any(one.num_preemptions for one in requests)
    assert engine.cache.pool.num_used_pages == 0
    for request in (one for one in requests if one.guide is not None and one.finish_reason == "stop"):
        parsed = parse_output(request.output_ids, processor.tokenizer, mode, [TOOL])
        value = parsed.tool_calls[0].arguments if options.get("tools") else json.loads(parsed.content)
        jsonschema.validate(value, SCHEMA)
    assert sum(one.finish_reason == "stop" for one in requests if one.guide is not None) >= (
        0 if mode == "enabled" else 3
    )
    return [one.output_ids for one in requests]


@pytest.mark.parametrize("mode", ["disabled", "enabled"])
@pytest.mark.parametrize("kind", ["schema", "tool"])
def test_speculation_changes_no_answer_under_a_guide(mode: str, kind: str) -> None:
    """Drafts look ahead on forks; a draft that the grammar forbids must neither stand nor move the guide."""
    options: dict[str, Any] = {"response_format": FORMAT}
    if kind == "tool":
        options = {"response_format": None, "tools": [TOOL], "tool_choice": "required", "parallel": False}
    plain = run(mode, options, do_sample=False)
    assert run(mode, options, do_sample=False, num_speculative_tokens=2) == plain
    assert run(mode, options, do_sample=False, max_running=1) == plain


@pytest.mark.parametrize("speculative", [0, 2])
def test_hot_sampling_stays_inside(speculative: int) -> None:
    run("disabled", {"response_format": FORMAT}, do_sample=True, num_speculative_tokens=speculative)


def test_guides_survive_preemption() -> None:
    """A request that steps back is computed again; its guide must not see its tokens twice."""
    options = {"response_format": FORMAT}
    plain = run("disabled", options, do_sample=False)
    assert run("disabled", options, do_sample=False, num_pages=12) == plain
