"""Cycles of a Pallas TPU kernel from the instruction bundles that the compiler makes of it.

libtpu can be asked to write the very long instruction words of a kernel as text: a bundle issues in a cycle, and a
latency that nothing fills is an empty bundle. How often a bundle runs is decided by the kernel's scalar side: counters
of the grid, block indices, and the scalars that are prefetched (which blocks to visit). So the scalar instructions are
*run*, on integers, and the vector ones are only counted:

    cycles = bundles issued + stalls waiting for copies

A copy takes its bytes over the bandwidth of HBM, one copy after the other, and a fixed latency. These two are the only
numbers assumed. A branch that depends on anything unknown is refused, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path

from jaxllm.plan.scalar_unit import Machine, Number, Scalars, Undecided, function_of, value_of
from jaxllm.plan.topology import Chip

STAGE = "packed-bundles-post-ra"  # the last stage whose text still has the empty bundles
DELAY_SLOTS = 4  # bundles after a branch that run whether it is taken or not
COPY_LATENCY = 0.4e-6  # seconds, assumed
HBM_EFFICIENCY = 0.9  # of the published bandwidth, assumed
CORE = "#allocation0"  # where a kernel finds the number of the core it runs on; each core does its share of the grid
MOST_BLOCKS = 20_000_000  # basic blocks run before a kernel is given up


@dataclass(frozen=True)
class Timing:
    """Cycles of one run of a kernel: bundles issued, and stalls. copied: bytes between HBM and the chip."""

    issued: int
    stalled: float
    copied: int

    @property
    def cycles(self) -> float:
        """From the first bundle to the last."""
        return self.issued + self.stalled


def flags(folder: Path) -> str:
    """What LIBTPU_INIT_ARGS must hold, before libtpu is loaded, for bundles to be written into `folder`."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*{STAGE}.*"


def dumped(files: Iterable[Path], kernel: str) -> str | None:
    """The bundles of a kernel, by a part of its name, among the files that libtpu wrote; None when they are missing."""
    found = (path for path in files if path.name.endswith(f"-{STAGE}.txt") and kernel in path.name)
    return next((path.read_text(errors="replace") for path in found), None)


def timing(text: str, scalars: Scalars, chip: Chip) -> Timing:
    """Run the scalar side of a kernel's bundles. scalars: what its prefetched operands hold.

    Raises Undecided when a branch or a copy depends on anything else, ValueError when the text holds no bundles.
    """
    rate = chip.bandwidth * HBM_EFFICIENCY / chip.clock / chip.cores
    machine, blocks = Machine(scalars, rate, COPY_LATENCY * chip.clock), _blocks(_read(text))
    machine.store(machine.place(CORE), 0)
    at, again = 0, False
    for _ in range(MOST_BLOCKS):
        taken = _run(machine, blocks[at], again)
        at, again = (blocks[at].target, blocks[at].target <= at) if taken else (at + 1, False)
        if at == len(blocks):
            return Timing(machine.issued, machine.stalled, machine.copied)
    raise Undecided(f"bundles: more than {MOST_BLOCKS:,} basic blocks were run; the kernel is too long to be timed")


# --------------------------------------------------------------------------------------------------------- reading

_BUNDLE = re.compile(r"^ *(?:0x)?([0-9a-f]+) *(LB|LH|LE|PB|PF|CT)? *: *(?:> ?)*\{(.*)$")
_INSTRUCTION = re.compile(r"%(\S+) = (\S+)\s*(.*)", re.S)
_GUARD = re.compile(r"\(\s*(!?%[sp]\d+_[sp]\d+)\s*(?:,\s*([^()]*?))?\s*\)\s*,?")
_VALUE = re.compile(r"([sp]\d+)_[sp]\d+")
_SCALAR = re.compile(r"s[a-z]|p(?:mov|and|nand|or|nor|xor|neg)\b|int_to_ptr|inlined_call_operand|dma\.|scalar_")


@dataclass(frozen=True)
class _Instruction:
    """result: the value it defines, None for an effect.  guard: runs only then; `otherwise` is the result if not."""

    result: str | None
    kind: str
    operands: tuple[str, ...]
    guard: str | None
    otherwise: str | None

    @property
    def uses(self) -> set[str]:
        """Values that it reads."""
        texts = (*self.operands, self.guard or "", self.otherwise or "")
        return {name for text in texts for name in _VALUE.findall(text)}


@dataclass(frozen=True)
class _Bundle:
    number: int
    loop: bool
    instructions: list[_Instruction]


def _read(text: str) -> list[_Bundle]:
    """The bundles, with their scalar instructions, copies and waits; vector instructions are left out."""
    bundles: list[_Bundle] = []
    for entry in _entries(re.sub(r"/\*.*?\*/", "", text, flags=re.S)):
        body = entry[3].rpartition("}")[0]
        made = [_instruction(part.strip()) for part in body.split(";;")]
        bundles.append(_Bundle(int(entry[1], 16), entry[2] in ("LB", "LH"), [i for i in made if i is not None]))
    if not bundles:
        raise ValueError(f"bundles: the text holds none; it begins {text[:60]!r}")
    return bundles


def _entries(text: str) -> list[re.Match[str]]:
    """One match per bundle; an instruction may go on in the lines that follow."""
    joined: list[str] = []
    for line in text.splitlines():
        if _BUNDLE.match(line):
            joined.append(line)
        elif joined:
            joined[-1] += " " + line
    return [match for line in joined if (match := _BUNDLE.match(line))]


def _instruction(text: str) -> _Instruction | None:
    match = _INSTRUCTION.fullmatch(text)
    if match is None or not _SCALAR.match(match[2]):
        return None
    rest = re.sub(r"\[(?:thread|resolvable):[^\]]*\]\s*", "", match[3])
    guard = _GUARD.search(rest)
    if guard is not None:
        rest = rest[: guard.start()] + rest[guard.end() :]
    result = match[1] if _VALUE.fullmatch(match[1]) else None
    operands = tuple(part.strip() for part in re.split(r",(?![^\[]*\])", rest) if part.strip())
    condition, otherwise = guard.groups() if guard else (None, None)
    return _Instruction(result and result.partition("_")[0], match[2], operands, condition, otherwise)


# -------------------------------------------------------------------------------------------------- from text to code

Run = Callable[["Machine"], None]


@dataclass
class _Block:
    """Bundles that run one after the other.

    phis: value -> (on entry, on the way back).  steps: what they do, at which bundle.  branch: guard of the jump at its
    end, None for no jump.  target: the block it leads to.
    """

    bundles: int
    phis: dict[str, tuple[str, ...]] = field(default_factory=dict)
    steps: list[tuple[int, Run]] = field(default_factory=list)
    branch: Callable[[Machine], Number] | None = None
    target: int = 0


def _blocks(bundles: list[_Bundle]) -> list[_Block]:
    """Basic blocks: they begin at loop heads, at the targets of jumps, and after the delay slots of jumps."""
    index = {bundle.number: i for i, bundle in enumerate(bundles)}
    jumps = {i: jump for i, b in enumerate(bundles) for jump in b.instructions if jump.kind.startswith("sbr")}
    targets = {i: index[_target(jump)] for i, jump in jumps.items()}
    heads = {i for i, bundle in enumerate(bundles) if bundle.loop}
    starts = sorted({0, *heads, *targets.values(), *(i + DELAY_SLOTS + 1 for i in jumps)} & set(range(len(bundles))))
    number = {start: n for n, start in enumerate(starts)}
    sources = _sources(bundles)
    blocks = []
    for start, stop in zip(starts, [*starts[1:], len(bundles)], strict=True):
        block = _Block(stop - start)
        for i in range(start, stop):
            block.phis |= {str(p.result): _names(p) for p in bundles[i].instructions if p.kind == "sphi"}
            block.steps += [(i - start, run) for run in _steps(bundles[i], sources)]
            if i in jumps:
                block.branch, block.target = value_of(jumps[i].guard or "1"), number[targets[i]]
        blocks.append(block)
    return blocks


def _target(jump: _Instruction) -> int:
    found = re.search(r"bundleno = (\d+)", " ".join(jump.operands))
    if found is None:
        raise ValueError(f"bundles: a jump without a target: {jump.operands!r}")
    return int(found[1])


def _names(phi: _Instruction) -> tuple[str, ...]:
    return tuple(name for text in phi.operands for name in _VALUE.findall(text))


def _sources(bundles: list[_Bundle]) -> dict[str, int]:
    """Value -> the kernel's operand whose address it is."""
    found: dict[str, int] = {}
    for bundle in bundles:
        for i in bundle.instructions:
            text = " ".join(i.operands)
            if i.kind.startswith("inlined_call_operand") and (number := re.search(r"index: (\d+)", text)):
                found[str(i.result)] = int(number[1])
            elif i.kind.startswith(("sshll", "int_to_ptr")) and i.result and (base := _VALUE.match(i.operands[0][1:])):
                found |= {i.result: found[base[1]]} if base[1] in found else {}
    return found


def _steps(bundle: _Bundle, sources: dict[str, int]) -> list[Run]:
    """What a bundle does: values in the order of their uses, then what touches memory and copies."""
    values = {i.result: i for i in bundle.instructions if i.result is not None and i.kind != "sphi"}
    graph = {result: i.uses & values.keys() - {result} for result, i in values.items()}
    runs = [_define(values[result], sources) for result in TopologicalSorter(graph).static_order()]
    return runs + [run for i in bundle.instructions if i.result is None and (run := _effect(i, sources)) is not None]


def _define(i: _Instruction, sources: dict[str, int]) -> Run:
    """The result of an instruction, kept under its name; None when it cannot be known."""
    name, guard, otherwise = str(i.result), value_of(i.guard or "1"), value_of(i.otherwise or "unknown")
    compute = _compute(i, sources)

    def run(machine: Machine) -> None:
        decided = guard(machine)
        machine.values[name] = None if decided is None else compute(machine) if decided else otherwise(machine)

    return run


def _compute(i: _Instruction, sources: dict[str, int]) -> Callable[[Machine], Number]:
    if i.kind.startswith("inlined_call_operand"):
        number = sources.get(str(i.result))
        if number is None or not i.kind.endswith(("<no", ".")):  # an address; with "no memory space" a value
            return lambda machine: None
        return lambda machine: machine.scalars[number][0] if number in machine.scalars else None
    operands = [value_of(text) for text in i.operands]
    if i.kind == "sld":
        return lambda machine: machine.memory.get(operands[0](machine))
    function = function_of(i.kind)
    if function is None:
        return lambda machine: None
    return lambda machine: function(*(operand(machine) for operand in operands))


def _effect(i: _Instruction, sources: dict[str, int]) -> Run | None:
    """A store, a copy, or a wait; None for what takes no part in timing."""
    guard = value_of(i.guard or "1")
    if i.kind == "sst":
        address, value = _address(i.operands[0])

        def store(machine: Machine) -> None:
            decided = guard(machine)
            if decided is None or decided:
                machine.store(address(machine), None if decided is None else value(machine))

        return store
    if not i.kind.startswith("dma."):
        return None
    if i.kind.startswith("dma.done.wait"):
        flag, size = value_of(i.operands[0]), value_of(i.operands[1])
        return lambda machine: machine.wait(flag(machine), size(machine)) if machine.decide(guard, "a wait") else None
    _, size, to, flag = map(value_of, i.operands[:4])
    source = sources.get(next(iter(_VALUE.findall(i.operands[0])), "")) if i.kind.endswith("to_smem") else None
    outside = "hbm" in i.kind or i.kind == "dma.general"

    def copy(machine: Machine) -> None:
        if machine.decide(guard, "a copy"):
            machine.copy(size(machine), flag(machine), outside)
            machine.fetch(source, to(machine))

    return copy


def _address(text: str) -> tuple[Callable[[Machine], Number], Callable[[Machine], Number]]:
    """Of "[smem:[place]] value": the place and the value."""
    place, _, value = text.rpartition(" ")
    return value_of(place), value_of(value)


# --------------------------------------------------------------------------------------------------------- running


def _run(machine: Machine, block: _Block, again: bool) -> bool:
    """Run a block, entered from its own loop (`again`) or not; whether its jump is taken."""
    machine.values |= {name: machine.values.get(of[-1 if again else 0]) for name, of in block.phis.items()}
    for offset, step in block.steps:
        machine.offset = offset
        step(machine)
    machine.issued, machine.offset = machine.issued + block.bundles, 0
    return block.branch is not None and machine.decide(block.branch, "a jump")
