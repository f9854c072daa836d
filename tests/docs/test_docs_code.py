"""Every code block of README, CONTRIBUTING and the documentation runs, and computed tables are up to date.

Blocks of a page run in order, in one namespace and one empty folder. Blocks with a title are written to that file;
`python` blocks are executed; in `bash` blocks, lines that start with `polopt` are run: training and comparing as a dry run, and
what needs a run that the page did not make is only parsed.
"""

import re
import shlex
from pathlib import Path

import pytest
from tables import PAGES, ROOT, filled

from polopt import part, registry
from polopt.cli import build_parser, main

BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a registry that forgets what a page adds."""
    monkeypatch.chdir(tmp_path)
    registry.load_everything()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(part, "_PARTS", {kind: dict(found) for kind, found in part._PARTS.items()})
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_of_a_page_runs(page: Path, folder: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "__main__"}
    for match in BLOCK.finditer(text):
        language, options, code = match.groups()
        line = text.count("\n", 0, match.start()) + 2
        if title := re.search(r'title="([^"]+)"', options):
            (folder / title[1]).write_text(code, encoding="utf-8")
        elif language == "python":
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
        elif language == "bash":
            for command in code.replace("\\\n", " ").splitlines():
                if command.startswith("polopt "):
                    run_command(shlex.split(command, comments=True)[1:], f"{page.name}:{line}")


def run_command(words: list[str], where: str) -> None:
    if words[0] in ("train", "compare") and "--help" not in words:
        words = [*words, "--dry-run"]
    if words[0] in ("resume", "eval", "export", "report") and not Path(words[1]).exists():
        build_parser().parse_args(words)
        return
    assert main(words) == 0, f"{where}: polopt {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_computed_tables_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert filled(text) == text, f"run: python tests/docs/tables.py (for {page.relative_to(ROOT)})"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
