"""constraints.txt fits every Python that pyproject.toml allows, by what packages say of themselves.

tests/soak/starts.py resolves the same pins anew for each Python, from the package index.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def pins(python: str) -> dict[str, str]:
    """Return the version of each package that constraints.txt names for one Python."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        pin = Requirement(line) if line and not line.startswith("#") else None
        if pin and (pin.marker is None or pin.marker.evaluate(environment(python))):
            name = canonicalize_name(pin.name)
            assert name not in found, f"{name} has two pins on Python {python}"
            found[name] = str(pin.specifier).removeprefix("==")
    return found


def environment(python: str) -> dict[str, str]:
    """Return what environment markers are compared with."""
    return {"python_version": python, "python_full_version": f"{python}.9", "extra": ""}


def installed_as_pinned(python: str) -> dict[str, metadata.Distribution]:
    """Return the installed packages of which `python` takes the same version, by name."""
    pinned = pins(python)
    here = {canonicalize_name(one.name): one for one in metadata.distributions()}
    return {
        name: one
        for name, one in here.items()
        if name in pinned and one.version.partition("+")[0] == pinned[name]
    }


@pytest.mark.parametrize("python", PYTHONS)
def test_no_pin_needs_a_newer_python_than_it_is_for(python: str) -> None:
    found = installed_as_pinned(python)
    assert len(found) > 20, "this environment has other versions than the pinned ones"
    for name, one in found.items():
        needs = one.metadata["Requires-Python"]
        assert needs is None or SpecifierSet(needs).contains(f"{python}.9"), f"{name}: {needs}"


@pytest.mark.parametrize("python", PYTHONS)
def test_what_a_package_needs_is_pinned_as_it_needs_it(python: str) -> None:
    pinned, found = pins(python), installed_as_pinned(python)
    for name, one in found.items():
        for text in one.requires or []:
            need = Requirement(text)
            if need.marker and not need.marker.evaluate(environment(python)):
                continue
            wanted = canonicalize_name(need.name)
            if re.match(r"(nvidia|cuda|triton)", wanted):  # torch pins its own
                continue
            assert wanted in pinned, f"{name} needs {text}, which has no pin on Python {python}"
            assert need.specifier.contains(pinned[wanted], prereleases=True), f"{name} needs {text}"


def test_the_oldest_python_is_tested() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={PYTHONS[0]}"' in text
