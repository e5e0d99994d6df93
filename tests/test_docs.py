"""What the pages name exists: paths, functions, modules, tests, links and their anchors, the rooms and their order."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

from launcher.cli import main as cli
from tests.support import ROOT
from tests.test_layering import ROOMS

PAGES = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
ARCHITECTURE = ROOT / "docs/architecture.md"
FOLDERS = "|".join((*ROOMS, "tests", "benchmarks", "configs", "docs", "slurm", "tools", r"\.github"))
PATH = re.compile(rf"((?:{FOLDERS})/[\w./*-]*)(?::([\w.]+))?")
MODULE = re.compile(rf"({'|'.join(ROOMS)})((?:\.\w+)+)")
KEYS = ("test_limit",)  # of the configuration, though named like tests
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def in_code(text: str) -> Iterator[str]:
    """What stands between single backticks."""
    return (match[1] for match in re.finditer(r"`([^`\n]+)`", prose(text)))


@cache
def defined(file: Path) -> frozenset[str]:
    """Names that a module defines: functions, classes, `Class.method`, constants and attributes at its top."""

    def names(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from names(node.body, f"{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))

    return frozenset(names(ast.parse(file.read_text(encoding="utf-8")).body, ""))


def module_exists(name: str) -> bool:
    """Whether a dotted name is a package, a module, or something that a module defines."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        path, rest = ROOT.joinpath(*parts[:cut]), ".".join(parts[cut:])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return not rest or rest in defined(file)
    return False


def slugs(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


def problems(page: Path, text: str) -> list[str]:
    """What a page names that is not there."""
    found = []
    for code in in_code(text):
        if match := PATH.fullmatch(code):
            path, name = match[1], match[2]
            files = list(ROOT.glob(path)) if "*" in path else [ROOT / path]
            if not files or not files[0].exists():
                found.append(f"{path}: no such path")
            elif name and name not in defined(files[0]):
                found.append(f"{path}: defines no {name}")
        elif MODULE.fullmatch(code) and not module_exists(code):
            found.append(f"{code}: no such module or name")
        elif re.fullmatch(r"test_\w+", code) and code not in KEYS and code not in known_tests():
            found.append(f"{code}: no such test")
    for target in LINK.findall(prose(text)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            found.append(f"{target}: links nowhere")
        elif anchor and anchor not in slugs(file.read_text(encoding="utf-8") if path else text):
            found.append(f"{target}: no such heading")
    return found


@cache
def known_tests() -> frozenset[str]:
    """The names of all tests, and of the modules that hold them."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    return frozenset().union(*(defined(file) for file in files), {file.stem for file in files})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    assert problems(page, page.read_text(encoding="utf-8")) == []


def test_what_does_not_exist_is_found() -> None:
    text = """
`mokd/gone.py` `mokd/training/trainer.py:Trainer.walk` `mokd.training.trainer.Gone` `test_of_nothing`
[one](gone.md) [two](slurm.md#nowhere) [three](#here)
"""
    assert problems(ARCHITECTURE, text) == [
        "mokd/gone.py: no such path",
        "mokd/training/trainer.py: defines no Trainer.walk",
        "mokd.training.trainer.Gone: no such module or name",
        "test_of_nothing: no such test",
        "gone.md: links nowhere",
        "slurm.md#nowhere: no such heading",
        "#here: no such heading",
    ]


def fenced_commands(text: str) -> Iterator[str]:
    """Every `mokd ...` and `make ...` in the fenced blocks, several of a line apart, without comments."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;|\|", re.split(r"(?:^|\s)#", line)[0]):
                words = part.removeprefix(" do").split()
                if words[:1] in (["mokd"], ["make"]):
                    yield " ".join(words)


def commands(text: str) -> Iterator[list[str]]:
    """The words of every `mokd ...` among them."""
    return (shlex.split(command)[1:] for command in fenced_commands(text) if command.startswith("mokd "))


def mentioned(text: str) -> Iterator[list[str]]:
    """The words of every `mokd ...` within a sentence or a table, of alternatives the first, numbers for `N`."""
    for code in in_code(text):
        plain = re.sub(r"\[[^\]]*\]", "", re.sub(r"(\w)\|[\w|]+", r"\1", code))
        words = shlex.split(re.sub(r"\bN$|\bN ", "1 ", plain)) if code.startswith("mokd ") else []
        if words[1:] and "..." not in words and not words[1].startswith("--"):
            yield words[1:]


def parse(words: list[str]) -> None:
    """Raises what the command line raises for options and arguments that a command does not have; runs nothing."""
    at = typer.main.get_command(cli.app)
    context = at.context_class(at, info_name="mokd")
    while words and hasattr(at, "get_command") and not words[0].startswith("-"):
        found = at.get_command(context, words[0])
        assert found is not None, f"no command {words[0]}"
        at, context, words = found, at.context_class(found, parent=context, info_name=words[0]), words[1:]
    at.parse_args(context, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_and_arguments_that_a_page_gives_them(page: Path) -> None:
    """As the command line parses them; what the commands do is tested where they are."""
    for words in commands(page.read_text(encoding="utf-8")):
        parse(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences_exist_with_their_options(page: Path) -> None:
    """Their arguments may be left out there."""
    for words in mentioned(page.read_text(encoding="utf-8")):
        try:
            parse(words)
        except Exception as error:
            if not re.match(r"Missing (parameter|command)|Option '[\w-]+' requires", str(error)):
                pytest.fail(f"mokd {' '.join(words)}: {error}")


def test_a_wrong_command_in_a_sentence_is_found() -> None:
    assert [*mentioned("`mokd train|launch C [key=value ...] --solo B`, `mokdir`")] == [["train", "C", "--solo", "B"]]
    with pytest.raises(Exception, match="No such option: --npoc"):
        parse(["train", "--npoc", "2"])


def test_a_wrong_command_on_a_page_is_found() -> None:
    text = "```\nmokd train a.yaml --nproc 2 # two\n  mokd eval RUN && mokd x\nmokdir\n```\nmokd y\n"
    assert list(commands(text)) == [["train", "a.yaml", "--nproc", "2"], ["eval", "RUN"], ["x"]]
    with pytest.raises(Exception, match="No such option: --npoc"):
        parse(["train", "a.yaml", "--npoc", "2"])
    with pytest.raises(Exception, match="Missing parameter: config"):
        parse(["train"])
    with pytest.raises(AssertionError, match="no command trian"):
        parse(["trian"])


@pytest.mark.parametrize("package", ROOMS)
def test_the_rooms_stand_in_their_order(package: str) -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    table = re.search(rf"^### `{package}/`\n(.*?)(?=^#)", text, flags=re.MULTILINE | re.DOTALL)
    picture = (ROOT / "docs" / "images" / "rooms.svg").read_text(encoding="utf-8")
    drawn = re.search(rf'<g id="{package}">(.*?)</g>', picture, flags=re.DOTALL)
    assert table is not None
    assert drawn is not None
    assert tuple(re.findall(r"^\| `([\w.]+)` \|", table[1], flags=re.MULTILINE)) == ROOMS[package]
    assert tuple(re.findall(r'class="room".*>([a-z_.]+)<', drawn[1])) == ROOMS[package]


def test_the_site_shows_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = re.findall(r"[\w-]+\.md", text[text.index("\nnav:") :])
    assert sorted(nav) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
