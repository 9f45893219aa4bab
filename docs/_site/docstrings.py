# SPDX-License-Identifier: Apache-2.0
"""What the reference needs to know beside the sources, which are read and not run.

A function that has its module's name (`zipfast.merging.merge`) is what that name gives at run time, so it takes the module's
place. Docstrings are written for people who read them in a terminal; here they get the form that the parser expects:
one entry for each of several arguments that share one, and for each error of a paragraph; doctests as code; formulas
(``.. math::``) as MathML, which browsers draw without scripts or fonts from elsewhere.
"""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

MATH = re.compile(r"^([ \t]*)\.\. math::[ \t]*(.*(?:\n\1[ \t]+\S.*)*)", re.MULTILINE)
EXAMPLE = re.compile(r"^([ \t]*)Example:$", re.MULTILINE)  # the parser reads doctests under the plural alone
DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)  # outside of such a section
SHARED = re.compile(r"^([ \t]+)(\w+(?:,\s+\w+)+): (.*(?:\n\1[ \t]+.*)*)", re.MULTILINE)
INLINE = re.compile(r"^([ \t]*)(Args|Returns|Raises): (?=\S)", re.MULTILINE)  # a paragraph, not a section
RAISES = re.compile(r"^([ \t]*)Raises:\n((?:\1[ \t]+\S.*\n?)+)", re.MULTILINE)
ERROR = re.compile(r"(?:^|(?<=[.)] ))((?:\w+(?:Error|Exception|Interrupt|Warning)(?:, )?)+): ")


def read_as_here(text: str) -> str:
    text = EXAMPLE.sub(r"\1Examples:", text)
    text = DOCTEST.sub(lambda found: f"```pycon\n{found[0]}\n```", text)
    text = INLINE.sub(r"\n\1**\2:** ", text)
    text = RAISES.sub(_raises, text)
    text = SHARED.sub(lambda f: "\n".join(f"{f[1]}{name}: {f[3]}" for name in f[2].replace(",", " ").split()), text)
    return MATH.sub(_formula, text)


def _raises(found: re.Match[str]) -> str:
    before, *parts = ERROR.split(" ".join(found[2].split()))
    if before or not parts:
        return found[0]
    lines = [f"{found[1]}    {error}: {what.strip()}" for error, what in zip(parts[::2], parts[1::2])]
    return "\n".join([f"{found[1]}Raises:", *lines, ""])


def _formula(found: re.Match[str]) -> str:
    return f"{found[1]}<p>{convert(' '.join(found[2].split()), display='block')}</p>"


def _walk(obj: griffe.Object) -> None:
    if obj.docstring:
        obj.docstring.value = read_as_here(obj.docstring.value)
    for member in obj.members.values():
        if not member.is_alias:
            _walk(member)


class Reference(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        _walk(pkg)
        rooms = [m for m in pkg.modules.values() if not m.is_alias and m.exports]
        for room in rooms:
            for name in map(str, room.exports):  # while the modules are there through which others are found
                if room.members[name].is_alias:
                    room.members[name].resolve_target()
        for room in rooms:
            for name in map(str, room.exports):
                module = room.members[name]
                if not module.is_alias and module.is_module and name in module.members:
                    room.set_member(name, module.members[name])
