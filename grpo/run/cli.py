"""A command line made from a frozen dataclass: a flag per field, defaults from a TOML file, bad input in one sentence.

Built on argparse, which prints the help. It imports nothing else of the project.
"""

import argparse
import difflib
import math
import shutil
import sys
import tomllib
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

Settings = TypeVar("Settings")

_PROJECT = Path(__file__).resolve().parents[2]

# For each type that a field may have: how --help writes a value, and how an error says what was expected.
_METAVARS = {int: "N", float: "X", str: "NAME", Path: "PATH", tuple: "A,B"}
_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    tuple: "names separated by commas",
}


def flag(default, help: str, choices: Sequence[str] | None = None, *, topic: str = "", least: float | None = None):
    """A field of a settings dataclass: its default, its line in --help, its choices, the topic in --help that begins
    with it, and the least that a number may be.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "topic": topic, "least": least})


def topics(settings_class: type) -> Iterator[tuple[str, Field]]:
    """Each field with its topic."""
    topic = ""
    for entry in fields(settings_class):
        topic = entry.metadata["topic"] or topic
        yield topic, entry


def fail(message: str) -> NoReturn:
    """End the program because of bad input: print the sentence on stderr, exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _says_what_is_wrong(error: Exception) -> bool:
    """Whether `error` comes from a `raise` statement of this project: its words are then meant for the user."""
    raised = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(raised.filename).resolve()
    ours = path.is_relative_to(_PROJECT) and "site-packages" not in path.parts
    return ours and raised.line.startswith("raise")


@contextmanager
def clean_errors() -> Iterator[None]:
    """Around main(): a ValueError or RuntimeError raised by the project ends the program by `fail`.

    The project refuses bad input by a ValueError; its RuntimeError means, for example, a failed download. Every other
    error keeps its traceback, since it is a bug: also one raised by a library or by a user's own reward.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if not _says_what_is_wrong(error):
            raise
        fail(str(error))


def _kind(annotation: Any) -> tuple[type, bool]:
    """The type of a field, and whether it may be None: `tuple[str, ...] | None` gives (tuple, True)."""
    options = get_args(annotation)
    optional = NoneType in options
    if optional:
        (annotation,) = set(options) - {NoneType}
    return get_origin(annotation) or annotation, optional


def _from_text(text: str, kind: type) -> Any:
    if kind is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return kind(text)


def _from_toml(value: Any, kind: type) -> Any:
    """A TOML value as the field's type; a number must be a number in TOML, not text as it is in a flag."""
    accepted = {float: (int, float), Path: str, tuple: (str, list)}.get(kind, kind)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError
    if isinstance(value, str):
        return _from_text(value, kind)
    if kind is tuple and not all(isinstance(part, str) for part in value):
        raise ValueError
    return kind(value)


def _near(name: str, names: Iterable[str]) -> str:
    """The end of a sentence that suggests which of `names` was meant."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _convert(raw: Any, kind: type, optional: bool, choices: Sequence[str] | None, where: str, convert) -> Any:
    """`raw` as the field's type; ValueError naming `where` it stood, its value and what was expected."""
    if optional and raw == "none":
        return None
    try:
        value = convert(raw, kind)
    except ValueError:
        expected = _EXPECTED[kind] + (" or none" if optional else "")
        raise ValueError(f"{where} is {raw!r}, and must be {expected}") from None
    for part in value if kind is tuple else (value,):
        if choices and part not in choices:
            raise ValueError(f"{where} is {part!r}, and must be one of {', '.join(choices)}{_near(str(part), choices)}")
    return value


def check_least(settings: Any) -> None:
    """Raise ValueError for a number that is infinite or below the least that its `flag` allows."""
    for entry in fields(settings):
        least, value = entry.metadata["least"], getattr(settings, entry.name)
        if None not in (least, value) and not least <= value < math.inf:
            finite = "finite and " if isinstance(value, float) else ""
            raise ValueError(f"{flag_name(entry.name)} {value}: it must be {finite}at least {least}")


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(default: Any) -> str:
    """A default as a user would type it; nothing for None, which the help text explains."""
    if default is None or default == "" or default == ():
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return ",".join(default)
    return f"{default:g}".replace("e-0", "e-") if isinstance(default, float) else str(default)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument ").replace(": expected one argument", " needs a value"))


def _make_parser(settings_class: type, kinds: dict[str, tuple[type, bool]], prog: str, description: str) -> _Parser:
    columns = min(110, shutil.get_terminal_size().columns)
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [flags]",
        description=description,
        add_help=False,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=columns),
    )
    groups = {}
    for topic, entry in topics(settings_class):
        choices, kind = entry.metadata["choices"], kinds[entry.name][0]
        if topic not in groups:
            groups[topic] = parser.add_argument_group(topic)
        text = entry.metadata["help"]
        text += f" [{', '.join(choices)}]" if choices else ""
        text += f" (default {shown})" if (shown := _shown(entry.default)) else ""
        action = {"action": argparse.BooleanOptionalAction} if kind is bool else {"metavar": _METAVARS[kind]}
        groups[topic].add_argument(
            flag_name(entry.name), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **action
        )
    other = parser.add_argument_group("Other")
    other.add_argument("--config", dest="--config", metavar="FILE", help="TOML file of defaults; flags override it")
    other.add_argument("-h", "--help", action="help", help="show this and exit")
    return parser


def _read_toml(path: str) -> dict[str, Any]:
    try:
        return {key.replace("-", "_"): value for key, value in tomllib.loads(Path(path).read_text("utf-8")).items()}
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--config {path} is not valid TOML: {error}") from error


def _refuse_unknown(words: Sequence[str], names: Sequence[str], prog: str) -> None:
    """Raise ValueError if there are words that argparse could not place."""
    unknown = next((word for word in words if word.startswith("-")), None)
    if unknown is not None:
        typed = unknown.split("=")[0].replace("_", "-")
        raise ValueError(f"{prog} has no flag {unknown.split('=')[0]}{_near(typed, names) or '; --help lists them'}")
    if words:
        raise ValueError(f"{words[0]!r} belongs to no flag; every value follows a --flag, as --help shows")


def _parse(settings_class, argv: Sequence[str] | None, prog: str, description: str, base: Settings | None) -> Settings:
    hints = get_type_hints(settings_class)
    kinds = {entry.name: _kind(hints[entry.name]) for entry in fields(settings_class)}
    choices = {entry.name: entry.metadata["choices"] for entry in fields(settings_class)}
    parser = _make_parser(settings_class, kinds, prog, description)
    known, unknown = parser.parse_known_args(argv)
    given = vars(known)
    path = given.pop("--config")
    negations = ["--no-" + flag_name(name)[2:] for name, (kind, _) in kinds.items() if kind is bool]
    _refuse_unknown(unknown, [*map(flag_name, kinds), *negations, "--config", "--help"], prog)
    values = {}
    for name, raw in (_read_toml(path) if path else {}).items():
        if name not in kinds:
            raise ValueError(f"{path} has the unknown key {name}{_near(name, kinds)}")
        values[name] = _convert(raw, *kinds[name], choices[name], f"{name} in {path}", _from_toml)
    for name, raw in given.items():
        convert = _from_text if isinstance(raw, str) else _from_toml
        values[name] = _convert(raw, *kinds[name], choices[name], flag_name(name), convert)
    return replace(base, **values) if base else settings_class(**values)


def parse(
    settings_class: type[Settings],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    base: Settings | None = None,
) -> Settings:
    """Read the command line into an instance of a frozen dataclass whose fields were made by `flag`.

    `lora_r: int` becomes --lora-r N; a bool becomes --name and --no-name; commas separate a tuple[str, ...]; "none"
    stands for None where a field may be None. --config FILE reads defaults from a flat TOML file, which flags override.
    A field that is not given is as in `base`, or else its default. --help prints the flags by topic and exits with 0.
    Bad input ends the program by `fail`, and so does a ValueError of the dataclass.
    """
    try:
        return _parse(settings_class, argv, prog, description, base)
    except ValueError as error:
        fail(str(error))
