"""The table of vLLM names: every row holds here, rows that do not hold say so, and `register` probes few of them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_ext import hooks, probes

ROOT = Path(__file__).resolve().parents[2]
FIELDS = "vllm.v1.attention.backend:CommonAttentionMetadata"
IMPL = "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl"
CLEAN = "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend.forward_includes_kv_cache_update"


@pytest.mark.parametrize("hook", hooks.TABLE, ids=lambda hook: f"{hook.name}-{hook.use}")
def test_name_is_as_expected(hook: probes.Hook) -> None:
    if hooks.platform_name() not in hook.platforms:
        pytest.skip(f"needed on {', '.join(hook.platforms)} only")
    assert hook.problem() == ""


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        (probes.has(FIELDS, ["seq_lens", "gone"]), f"{FIELDS} has no gone."),
        (probes.takes("vllm.logger:init_logger", ["name", "gone"]), "vllm.logger:init_logger has no parameter gone."),
        (probes.sets(IMPL, ["scale", "gone"]), f"{IMPL} has no gone."),
        (probes.equals(CLEAN, True), f"{CLEAN} is False, not True."),
    ],
)
def test_probe_names_what_is_missing(problem: str, sentence: str) -> None:
    assert problem == sentence


def test_a_module_that_is_gone_is_a_sentence() -> None:
    hook = probes.Hook("vllm.gone:name", "nothing", lambda: probes.takes("vllm.gone:name"))
    assert hook.problem().startswith("vllm.gone:name: ModuleNotFoundError")


def test_padding_that_is_ignored_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.kv_cache_interface import AttentionSpec

    monkeypatch.setattr(AttentionSpec, "page_size_bytes", property(lambda spec: spec.unpadded_page_size_bytes))
    assert "adds 0 bytes" in probes.padding_counts()


def imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """`from vllm...` statements that run, so not those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            yield node
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from imports(node)


def test_every_import_of_the_backends_has_a_row() -> None:
    """What `from vllm... import name` brings into the attention code is in the table, as a name or as its owner."""
    known = {hook.name.replace(":", ".") for hook in hooks.TABLE}
    for path in sorted((ROOT / "attention_backends").glob("*.py")):
        for node in imports(ast.parse(path.read_text())):
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                assert any(k == name or k.startswith(name + ".") for k in known), f"{path.name} imports {name}"


def test_register_probes_only_what_it_rebinds(python: Callable[..., Any]) -> None:
    """The other probes import attention code; stock serving should not pay for that."""
    code = """
import sys
from vllm_ext import hooks
assert hooks.refusal() == "", hooks.refusal()
modules = {hook.name.partition(":")[0] for hook in hooks.TABLE if not hook.rebound}
modules -= {hook.name.partition(":")[0] for hook in hooks.TABLE if hook.rebound}
print(sorted(m for m in modules if m in sys.modules and ".backends." in m))
"""
    done = python(code)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stdout + done.stderr
