"""The README and docs/: their code runs, their links lead somewhere, and no block is left out."""

import re
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
from checkpoints import BASE, CONVERTED

import lsg_attn
import lsg_attn.bart
from lsg_attn.cli.main import main
from lsg_attn.models.families import FAMILIES

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
# tiny checkpoints for the published ones, and few tokens for the demos
STAND_INS = {
    "ccdv/lsg-bart-large-4096": str(CONVERTED),
    "facebook/bart-base": str(BASE),
    "sentence-transformers/all-MiniLM-L6-v2": str(BASE),
    "--tokens 8192": "--tokens 600",
}
TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 60
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)


def each_page(name="page", pages=PAGES):
    return pytest.mark.parametrize(name, pages, ids=[str(page.relative_to(ROOT)) for page in pages])


def blocks(page):
    """The (language, code) of a page's fenced blocks, in order."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def with_stand_ins(code):
    for name, stand_in in STAND_INS.items():
        code = code.replace(name, stand_in)
    return code


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with the documents that the pages read."""
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@each_page()
def test_every_block_is_of_a_known_language(page):
    """What cannot run is marked as text; a fence that is indented or longer would not be found."""
    languages = [language for language, _ in blocks(page)]
    assert set(languages) <= {"python", "sh", "text"}
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(languages)


PYTHON = [page for page in PAGES if any(language == "python" for language, _ in blocks(page))]


def run_python(page):
    """Execute the Python blocks of a page in order; the names that they leave, and how many blocks ran."""
    names, count = {"__name__": "__main__"}, 0
    for language, code in blocks(page):
        if language == "python":
            exec(compile(with_stand_ins(code), f"{page.name}, Python block {count + 1}", "exec"), names)
            count += 1
    return names, count


@each_page(pages=PYTHON)
def test_python_blocks_run(page, folder):
    _, count = run_python(page)
    assert count == page.read_text(encoding="utf-8").count("```python\n")


def test_readme_gives_what_its_comments_say(folder):
    names, count = run_python(README)
    assert count == 2
    assert type(names["model"]) is lsg_attn.bart.LSGBartForConditionalGeneration
    assert len(names["ids"][0]) > 1
    assert names["out"].shape == (2, 4001, 768)
    assert names["layer"].q_proj.weight.grad.abs().sum() > 0


def test_models_page_gives_what_it_says(folder):
    names, count = run_python(DOCS / "models.md")
    assert count == 5
    assert len(names["ids"][0]) > 1
    assert names["tokenizer"].model_max_length == names["model"].config.max_position_embeddings == 16384
    assert names["model"].config.num_global_tokens == 16


def commands(page):
    """The commands of a page's shell blocks, as lists of words."""
    for language, code in blocks(page):
        if language == "sh":
            for line in code.splitlines():
                if words := shlex.split(with_stand_ins(line), comments=True):
                    yield words


def check(words, capsys):
    """Run a command of ours that is cheap; of another, check that what it names is there."""
    program, *arguments = words
    if program == "lsg-attn":
        main(arguments)
    elif program == "make":
        (target,) = arguments
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif program == "pip":
        extra = re.fullmatch(r"install \.(?:\[(\w+)\])?", " ".join(arguments)).group(1)
        assert extra is None or f'"{extra}": [' in (ROOT / "setup.py").read_text(encoding="utf-8")
    elif program == "python":
        check_python(arguments, capsys)
    elif program == "torchrun":
        option, count, *arguments = arguments
        assert option == "--nproc-per-node"
        assert count.isdigit()
        check_python(arguments, capsys)
    else:
        assert words == [".ci/run"], f"no check for {shlex.join(words)}"
        assert (ROOT / ".ci/run").exists()


def check_python(arguments, capsys):
    """The paths that pytest is given exist; other programs know their options."""
    is_module = arguments[0] == "-m"
    program, *arguments = arguments[is_module:]
    if program in ("pytest", "ttsem.sanitize"):
        paths = [ROOT / word for word in arguments if word != "pytest"]
        assert paths
        assert all(path.exists() for path in paths)
    else:
        options = [word for word in arguments if word.startswith("--")]
        usage = help_of(program, is_module, capsys)
        assert all(option in usage for option in options)


def help_of(program, is_module, capsys):
    """What a program prints for --help."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, "--help"])
        patch.syspath_prepend(str((ROOT / program).parent))  # as Python does for a program
        if not hasattr(sys.modules.get(program), "__path__"):  # a package would be imported anew, without its modules
            patch.delitem(sys.modules, program, raising=False)  # runpy warns of a module that was imported before
        run = partial(runpy.run_module, program) if is_module else partial(runpy.run_path, str(ROOT / program))
        with pytest.raises(SystemExit) as stop:
            run(run_name="__main__")
    assert stop.value.code == 0
    return capsys.readouterr().out


@each_page(pages=[page for page in PAGES if any(commands(page))])
def test_commands_of_shell_blocks(page, folder, capsys):
    every = list(commands(page))
    shell = "".join(code for language, code in blocks(page) if language == "sh")
    assert len(every) == len([line for line in shell.splitlines() if line and not line.startswith("#")])
    for words in every:
        check(words, capsys)


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


def test_readme_and_pattern_page_describe_types_alike():
    rows = [
        re.findall(r"^\| `(\w+)` \|(.*)$", page.read_text(), re.MULTILINE) for page in (README, DOCS / "pattern.md")
    ]
    readme, page = ([row for row in each if row[0] in lsg_attn.SPARSITY_TYPES] for each in rows)
    assert [name for name, _ in readme] == list(lsg_attn.SPARSITY_TYPES)
    assert readme == page


def prose(page):
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@each_page(pages=[*PAGES, ROOT / "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    """A link of a page of the site stays within the site."""
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not link.startswith("https://")]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
        assert page.parent != DOCS or target.is_relative_to(DOCS), link


@each_page(pages=[*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "kernels/README.md"])
def test_files_that_are_named_exist(page):
    """All but the one that must not."""
    folders = r"lsg_attn|kernels|bench|tests|docs|examples|\.ci"
    for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", prose(page)):
        assert (ROOT / name).exists() == (name != "kernels/__init__.py"), name


def test_site_has_every_page():
    nav = re.findall(r"^  - .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(nav) == [page.name for page in PAGES if page.parent == DOCS]


def test_api_has_every_public_name():
    """The API page has what is written here, the page of models each class that is made of transformers' own."""
    listed = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    functions = [f"lsg_attn.models.{name}" for name in lsg_attn.models.__all__ if name.islower()]
    public = [*(f"lsg_attn.{name}" for name in lsg_attn.__all__), *functions]
    assert sorted(public) == sorted(name for name in listed if name in public)
    rows = re.findall(r"^\| ([\w, -]+) \| (.*`.*) \|", (DOCS / "models.md").read_text(encoding="utf-8"), re.MULTILINE)
    described = {title: cells for titles, cells in rows for title in titles.split(", ")}
    named = set()
    for family in FAMILIES:
        cells = described[family.title]
        for other in (title for title in described if f"as {title}" in cells):
            cells += described[other]
        for cls in family.models:
            suffix = cls.__name__.removeprefix(family.config_class.__name__.removesuffix("Config"))
            assert f"`{suffix}`" in cells, cls
            named.add(cls.__name__)
        named.add(family.config_class.__name__)
    assert named == {name for name in lsg_attn.models.__all__ if not name.islower()}
