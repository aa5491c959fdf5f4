"""The command line: what is loaded when, exit codes, and how errors look."""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentParser, Namespace
from types import ModuleType

import pytest

from kvcomm import cli
from kvcomm._version import __version__
from kvcomm.errors import InputError, KVCommError, UnsupportedModel


def fake_command(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> list[Namespace]:
    """Make `kvcomm doctor` a command with the flag --n that records its arguments, or raises."""
    seen: list[Namespace] = []

    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--n", type=int, default=3)

    def run(args: Namespace) -> int:
        seen.append(args)
        if error is not None:
            raise error
        return 0

    module = ModuleType("kvcomm.doctor")
    module.__dict__.update(add_arguments=add_arguments, run=run)
    monkeypatch.setitem(sys.modules, "kvcomm.doctor", module)
    return seen


def test_shared_and_own_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_command(monkeypatch)
    assert cli.main(["doctor", "--format", "json", "--output", "out", "-q", "--n", "5"]) == 0
    assert cli.main(["doctor"]) == 0
    assert [(a.format, str(a.output), a.quiet, a.n) for a in seen] == [("json", "out", True, 5), ("terminal", "None", False, 3)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("seven is\n odd"), 2),
        (UnsupportedModel("seven is\n odd"), 2),
        (KVCommError("seven is\n odd"), 1),
        (OSError("seven is\n odd"), 1),
    ],
)
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    fake_command(monkeypatch, error)
    assert cli.main(["doctor"]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"kvcomm: {type(error).__name__}: seven is odd\n")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(monkeypatch, InputError("odd"))
    monkeypatch.setenv("KVCOMM_DEBUG", "1")
    with pytest.raises(InputError, match="odd"):
        cli.main(["doctor"])


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(monkeypatch, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["doctor"])


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_command(monkeypatch, KeyboardInterrupt())
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "kvcomm: interrupted\n"


@pytest.mark.parametrize(
    "argv", [["nosuch"], ["doctor", "--nosuch"], ["doctor", "--format", "xml"], ["bench"], ["bench", "nosuch"]]
)
def test_wrong_usage_is_2(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    fake_command(monkeypatch)
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert e.value.code == 2


def test_nothing_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: kvcomm" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["bench", "--help"]])
def test_help_loads_no_command(argv: list[str]) -> None:
    """`python -m kvcomm` in a process of its own: help comes without any command's module, and so without torch."""
    modules = [c.module for c in cli.COMMANDS]
    code = (
        f"import sys; from kvcomm import cli\ntry: cli.main({argv!r})\nexcept SystemExit as e: assert e.code == 0\n"
        f"print([m for m in (*{modules!r}, 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda c: " ".join(c.words))
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: cli.Command) -> None:
    with pytest.raises(SystemExit) as e:
        cli.main([*command.words, "--help"])
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert command.help in " ".join(out.split())
    assert ("--format {terminal,json}" in out) is not command.passes_on


def test_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvcomm", "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"kvcomm {__version__}\n")


def test_what_another_program_knows_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """`kvcomm vllm` keeps its own flag and hands over the others as they are, whatever their names are short for."""
    seen: list[Namespace] = []

    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--kvcomm-config")

    def run(args: Namespace) -> int:
        seen.append(args)
        return 0

    module = ModuleType("kvcomm.connectors.serve")
    module.__dict__.update(add_arguments=add_arguments, run=run)
    monkeypatch.setitem(sys.modules, "kvcomm.connectors.serve", module)
    assert cli.main(["vllm", "--model", "m", "-q", "awq", "--kvcomm", "x", "--kvcomm-config", "{}", "--output=y"]) == 0
    assert seen[0].rest == ["--model", "m", "-q", "awq", "--kvcomm", "x", "--output=y"]
    assert seen[0].kvcomm_config == "{}"
