"""Reads the tokenizer of a model directory, and checks it against the directory's config."""

from pathlib import Path

from sentencepiece import SentencePieceProcessor

from gemma3.config import Config
from gemma3.tokenizer import Tokenizer


def load_tokenizer(directory: Path | str, config: Config) -> Tokenizer:
    """Read `directory`/tokenizer.model; ValueError if it is missing or damaged, or does not fit `config`."""
    path = Path(directory) / "tokenizer.model"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: a Gemma model directory holds its sentencepiece model in that file")
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
    for piece in ("<start_of_turn>", "<end_of_turn>"):
        if pieces.piece_to_id(piece) == pieces.unk_id():
            raise ValueError(f"{path} has no piece {piece}: it is not the tokenizer of a Gemma 2 or Gemma 3 model")
    _check_ids(pieces, config, path)
    return Tokenizer(pieces, config)


def _check_ids(pieces: SentencePieceProcessor, config: Config, path: Path) -> None:
    """ValueError if the config and the tokenizer give special tokens different ids: one belongs to another model."""
    size = pieces.get_piece_size()
    if size > config.vocab_size:
        raise ValueError(f"{path} has {size} pieces, more than the config's vocab_size {config.vocab_size}")
    names = {
        "pad_id": "<pad>",
        "bos_id": "<bos>",
        "start_of_image_id": "<start_of_image>",
        "image_token_id": "<image_soft_token>",
        "end_of_image_id": "<end_of_image>",
    }
    for field, name in names.items():
        token_id = getattr(config, field)
        if token_id is None:
            continue
        if not 0 <= token_id < config.vocab_size:
            raise ValueError(f"the config's {field} {token_id} is outside its vocab_size {config.vocab_size}")
        # The published tokenizer.model ends before the image soft token, a row that only the checkpoint has.
        if token_id >= size and field == "image_token_id":
            continue
        found = pieces.id_to_piece(token_id) if token_id < size else "nothing"
        if found != name:
            raise ValueError(f"the config's {field} {token_id} should be {name}, but {path} has {found!r} there")
    ends = {pieces.eos_id(): "<eos>", pieces.piece_to_id("<end_of_turn>"): "<end_of_turn>"}
    for token_id in config.stop_ids:
        if token_id not in ends:
            raise ValueError(f"the config's stop id {token_id} is neither <eos> nor <end_of_turn> ({ends}) in {path}")
