"""PTX text to functions: names resolved, nothing interpreted yet.

1. Comments go, lines stay, so that every instruction knows its line.
2. A module is variables and functions; a function is declarations, labels and instructions in one flat list.
3. A nested `{ }` (inline assembly has them) may declare names again: at its end its names get a suffix of their own.

Left out on purpose, and refused: branch tables, initializers that hold addresses, several variables in one declaration.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

WIDTH_BYTES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4}
WIDTH_BYTES |= {"s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}
NAME = r"[%$A-Za-z_][\w$]*"

_DIRECTIVE_OF_A_LINE = re.compile(r"\.(version|target|address_size|file|loc)\b[^\n]*")
_LINKAGE = re.compile(r"\.(visible|extern|weak|common)\b")
_FUNCTION = re.compile(
    rf"\.(entry|func)\b\s*(?P<noreturn>\.noreturn\s*)?(?:\((?P<results>[^)]*)\))?\s*(?P<name>{NAME})\s*"
    r"(?:\((?P<parameters>[^)]*)\))?(?P<directives>[^{;]*)(?P<end>[{;])"
)
_VARIABLE = re.compile(
    rf"\.(?P<space>global|const|shared|local|param)\b(?P<attributes>(?:\s*\.\w+(?:\s+\d+(?!\w))?)*)\s+"
    rf"(?P<name>{NAME})\s*(?P<extents>(?:\[\s*\d*\s*\]\s*)*)(?:=\s*(?P<initial>[^;]*))?$"
)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_WORD = re.compile(NAME)
_LABEL = re.compile(rf"({NAME})\s*:(?!:)")
_GUARD = re.compile(rf"@\s*(!?)\s*({NAME})\s+(.*)", re.S)


class PtxSyntaxError(ValueError):
    """The text is not the PTX that this parser knows."""


class Variable(NamedTuple):
    """A variable of a state space, in bytes; n_bytes 0 is an `extern` array whose size the launch gives."""

    name: str
    space: str
    element: str
    align: int
    n_bytes: int
    initial: tuple[int, ...]


class Instruction(NamedTuple):
    """One instruction: `@!guard opcode operands`, and where it stood."""

    line: int
    text: str
    guard: str
    is_negated: bool
    opcode: str
    operands: tuple[str, ...]


@dataclass
class Function:
    """A kernel or device function; `labels` point into `body`, `registers` map a name to its declared type."""

    name: str
    is_entry: bool
    parameters: list[Variable]
    results: list[Variable]
    max_threads: int = 0
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    body: list[Instruction] = field(default_factory=list)


class Module(NamedTuple):
    variables: list[Variable]
    functions: dict[str, Function]


class _Scope(NamedTuple):
    first_instruction: int
    names: list[str]


def parse(text: str) -> Module:
    """All functions and variables of a PTX text. Raises PtxSyntaxError with the line."""
    text = _without_comments(text)
    variables: list[Variable] = []
    functions: dict[str, Function] = {}
    position = _skip(text, 0)
    while position < len(text):
        if found := (_DIRECTIVE_OF_A_LINE.match(text, position) or _LINKAGE.match(text, position)):
            position = found.end()
        elif found := _FUNCTION.match(text, position):
            function, position = _declared(found), found.end()
            if found["end"] == "{":
                position = _parse_body(text, position, function)
                functions[function.name] = function
        else:
            end = text.find(";", position)
            if end < 0:
                raise PtxSyntaxError(f"line {_line(text, position)}: {text[position : position + 80]!r}")
            statement = text[position:end].strip()
            if not statement.startswith(".pragma"):
                variables.append(_variable(statement, _line(text, position)))
            position = end + 1
        position = _skip(text, position)
    return Module(variables, functions)


def split_operands(text: str) -> tuple[str, ...]:
    """Operands between commas, those inside `{}`, `[]` and `()` kept together."""
    operands, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            operands.append(text[start:position].strip())
            start = position + 1
    last = text[start:].strip()
    return (*operands, last) if last else tuple(operands)


def _without_comments(text: str) -> str:
    blank = lambda found: re.sub(r"[^\n]", " ", found.group())  # noqa: E731
    return re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.S)


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _declared(found: re.Match[str]) -> Function:
    def listed(names: str | None) -> list[Variable]:
        return [_variable(each.strip(), 0) for each in (names or "").split(",") if each.strip()]

    limit = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", found["directives"])
    threads = 0
    if limit:
        threads = int(limit[1]) * int(limit[2] or 1) * int(limit[3] or 1)
    return Function(
        found["name"], found[1] == "entry", listed(found["parameters"]), listed(found["results"]), max_threads=threads
    )


def _variable(statement: str, line: int) -> Variable:
    found = _VARIABLE.match(statement)
    # A result or parameter of a device function may be a register.
    if statement.startswith(".reg"):
        kind, name = statement.split()[1:3]
        return Variable(name, "reg", kind[1:], 1, WIDTH_BYTES.get(kind[1:], 1), ())
    if not found:
        raise PtxSyntaxError(f"line {line}: not a variable: {statement!r}")
    attributes = found["attributes"]
    elements = [kind for kind in re.findall(r"\.(\w+)", attributes) if kind in WIDTH_BYTES]
    if len(elements) != 1:
        raise PtxSyntaxError(f"line {line}: not a variable: {statement!r}")
    width = WIDTH_BYTES[elements[0]]
    n_bytes = width
    if vector := re.search(r"\.v([248])\b", attributes):
        n_bytes *= int(vector[1])
    for extent in re.findall(r"\[\s*(\d*)\s*\]", found["extents"]):
        n_bytes *= int(extent or 0)
    aligned = re.search(r"(?<!ptr)\s*\.align\s+(\d+)", re.sub(r"\.ptr.*", "", attributes))
    initial = ()
    if found["initial"]:
        words = found["initial"].replace("{", " ").replace("}", " ").replace(",", " ").split()
        if not all(re.fullmatch(r"-?\d\w*", word) for word in words):
            raise PtxSyntaxError(f"line {line}: an initializer that is not all numbers: {found['name']}")
        values = [int(word[2:], 16) if re.match("0[fd]", word) else int(word.rstrip("U"), 0) for word in words]
        initial = tuple(byte for value in values for byte in (value % (1 << 8 * width)).to_bytes(width, "little"))
    return Variable(found["name"], found["space"], elements[0], int(aligned[1]) if aligned else width, n_bytes, initial)


def _parse_body(text: str, position: int, function: Function) -> int:
    """Read statements up to the function's closing brace; returns the position after it."""
    scopes = [_Scope(0, [])]
    n_scopes = 0
    while scopes:
        position = _skip(text, position)
        if position >= len(text):
            raise PtxSyntaxError(f"function {function.name} has no end")
        if text[position] == "{":
            scopes.append(_Scope(len(function.body), []))
            position += 1
        elif text[position] == "}":
            n_scopes += 1
            scope = scopes.pop()
            if scopes:
                _rename(function, scope, f"$scope{n_scopes}")
            position += 1
        elif text[position] == ";":
            position += 1
        elif found := _DIRECTIVE_OF_A_LINE.match(text, position):
            position = found.end()
        elif found := _LABEL.match(text, position):
            _declare(function.labels, scopes[-1], found[1], len(function.body), _line(text, position))
            position = found.end()
        else:
            end = text.index(";", position)
            _statement(text[position:end].strip(), _line(text, position), function, scopes[-1])
            position = end + 1
    return position


def _declare(table: dict[str, int] | dict[str, str], scope: _Scope, name: str, value: object, line: int) -> None:
    # The name is free again once the scope that declared it has ended and renamed it.
    if name in table:
        if name in scope.names:
            raise PtxSyntaxError(f"line {line}: {name} is declared twice")
        raise PtxSyntaxError(f"line {line}: {name} hides a name of an outer scope")
    table[name] = value
    scope.names.append(name)


def _statement(statement: str, line: int, function: Function, scope: _Scope) -> None:
    if found := _REGISTERS.match(statement):
        for name in (each.strip() for each in found[2].split(",")):
            many = re.fullmatch(rf"({NAME})<(\d+)>", name)
            for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                _declare(function.registers, scope, each, found[1], line)
    elif statement.startswith(".pragma"):
        return
    elif statement.startswith("."):
        variable = _variable(statement, line)
        function.variables.append(variable)
        scope.names.append(variable.name)
    else:
        guard = _GUARD.match(statement)
        rest = guard[3] if guard else statement
        opcode, _, operands = " ".join(rest.split()).partition(" ")
        text = " ".join(statement.split())
        is_negated = bool(guard and guard[1])
        function.body.append(
            Instruction(line, text, guard[2] if guard else "", is_negated, opcode, split_operands(operands))
        )


def _rename(function: Function, scope: _Scope, suffix: str) -> None:
    """Give the names of an ended scope a suffix, in its declarations and its instructions."""
    names = set(scope.names)
    if not names:
        return
    new_names = {name: name + suffix for name in names}
    for table in (function.registers, function.labels):
        for name in names & table.keys():
            table[new_names[name]] = table.pop(name)
    function.variables = [each._replace(name=new_names.get(each.name, each.name)) for each in function.variables]
    for index in range(scope.first_instruction, len(function.body)):
        function.body[index] = renamed(function.body[index], new_names)


def renamed(instruction: Instruction, new_names: dict[str, str]) -> Instruction:
    """The instruction with other names in its guard and operands."""

    def replaced(text: str) -> str:
        return _WORD.sub(lambda found: new_names.get(found[0], found[0]), text)

    operands = tuple(replaced(each) for each in instruction.operands)
    return instruction._replace(guard=replaced(instruction.guard), operands=operands)
