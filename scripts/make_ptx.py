#!/usr/bin/env python3
"""Compiles every .cu file of the kernels to the PTX that the program embeds; no GPU, no driver and no toolkit are needed.

    pip install nvidia-cuda-nvrtc-cu12==12.1.105
    scripts/make_ptx.py                    writes crates/kernels/ptx/*.ptx
    scripts/make_ptx.py --check            compiles and compares with what is there
    scripts/make_ptx.py --architectures    compiles to machine code for sm_80, sm_89 and sm_90 and prints registers and spills

NVRTC decides the PTX version and with it the oldest driver that takes the result: 12.1 writes PTX 8.1, for drivers from
530 on. The code is for compute capability 8.0; drivers compile it for what they find.
"""

import argparse
import ctypes
import hashlib
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
SRC = ROOT / "crates/kernels/src"
PTX = ROOT / "crates/kernels/ptx"
FLAGS = ["--std=c++17", f"--include-path={SRC}"]
TARGET = "--gpu-architecture=compute_80"


def library():
    """NVRTC as the wheel brings it, or as the system finds it."""
    places = [pathlib.Path(entry) / "nvidia/cuda_nvrtc/lib/libnvrtc.so.12" for entry in sys.path if entry]
    found = [str(place) for place in places if place.exists()] or ["libnvrtc.so.12"]
    return ctypes.CDLL(found[0])


class Nvrtc:
    def __init__(self):
        self.lib = library()
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def compile(self, source, name, flags, result):
        """The PTX (or CUBIN) of a source, and the compiler's words."""
        program = ctypes.c_void_p()
        self.call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        options = (ctypes.c_char_p * len(flags))(*[flag.encode() for flag in flags])
        code = self.lib.nvrtcCompileProgram(program, len(flags), options)
        log = self.text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip("\0\n").rstrip()
        if code != 0:
            sys.exit(f"{name} does not compile:\n{log}")
        made = self.text(program, f"nvrtcGet{result}Size", f"nvrtcGet{result}", binary=result == "CUBIN")
        self.lib.nvrtcDestroyProgram(ctypes.byref(program))
        return made, log

    def call(self, function, *arguments):
        code = getattr(self.lib, function)(*arguments)
        if code != 0:
            sys.exit(f"{function} failed with {code}")

    def text(self, program, size, get, binary=False):
        length = ctypes.c_size_t()
        self.call(size, program, ctypes.byref(length))
        space = ctypes.create_string_buffer(length.value)
        self.call(get, program, space)
        return space.raw if binary else space.raw.rstrip(b"\0").decode()


def modules():
    """(name, source file) of every module that the program embeds."""
    table = (SRC / "cuda/module.rs").read_text()
    return re.findall(r'^    "(\w+)": "([\w/.]+\.cu)",$', table, re.M)


def with_includes(path):
    """The file and what it includes, in order; what the sum of a module is taken over."""
    parts = [path.read_bytes()]
    for included in re.findall(r'^#include "([\w/.]+)"$', path.read_text(), re.M):
        parts += with_includes(SRC / included) if (SRC / included).exists() else []
    return parts


def digest(path):
    return hashlib.sha256(b"".join(with_includes(path))).hexdigest()


def embedded(nvrtc, source):
    """The PTX file of a module: its sources' sum, the compiler's version, and the code without remarks."""
    path = SRC / source
    made, log = nvrtc.compile(path.read_text(), source, FLAGS + [TARGET], "PTX")
    if log:
        print(f"{source}: {log}")
    code = "\n".join(line for line in made.splitlines() if line.strip() and not line.lstrip().startswith("//"))
    return f"// sources sha256 {digest(path)}\n// nvrtc {nvrtc.version}\n{code}\n"


def architectures(nvrtc):
    for name, source in modules():
        for architecture in ["sm_80", "sm_89", "sm_90"]:
            flags = FLAGS + [f"--gpu-architecture={architecture}", "--ptxas-options=-v"]
            _, log = nvrtc.compile((SRC / source).read_text(), source, flags, "CUBIN")
            kernels = re.findall(
                r"Compiling entry function '(\w+)'.*?\n.*?\n\D*(\d+) bytes stack frame, (\d+) bytes spill stores"
                r".*?\n.*?Used (\d+) registers(?:.*?, (\d+) bytes smem)?", log)
            for kernel, _stack, spill, registers, shared in kernels:
                print(f"{name:24} {architecture}  {kernel:44} {registers:>3} registers {spill:>5} bytes spilled {shared or 0:>6} shared")
            if not kernels:
                print(f"{name:24} {architecture}  compiled {log}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files that are there")
    parser.add_argument("--architectures", action="store_true", help="compile to machine code and print its resources")
    parser.add_argument("modules", nargs="*", help="the modules to make; all where none is named")
    options = parser.parse_args()
    nvrtc = Nvrtc()
    if options.architectures:
        return architectures(nvrtc)
    stale = []
    for name, source in modules():
        if options.modules and name not in options.modules:
            continue
        made, path = embedded(nvrtc, source), PTX / f"{name}.ptx"
        if options.check and (not path.exists() or path.read_text() != made):
            stale.append(name)
        elif not options.check:
            PTX.mkdir(exist_ok=True)
            path.write_text(made)
    if stale:
        sys.exit(f"not current: {', '.join(stale)}; run scripts/make_ptx.py")


if __name__ == "__main__":
    main()
