"""What a Gemma model is made of. The published sizes are in `files/published`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP encoder (So400m/14 in every published Gemma 3) and how many soft tokens an image becomes."""

    hidden_size: int = 1152  # E
    intermediate_size: int = 4304
    num_layers: int = 27
    num_heads: int = 16
    image_size: int = 896  # pixels a side: images are squashed to a square
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
    image_token_id: int | None = None  # stands for one soft token
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
