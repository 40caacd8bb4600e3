"""The pages: their code runs, their command lines are valid, and what they name exists."""

import argparse
import contextlib
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

import score_sde
from score_sde import cli
from score_sde.config import default_config
from score_sde.machine import parallel
from score_sde.moved import MOVED
from score_sde.tasks.options import MODES
from tests import ROOT
from tests.rooms import BEGIN, END, PACKAGE, files, picture

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "configs" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TEXT = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
SUFFIXES = {"md", "py", "png", "json", "jsonl", "npz", "npy", "txt", "safetensors", "pth", "wav", "cfg", "toml", "zip"}
FOREIGN = {"torch", "numpy", "scipy", "sklearn", "matplotlib", "diffusers", "ml_collections", "section"}
FOLDERS = ("configs", "score_sde", "benchmarks", "studies", "docs", "examples", "tests")
TRAINED = {  # what the pages' code and commands read: small networks, by two steps of training
    "runs/vp_digits": ["model.nf=8", "model.ch_mult=1", "model.num_res_blocks=1", "model.attn_resolutions="],
    "runs/autoencoder_digits32": ["model.nf=8"],
    "runs/latent_digits32": ["model.nf=8", "model.ch_mult=1,1", "model.num_res_blocks=1"],
}
PIPELINE = "ddpm-cifar10-32"  # of diffusers
FEWER = {  # points, images and steps in blocks that take many
    "(1000, 2)": "(60, 2)", "expand(1000,": "expand(60,", "n=1000": "n=100", "(512, 0)": "(256, 0)",
    "times.log_snr(model.sde, 100)": "times.log_snr(model.sde, 20)", "(16, 1, 8, 8)": "(2, 1, 8, 8)",
}  # fmt: skip
SLOW = ("runs/latent_digits32", PIPELINE, "100_000")  # in blocks that train much, import much or draw much


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder as a reader of the pages has it: a checkout, and beside it what `make demo` trains."""
    where = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "docs", "main.py", "Makefile"):
        (where / name).symlink_to(ROOT / name)
    (own,) = (block for block in python_code(TEXT["configs/README.md"]) if "class Net" in block)
    (where / "mine.py").write_text(own)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        train("runs/vp_digits")
        yield where


def provide(code: str) -> None:
    """Train or make what the code reads."""
    for workdir in TRAINED:
        if workdir in code:
            train(workdir)
    if PIPELINE in code:
        import diffusers

        channels = {"block_out_channels": (8, 8), "norm_num_groups": 4}
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        network = diffusers.UNet2DModel(sample_size=8, layers_per_block=1, **channels, **blocks)
        diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(PIPELINE)


def train(workdir: str) -> None:
    """Two steps of the config that has the workdir's name, unless it is trained already."""
    quick = ["training.n_iters=2", "training.batch_size=8", "training.snapshot_sampling=false", *TRAINED[workdir]]
    words = ["--config", f"configs/{Path(workdir).name}.py", "--mode", "train", "--workdir", workdir]
    if not Path(workdir).exists():
        assert cli.run([*words, *(f"--config.{setting}" for setting in quick)]) == 0


# --- code

TESTED = next(block[2] for block in FENCED.finditer(TEXT["README.md"]) if block[1] == "python")


def python_code(text: str) -> list[str]:
    return [code for kind, code in FENCED.findall(text) if kind == "python"]


def python_blocks() -> list[Any]:
    """(page, line, code) of each block, but for the one that test_package.py runs."""
    blocks = []
    for page, text in TEXT.items():
        for block in FENCED.finditer(text):
            if block[1] == "python" and block[2] != TESTED:
                line = text[: block.start()].count("\n") + 2
                slow = any(words in block[2] for words in SLOW)
                marks = [pytest.mark.slow] if slow else []
                blocks.append(pytest.param(page, line, block[2], id=f"{page}:{line}", marks=marks))
    return blocks


@pytest.mark.parametrize(("page", "line", "code"), python_blocks())
def test_every_block_of_python_runs_as_it_stands(page: str, line: int, code: str, folder: Path) -> None:
    provide(code)
    code = re.sub("|".join(map(re.escape, FEWER)), lambda many: FEWER[many[0]], code)
    exec(compile("\n" * (line - 1) + code, page, "exec"), {"__name__": "__main__"})


# --- command lines


def command_lines(text: str) -> list[str]:
    """Those in blocks of shell, in indented blocks and in spans of code, without comments and line breaks."""
    joined = text.replace("\\\n", " ")
    fenced = [line for kind, block in FENCED.findall(joined) if kind == "sh" for line in block.splitlines()]
    rest = FENCED.sub("", joined)
    begins = re.compile(r"(?:python|score_sde|torchrun|make) ")
    indented = [line.strip() for line in rest.splitlines() if line.startswith("    ") and begins.match(line.strip())]
    spans = [span for span in SPAN.findall(re.sub(r"^    .*", "", rest, flags=re.MULTILINE)) if begins.match(span)]
    lines = [re.sub(r"(?:^| +)# .*", "", line).strip() for line in fenced + indented + spans]
    return [line for line in lines if line]


class Parsed(BaseException):
    """The work would begin here: the command line was read, and the config with it."""


def stop(*args: Any, **options: Any) -> NoReturn:
    raise Parsed


PLACES = {"NAME": "vp_digits", "FILE": "runs/vp_digits/checkpoints/000000002.safetensors"}
READERS = {"FILE.py", "mine.py", "my.py"}  # files that a reader writes
OTHERS = {"pip", "git", "apt", "cd", "huggingface-cli", "."}  # programs that are not the project's


def read(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the command line up to where its work would begin. Raises whatever the command does for a wrong one."""
    words = [re.sub(r"\b(NAME|FILE)\b", lambda m: PLACES[m[1]], word) for word in shlex.split(line)]
    while re.fullmatch(r"\w+=\S+", words[0]):  # settings of the environment
        words = words[1:]
    monkeypatch.setattr(parallel, "start", stop)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert all("=" in word or word in targets for word in words[1:]), line
    elif program := {"score_sde", "main.py"} & set(words):
        _command_line(words[words.index(program.pop()) + 1 :], line)
    elif words[0].rpartition("/")[2] == "python":
        _module(words[1:], monkeypatch)
    else:
        assert words[0] in OTHERS, line


def _command_line(words: list[str], line: str) -> None:
    with contextlib.suppress(Parsed):
        assert cli.run(words) == 0, line


def _module(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``-m NAME ...`` or ``FILE.py ...``, up to the end of its parser's work; settings of a config are read too."""
    parse = argparse.ArgumentParser.parse_args

    def stopping(*args: Any) -> NoReturn:
        parse(*args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stopping)
    name, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.delitem(sys.modules, name, raising=False)  # a module that is run is loaded anew
    if name in ("pip", "pytest"):
        assert all((ROOT / word).exists() for word in arguments if "/" in word), arguments
        return
    try:
        if words[0] == "-m":
            runpy.run_module(name, run_name="__main__")
        else:
            runpy.run_path(str(ROOT / name), run_name="__main__")
    except Parsed:
        pass
    except SystemExit as end:
        assert end.code in (0, None), end
    settings = [word for word in arguments if word.startswith("--config.")]
    if settings:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
        config = arguments[arguments.index("--config") + 1]
        _command_line(["--mode", "train", "--config", config, *settings], name)


@pytest.mark.parametrize("page", TEXT)
def test_every_command_line_is_valid(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in dict.fromkeys(command_lines(TEXT[page])):
        with monkeypatch.context() as patch:
            read(line, patch)


@pytest.mark.parametrize(
    "line",
    [
        "python main.py --config configs/vp_digits.py --mode smaple",
        "python main.py --config configs/vp_digits.py --mode train --config.optim.rate=1",
        "python main.py --config configs/vp_digitss.py --mode train",
        "python main.py --config configs/vp_digits.py --mode train --prompt cat",
        "score_sde train vp_digitss",
        "score_sde trian vp_digits",
        "score_sde config vp_cifar --dif",
        "python -m studies.guidance --bogus",
        "make everything",
    ],
)
def test_wrong_command_lines_are_seen(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        read(line, monkeypatch)


# --- names


@cache
def modules() -> dict[str, list[ModuleType]]:
    """Name of a file or a room of the package -> the modules of that name, and the package's face."""
    known: dict[str, list[ModuleType]] = {"score_sde": [score_sde]}
    for room, paths in files().items():
        for path in paths:
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            dotted = ".".join(("score_sde", *parts)).removesuffix(".__init__")
            if parts[-1] != "__main__":
                known.setdefault(room if parts[-1] == "__init__" else parts[-1], []).append(
                    importlib.import_module(dotted)
                )
    return known


def named(dotted: str) -> bool:
    """Whether a name such as ``losses.simple``, ``sde.f`` or ``training.n_iters`` means something here or elsewhere."""
    first, *rest = dotted.split(".")
    owners: list[Any] = list(modules().get(first, []))
    if hasattr(score_sde, first) and first not in MOVED:  # old names of modules, which another test may have imported
        owners.append(getattr(score_sde, first))
    variables = {"sde": score_sde.SDE, "chain": score_sde.DDPM, "model": score_sde.Preconditioned}
    if first in variables:
        owners.append(variables[first])
    if first in ("benchmarks", "studies", "examples"):
        owners.append(importlib.import_module(".".join(dotted.split(".")[:2])))
        rest = rest[1:]
    config = default_config()
    if first in config:
        owners.append(config[first])
    return first in FOREIGN or any(_has(owner, rest) for owner in owners)


def _has(owner: Any, names: list[str]) -> bool:
    for name in names:
        if not (hasattr(owner, name) or name in getattr(owner, "__annotations__", {})):
            return False
        owner = getattr(owner, name, None)
    return True


@pytest.mark.parametrize("page", TEXT)
def test_dotted_names_and_keys_exist(page: str) -> None:
    text = TEXT[page]
    begins = re.compile(r"(?:--config\.)?([a-zA-Z_]\w*(?:\.[a-zA-Z_]\w*)+)(?!\w*/)")
    spans = [match[1] for span in SPAN.findall(text) if (match := begins.match(span))]
    assert [span for span in spans if span.rsplit(".", 1)[1] not in SUFFIXES and not named(span)] == [], page
    modes = set(re.findall(r"--mode (\w+)", text)) - {"MODE"}
    assert modes <= set(MODES), page


def test_names_that_do_not_exist_are_seen() -> None:
    assert named("losses.simple") and named("sde.f") and named("training.n_iters") and named("rules.label_edm")
    wrong = ("losses.bogus", "model.label_edm", "training.iterations", "bounds.discretised", "DDPM.sine")
    assert not any(map(named, wrong))


def test_functions_and_classes_of_the_papers_page_exist() -> None:
    known = {name for found in modules().values() for module in found for name in vars(module)}
    tables = [line for line in TEXT["docs/paper_to_code.md"].splitlines() if line.startswith("| ")]
    called = re.findall(r"`(\w+)\(", "\n".join(tables))
    assert len(called) > 30 and sorted(set(called) - known) == []


@pytest.mark.parametrize("page", TEXT)
def test_files_and_links_exist(page: str) -> None:
    text = TEXT[page]
    paths = set(re.findall(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w./-]+\.\w+)", text))
    paths |= {f"score_sde/{name}" for name in re.findall(rf"`((?:{'|'.join(files())})/\w+\.py)`", text)}
    for name in re.findall(r"`(\w+\.py)`", text):
        assert name in READERS or next(ROOT.glob(f"*/**/{name}"), ROOT / name).exists(), f"{page}: {name}"
    missing = [path for path in sorted(paths) if not (ROOT / path).exists() and "NAME" not in path]
    assert missing == [], page
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        other = (ROOT / page).parent / file if file else ROOT / page
        assert other.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in headings(other), f"{page}: {target}"


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in found}


# --- README and the list of configs


def test_readme_is_short() -> None:
    assert len(TEXT["README.md"].splitlines()) <= 120


def test_every_page_is_on_the_readme_s_map() -> None:
    linked = set(re.findall(r"\]\(([^)\s#]+\.md)\)", TEXT["README.md"]))
    assert sorted(set(TEXT) - {"README.md"} - linked) == []


def test_the_list_of_configs_is_complete() -> None:
    rows = re.findall(r"^\| \[`(\w+)`\]\((\w+)\.py\) \| (.+) \|$", TEXT["configs/README.md"], flags=re.MULTILINE)
    assert all(name == file for name, file, _ in rows)
    assert sorted(name for name, _, _ in rows) == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


# --- the page of the architecture


def test_every_file_has_its_line() -> None:
    rows = re.findall(r"^\| `([\w/]+\.py)` \| .+ \|$", TEXT["docs/architecture.md"], flags=re.MULTILINE)
    paths = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    assert sorted(rows) == sorted(str(path) for path in paths if path.parent == Path() or path.name != "__init__.py")


def test_the_picture_is_that_of_the_rows() -> None:
    assert BEGIN + picture() + END in TEXT["docs/architecture.md"]  # python tests/rooms.py --page draws it anew


def test_the_tables_of_names_that_the_page_sends_to_exist() -> None:
    named = re.findall(r"`(_?[A-Z_]{4,})` of `([\w/]+\.py)`", TEXT["docs/architecture.md"])
    assert len(named) > 8
    for table, file in named:
        path = ROOT / file if file.startswith("tests/") else PACKAGE / file
        assert re.search(rf"^{table}\b.* = ", path.read_text(), flags=re.MULTILINE), (table, file)


# --- words


ODD = r"told|lest|hangs? on|what is none|is of|are of|in the place of|is had"  # plain English has other words


@pytest.mark.parametrize("page", TEXT)
def test_pages_say_it_plainly(page: str) -> None:
    prose = SPAN.sub("", FENCED.sub("", TEXT[page]))
    assert re.findall(rf"(?i).{{0,30}}\b(?:{ODD})\b.{{0,30}}", prose) == []
