"""What a Gemma model is made of: frozen dataclasses, and every published size as a value.

Sizes are those of the files Google published at Hugging Face and of google-deepmind/gemma; `config_json` reads others.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP encoder (So400m/14 in every published Gemma 3) and how many soft tokens an image becomes."""

    hidden_size: int = 1152  # E
    intermediate_size: int = 4304
    num_layers: int = 27
    num_heads: int = 16
    image_size: int = 896  # pixels a side: pictures are squashed to a square
    patch_size: int = 14
    norm_eps: float = 1e-6
    tokens_per_image: int = 256  # M, a square number: patches are mean-pooled to this many

    def __post_init__(self):
        if self.image_size % self.patch_size or self.hidden_size % self.num_heads:
            raise ValueError(
                f"the vision config does not divide: image_size {self.image_size} by patch_size {self.patch_size}, "
                f"hidden_size {self.hidden_size} by {self.num_heads} heads"
            )
        if self.tokens_per_side**2 != self.tokens_per_image or self.patches_per_side % self.tokens_per_side:
            raise ValueError(
                f"mm_tokens_per_image {self.tokens_per_image} must be a square whose side divides the "
                f"{self.patches_per_side} patches a side"
            )

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_side(self) -> int:
        return int(self.tokens_per_image**0.5)


@dataclass(frozen=True)
class Config:
    """One Gemma 3 or Gemma 2 model. Hashable, so it can be a static argument of `jax.jit`."""

    model_type: str  # Hugging Face's: "gemma3" (text and images), "gemma3_text" or "gemma2"
    vocab_size: int  # V, rows of the embedding table
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H; N * H is not D in any published size
    sliding_window: int  # a local layer's query sees this many keys, itself included
    layer_types: tuple[str, ...]  # "sliding_attention" (local) or "full_attention" (global), one per layer
    query_pre_attn_scalar: int  # scores are multiplied by its inverse square root (27b: D / N, not H)
    global_rope_base: float = 1e6
    global_rope_factor: float = 1.0  # positions of global layers are divided by it (8 in 4b, 12b, 27b)
    local_rope_base: float = 1e4
    qk_norm: bool = True  # Gemma 3; Gemma 2 has soft caps instead
    attention_softcap: float | None = None
    final_softcap: float | None = None
    norm_eps: float = 1e-6
    max_positions: int = 131072
    pad_id: int = 0
    bos_id: int = 2
    stop_ids: tuple[int, ...] = (1,)  # a completion ends with any of them: <eos>, and <end_of_turn> in -it models
    image_token_id: int | None = None  # the position of one soft token
    start_of_image_id: int | None = None
    end_of_image_id: int | None = None
    vision: VisionConfig | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads do not share {self.num_kv_heads} key/value heads evenly")
        if len(self.layer_types) != self.num_layers:
            raise ValueError(f"layer_types names {len(self.layer_types)} layers of num_hidden_layers {self.num_layers}")

    @property
    def query_scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5

    @property
    def is_local(self) -> tuple[bool, ...]:
        """Which layers attend within the sliding window, [L]."""
        return tuple(kind == "sliding_attention" for kind in self.layer_types)


def layer_pattern(num_layers: int, period: int) -> tuple[str, ...]:
    """Every `period`-th layer is global, the others local: 6 in Gemma 3, 2 in Gemma 2."""
    return tuple("sliding_attention" if (i + 1) % period else "full_attention" for i in range(num_layers))


def _gemma3(layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, *, text_only: bool, **fields) -> Config:
    sizes = {
        "vocab_size": 262144 if text_only else 262208,
        "head_dim": 256,
        "sliding_window": 512 if text_only else 1024,
        "query_pre_attn_scalar": 256,
        "max_positions": 32768 if text_only else 131072,
        "global_rope_factor": 1.0 if text_only else 8.0,
    }
    image = {
        "image_token_id": 262144,
        "start_of_image_id": 255999,
        "end_of_image_id": 256000,
        "vision": VisionConfig(),
    }
    return Config(
        model_type="gemma3_text" if text_only else "gemma3",
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_heads=heads,
        num_kv_heads=kv_heads,
        layer_types=layer_pattern(layers, 6),
        **(sizes | ({} if text_only else image) | fields),
    )


def _gemma2(layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, **fields) -> Config:
    return Config(
        model_type="gemma2",
        vocab_size=256000,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_heads=heads,
        num_kv_heads=kv_heads,
        layer_types=layer_pattern(layers, 2),
        sliding_window=4096,
        global_rope_base=1e4,
        qk_norm=False,
        attention_softcap=50.0,
        final_softcap=30.0,
        max_positions=8192,
        **({"head_dim": 256, "query_pre_attn_scalar": 256} | fields),
    )


_PRETRAINED = {
    "gemma-3-270m": _gemma3(18, 640, 2048, 4, 1, text_only=True),
    "gemma-3-1b-pt": _gemma3(26, 1152, 6912, 4, 1, text_only=True),
    "gemma-3-4b-pt": _gemma3(34, 2560, 10240, 8, 4, text_only=False),
    "gemma-3-12b-pt": _gemma3(48, 3840, 15360, 16, 8, text_only=False),
    "gemma-3-27b-pt": _gemma3(62, 5376, 21504, 32, 16, text_only=False, head_dim=128, query_pre_attn_scalar=168),
    "gemma-2-2b": _gemma2(26, 2304, 9216, 8, 4),
    "gemma-2-9b": _gemma2(42, 3584, 14336, 16, 8),
    "gemma-2-27b": _gemma2(46, 4608, 36864, 32, 16, head_dim=128, query_pre_attn_scalar=144),
}

# Small enough to train on a laptop in minutes, with every part of the real model: both kinds of layer, grouped heads,
# a window shorter than a sequence, images. Special ids are those of its own small tokenizer.
NANO = Config(
    model_type="gemma3",
    vocab_size=448,
    hidden_size=64,
    intermediate_size=256,
    num_layers=6,
    num_heads=4,
    num_kv_heads=1,
    head_dim=16,
    sliding_window=32,
    layer_types=layer_pattern(6, 6),
    query_pre_attn_scalar=16,
    max_positions=2048,
    stop_ids=(1, 5),
    start_of_image_id=6,
    image_token_id=7,
    end_of_image_id=8,
    vision=VisionConfig(64, 192, 2, 4, image_size=32, patch_size=8, tokens_per_image=4),
)

_INSTRUCTION_TUNED = {
    name.removesuffix("-pt") + "-it": replace(config, stop_ids=(1, 107 if config.model_type == "gemma2" else 106))
    for name, config in _PRETRAINED.items()
}

# By published name: pretrained, and instruction-tuned ("-it"), which stop at <end_of_turn> too.
CONFIGS = {"nano": NANO} | _PRETRAINED | _INSTRUCTION_TUNED
