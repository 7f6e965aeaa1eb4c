"""The bash commands of README, CONTRIBUTING and the docs.

Quick: those of `train.py` are composed as far as they could start, other commands run. Slow: all of a page run, one
after another in an empty folder, since later ones may use what earlier ones made. A comment before a block says more:

    <!-- slow -->             too long for the quick tests
    <!-- not run: REASON -->  not even for the slow ones: another machine, the network, an hour
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from mixerzoo.training.ablation import preset, search
from mixerzoo.training.ablation.plan import arm_settings, once
from mixerzoo.training.cli import verb
from mixerzoo.training.cli.compose import compose_config
from mixerzoo.training.quoting import literal

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- *([^>]*?) *-->\n)?```(?:bash|sh|shell|console)\n(.*?)```", re.S)


@dataclass(frozen=True)
class Command:
    """One command of a page.

    page: its name.
    words: as the shell splits them, without comments.
    text: as it stands there.
    mark: of the comment before its block, "" without one.
    """

    page: str
    words: tuple[str, ...]
    text: str
    mark: str

    @property
    def trains(self) -> bool:
        return "train.py" in self.words[:2] or self.words[:1] == ("mixerzoo-train",)


def commands(page: Path) -> list[Command]:
    found = []
    for mark, block in BLOCK.findall(page.read_text()):
        assert mark in ("", "slow") or mark.startswith("not run: "), f"{page.name}: <!-- {mark} --> is not known"
        for line in block.replace("\\\n", " ").splitlines():
            text = line.removeprefix("$ ").strip()
            if words := shlex.split(text, comments=True):
                found.append(Command(page.stem, tuple(words), text, mark))
    return found


COMMANDS = {page.stem: found for page in PAGES if (found := commands(page))}
QUICK = [pytest.param(c, id=f"{page}-{' '.join(c.words)[:70]}") for page, found in COMMANDS.items() for c in found]


def understood(overrides: list[str]) -> None:
    """Compose every run that a command line asks for."""
    if any(text.startswith("search.") for text in overrides):
        wanted, base = search.from_command_line(overrides)
        for name in wanted.mixers:
            compose_config([*base, f"mixer={name}"])
    elif "-m" in overrides or any(text.startswith("ablation") for text in overrides):
        ablation = preset.from_command_line([text for text in overrides if text != "-m"])
        for point in ablation.points():
            varied = [f"{key}={literal(value)}" for key, value in point.items()]
            for arm in ablation.mixers:
                compose_config(once([*ablation.base, *arm_settings(ablation, arm), *varied]))
    else:
        compose_config(overrides)


def about_a_file_of_the_readers(words: tuple[str, ...]) -> bool:
    """Such as a plugin or a run: the page's own test makes what can be made."""
    files = re.findall(r"[\w./-]+\.(?:py|yaml|safetensors|pt|pth|jpg|png)\b", " ".join(words[1:]))
    return any(file != "train.py" and not (ROOT / file).exists() for file in files) or "runs/" in " ".join(words)


@pytest.mark.parametrize("command", QUICK)
def test_command(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = list(command.words)
    if about_a_file_of_the_readers(command.words):
        pytest.skip("about a file of the reader's, or a run")
    if command.trains:
        understood(words[words.index("train.py") + 1 :] if "train.py" in words else words[1:])
    elif words[0] == "make":  # what they run are the tests and the training, again
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif command.mark:
        pytest.skip(command.mark)
    elif words[:3] == ["python", "-m", "mixerzoo"]:
        assert verb.main(words[3:]) == 0
    else:
        run(command, tmp_path)


def run(command: Command, folder: Path) -> None:
    """Run a command by the shell in a folder in which this checkout is `mixerzoo`, and `train.py` is there."""
    site, tools = folder / ".site", folder / ".bin"
    for made in (site, tools):
        made.mkdir(exist_ok=True)
    for link, target in ((site / "mixerzoo", ROOT), (folder / "train.py", ROOT / "train.py")):
        if not link.exists():
            link.symlink_to(target)
    (tools / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (tools / "python").chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(site), "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command.text], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command.text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", COMMANDS)
def test_all_commands_of_a_page_run(page: str, tmp_path: Path) -> None:
    for command in COMMANDS[page]:
        if command.words[0] != "make" and not command.mark.startswith("not run"):
            run(command, tmp_path)


def test_a_wrong_command_is_noticed() -> None:
    with pytest.raises(Exception, match="Did you mean"):
        understood(["mixer=atention"])
    with pytest.raises(Exception, match="ablation"):
        understood(["-m", "ablation=visoin"])
    with pytest.raises(Exception, match="widthz"):
        understood(["search.mixers=[attention]", "search.widthz=[1]"])
