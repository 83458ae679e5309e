"""Gemma 3 in plain `jax.numpy`: text and images, sampling, LoRA, and nothing that knows about training.

Reading order: `config`, `layers`, `attention`, `transformer`, `vision`, `model`, then `mesh`, `lora`, `sample`. Files
on disk are the business of `weights`, `adapter`, `tokenizer` and `image`, and of the small modules these rest on.

Shapes are written with one alphabet everywhere:

    Q  distinct prompts in a step            G  completions per prompt
    P  padded prompt length                  C  padded completion length
    T  query positions (vision: patches)     S  key/value positions
    D  model width    F  MLP width           V  vocabulary    L  layers
    N  query heads    K  key/value heads     R  query heads per key/value head, N = K * R    H  head dim
    E  vision width   I  images, flattened    A  images per prompt    M  soft tokens per image
    h, w, c  pixel height, width, channels   B  rows of a plain batch
"""

from gemma3.files.weights import load_checkpoint, save_checkpoint
from gemma3.image import load_image
from gemma3.model import forward
from gemma3.tokenizer import Tokenizer

__all__ = ["Tokenizer", "forward", "load_checkpoint", "load_image", "save_checkpoint"]
