"""Small stand-ins for what a model directory holds, shared by tests: a real `tokenizer.model` of a few hundred pieces.

It is trained by sentencepiece with the settings of Gemma's: BPE, byte fallback, no dummy prefix, no normalisation.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

NEWLINE_RUNS = tuple("\n" * n for n in range(1, 9))
SPACE_RUNS = ("▁▁", "▁▁▁▁", "▁▁▁")
# The layout of gemma3.config.NANO: <end_of_turn> is 5, the image tokens are 6, 7, 8.
NANO_SYMBOLS = (
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<image_soft_token>",
    "<end_of_image>",
    *NEWLINE_RUNS,
    *SPACE_RUNS,
)

CORPUS = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "How many clips did Natalia sell altogether in April and May? Natalia sold 48 / 2 = 24 clips in May.",
    "user asks a question about the image; the model answers the question with a number.",
    "Here is the original image and here are some crops to help you see better.",
    "What is the value of the smallest bar? Choices: (A) 3.5 (B) 7 (C) 10 (D) None of the above.",
    "<reasoning> Two sides of the figure are equal, so the other angle is 45. </reasoning> <answer>45</answer>",
    "def add(x, y):\n    return x + y  # the sum\n\n\nprint(add(1, 2))",
    "Está bien: el número es 12, ¿no? Größe, façade, naïve.",
    "The system is told to be brief. Hello, hi, thank you! \"Quotes\" & 'marks' 100% [ok] {x} <b>bold</b>",
)


def write_tokenizer(
    directory: Path, *, vocab_size: int = 448, symbols: Sequence[str] = NANO_SYMBOLS, texts: Sequence[str] = CORPUS
) -> dict[str, int]:
    """Write `directory`/tokenizer.model and return the id of each piece.

    Ids: <pad> 0, <eos> 1, <bos> 2, <unk> 3, then `symbols` in order from 4, the 256 bytes, merges, single characters.
    `vocab_size` is the number of pieces; sentencepiece refuses one that `texts` cannot fill.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
        **{"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>"},
        user_defined_symbols=list(symbols),
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        character_coverage=1.0,
        minloglevel=2,
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
