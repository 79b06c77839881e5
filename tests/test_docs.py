"""README and docs/: links lead somewhere, commands exist, and the reference of config keys is today's."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from typer.main import get_command

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the site give to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return set(plain)


@pytest.mark.parametrize("name", NAMES)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(name: str):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = page if not file else page.parent / file
        assert found.exists(), f"{name}: {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{name}: {target}"


def test_every_page_of_docs_is_in_the_index_of_the_site():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = [
        line
        for toc in re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL)
        for line in toc.splitlines()
        if line and not line.startswith(":")
    ]
    assert sorted(listed) == sorted(page.stem for page in ROOT.glob("docs/*.md") if page.stem != "index")


@cache
def commands():
    """The subcommands of `exprl` by name."""
    from exprl_megatron.cli import app

    return get_command(app).commands


def exprl_commands(text: str) -> list[list[str]]:
    """The words after `exprl` in code: of each line of a block, with its continuations, and of each inline span."""
    whole = text.replace("\\\n", " ")
    lines = re.findall(r"^(?: {4,}|[ \t]*\$ )(?:\S*/)?exprl (.*)$", whole, re.MULTILINE)
    spans = re.findall(r"`(?:\S*/)?exprl ([^`]+)`", " ".join(whole.split()))
    return [line.split("#")[0].split() for line in [*lines, *spans]]


@pytest.mark.parametrize("name", NAMES)
def test_every_exprl_command_of_a_page_has_that_subcommand_and_those_options(name: str):
    for words in exprl_commands((ROOT / name).read_text(encoding="utf-8")):
        command = words[0].strip(".,;:")
        if command.startswith("-"):
            continue
        assert command in commands(), f"{name}: exprl {' '.join(words)}"
        known = {option for parameter in commands()[command].params for option in parameter.opts} | {"--help"}
        used = {word.strip("[].,;:)").split("=")[0] for word in words[1:] if word.strip("[").startswith("--")}
        assert used <= known, f"{name}: exprl {' '.join(words)} has no {', '.join(sorted(used - known))}"


@pytest.mark.parametrize("name", NAMES)
def test_every_file_and_target_that_a_page_names_exists(name: str):
    text = (ROOT / name).read_text(encoding="utf-8")
    made = re.findall(r"\bmake ([a-z][\w-]*)`", text) + re.findall(r"^ {4,}make ([a-z][\w-]*)", text, re.MULTILINE)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(made) <= targets
    for path in re.findall(r"(?:tools|recipes/configs|tests)/[\w./-]+\.(?:py|ya?ml|sh)\b", text):
        assert (ROOT / path).is_file(), f"{name}: {path}"


def test_the_reference_of_config_keys_is_what_the_classes_say():
    import make_reference

    assert make_reference.PAGE.read_text(encoding="utf-8") == make_reference.page(), "run `make reference`"


def test_the_reference_has_every_key_of_a_resolved_config():
    import make_reference
    import yaml

    from exprl_megatron.config.load import load_config

    config = load_config(ROOT / "recipes" / "configs" / "demo.yaml", []).model_dump(mode="json")
    listed = set(re.findall(r"^\| `(\w+)` \|", make_reference.PAGE.read_text(encoding="utf-8"), re.MULTILINE))

    def keys(value: object) -> set[str]:
        if isinstance(value, dict):
            return set(value) | {key for below in value.values() for key in keys(below)}
        return {key for below in value for key in keys(below)} if isinstance(value, list) else set()

    free = {"template_args"}
    assert keys(yaml.safe_load(yaml.safe_dump(config))) - free <= listed


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-W", "--keep-going", ROOT / "docs", tmp_path / "html"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "index.html").is_file()
