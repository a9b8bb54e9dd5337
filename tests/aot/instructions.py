"""Reads memory and tensor-core instructions out of the PTX and the machine code of a compiled CUDA file."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Access:
    """A load or store: its kind ("shared store"), bytes of a thread, name, and the source line it was inlined from."""

    kind: str
    bytes: int
    name: str
    file: str
    line: int


@dataclass
class Instructions:
    accesses: list[Access] = field(default_factory=list)
    tensor_core: int = 0


# By symbol and architecture.
Found = dict[tuple[str, int], Instructions]

PTX_ACCESS = re.compile(
    r"\b((ld|st)(?:\.volatile|\.relaxed|\.weak)?(?:\.(shared|global|local|param|const)(?:::\w+)?)?"
    r"(?:\.(?!v[248])[a-z]\w*(?:::\w+)?)*?(?:\.v([248]))?\.[bfsu](8|16|32|64|128))\s"
)
MACHINE_SPACES = {"S": "shared", "G": "global", "L": "local", "": "generic"}
MACHINE_ACCESS = re.compile(r"\b((LD|ST)([SGL]?)(?![A-Z])((?:\.\w+)*))\s")
COPY = re.compile(r"\b(LDGSTS((?:\.\w+)*))\s")


def run(tool: str, *arguments: str | Path, folder: str | None = None) -> str:
    """The output of one of NVIDIA's tools. Triton ships them; not every CUDA toolkit does."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    done = subprocess.run([tools / tool, *arguments], capture_output=True, text=True, check=True, cwd=folder)
    return done.stdout


def of_ptx(compiled: Path) -> Found:
    found: Found = {}
    text = run("cuobjdump", "-ptx", compiled)
    for part in re.split(r"^Fatbin ptx code:$", text, flags=re.MULTILINE)[1:]:
        architecture = int(re.search(r"^arch = sm_(\d+)", part, re.MULTILINE)[1])
        files = dict(re.findall(r'^\.file\s+(\d+) "([^"]*)"', part, re.MULTILINE))
        file, line, here = "", 0, Instructions()
        for text_line in part.splitlines():
            if entry := re.search(r"\.entry (\w+)", text_line):
                here = found.setdefault((entry[1], architecture), Instructions())
            elif place := re.match(r"\s*\.loc\s+(\d+) (\d+)", text_line):
                file, line = os.path.basename(files.get(place[1], "")), int(place[2])
            elif access := PTX_ACCESS.search(text_line):
                name, verb, space, count, bits = access.groups()
                if space not in ("param", "const"):
                    kind = f"{space or 'generic'} {'load' if verb == 'ld' else 'store'}"
                    here.accesses.append(Access(kind, int(count or 1) * int(bits) // 8, name, file, line))
    return found


def of_machine_code(compiled: Path) -> Found:
    found: Found = {}
    with tempfile.TemporaryDirectory() as folder:
        run("cuobjdump", "-xelf", "all", compiled.resolve(), folder=folder)
        for cubin in Path(folder).glob("*.cubin"):
            architecture = int(re.search(r"sm_(\d+)", cubin.name)[1])
            for symbol, instructions in disassembled(run("nvdisasm", "-gi", "-c", cubin)):
                found[symbol, architecture] = instructions
    return found


def disassembled(text: str) -> Iterator[tuple[str, Instructions]]:
    """Each function's name and instructions, from what `nvdisasm -gi -c` prints."""
    file, line, innermost = "", 0, True
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        here = Instructions()
        for text_line in part.splitlines():
            if place := re.match(r'\s*//## File "([^"]*)", line (\d+)', text_line):
                # The lines from which it was inlined follow the innermost one.
                if innermost:
                    file, line = os.path.basename(place[1]), int(place[2])
                innermost = False
                continue
            innermost = True
            if "@!PT" in text_line:  # never runs: ptxas puts such loads before a cp.async
                continue
            if access := MACHINE_ACCESS.search(text_line):
                name, verb, space, suffix = access.groups()
                kind = f"{MACHINE_SPACES[space]} {'load' if verb == 'LD' else 'store'}"
                here.accesses.append(Access(kind, width(suffix), name, file, line))
            elif copy := COPY.search(text_line):
                here.accesses.append(Access("copy", width(copy[2]), copy[1], file, line))
            # HFMA2.MMA is none of them.
            elif re.search(r"(?<![.\w])\w*MMA[.\s]", text_line):
                here.tensor_core += 1
        yield part.partition(":")[0], here


def width(suffix: str) -> int:
    """Bytes of an access, from the suffix of its instruction."""
    found = re.search(r"\.[US]?(8|16|32|64|128|256)(?!\w)", suffix)
    return int(found[1]) // 8 if found else 4
