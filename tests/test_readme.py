"""README.md and docs/: links lead somewhere, what is linked as a function is one, flags exist, the README is short."""

import re
from dataclasses import fields

import pytest
from test_floors import PROJECT

from grpo.run.settings import Settings
from grpo.use.eval_settings import EvalSettings

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
# Flags of other programs, and two that argparse has.
FOREIGN = {"--config", "--help", "--repeats", "--threads", "--python"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_what_it_names(page):
    links = re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", page.read_text("utf-8"))
    for text, target in links:
        if target.startswith("http"):
            continue
        path = page.parent / target
        assert path.exists(), f"{page.name} links to {target}"
        name = re.fullmatch(r"`(\w+)`", text)
        if name and path.suffix == ".py":
            assert re.search(rf"^(def|class) {name[1]}\b", path.read_text("utf-8"), re.MULTILINE), (text, target)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_is_one(page):
    known = {entry.name for settings in (Settings, EvalSettings) for entry in fields(settings)}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text("utf-8"))) - FOREIGN:
        assert flag[2:].removeprefix("no-").replace("-", "_") in known, f"{page.name}: {flag}"


def test_the_readme_is_one_page_and_its_tree_names_every_file_of_the_core():
    text = (PROJECT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 200
    tree = text[text.index("## The tree") : text.index("## How it was checked")]
    for folder in ("gemma3", "grpo"):
        for path in (PROJECT / folder).glob("*.py"):
            assert path.name == "__init__.py" or path.name in tree, path
