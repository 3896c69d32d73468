"""A user's own rule on the native backend: compiled when it is first used, kept on disk."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path

from ._version import __version__
from .backends import native
from .binding import RULES, Rule, numbered_cpp

_SOURCE = """\
#include "step.h"

namespace fusedopt {
namespace {
%s
}
}

#define KERNEL extern "C" __attribute__((visibility("default"))) void
KERNEL in_float32(const fusedopt::Update& update, int64_t begin, int64_t end) {
  fusedopt::update_range<fusedopt::own_rule, float>(update, begin, end);
}
KERNEL in_float64(const fusedopt::Update& update, int64_t begin, int64_t end) {
  fusedopt::update_range<fusedopt::own_rule, double>(update, begin, end);
}
"""

# By rule and instruction set: its number, or why there is none.
_compiled: dict[tuple[Rule, str], int | str] = {}
# By source and instruction set: functions of equal code, such as those a factory makes, share kernels.
_numbers: dict[tuple[str, str], int] = {}
_lock = threading.Lock()


def rule_number(rule: Rule) -> int:
    """The native module's number of `rule`; -1 where it cannot run it. Compiles a user's rule, once.

    Raises:
        ImportError: there is no native module.
    """
    if RULES.get(rule.name) is rule:
        return native().rule_number(rule.name)
    found = _own_rule(rule)
    return found if isinstance(found, int) else -1


def refusal(rule: Rule) -> str | None:
    """Why the native module cannot run `rule`, with the remedy; None where it can. Compiles a user's rule, once."""
    if RULES.get(rule.name) is rule:
        return None
    try:
        found = _own_rule(rule)
    except ImportError as error:
        return str(error)
    return found if isinstance(found, str) else None


def refusals() -> list[str]:
    """What has been refused in this process, and why."""
    return [found for found in dict.fromkeys(_compiled.values()) if isinstance(found, str)]


def _own_rule(rule: Rule) -> int | str:
    instruction_set = native().instruction_set()
    with _lock:
        if (rule, instruction_set) not in _compiled:
            try:
                found: int | str = _number(rule, instruction_set)
            except (RuntimeError, OSError, ValueError) as error:
                found = f"rule {rule.name!r} cannot be compiled for the CPU: {error}"
                warnings.warn(found, stacklevel=2)
            _compiled[rule, instruction_set] = found
        return _compiled[rule, instruction_set]


def _number(rule: Rule, instruction_set: str) -> int:
    for kind, given, most in (
        ("states", rule.states, native().max_states),
        ("scalars", rule.scalars, native().max_scalars),
    ):
        if len(given) > most:
            raise RuntimeError(f"it has {len(given)} {kind}, and {most} are the most; use backend='eager'")
    source = _SOURCE % numbered_cpp(rule)
    if (source, instruction_set) not in _numbers:
        library = _library(source, native().kernel_flags()[instruction_set].split())
        kernels = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in ("in_float32", "in_float64")]
        _numbers[source, instruction_set] = native().add_rule(rule.name, len(rule.states), len(rule.scalars), *kernels)
    return _numbers[source, instruction_set]


def _library(source: str, flags: list[str]) -> ctypes.CDLL:
    compiler, version = _compiler(os.environ.get("CXX", ""))
    command = [*compiler, *flags, "-fPIC", "-shared"]
    files = {**native().kernel_headers(), "own_rule.cpp": source}
    key = _digest(json.dumps([files, command, version, __version__, platform.machine()]).encode())
    directory = _cache_directory()
    return _load(directory, key) or _build(files, command, directory, key)


def _load(directory: Path, key: str) -> ctypes.CDLL | None:
    """The cached library. Its name has a digest of its content: loading a damaged one would end the process."""
    with contextlib.suppress(OSError):
        for path in directory.glob(f"{key}-*.so"):
            if path.name == _library_name(key, path.read_bytes()):
                return ctypes.CDLL(str(path))
    return None


def _build(files: dict[str, str], command: list[str], directory: Path, key: str) -> ctypes.CDLL:
    with _workplace(directory) as work:
        for name, text in files.items():
            Path(work, name).write_text(text)
        run = [*command, "own_rule.cpp", "-o", "own_rule.so"]
        done = subprocess.run(run, cwd=work, capture_output=True, text=True, errors="replace")
        if done.returncode:
            said = (done.stderr or done.stdout).strip()[-2000:] or f"exit status {done.returncode}"
            raise RuntimeError(f"`{shlex.join(run)}` failed; set CXX to GCC or Clang, or use backend='eager'\n{said}")
        library = Path(work, "own_rule.so")
        # Another process may build it too; each moves a whole file into place.
        if Path(work).parent == directory:
            library = library.replace(directory / _library_name(key, library.read_bytes()))
        # The file may go once it is loaded.
        return ctypes.CDLL(str(library))


def _workplace(directory: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder in the cache, or elsewhere where the cache cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=directory)
    except OSError:
        return tempfile.TemporaryDirectory()


def _cache_directory() -> Path:
    if chosen := os.environ.get("FUSEDOPT_CACHE"):
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "fusedopt").absolute()


@functools.cache
def _compiler(cxx: str) -> tuple[list[str], str]:
    """The command of the compiler that `setup.py` would use, and its version."""
    if command := shlex.split(cxx):
        if shutil.which(command[0]) is None:
            raise RuntimeError(f"CXX={cxx!r} names no program that can be run; set it to GCC or Clang, or unset it")
        return command, _version([*command])[1]
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            runs, version = _version([path])
            # On a Mac without the developer tools c++ exists, but only to say that they are missing.
            if runs:
                return [path], version
    raise RuntimeError(
        "no C++ compiler found (CXX, c++, g++ or clang++); install one, set CXX to one, or use backend='eager'"
    )


def _version(command: list[str]) -> tuple[bool, str]:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace")
    return done.returncode == 0, done.stdout


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def _library_name(key: str, content: bytes) -> str:
    return f"{key}-{_digest(content)}.so"
