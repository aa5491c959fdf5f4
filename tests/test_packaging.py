"""The fixed top level: links, explicit packages, and an `agents` SDK that is not hidden by ours."""

from __future__ import annotations

import configparser
import socket
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kvcomm

LINKED = ("agents", "anchors")


@pytest.fixture(scope="module")
def setup_cfg(checkout: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(checkout / "setup.cfg", encoding="utf-8")
    return parser


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def package_folders(checkout: Path) -> dict[str, Path]:
    """Every folder of kvcomm with a module in it, by package name; links followed."""
    found = {}
    for folder in [checkout / "kvcomm", *(p for p in sorted((checkout / "kvcomm").rglob("*")) if p.is_dir())]:
        if folder.name != "__pycache__" and any(folder.glob("*.py")):
            found[".".join(folder.relative_to(checkout).parts)] = folder
    for name in LINKED:  # rglob does not follow links
        found[f"kvcomm.{name}"] = checkout / name
    return found


@pytest.mark.parametrize("name", LINKED)
def test_links_resolve(checkout: Path, name: str) -> None:
    link = checkout / "kvcomm" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.resolve() == checkout / name
    assert (checkout / name).is_dir()


def test_agents_is_no_ordinary_package(checkout: Path) -> None:
    assert not (checkout / "agents" / "__init__.py").exists()
    assert (checkout / "anchors" / "__init__.py").exists()


def test_every_folder_with_code_is_listed(checkout: Path, setup_cfg: configparser.ConfigParser) -> None:
    """setup.cfg against the folders on disk, both ways."""
    assert lines(setup_cfg["options"]["packages"]) == sorted(package_folders(checkout))
    assert lines(setup_cfg["options"]["package_dir"]) == [f"kvcomm.{name} = {name}" for name in LINKED]


def test_ordinary_packages_have_an_init(checkout: Path) -> None:
    without = [name for name, folder in package_folders(checkout).items() if not (folder / "__init__.py").exists()]
    assert without == ["kvcomm.agents"]


def test_no_folder_with_code_outside(checkout: Path) -> None:
    """The top level holds no other Python than the packages, tests and examples."""
    hidden_or_known = {"kvcomm", "tests", "examples", "docs", "build", "dist", *LINKED}
    for folder in checkout.iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in hidden_or_known:
            assert not list(folder.rglob("*.py")), f"{folder.name}/ has code that no wheel would carry"
    assert not list(checkout.glob("*.py"))


def test_every_data_file_is_listed(checkout: Path, setup_cfg: configparser.ConfigParser) -> None:
    """What lies in a package's folder and is not Python is carried by a pattern of package_data."""
    data = {name: [p.strip() for p in text.split(",")] for name, text in setup_cfg["options.package_data"].items()}
    for name, folder in package_folders(checkout).items():
        for file in folder.iterdir():
            if file.is_file() and file.suffix not in (".py", ".pyc"):
                assert any(fnmatch(file.name, p) for p in data.get(name, [])), (
                    f"{file.relative_to(checkout)} is not in package_data"
                )


def test_installed_package_is_whole(checkout: Path) -> None:
    """Every module and data file of the checkout is in the kvcomm that is imported here: the checkout's, or the wheel's."""
    installed = Path(kvcomm.__file__).parent
    for name, folder in package_folders(checkout).items():
        here = installed.joinpath(*name.split(".")[1:])
        expected = {p.name for p in folder.iterdir() if p.is_file() and p.suffix != ".pyc"}
        assert expected <= {p.name for p in here.iterdir()}, name


def test_agents_sdk_is_not_shadowed(checkout: Path, tmp_path: Path) -> None:
    """A process started at the root, with the root first on its path, gets the SDK as `agents`, and ours beside it."""
    sdk = tmp_path / "site" / "agents"
    sdk.mkdir(parents=True)
    (sdk / "__init__.py").write_text("WHO = 'the SDK'\n", encoding="utf-8")
    code = (
        f"import sys; sys.path[1:1] = [{str(sdk.parent)!r}]\n"
        "import agents, kvcomm.agents\n"
        "print(agents.WHO, [p.endswith('agents') for p in kvcomm.agents.__path__], hasattr(agents, 'team'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "the SDK [True] False\n", done.stderr


def test_constraints_pin_what_is_required(checkout: Path, setup_cfg: configparser.ConfigParser) -> None:
    """One exact version for every direct requirement of the core and of the tests, torch first."""
    pins = [line for line in lines((checkout / "constraints.txt").read_text(encoding="utf-8")) if not line.startswith("#")]
    assert pins[0] == "torch==2.13.0"
    assert all(pin.count("==") == 1 and "+" not in pin for pin in pins)
    names = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    for text in (setup_cfg["options"]["install_requires"], setup_cfg["options.extras_require"]["test"]):
        for requirement in (line for line in lines(text) if not line.startswith("#")):
            assert Requirement(requirement).name.lower() in names, f"{requirement} is not pinned"


def test_licence_is_apache(checkout: Path) -> None:
    text = (checkout / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_network_is_blocked() -> None:
    """The guard of conftest: outside is refused before a packet leaves, this machine is reachable."""
    with socket.socket() as s, pytest.raises(OSError, match="tests have no network"):
        s.connect(("192.0.2.1", 80))
    with pytest.raises(OSError, match=r"wanted 'example\.org'"):
        socket.getaddrinfo("example.org", 80)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()
