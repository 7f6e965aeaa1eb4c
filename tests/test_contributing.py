"""What CONTRIBUTING says about adding a part of each kind, done to the letter."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("token mixer", "token mixer that streams", "channel mixer", "norm", "block", "stem", "head", "token order",
         "schedule", "op", "model", "task")  # fmt: skip


@dataclass(frozen=True)
class Section:
    """What one section of the page adds.

    title: of the section.
    files: path below the root -> content.
    found_by: the tests that it says find the part.
    """

    title: str
    files: dict[str, str]
    found_by: list[str]

    @property
    def name(self) -> str:
        """By which the part registers itself."""
        (name,) = set(re.findall(r"\w+_example\b", " ".join(self.files)))
        return name


def sections() -> list[Section]:
    """The sections with examples: each code block stands below a line that ends with the path of its file."""
    found = []
    for part in (ROOT / "CONTRIBUTING.md").read_text().split("\n## ")[1:]:
        files = dict(re.findall(r"`([\w/]+\.(?:py|yaml))`[^`]*:\n\n```\w+\n(.*?)```", part, flags=re.S))
        files |= dict(re.findall(r"`([\w/]+\.py)`, or[^:]*:\n\n```\w+\n(.*?)```", part, flags=re.S))
        if files:
            said = re.search(r"Found by(.*?)[;.] ", part.replace("\n", " ").replace(".py", "\0"))
            tests = re.findall(r"`(tests/[\w/]+)\0`", said[1]) if said else []
            found.append(Section(part.splitlines()[0], files, [f"{test}.py" for test in tests]))
    return found


SECTIONS = sections()


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the examples' files added, and nothing else changed."""
    folder = tmp_path_factory.mktemp("clone") / "mixerzoo"
    for name in ("kernels", "mixers", "models", "tasks", "training", "contract", "configs", "tools", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(file, folder / file.name)
    for section in SECTIONS:
        for path, content in section.files.items():
            assert not (folder / path).exists(), f"{path} is an edit, not a new file"
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(content)
    return folder


def run(copy: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(copy.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True)


def test_every_kind_has_an_example_of_one_file_or_folder() -> None:
    titles = {re.sub("^An? ", "", section.title): section for section in SECTIONS}
    assert set(KINDS) <= titles.keys(), titles.keys()
    for title, section in titles.items():
        if title == "op":
            assert {str(Path(path).parent) for path in section.files} == {f"kernels/{section.name}"}
        else:
            assert len(section.files) == 1, (title, list(section.files))
    blocks = re.findall(r"```(?:python|yaml)\n", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(blocks) == sum(len(section.files) for section in SECTIONS)  # no example is passed over


def test_the_tests_that_are_named_find_the_parts(copy: Path) -> None:
    tests = sorted({test for section in SECTIONS for test in section.found_by})
    done = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", "_example", "--junit-xml=report.xml")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = [
        (case.get("classname", "").replace(".", "/") + ".py", case.get("name", ""))
        for case in ElementTree.parse(copy / "report.xml").iter("testcase")
        if not len(case)
    ]
    for section in SECTIONS:
        count = {test: sum(test in file and section.name in name for file, name in passed) for test in section.found_by}
        print(section.title, sum(len(c.splitlines()) for c in section.files.values()), count)
        assert all(count.values()), (section.title, count)


def as_plugin(path: str, content: str) -> str:
    """The file with full names of modules in place of relative ones, as it stands outside of the package."""
    folders = Path(path).parent.parts

    def full(found: re.Match[str]) -> str:
        package = folders[: len(folders) + 1 - len(found[1])]
        return f"from {'.'.join(['mixerzoo', *package, found[2]])} import"

    return re.sub(r"from (\.+)(\w[\w.]*) import", full, content)


def test_the_same_files_are_plugins(tmp_path: Path) -> None:
    """Outside of the repository, without a copy of it; and the contract is found there, too."""
    folder = tmp_path / "my_parts"
    folder.mkdir()
    single = [(path, section) for section in SECTIONS if len(section.files) == 1 for path in section.files]
    for path, section in single:
        if path.endswith(".py"):
            (folder / Path(path).name).write_text(as_plugin(path, section.files[path]))
    package = tmp_path / "mixerzoo"
    package.symlink_to(ROOT)
    done = run(package, "-m", "mixerzoo", "check", str(folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for _, section in single:
        if any(test.endswith(("mixers/test_contract.py", "contract/test_parts.py")) for test in section.found_by):
            assert re.search(rf'"{section.name}": \d+ promises kept, 0 broken', done.stdout), done.stdout


SCRIPT = """
import mixerzoo, torch
from mixerzoo.models import read_state_dict
from safetensors.torch import save_file

assert mixerzoo.__file__.startswith(COPY), mixerzoo.__file__
assert {"decaying_example", "fading_example"} <= set(mixerzoo.list_mixers(causal=True))
torch.manual_seed(0)
model = mixerzoo.create_model("poolformer_example", channel_mixer="gate_example", norm="unit_example",
    block="parallel_example", stem="average_example", head={"name": "cosine_example", "scale": 2.0})
y = model(torch.randn(2, 3, 16, 16))
assert y.shape == (2, 10)
names = {type(module).__name__ for module in model.modules()}
assert {"Gate", "UnitNorm", "ParallelBlock", "AverageStem", "CosineHead"} <= names, names
y.square().sum().backward()

plain = mixerzoo.create_model("poolformer_example").eval()
theirs = {}
for key, value in plain.state_dict().items():
    for ours, other in (("stages.", "levels."), (".blocks.", "."), (".downsample.conv.", ".down."),
                        (".channel_mixer.", ".mlp."), ("stem.conv.", "stem.proj."), ("head.norm.", "norm."),
                        ("head.fc.", "head.")):
        key = key.replace(ours, other)
    theirs[key] = value.clone()
assert not {k for k in theirs if k in plain.state_dict()}, theirs.keys()
save_file(theirs, "older.safetensors")
loaded = mixerzoo.create_model("poolformer_example", checkpoint="older.safetensors").eval()
x = torch.randn(2, 3, 16, 16)
assert torch.equal(loaded(x), plain(x))
x = torch.randn(1, 5, 3)
assert torch.equal(mixerzoo.kernels.mirror_example(x)[:, 0], x[:, -1])
from mixerzoo.kernels.common.discovery import find_cases
assert "mirror_example.backward" in find_cases()  # what tests/tools/test_build.py compiles
print("all is well")
"""


def test_models_take_the_parts(copy: Path) -> None:
    done = run(copy, "-c", SCRIPT.replace("COPY", repr(str(copy))))
    assert "all is well" in done.stdout, done.stderr[-3000:]


def test_the_command_line_takes_them(copy: Path) -> None:
    words = ("task=reversal_example", "task.num_train=1000", "task.num_eval=200", "model=mamba2_tiny", "model.depth=1",
             "model.dim=16", "model.norm=unit_example", "mixer=fading_example", "train.schedule=root_example",
             "train.epochs=1", "train.batch_size=100", "progress=false")  # fmt: skip
    done = run(copy, "train.py", *words, f"output_dir={copy}/runs")
    assert done.returncode == 0, done.stderr[-3000:]
    typo = run(copy, "train.py", "mixer=decaying_exampel")
    assert typo.returncode == 2
    assert 'Did you mean "decaying_example"?' in typo.stderr + typo.stdout
