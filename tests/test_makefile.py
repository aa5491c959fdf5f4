"""The install steps of the Makefile, with a fake Python and apt-get that note what they are asked: order, recovery, errors."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

# Logs its arguments; `-m venv .venv` puts a copy of itself there; a version check fails when the file `old` is beside the
# Makefile, `pip install -c` when the file `broken` is, and looking for a library when the file `bare` is.
FAKE = """#!/bin/sh
echo "$(basename "$0") $*" >> log
case "$*" in
    *version_info*) [ ! -e old ] ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *"install -c"*) [ ! -e broken ] ;;
    *CDLL*) [ ! -e bare ] ;;
esac
"""

# Installs once `apt-get update` was run, or at once where the file `lists` is there.
APT = """#!/bin/sh
echo "apt-get $*" >> log
case "$*" in
    update) [ -e reachable ] && touch lists ;;
    install*) [ -e lists ] ;;
esac
"""


class House:
    """A folder with the Makefile in it, in which `make` finds no Python but the fake one."""

    def __init__(self, folder: Path, makefile: Path) -> None:
        self.folder = folder
        shutil.copy(makefile, folder)
        (folder / "setup.cfg").touch()
        (folder / "constraints.txt").write_text("# pins\ntorch==2.13.0\nnumpy==2.4.6\n", encoding="utf-8")
        self.tools = folder / "tools"
        self.tools.mkdir()
        for name in ("sh", "rm", "mkdir", "touch", "grep", "cp", "basename"):
            (self.tools / name).symlink_to(str(shutil.which(name)))
        self.make = str(shutil.which("make"))

    def python(self, name: str) -> None:
        self.tool(name, FAKE)

    def tool(self, name: str, script: str) -> None:
        (self.tools / name).write_text(script, encoding="utf-8")
        (self.tools / name).chmod(0o755)

    def install(self, target: str = "install") -> tuple[int, str, list[str]]:
        """Exit code, stderr, and what the fake programs were asked, version checks and libraries left out."""
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        env = {**os.environ, "PATH": str(self.tools), "MAKEFLAGS": ""}
        argv = [self.make, target]
        done = subprocess.run(argv, cwd=self.folder, env=env, capture_output=True, text=True, timeout=60, check=False)
        asked = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        asked = [line.replace("-m pip --disable-pip-version-check", "pip") for line in asked]
        return done.returncode, done.stderr, [line for line in asked if "version" not in line and "CDLL" not in line]


@pytest.fixture
def house(checkout: Path, tmp_path: Path) -> House:
    return House(tmp_path, checkout / "Makefile")


INSTALLS = ["python pip install torch==2.13.0", "python pip install -c constraints.txt -e .[test]"]


def test_torch_first_and_once(house: House) -> None:
    house.python("python3.11")
    house.python("python3")
    code, _, asked = house.install()
    assert (code, asked) == (0, ["python3.11 -m venv .venv", *INSTALLS])
    assert house.install() == (0, "", [])


@pytest.mark.parametrize("name", ["setup.cfg", "constraints.txt"])
def test_again_when_pins_change(house: House, name: str) -> None:
    house.python("python3")
    assert house.install()[2][0] == "python3 -m venv .venv"
    later = (house.folder / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(house.folder / name, (later, later))
    code, _, asked = house.install()
    assert (code, [a for a in asked if a in INSTALLS]) == (0, INSTALLS)
    assert not [a for a in asked if "venv" in a]


def test_interrupted_install_begins_again(house: House) -> None:
    house.python("python3")
    (house.folder / "broken").touch()
    assert house.install()[0] != 0
    (house.folder / "broken").unlink()
    (house.folder / ".venv" / "half").touch()
    code, _, asked = house.install()
    assert (code, asked) == (0, ["python3 -m venv .venv", *INSTALLS])
    assert not (house.folder / ".venv" / "half").exists()


def test_no_python(house: House) -> None:
    code, err, _ = house.install()
    assert code != 0
    assert "kvcomm needs Python 3.11 or newer" in err
    house.python("python3")
    (house.folder / "old").touch()
    code, err, _ = house.install()
    assert code != 0
    assert "kvcomm needs Python 3.11 or newer" in err
    (house.folder / "old").unlink()
    assert house.install()[0] == 0


def machine(house: House, *, user: int) -> None:
    """Installed, with apt-get, and with nothing that services need."""
    house.python("python3")
    assert house.install()[0] == 0
    house.tool("apt-get", APT)
    house.tool("id", f"#!/bin/sh\necho {user}\n")
    (house.folder / "bare").touch()


PACKAGES = "redis-server libibverbs1 libcurl4 libnuma1"


@pytest.mark.parametrize("server", ["redis-server", "valkey-server"])
def test_services_that_are_there(house: House, server: str) -> None:
    machine(house, user=0)
    (house.folder / "bare").unlink()
    house.tool(server, "#!/bin/sh\n")
    assert house.install("services") == (0, "", [])


def test_services_as_root(house: House) -> None:
    """The lists of packages are fetched where they are needed, and only what is missing is installed."""
    machine(house, user=0)
    (house.folder / "lists").touch()
    assert house.install("services") == (0, "", [f"apt-get install -y {PACKAGES}"])
    (house.folder / "lists").unlink()
    (house.folder / "reachable").touch()
    code, err, asked = house.install("services")
    assert (code, err) == (0, "")
    assert asked == [f"apt-get install -y {PACKAGES}", "apt-get update", f"apt-get install -y {PACKAGES}"]
    (house.folder / "bare").unlink()
    assert house.install("services")[2] == ["apt-get install -y redis-server"]


def test_services_that_cannot_be_installed(house: House) -> None:
    """By another user, without a network, without apt-get: told how, and no failure of its own."""
    machine(house, user=1000)
    code, err, asked = house.install("services")
    assert (code, asked) == (0, [])
    assert f"As root: apt-get install -y {PACKAGES}\n" in err
    machine(house, user=0)
    code, err, asked = house.install("services")
    assert (code, asked) == (0, [f"apt-get install -y {PACKAGES}", "apt-get update"])
    assert f"As root: apt-get install -y {PACKAGES}\n" in err
    (house.tools / "apt-get").unlink()
    code, err, asked = house.install("services")
    assert (code, asked) == (0, [])
    assert f"As root: apt-get install -y {PACKAGES}\n" in err


def test_tests_come_after_services(house: House) -> None:
    machine(house, user=0)
    (house.folder / "lists").touch()
    (house.folder / ".venv" / "bin" / "kvcomm").symlink_to(house.tools / "python3")
    code, _, asked = house.install("test")
    assert (code, asked) == (0, ["kvcomm demo", f"apt-get install -y {PACKAGES}", "python -m pytest"])
