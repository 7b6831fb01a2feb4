"""The structs of csrc/stages/params.h for ctypes: read from the header, so that there is one description of them."""

import ctypes
import math
import re
from pathlib import Path
from typing import Any, ClassVar

HEADER = Path(__file__).parents[2] / "csrc/stages/params.h"
SCALARS = {
    "bool": ctypes.c_bool,
    "int8_t": ctypes.c_int8,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "double": ctypes.c_double,
}
CONSTANTS = {
    "nullptr": None,
    "true": True,
    "false": False,
    "std::numeric_limits<int64_t>::max()": 2**63 - 1,
    "std::numeric_limits<double>::infinity()": math.inf,
}


class Params(ctypes.Structure):
    """A struct that starts from the defaults of its declaration."""

    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, **values: Any):
        super().__init__(**{**self.defaults, **values})


def _enums(code: str) -> dict[str, list[str]]:
    found = re.findall(r"enum class (\w+) : int8_t \{([^}]*)\}", code)
    return {name: [entry.strip() for entry in body.split(",")] for name, body in found}


def _value(text: str) -> Any:
    if text in CONSTANTS:
        return CONSTANTS[text]
    if "::" in text:
        enum, entry = text.split("::")
        return ENUMS[enum].index(entry)
    return float(text) if re.search(r"[.e]", text) else int(text)


def _struct(name: str, body: str, known: dict[str, type[Params]]) -> type[Params]:
    fields, defaults = [], {}
    for declaration in filter(None, map(str.strip, body.split(";"))):
        const_type, pointer, declarators = re.fullmatch(r"(?:const )?(\w+)(\*?) (.*)", declaration, re.DOTALL).groups()
        if pointer:
            kind = ctypes.c_void_p
        elif const_type in ENUMS:
            kind = ctypes.c_int8
        else:
            kind = SCALARS.get(const_type) or known[const_type]
        for declarator in declarators.split(","):
            field, _, default = (part.strip() for part in declarator.partition("="))
            fields.append((field, kind))
            if default:
                defaults[field] = _value(default)
            elif issubclass(kind, Params):
                defaults[field] = kind()
    return type(name, (Params,), {"_fields_": fields, "defaults": defaults})


def _structs(code: str) -> dict[str, type[Params]]:
    known: dict[str, type[Params]] = {}
    code = re.sub(r"explicit operator bool\(\)[^}]*\}", "", code)
    for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", code, re.DOTALL | re.MULTILINE):
        known[name] = _struct(name, body, known)
    return known


CODE = re.sub(r"//[^\n]*", "", HEADER.read_text())
ENUMS = _enums(CODE)
STRUCTS = _structs(CODE)
