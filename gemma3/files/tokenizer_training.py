"""Makes a small tokenizer of Gemma's kind, and the files that Hugging Face needs to load a new model's directory.

Rests on sentencepiece. Needed once, when a model such as nano is made from nothing; published models bring these files.
"""

import io
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from gemma3.files.hub import files_beside_weights

# Ids 0 to 3, as Gemma has them.
PAD, EOS, BOS, UNK = SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
# From id 4, in this order. A prompt has runs of up to four newlines: around an image, after a system message.
CONTROL = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<image_soft_token>", "<end_of_image>")
NEWLINE_RUNS = tuple("\n" * length for length in (1, 2, 3, 4))


def train_tokenizer(texts: Iterable[str], directory: Path | str, vocab_size: int) -> None:
    """Learn byte-pair pieces from `texts` and write `directory`/tokenizer.model: the same file for the same texts.

    Ids: pad 0, eos 1, bos 2, unk 3, then CONTROL, NEWLINE_RUNS, 256 bytes, the pieces in the order of their merges,
    single characters. As in Gemma's tokenizer, every digit is a piece of its own, text without a piece is spelled in
    bytes, and spaces are kept as they are. ValueError if `texts` are too few or too many for `vocab_size`.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
            **{"pad_piece": PAD, "eos_piece": EOS, "bos_piece": BOS, "unk_piece": UNK},
            user_defined_symbols=[*CONTROL, *NEWLINE_RUNS],
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocab_size} pieces can be made of these texts: {error}") from error
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model.getvalue())


def _merges(pieces: sentencepiece.SentencePieceProcessor) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, in the order of the joined pieces' ids: that is the merge order."""
    whole = {*SPECIAL, *CONTROL, *NEWLINE_RUNS}  # these are found in the text first and never merged
    names = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size()) if not pieces.is_byte(i)]
    joined = {name for name in names if name not in whole}
    halves = ((name[:i], name[i:]) for name in names if name in joined for i in range(1, len(name)))
    return [pair for pair in halves if joined.issuperset(pair)]


def write_hugging_face_files(directory: Path | str) -> None:
    """Write the files that AutoTokenizer and AutoProcessor read, beside the tokenizer.model of `train_tokenizer`.

    They are nano's files, with the pieces of this tokenizer in place of nano's.
    """
    directory = Path(directory)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    for path in files_beside_weights("nano"):
        if path.name != "tokenizer.model":
            shutil.copy(path, directory)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"] = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    content["model"]["merges"] = _merges(pieces)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
