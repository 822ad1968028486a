"""Probes of vLLM names: each returns "" if the name is as expected, or one sentence that says what is missing."""

from __future__ import annotations

import dataclasses
import dis
import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any


@dataclasses.dataclass(frozen=True)
class Hook:
    """One vLLM name.

    Attributes:
        name: `module:attribute.path`.
        use: what for.
        probe: returns "" or what is missing.
        rebound: whether `plugin.register` replaces or extends it (then a failing probe makes it decline).
        platforms: where it is needed.
    """

    name: str
    use: str
    probe: Callable[[], str]
    rebound: bool = False
    platforms: tuple[str, ...] = ("cpu", "cuda")

    def problem(self) -> str:
        """ "" if the name is as expected, else one sentence; never raises."""
        try:
            return self.probe()
        except Exception as error:  # whatever a changed vLLM raises is the answer
            return f"{self.name}: {type(error).__name__}: {error}"


def row(probe: Callable[..., str], name: str, use: str, *args: Any, **kwargs: Any) -> Hook:
    """A hook whose probe is called with the vLLM name and `args`; `kwargs` go to the hook."""
    return Hook(name, use, partial(probe, name, *args), **kwargs)


def resolve(name: str) -> Any:
    """The object behind `module:attribute.path`."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split(".") if path else ():
        found = getattr(found, part)
    return found


def _missing(name: str, what: str, missing: Sequence[str]) -> str:
    return f"{name} has no {what}{', '.join(missing)}." if missing else ""


def takes(name: str, parameters: Sequence[str] = ()) -> str:
    """A callable with (at least) these parameters."""
    found = resolve(name)
    if not callable(found):
        return f"{name} is not callable."
    known = inspect.signature(found).parameters if parameters else {}
    return _missing(name, "parameter ", [p for p in parameters if p not in known])


def has(name: str, members: Sequence[str]) -> str:
    """A class with these attributes or dataclass fields."""
    cls = resolve(name)
    known = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    return _missing(name, "", [m for m in members if m not in known and not hasattr(cls, m)])


def sets(name: str, attributes: Sequence[str]) -> str:
    """A class that assigns these attributes of an instance while it is made, itself or in a base class."""
    inits = [vars(c)[n] for c in resolve(name).__mro__ for n in ("__init__", "__post_init__") if n in vars(c)]
    code = [i.__code__ for i in map(inspect.unwrap, inits) if hasattr(i, "__code__")]
    known = {i.argval for c in code for i in dis.get_instructions(c) if i.opname == "STORE_ATTR"}
    return _missing(name, "", [a for a in attributes if a not in known])


def equals(name: str, value: Any) -> str:
    """A constant of this value."""
    found = resolve(name)
    return "" if found == value else f"{name} is {found!r}, not {value!r}."


def platform_takes(method: str, parameters: Sequence[str]) -> str:
    """A classmethod of the current platform with these parameters."""
    platform = type(resolve("vllm.platforms:current_platform"))
    known = inspect.signature(getattr(platform, method)).parameters
    return _missing(f"{platform.__name__}.{method}", "parameter ", [p for p in parameters if p not in known])


def dotted_flags() -> str:
    """`--additional-config.a.b 1` is read as {"a": {"b": 1}}, and merged."""
    parser = resolve("vllm.utils.argparse_utils:FlexibleArgumentParser")(add_help=False)
    parser.add_argument("--additional-config", type=json.loads)
    read = parser.parse_args(["--additional_config.a.b", "1", "--additional-config.a.c=[2]"]).additional_config
    return "" if read == {"a": {"b": 1, "c": [2]}} else f"dotted flags are read as {read}."


def padding_counts() -> str:
    """A spec with `page_size_padded` plans that many bytes a page."""
    import torch

    spec = resolve("vllm.v1.kv_cache_interface:FullAttentionSpec")
    plain = spec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    padded = dataclasses.replace(plain, page_size_padded=plain.unpadded_page_size_bytes + 512)
    if plain.unpadded_page_size_bytes != 16 * 2 * 2 * 64 * 2:
        return f"a page of 16 tokens, 2 heads of 64 and bfloat16 takes {plain.unpadded_page_size_bytes} bytes."
    more = padded.page_size_bytes - plain.page_size_bytes
    return "" if more == 512 else f"page_size_padded adds {more} bytes to a page where it should add 512."
