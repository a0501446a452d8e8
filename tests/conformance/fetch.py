"""PEFT's source distributions and releases from the package registry, kept in a folder."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

# the versions that nblora supports, and the SHA-256 of their source distributions
SUPPORTED = {
    "0.21.0": "17f2b5a264439f4cd983c02e95954f2e948e3bcb85f75895ee307f94a55fd28f",
    "0.21.1": "95f239f84da1919a6d0c64c4049650a6a79804e3a87c78f35c597da771e31f68",
    "0.21.2": "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e",
}
SOURCE_ONLY = ("--no-deps", "--no-binary", "peft")


class FetchError(RuntimeError):
    """What was fetched is not what was asked for."""


def pip(*arguments: str) -> str:
    """Run pip and return what it prints.

    Raises:
        FetchError: if it fails.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise FetchError(f"pip must succeed, got status {run.returncode} from {command}:\n{run.stderr}")
    return run.stdout


def resolve(requirement: str) -> tuple[str, str]:
    """The version and the SHA-256 of the source distribution that pip would take for a requirement."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip("install", "--dry-run", "--ignore-installed", *SOURCE_ONLY, "--report", str(report), requirement)
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))["install"][0]
    return found["metadata"]["version"], found["download_info"]["archive_info"]["hashes"]["sha256"]


def check(archive: Path, version: str, resolved: str) -> None:
    """Refuse an archive that is not what pip resolved, or not what is pinned here.

    Raises:
        FetchError: if so.
    """
    actual = hashlib.sha256(archive.read_bytes()).hexdigest()
    for source, expected in (("pip resolved", resolved), ("is pinned", SUPPORTED.get(version, resolved))):
        if actual != expected:
            raise FetchError(
                f"the SHA-256 of {archive.name} must be {expected}, which {source}, got {actual}"
            )


def unpack_tests(archive: Path, folder: Path) -> None:
    """Unpack only tests/ of a source distribution, so that no second peft can be imported from there."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            parts = Path(member.name).parts
            if len(parts) > 2 and parts[1] == "tests":
                tar.extract(member.replace(name=str(Path(*parts[1:]))), folder, filter="data")
    (folder / "tests" / "__init__.py").touch()  # the modules import each other relatively


def fetch_tests(requirement: str, cache: Path) -> tuple[str, Path]:
    """Fetch PEFT's tests unless they are there.

    Args:
        requirement: Such as "peft==0.21.2", or "peft" for the newest release.

    Returns:
        The version, and the folder that holds tests/.
    """
    version = requirement.removeprefix("peft").removeprefix("==")
    folder = cache / f"peft-{version}"
    if version and (folder / "tests" / "__init__.py").exists():
        return version, folder
    version, resolved = resolve(requirement)
    folder = cache / f"peft-{version}"
    if not (folder / "tests" / "__init__.py").exists():
        cache.mkdir(parents=True, exist_ok=True)
        pip("download", *SOURCE_ONLY, "--dest", str(cache), f"peft=={version}")
        archive = cache / f"peft-{version}.tar.gz"
        check(archive, version, resolved)
        unpack_tests(archive, folder)
    return version, folder


def fetch_release(version: str, cache: Path) -> Path:
    """Install a release of PEFT, without what it depends on, into a folder for PYTHONPATH."""
    folder = cache / f"release-{version}"
    if not (folder / "peft").exists():
        pip("install", "--no-deps", "--target", str(folder), f"peft=={version}")
    return folder
