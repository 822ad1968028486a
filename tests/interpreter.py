"""Triton's interpreter in three fifths of its time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def keep_language() -> None:
    """Let the interpreter replace the functions of `triton.language` once in a process.

    It does so, and puts them back, in every program of every kernel and every function that a kernel calls. Here they
    stay replaced, so nothing can be compiled in the process any more.
    """
    from triton.runtime import interpreter

    replace, replaced = interpreter._patch_lang, set()

    def replace_once(fn: Any) -> Any:
        if id(fn.__globals__) not in replaced:
            replace(fn)
            replaced.add(id(fn.__globals__))
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = replace_once
