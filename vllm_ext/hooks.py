"""Every vLLM name that vllm-ext relies on or rebinds, each with a probe. `vllm-ext doctor` prints the table.

A probe returns "" if the name is as expected, or what is missing. `plugin.register` runs those of the names it is
about to rebind, and declines if one fails: serving then goes on as if vllm-ext were not installed.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

VLLM_VERSION = "0.32"
"""The minor version of vLLM that the table describes."""


@dataclass(frozen=True)
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


def resolve(name: str) -> Any:
    """The object behind `module:attribute.path`."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split(".") if path else ():
        found = getattr(found, part)
    return found


def _callable(name: str, parameters: Sequence[str] = ()) -> str:
    """Probe: a callable with (at least) these parameters."""
    found = resolve(name)
    if not callable(found):
        return f"{name} is not callable."
    known = inspect.signature(found).parameters if parameters else {}
    missing = [p for p in parameters if p not in known]
    return f"{name} has no parameter {', '.join(missing)}." if missing else ""


def _members(name: str, members: Sequence[str]) -> str:
    """Probe: a class with these attributes or dataclass fields."""
    cls = resolve(name)
    known = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    missing = [m for m in members if m not in known and not hasattr(cls, m)]
    return f"{name} has no {', '.join(missing)}." if missing else ""


def _platform(method: str, parameters: Sequence[str]) -> str:
    """Probe: a classmethod of the current platform."""
    platform = resolve("vllm.platforms:current_platform")
    known = inspect.signature(getattr(type(platform), method)).parameters
    missing = [p for p in parameters if p not in known]
    return f"{type(platform).__name__}.{method} has no parameter {', '.join(missing)}." if missing else ""


def _dotted_flags() -> str:
    """Probe: `--additional-config.a.b 1` is read as {"a": {"b": 1}}, and merged."""
    import json

    parser = resolve("vllm.utils.argparse_utils:FlexibleArgumentParser")(add_help=False)
    parser.add_argument("--additional-config", type=json.loads)
    read = parser.parse_args(["--additional_config.a.b", "1", "--additional-config.a.c=[2]"]).additional_config
    return "" if read == {"a": {"b": 1, "c": [2]}} else f"dotted flags are read as {read}."


def _row(probe: Callable[..., str], name: str, use: str, *args: Any, **kwargs: Any) -> Hook:
    return Hook(name, use, partial(probe, name, *args), **kwargs)


_ARGS = "vllm.engine.arg_utils:EngineArgs"
_BACKEND = "vllm.v1.attention.backend"

TABLE: tuple[Hook, ...] = (
    _row(_callable, "vllm.plugins:load_general_plugins", "calls plugin.register in every process"),
    _row(_callable, f"{_ARGS}.add_cli_args", "adds --plugins to the parser", ["parser"], rebound=True),
    _row(_callable, f"{_ARGS}.__post_init__", "refuses a bad model directory or option early", ["self"], rebound=True),
    _row(
        _callable,
        f"{_ARGS}.create_engine_config",
        "runs the plugins' checks, prints the banner",
        ["self"],
        rebound=True,
    ),
    _row(
        _members,
        _ARGS,
        "engine arguments that plugins set",
        ["model", "additional_config", "attention_backend", "block_size"],
        rebound=True,
    ),
    Hook(
        "vllm.utils.argparse_utils:FlexibleArgumentParser.parse_args",
        "reads dotted --additional-config flags",
        _dotted_flags,
    ),
    _row(_callable, "vllm.logger:init_logger", "log lines and the banner", ["name"], rebound=True),
    _row(
        _callable,
        "vllm.v1.attention.backends.registry:AttentionBackendEnum.register",
        "gives the attention backend its name; pickled by name (copyreg)",
        ["name", "value"],
        rebound=True,
    ),
    _row(
        _callable,
        "vllm.v1.attention.backends.registry:AttentionBackendEnum.get_class",
        "finds the attention backend's class",
        rebound=True,
    ),
    Hook(
        "vllm.platforms:current_platform.get_attn_backend_cls",
        "honours the attention backend's name on CPU too",
        partial(_platform, "get_attn_backend_cls", ["selected_backend", "attn_selector_config"]),
        rebound=True,
        platforms=("cpu",),
    ),
    _row(
        _members,
        "vllm.config:VllmConfig",
        "what the plugins' checks and the banner read",
        [
            "model_config",
            "cache_config",
            "parallel_config",
            "compilation_config",
            "attention_config",
            "additional_config",
        ],
    ),
    _row(
        _members,
        f"{_BACKEND}:AttentionBackend",
        "base class of the sparse backend",
        ["get_name", "get_impl_cls", "get_builder_cls", "validate_configuration", "customize_spec"],
    ),
    _row(
        _callable,
        f"{_BACKEND}:AttentionMetadataBuilder.build",
        "per-step metadata",
        ["common_prefix_len", "common_attn_metadata", "fast_build"],
    ),
    _row(
        _members,
        f"{_BACKEND}:CommonAttentionMetadata",
        "lengths, block tables and slots of a step",
        ["query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping", "num_actual_tokens", "max_query_len"],
    ),
    _row(
        _members,
        "vllm.v1.kv_cache_interface:FullAttentionSpec",
        "room for the page index behind each page",
        ["block_size", "num_kv_heads", "head_size", "dtype", "page_size_padded", "unpadded_page_size_bytes"],
    ),
    _row(
        _members,
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend",
        "stock attention on CPU, delegated to",
        ["get_impl_cls", "get_builder_cls"],
        platforms=("cpu",),
    ),
    _row(
        _members,
        "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend",
        "stock attention on CUDA, delegated to",
        ["get_impl_cls", "get_builder_cls"],
        platforms=("cuda",),
    ),
)


def version_problem() -> str:
    """ "" if the installed vLLM is the one the table describes, else one sentence."""
    import vllm

    version = str(getattr(vllm, "__version__", "unknown"))
    if version.split(".")[:2] == VLLM_VERSION.split("."):
        return ""
    return f"vLLM {version} is not the supported {VLLM_VERSION}.x; install vllm=={VLLM_VERSION}.0 or another vllm-ext."


def platform_name() -> str:
    """ "cpu", "cuda", or the name of a platform that is not supported."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        return "cuda"
    return "cpu" if current_platform.is_cpu() else str(getattr(current_platform, "device_name", "unknown"))


def refusal() -> str:
    """Why `plugin.register` must leave this vLLM alone, as one sentence, or "" if it need not."""
    if problem := version_problem():
        return problem
    platform = platform_name()
    if platform not in ("cpu", "cuda"):
        return f"the platform '{platform}' is not supported; use CUDA or a CPU."
    for hook in TABLE:
        if hook.rebound and platform in hook.platforms and (problem := hook.problem()):
            return problem
    return ""
