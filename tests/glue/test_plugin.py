"""What `register` changes in a process, and what it leaves alone."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vllm_ext
from vllm_ext.options import ConfigError

# Snapshot of everything that `register` may rebind, and the log of `register`.
PRELUDE = """
import copyreg, logging, sys
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum as E
NAMES = ("add_cli_args", "__post_init__", "create_engine_config")
def snapshot():
    own = vars(type(current_platform))["get_attn_backend_cls"]
    return [vars(EngineArgs)[n] for n in NAMES], own, copyreg.dispatch_table.get(E)
said = []
class Listen(logging.Handler):
    def emit(self, record): said.append(record.getMessage())
logging.getLogger("vllm.vllm_ext").addHandler(Listen())
before = snapshot()
from vllm_ext import plugin
"""


def test_glue_imports_neither_torch_nor_vllm(python: Callable[..., Any]) -> None:
    done = python(
        "import sys; from vllm_ext import plugin, backend_name, banner, catalogue, command_line, config, hooks\n"
        "[entry.cls()() for entry in catalogue.load().values()]; config.expand(['quest'])\n"
        "print([m for m in ('torch', 'vllm', 'triton') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_inert_until_asked(forked: Callable[..., Any], model_dir: Path) -> None:
    code = """
import sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm_ext import plugin
assert plugin.state() == "active", plugin.state()
from vllm.engine.arg_utils import EngineArgs
from vllm.config import set_current_vllm_config
from vllm.v1.attention.selector import get_attn_backend
config = EngineArgs(model=sys.argv[1]).create_engine_config()
with set_current_vllm_config(config):
    import torch
    backend = get_attn_backend(32, torch.bfloat16, None)
    print(backend.__name__, config.additional_config, config.attention_config.backend)
print(sorted(m for m in sys.modules if m.startswith("vllm_ext.")))
"""
    done = forked(code, model_dir)
    assert "CPUAttentionBackend {} None" in done.stdout, done.stderr
    loaded = done.stdout.strip().splitlines()[-1]
    assert "vllm_ext.plugin" in loaded
    for module in ("backend'", "kernels", "metrics", "banner", "quest", "support"):
        assert module not in loaded.replace("vllm_ext.attention_backends'", ""), loaded
    assert "vllm-ext" not in done.stdout.replace("Registered", "")


@pytest.mark.parametrize(
    ("sabotage", "reason"),
    [
        ("vllm.__version__ = '0.33.1'", "vLLM 0.33.1 is not the supported 0.32.x"),
        ("E.register = None", "AttentionBackendEnum.register is not callable"),
        ("EngineArgs.create_engine_config = lambda engine: None; before = snapshot()", "has no parameter self"),
        ("plugin._wrap_create_engine_config = lambda original: 1 / 0", "ZeroDivisionError"),
        ("import vllm_ext.hooks as h; h.platform_name = lambda: 'tpu'", "the platform 'tpu' is not supported"),
    ],
)
def test_declines_with_one_sentence_and_changes_nothing(forked: Callable[..., Any], sabotage: str, reason: str) -> None:
    done = forked(
        f"{PRELUDE}\n{sabotage}\nplugin.register(); plugin.register()\n"
        "assert plugin.state() == 'declined'\nassert snapshot() == before\nprint(said)"
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.strip().splitlines()[-1]
    assert reason in said
    assert said.count("vllm-ext is off and vLLM is unchanged") == 1


def test_a_broken_catalogue_leaves_stock_serving_alone(forked: Callable[..., Any], model_dir: Path) -> None:
    code = f"""{PRELUDE}
from vllm_ext import catalogue
from vllm_ext.options import ConfigError
def broken(*_): raise ConfigError("catalogue is broken.")
catalogue.load = broken
plugin.register()
assert snapshot() != before
from vllm.utils.argparse_utils import FlexibleArgumentParser
args = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--model", {str(model_dir)!r}])
print(EngineArgs.from_cli_args(args).create_engine_config().model_config.model)
"""
    done = forked(code)
    assert done.stdout.strip().endswith(str(model_dir)), done.stderr


def test_wrong_command_line_ends_with_code_2_and_one_line(forked: Callable[..., Any]) -> None:
    for argv in (["vllm", "serve", "m", "--plugins", "qest"], ["vllm", "bench", "throughput", "--plugins", "a.yaml"]):
        done = forked(f"import sys; sys.argv[:] = {argv!r}\nfrom vllm_ext import plugin\nplugin.register()")
        lines = [line for line in done.stderr.splitlines() if line.startswith("vllm-ext: ")]
        assert (done.returncode, len(lines)) == (2, 1), done.stderr
        assert "Traceback" not in done.stderr


def test_our_backend_name_survives_a_spawned_process(
    python: Callable[..., Any], forked: Callable[..., Any], tmp_path: Path
) -> None:
    vllm_ext.engine_args("quest")
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member = AttentionBackendEnum["VLLM_EXT_SPARSE"]
    path = tmp_path / "pickle"
    path.write_bytes(pickle.dumps([member, AttentionBackendEnum.CPU_ATTN]))
    read = f"import pickle, sys\nread = pickle.load(open({str(path)!r}, 'rb'))\n"
    done = python(read + "print([m.name for m in read], read[0].value, 'vllm_ext.plugin' in sys.modules)")
    assert done.stdout.split("\n")[-2] == f"['VLLM_EXT_SPARSE', 'CPU_ATTN'] {member.value} False", done.stderr
    # the fault that this mends: stock Enum pickling of a member that the reader has not registered
    function, arguments = member.__reduce_ex__(2)
    path.write_bytes(pickle.dumps((function, arguments)))
    assert "is not a valid" in forked(read + "read[0](*read[1])").stderr
    assert pickle.loads(pickle.dumps(member)) is member


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What vllm-ext logs in this process; vLLM replaces the handlers of its loggers, so the method is caught."""
    texts: list[str] = []
    monkeypatch.setattr(logging.getLogger("vllm.vllm_ext"), "info", lambda text, *args: texts.append(text % args))
    return texts


def engine_config(model: Any, **kwargs: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(model), max_model_len=1024, **kwargs).create_engine_config()


def test_banner_is_printed_once_and_not_by_a_reader_of_the_config(
    model_dir: Path, heard: list[str], forked: Callable[..., Any], tmp_path: Path
) -> None:
    config = engine_config(model_dir, **vllm_ext.engine_args("quest", quest={"budget": 256, "dense_layers": [3]}))
    banners = [text for text in heard if text.startswith("vllm-ext 0")]
    assert len(banners) == 1
    for part in ("quest", "budget 256 (default 1024), dense_layers [3] (default [0, 1])", "graphs", str(model_dir)):
        assert part in banners[0]
    assert config.cache_config.block_size == 64
    path = tmp_path / "config"
    path.write_bytes(pickle.dumps(config))
    done = forked(
        f"import pickle; c = pickle.load(open({str(path)!r}, 'rb'))\n"
        "print(c.attention_config.backend.name, c.additional_config)"
    )
    assert "VLLM_EXT_SPARSE {'vllm_ext': {'quest':" in done.stdout, done.stderr
    assert "vllm-ext 0" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"additional_config": {"vllm_ext": {"quest": {}}}}, "plugin 'quest' needs attention_backend=VLLM_EXT_SPARSE"),
        ({"attention_backend": "VLLM_EXT_SPARSE", "block_size": 64}, "needs a plugin; select one with --plugins"),
        ({"quest": {"dense_layers": [0, 9]}}, "quest.dense_layers names layer 9"),
        ({"quest": {}, "block_size": 32}, "plugin 'quest' needs block_size=64, but it is 32"),
        ({"quest": {}, "model": "/no/such/dir"}, "model directory '/no/such/dir' does not exist"),
    ],
)
def test_in_process_errors(model_dir: Path, heard: list[str], kwargs: dict[str, Any], sentence: str) -> None:
    model = kwargs.pop("model", model_dir)
    args = vllm_ext.engine_args("quest", quest=kwargs.pop("quest")) if "quest" in kwargs else {}
    with pytest.raises(ConfigError) as error:
        engine_config(model, **{**args, **kwargs})
    assert sentence in str(error.value)
    assert not heard


@pytest.mark.parametrize("content", [None, "", '{"architectures": ', "[]"])
def test_unreadable_model_config(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"has no readable config\.json"):
        engine_config(tmp_path, **vllm_ext.engine_args("quest"))


def test_model_without_full_attention(tmp_path: Path, model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 128}
    (model_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="sliding window; drop the plugin"):
        engine_config(model_dir, **vllm_ext.engine_args("quest"))


def test_platform_hands_out_our_backend_only_when_selected(model_dir: Path) -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("the wrapped method is the CPU platform's")
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import get_attn_backend

    with set_current_vllm_config(engine_config(model_dir, **vllm_ext.engine_args("quest"))):
        assert get_attn_backend(32, torch.bfloat16, None).get_name() == "VLLM_EXT_SPARSE"
        with pytest.raises(ValueError, match=r"cannot serve this model: .*dtype not supported"):
            get_attn_backend(32, torch.float64, None)
    with set_current_vllm_config(engine_config(model_dir, attention_backend=AttentionBackendEnum.CPU_ATTN)):
        assert get_attn_backend(32, torch.bfloat16, None).get_name() == "CPU_ATTN"
