"""How many parameters a config describes, how many of them a token passes through, and what memory they take.

Pure arithmetic on the config: no torch, no weights. The sum over parts is what a checkpoint of the config holds, the
router's correction bias included.
"""

from dataclasses import dataclass

from minim3.config import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig

FORMATS = ("bf16", "fp32", "mxfp8")
MXFP8_BLOCK = 32  # inputs that share one scale byte


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part of the model.

    total: all of them. active: those that one text token passes through (of the routed experts, the chosen ones;
    nothing of the vision tower). scales: bytes of scales when written as MXFP8; None for a part that stays unquantized.
    fp32: kept in fp32 whatever the rest is in.
    """

    name: str
    total: int
    active: int
    scales: int | None = None
    fp32: bool = False

    def num_bytes(self, format: str) -> int:
        """Size of the weights in `format` ("bf16", "fp32" or "mxfp8")."""
        if format not in FORMATS:
            raise ValueError(f"format is {format!r}; known: {', '.join(FORMATS)}")
        if self.fp32 or format == "fp32":
            return 4 * self.total
        if format == "mxfp8" and self.scales is not None:
            return self.total + self.scales
        return 2 * self.total


@dataclass(frozen=True)
class ParameterCounts:
    """The parts of a model, in the order a token passes them."""

    parts: tuple[PartCount, ...]

    @property
    def total(self) -> int:
        return sum(part.total for part in self.parts)

    @property
    def active(self) -> int:
        """Parameters a text token passes through, without embeddings and head: the figure models are quoted with."""
        return sum(part.active for part in self.parts if part.name not in ("embeddings", "head"))

    def num_bytes(self, format: str) -> int:
        return sum(part.num_bytes(format) for part in self.parts)


def count_parameters(
    config: MiniMaxM3VLConfig | MiniMaxM3VLTextConfig, num_mtp_modules: int | None = None
) -> ParameterCounts:
    """Counts by part. `num_mtp_modules`: those the weights hold, perhaps fewer than the config names (None: these)."""
    text = config.text_config if isinstance(config, MiniMaxM3VLConfig) else config
    num_mtp = text.num_mtp_modules if num_mtp_modules is None else num_mtp_modules
    layers = list(range(text.num_hidden_layers))
    parts = [PartCount("embeddings", text.vocab_size * text.hidden_size, 0), *_decoder_parts(text, layers)]
    parts.append(PartCount("final norm", text.hidden_size, text.hidden_size))
    parts.append(PartCount("head", 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size, 0))
    if num_mtp:
        parts += _mtp_parts(text, num_mtp)
    if isinstance(config, MiniMaxM3VLConfig) and config.vision_config is not None:
        parts += _vision_parts(config)
    return ParameterCounts(tuple(part for part in parts if part.total))


def cache_bytes_per_token(text: MiniMaxM3VLTextConfig, bytes_per_number: int = 2) -> tuple[int, int]:
    """Bytes that one token takes in the cache over all layers: K and V, and index keys."""
    sparse = sum(text.is_sparse_attention_layer(i) for i in range(text.num_hidden_layers))
    keys_and_values = text.num_hidden_layers * 2 * text.num_key_value_heads * text.head_dim
    return keys_and_values * bytes_per_number, sparse * text.index_head_dim * bytes_per_number


def describe_layers(text: MiniMaxM3VLTextConfig) -> str:
    """Runs of equal layers: "layers 0-2 full attention, dense MLP; 3-59 sparse attention, MoE"."""
    runs: list[tuple[int, int, str]] = []
    for i in range(text.num_hidden_layers):
        attention = "sparse attention" if text.is_sparse_attention_layer(i) else "full attention"
        kind = f"{attention}, {'MoE' if text.is_moe_layer(i) else 'dense MLP'}"
        if runs and runs[-1][2] == kind:
            runs[-1] = (runs[-1][0], i, kind)
        else:
            runs.append((i, i, kind))
    spans = [f"{first} {kind}" if first == last else f"{first}-{last} {kind}" for first, last, kind in runs]
    return ("layers " if text.num_hidden_layers > 1 else "layer ") + "; ".join(spans)


def _matrix(outputs: int, inputs: int) -> tuple[int, int]:
    """Parameters, and scale bytes as MXFP8, of one linear layer."""
    return outputs * inputs, outputs * -(-inputs // MXFP8_BLOCK)


def _sum(*matrices: tuple[int, int], times: int = 1) -> tuple[int, int]:
    return times * sum(m[0] for m in matrices), times * sum(m[1] for m in matrices)


def _swiglu(hidden: int, width: int) -> tuple[int, int]:
    return _sum(_matrix(width, hidden), _matrix(width, hidden), _matrix(hidden, width))


def _decoder_parts(text: MiniMaxM3VLTextConfig, layers: list[int]) -> list[PartCount]:
    """Everything inside the decoder layers `layers` (an index may come twice)."""
    hidden, kv_dim = text.hidden_size, text.num_key_value_heads * text.head_dim
    q_dim = text.num_attention_heads * text.head_dim
    num_sparse = sum(text.is_sparse_attention_layer(i) for i in layers)
    num_moe = sum(text.is_moe_layer(i) for i in layers)
    num_dense = len(layers) - num_moe

    attention = _sum(
        _matrix(q_dim, hidden), _matrix(kv_dim, hidden), _matrix(kv_dim, hidden), _matrix(hidden, q_dim),
        times=len(layers),
    )  # fmt: skip
    indexer = num_sparse * ((text.index_n_heads + 1) * text.index_head_dim * hidden + 2 * text.index_head_dim)
    dense = _sum(_swiglu(hidden, text.dense_intermediate_size), times=num_dense)
    routed = _sum(_swiglu(hidden, text.intermediate_size), times=num_moe * text.num_local_experts)
    chosen = _sum(_swiglu(hidden, text.intermediate_size), times=num_moe * text.num_experts_per_tok)[0]
    shared = _sum(_swiglu(hidden, text.shared_intermediate_size * text.n_shared_experts), times=num_moe)
    router = num_moe * text.num_local_experts * (hidden + int(text.use_routing_bias))
    norms = len(layers) * (2 * hidden + (2 * text.head_dim if text.use_qk_norm else 0))
    return [
        PartCount("attention", attention[0], attention[0], attention[1]),
        PartCount("indexer", indexer, indexer),
        PartCount("dense MLP", dense[0], dense[0], dense[1]),
        PartCount("router", router, router, fp32=True),
        PartCount("routed experts", routed[0], chosen, routed[1]),
        PartCount("shared expert", shared[0], shared[0], shared[1]),
        PartCount("layer norms", norms, norms),
    ]


def _mtp_parts(text: MiniMaxM3VLTextConfig, num_modules: int) -> list[PartCount]:
    """The draft modules; they take no part in a token's own forward pass, so nothing of them counts as active."""
    block = _decoder_parts(text, [text.num_hidden_layers - 1] * num_modules)
    around = num_modules * (2 * text.hidden_size**2 + 3 * text.hidden_size)  # eh_proj; enorm, hnorm, final_layernorm
    inside = [PartCount(f"MTP {part.name}", part.total, 0, part.scales, part.fp32) for part in block]
    return [PartCount("MTP projection", around, 0), *inside]


def _vision_parts(config: MiniMaxM3VLConfig) -> list[PartCount]:
    vision = config.vision_config
    assert vision is not None
    hidden, width = vision.hidden_size, vision.intermediate_size
    patch = hidden * vision.num_channels * vision.temporal_patch_size * vision.patch_size**2
    layer = 4 * (hidden + 1) * hidden + (hidden + 1) * width + (width + 1) * hidden + 4 * hidden
    tower = patch + 2 * hidden + vision.num_hidden_layers * layer
    text_dim, projected = config.text_config.hidden_size, config.projector_hidden_size
    merged = text_dim * vision.spatial_merge_size**2
    projector = (hidden + 1) * projected + (merged + 1) * projected + 2 * (projected + 1) * text_dim
    return [PartCount("vision tower", tower, 0), PartCount("projectors", projector, 0)]
