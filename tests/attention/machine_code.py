"""Whether the machine code of a kernel multiplies the numbers in shared memory that its PTX names.

PTXAS 12.8, which Triton brings, may compile two products by `wgmma` with operands at the same place
so that the second reads other memory. An operand is a descriptor of 64 bits, whose low half has the
address over 16. Both texts are evaluated line by line, as far as values follow from the start of
shared memory alone, and then compared half by half.
"""

import re
import subprocess
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile

from triton.backends import nvidia

NVDISASM = Path(nvidia.__file__).parent / "bin/nvdisasm"
START = 0x400  # of shared memory behind what the driver keeps there
HALF, WHOLE = 2**32 - 1, 2**64 - 1
PTX = {
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "or": lambda a, b: a | b,
    "and": lambda a, b: a & b,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "bfe": lambda a, begin, size: a >> begin & (1 << size) - 1,
}
MACHINE = {
    "UMOV": lambda a: a,
    "MOV": lambda a: a,
    "R2UR": lambda a: a,
    "IMAD.U32": lambda a, b, c: a * b + c,
    "IMAD.MOV.U32": lambda a, b, c: a * b + c,
    "USHF.R.U32.HI": lambda a, by, high: high >> by,
    "USGXT.U32": lambda a, size: a & (1 << size) - 1,
    "ULEA": lambda a, b, by: (a << by) + b,
}


def wrong(compiled):
    """Return how many halves of operands were compared, and those that differ, with both values."""
    if "wgmma" not in compiled.asm["ptx"]:
        return 0, []
    return compared(compiled.asm["ptx"], compiled.asm["cubin"])


@cache
def compared(ptx, cubin):
    """Return the same for both texts of a kernel."""
    named, used = operands_of_ptx(ptx), operands_of_machine(cubin)
    assert len(named) == len(used), "a product is not in both texts"
    pairs = [
        (ours, theirs)
        for product in zip(named, used, strict=True)
        for ours, theirs in zip(*product, strict=True)
        if ours is not None and theirs is not None
    ]
    return len(pairs), [(hex(a), hex(b)) for a, b in pairs if a != b]


def operands_of_ptx(text):
    """Return the halves of both operands of each product, None where unknown or in registers."""
    known, found = {}, []

    def value(word):
        word = word.strip()
        if word == "global_smem":
            return START
        return int(word) if re.fullmatch(r"-?\d+", word) else known.get(word)

    for line in map(str.strip, text.splitlines()):
        if line.startswith("wgmma.mma_async"):
            _, left, right = re.match(
                r"\S+ (\{[^}]*\}), (\{[^}]*\}|%rd\d+), (%rd\d+)", line
            ).groups()
            found.append([*halves(known.get(left)), *halves(known.get(right))])
            continue
        match = re.match(r"(?:@!?%p\d+ )?([a-z0-9]+)\S*\s+(%r\w+)\b(?:\|%p\d+)?,? ?(.*);", line)
        if match:
            name, target, words = match.groups()
            mask = WHOLE if target.startswith("%rd") else HALF
            numbers = [value(word) for word in words.split(",")]
            function = PTX.get(name)
            certain = function and None not in numbers and not line.startswith("@")
            fits = certain and function.__code__.co_argcount == len(numbers)
            known[target] = function(*(n & mask for n in numbers)) & mask if fits else None
    return found


def halves(number):
    """Return the low and the high half of a descriptor."""
    return (None, None) if number is None else (number & HALF, number >> 32)


def operands_of_machine(cubin):
    """Return the same of the machine code."""
    known, carries, found = {"URZ": 0, "RZ": 0}, {}, []

    def value(word):
        sign, word = (-1, word[1:]) if word.startswith("-") else (1, word)
        number = int(word, 16) if word.startswith("0x") else known.get(word.removesuffix(".reuse"))
        return None if number is None else sign * number

    def pair(word):
        """Return the number of 64 bits in a register and the next, or written out."""
        sign, word = (-1, word[1:]) if word.startswith("-") else (1, word)
        if word.startswith("0x"):
            return sign * int(word, 16)
        low, high = known.get(word), 0 if word == "URZ" else known.get(after(word))
        return None if None in (low, high) else sign * (low | high << 32)

    def after(register):
        return re.sub(r"\d+", lambda number: str(int(number[0]) + 1), register)

    for condition, name, text in instructions(cubin):
        words = [word.strip() for word in text.split(",")]
        if name.startswith("HGMMA"):
            first = int(re.search(r"gdesc\[UR(\d+)\]", text)[1])
            four = [known.get(f"UR{first + n}") for n in range(4)]
            in_registers = re.match(r"R\d+, R\d+, gdesc", text)
            found.append([None, None, *four[2:]] if in_registers else four)
            continue
        target, *words = words
        if not re.fullmatch(r"U?R\d+", target):
            continue
        carry = [word for word in words if re.fullmatch(r"UP\d", word)]
        words = [word for word in words if not re.fullmatch(r"!?U?PT?\d?", word)]
        wide = name == "UIADD3.64"
        numbers = [pair(word) if wide else value(word) for word in words]
        total = None
        if condition or (None in numbers and name != "S2UR"):
            pass
        elif name == "S2UR":
            total = 0 if "SR_CgaCtaId" in words else None
        elif wide or name == "UIADD3":
            total = sum(numbers)
        elif name == "UIADD3.X" and carries.get(carry[0]) is not None:
            total = sum(numbers) + carries[carry[0]]
        elif name in MACHINE:
            total = MACHINE[name](*numbers[: MACHINE[name].__code__.co_argcount])
        elif name == "ULOP3.LUT":
            total = looked_up(*numbers[:4])
        if name == "UIADD3" and carry:
            carries[carry[0]] = None if total is None else sum(n & HALF for n in numbers) >> 32
        known[target] = None if total is None else total & HALF
        if wide:
            known[after(target)] = None if total is None else total >> 32 & HALF
        elif ".64" in name or ".WIDE" in name:
            known[after(target)] = None
    return found


def instructions(cubin):
    """Yield the condition, if any, the name and the operands of each instruction."""
    with NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run(
            [NVDISASM, "-ndf", "-c", file.name], capture_output=True, text=True, check=True
        )
    line = r"/\*[0-9a-f]{4,5}\*/\s+(@!?U?P\d+ )?([A-Za-z0-9_.]+) ([^;]*);"
    yield from (match.groups() for match in re.finditer(line, run.stdout))


def looked_up(a, b, c, table):
    """Return a function of three bits, given by a table of eight, for 32 bits at once."""
    each = ((a >> n & 1) << 2 | (b >> n & 1) << 1 | c >> n & 1 for n in range(32))
    return sum((table >> place & 1) << n for n, place in enumerate(each))
