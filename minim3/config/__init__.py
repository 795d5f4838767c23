"""Model configuration: both dialects of config.json read, the released one written, everything resolved once.

The *released* dialect says which layers are what through `moe_layer_freq` and `sparse_attention_config`; the
*transformers* dialect through `mlp_layer_types`, `layer_types` and `index_*`. Here each layer's kind is a string in a
tuple, decided at construction, and no other code looks at the raw fields. Constructors take the resolved names as
keywords; `from_dict` takes either dialect. Fields nobody here knows are kept in `extra` and written back.

Where to look: `text`, `vision`, `vision_language` (one config class each), `reader` (fields, strictly), `files`.
"""

from minim3.config.files import read_config_dict, write_config_dict
from minim3.config.text import TEXT_MODEL_TYPES, MiniMaxM3VLTextConfig
from minim3.config.vision import VISION_MODEL_TYPES, MiniMaxM3VLVisionConfig
from minim3.config.vision_language import MODEL_TYPE, MiniMaxM3VLConfig, config_from_dict, load_config

__all__ = [
    "MODEL_TYPE",
    "TEXT_MODEL_TYPES",
    "VISION_MODEL_TYPES",
    "MiniMaxM3VLConfig",
    "MiniMaxM3VLTextConfig",
    "MiniMaxM3VLVisionConfig",
    "config_from_dict",
    "load_config",
    "read_config_dict",
    "write_config_dict",
]
