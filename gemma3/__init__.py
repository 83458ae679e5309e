"""Gemma 3 in plain `jax.numpy`: text and images, sampling, LoRA, and nothing that knows about training.

Reading order: `config`, `params`, `layers`, `attention`, `transformer`, `vision`, `model`, then `mesh`, `lora`,
`filters`, `cache`, `sample`. `tokenizer` and `image` make what a model reads; `files/` reads and writes the disk.

Shapes are written with one alphabet everywhere:

    Q  distinct prompts in a step            G  completions per prompt
    P  padded prompt length                  C  padded completion length
    T  query positions (vision: patches)     S  key/value positions
    D  model width    F  MLP width           V  vocabulary    L  layers
    N  query heads    K  key/value heads     R  query heads per key/value head, N = K * R    H  head dim
    E  vision width   I  images, flattened    A  images per prompt    M  soft tokens per image
    h, w, c  pixel height, width, channels   B  rows of a plain batch            r  rank of an adapter
    n, e, f  vision heads, their head dim, vision MLP width                      p  numbers of an image's patch

One word means one thing, here and in the other packages:

    model            a config on a mesh of devices           params           a model's weights
    policy           params, with an adapter or without      adapter          a `Lora`, made of pairs (A, B)
    completion       what is sampled after a prompt          group            the G completions of one prompt
    index            a prompt's number in the stream         position         a token's place, from its prompt's start
    t                a token's place in its completion       row              an example with its prompt
    logps            log-probs of given tokens               token_weights    each token's weight in the loss
    reward           a completion's value, a sum of parts    advantage        a reward relative to its group
    step             one step of training                    update           one optimizer step; a step has one or more
    correct          the answer is the right one             score            only MathVista's official verdicts
"""

from gemma3.files.tokenizer_model import load_tokenizer
from gemma3.files.weights import load_checkpoint, save_checkpoint
from gemma3.image import load_image
from gemma3.lora import Policy
from gemma3.model import forward

__all__ = ["Policy", "forward", "load_checkpoint", "load_image", "load_tokenizer", "save_checkpoint"]
