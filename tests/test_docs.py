"""The pages: what they link to, name and tell to type is there; README and glossary are short."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS]
PUBLIC = json.loads((ROOT / "tests" / "public.json").read_text())
COMMANDS = {"infer.py": "infer.py", "train.py": "train.py", "-m convert": "convert"}
COMMANDS |= {"qwen3vl train": "train.py", "qwen3vl convert": "convert"}
COMMANDS |= {f"qwen3vl {name}": "infer.py" for name in ("ask", "chat", "batch", "plan")}
COMMANDS |= {name: name for name in ("qwen3vl score", "qwen3vl serve")}
FOLDERS = "qwen3vl_jax|convert|configs|demo|benchmarks|tests|docs|examples"
OPTION = r"(?<![\w-])--[a-z][a-z-]*"
MOST_LINES = {"README.md": 130, "glossary.md": 60}
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path) -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def code(page: Path) -> list[str]:
    """All that a page shows as code: lines of blocks, continued lines joined, and inline code."""
    lines = "".join(blocks(page)).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [*lines, *(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))]


def command_of(text: str) -> tuple[str, set[str]]:
    """A command of ours in a piece of code, from its name on, and its options; ("", none) without."""
    if re.match(r"--[a-z]", text):
        return text, set().union(*PUBLIC["options"].values())
    for start, name in COMMANDS.items():
        if f"python {start}" in text or text.startswith(start):
            # The options of `score` that are not its own are those of infer.py.
            names = (name, "infer.py") if name == "qwen3vl score" else (name,)
            return text[text.index(start) :], {x for n in names for x in PUBLIC["options"][n]}
    if found := re.search(r"-m ((?:benchmarks|demo)\.\w+)", text):
        source = (ROOT / found[1].replace(".", "/")).with_suffix(".py").read_text()
        return text[found.start() :], set(re.findall(OPTION, source))
    return "", set()


@by_page
def test_links_and_paths_exist(page):
    """Relative links, and paths of our folders wherever they are named."""
    text = page.read_text()
    links = re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", text)
    wrong = [link for pair in links for link in pair if link and "://" not in link]
    wrong = [link for link in wrong if not (page.parent / link).exists()]
    named = re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]*[\w/])", text)
    wrong += [path for path in named if not (ROOT / path).exists()]
    assert not wrong


def test_files_named_in_sources_exist():
    """A docstring or comment that names a file of ours names one that is there, by the end of its path."""
    sources = [path for folder in FOLDERS.split("|") for path in (ROOT / folder).rglob("*.py")]
    sources += ROOT.glob("*.py")
    ours = {"/" + str(path.relative_to(ROOT)) for path in [*sources, *PAGES]}
    wrong = [
        (path.name, name)
        for path in sources
        for name in re.findall(r"(?<![\w/.{}])([a-z][\w/]*\.(?:py|md))\b", path.read_text())
        if not any(each.endswith("/" + name) for each in ours)
    ]
    assert not wrong


@by_page
def test_modules_and_public_names_exist(page):
    """Dotted names in code: modules, what is in them, and names of q3."""
    wrong = []
    for name in re.findall(r"\b(?:qwen3vl_jax|benchmarks|demo)(?:\.\w+)+", "\n".join(code(page))):
        parts = name.split(".")
        path = ROOT / Path(*parts)
        if name.endswith((".py", ".toml")) or path.is_dir() or path.with_suffix(".py").exists():
            continue
        try:
            module = importlib.import_module(".".join(parts[:-1]))
            getattr(module, parts[-1])
        except (ImportError, AttributeError):
            wrong.append(name)
    names = set(re.findall(r"\bq3\.(\w+)", page.read_text())) - {"NAME"}
    assert not wrong and names <= PUBLIC["signatures"].keys()


@by_page
def test_options_are_options(page):
    """Of the command that they are shown with; alone, of any of the three."""
    wrong = []
    for text in code(page):
        command, allowed = command_of(text.split(" #")[0])
        wrong += [(text, each) for each in re.findall(OPTION, command) if each not in allowed]
    assert not wrong


@by_page
def test_recipe_keys_are_keys(page):
    """table.key in code, as a command line has it."""
    recipe = PUBLIC["recipe"]
    tables = "|".join(name for name, value in recipe.items() if isinstance(value, dict))
    found = re.findall(rf"(?<![\w./:])({tables})\.([a-z]\w*)", "\n".join(code(page)))
    files = {"py", "toml", "jsonl", "csv"}
    assert not [(t, key) for t, key in found if key not in files and key not in recipe[t]]


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_pages_begin_with_a_command_and_end_with_links(page):
    """A title, a block to type, and where to go from there."""
    lines = page.read_text().splitlines()
    assert lines[0].startswith("# ") and lines[1:3] == ["", "```"]
    assert page.name == "glossary.md" or lines[-1].startswith("Next: [")


@pytest.mark.parametrize("page", [p for p in PAGES if p.name in MOST_LINES], ids=lambda p: p.name)
def test_short_pages_stay_short(page):
    """README is read whole, and the glossary is a page."""
    assert len(page.read_text().splitlines()) <= MOST_LINES[page.name]


def test_readme_has_the_two_commands():
    """What users and .ci/run type: the demo, then the tests; the demo's blocks are its own output."""
    first, answer, second = blocks(ROOT / "README.md")[:3]
    assert first == "pip install -e . && python infer.py\n"
    assert second == "pip install -e '.[test]' && pytest\n"
    assert re.fullmatch(r"(\d( \d)*\n)+", answer)


def test_every_page_is_reached_from_the_readme():
    """No page is lost."""
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in DOCS if f"docs/{page.name}" not in text] == []
