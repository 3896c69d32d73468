"""Builds the native module with CMake and Ninja; everything else about the package is in pyproject.toml.

FUSEDOPT_NATIVE=auto (default) builds it where there is a C++ compiler, 1 insists on it, 0 leaves it out.
FUSEDOPT_CUDA is the same for the CUDA kernels in it, where there is nvcc, and FUSEDOPT_CUDA_ARCHITECTURES are those
they are compiled for.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = Extension("fusedopt._native", sources=[])


def find_compiler() -> str | None:
    """The C++ compiler CMake will use, or None where there is none. A CXX that cannot be run is an error."""
    if cxx := os.environ.get("CXX"):
        if shutil.which(shlex.split(cxx)[0]) is None:
            raise SystemExit(
                f"fusedopt: CXX={cxx!r} names no program that can be run; set it to a C++ compiler, unset it, "
                "or set FUSEDOPT_NATIVE=0 to install without the native backend."
            )
        return cxx
    for name in ("c++", "g++", "clang++"):
        # Run it: on a Mac without the developer tools c++ exists, but only to say that they are missing.
        if (path := shutil.which(name)) and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    return None


def find_nvcc() -> str | None:
    """CUDA's compiler: on PATH, in CUDA_HOME, or where CUDA is installed; None where none is found or wanted."""
    choice = os.environ.get("FUSEDOPT_CUDA") or "auto"
    if choice not in ("auto", "1", "0"):
        raise SystemExit(f"fusedopt: FUSEDOPT_CUDA={choice!r} is not understood; use auto, 1 or 0.")
    if choice == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes if home)])
    found = shutil.which("nvcc", path=path)
    if found is None and choice == "1":
        raise SystemExit(
            "fusedopt: FUSEDOPT_CUDA=1, but no nvcc found (PATH, CUDA_HOME or /usr/local/cuda); install CUDA's toolkit."
        )
    return found


def find_tool(name: str) -> str:
    """Path of a build tool: this interpreter's own first, then PATH (which is where pip's isolated build puts it)."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    if found := shutil.which(name, path=path):
        return found
    raise SystemExit(f"fusedopt: building the native module needs {name}; `pip install {name}` provides it.")


class BuildNative(build_ext):
    compiler_command: str | None = None

    def run(self) -> None:
        choice = os.environ.get("FUSEDOPT_NATIVE") or "auto"
        if choice not in ("auto", "1", "0"):
            raise SystemExit(f"fusedopt: FUSEDOPT_NATIVE={choice!r} is not understood; use auto, 1 or 0.")
        self.compiler_command = None if choice == "0" else find_compiler()
        if self.compiler_command is not None:
            super().run()
            return
        missing = "no C++ compiler found (CXX, c++, g++ or clang++)"
        if choice == "1":
            raise SystemExit(f"fusedopt: FUSEDOPT_NATIVE=1, but {missing}; install one, or set CXX to one.")
        print(
            f"fusedopt: {'FUSEDOPT_NATIVE=0' if choice == '0' else missing}: installing without the native module; "
            "optimizers run on the eager backend, correctly but slowly.",
            file=sys.stderr,
        )
        # An earlier build's module must not stay behind and serve after all.
        stale = Path(self.get_ext_fullpath(NATIVE.name))
        stale.unlink(missing_ok=True)
        self.extensions = []

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name))
        build = ROOT / "build" / "native" / target.name.removesuffix(sysconfig.get_config_var("SHLIB_SUFFIX"))
        configure = [
            find_tool("cmake"),
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFUSEDOPT_NVCC={find_nvcc() or ''}",
            f"-DFUSEDOPT_CUDA_REQUIRED={os.environ.get('FUSEDOPT_CUDA') == '1'}",
        ]
        if architectures := os.environ.get("FUSEDOPT_CUDA_ARCHITECTURES"):
            configure.append(f"-DFUSEDOPT_CUDA_ARCHITECTURES={architectures}")
        self.configure_afresh(build, configure)
        for command in (configure, [configure[0], "--build", str(build)]):
            # What CMake and the compiler say has been printed; a traceback of this file would only bury it.
            if subprocess.run(command, env={**os.environ, "CXX": self.compiler_command}).returncode:
                raise SystemExit(
                    f"fusedopt: {self.compiler_command} could not build the native module, as said above; "
                    "FUSEDOPT_NATIVE=0 installs without it."
                )
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(build / target.name), str(target))

    def configure_afresh(self, build: Path, configure: list[str]) -> None:
        """Empty the persistent build directory unless the last build there had these very settings.

        CMake keeps the first compiler and flags it saw, and the paths of an isolated build's tools, which are gone.
        """
        variables = {name: os.environ.get(name) for name in ("CXXFLAGS", "CPPFLAGS", "LDFLAGS")}
        settings = json.dumps({"configure": configure, "CXX": self.compiler_command, **variables}, indent=1)
        record = build / "settings.json"
        if record.is_file() and record.read_text() == settings:
            return
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        record.write_text(settings)


setup(ext_modules=[NATIVE], cmdclass={"build_ext": BuildNative})
