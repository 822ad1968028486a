"""`--plugins` in sys.argv, read back by vLLM's own parser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_ext import command_line, config
from vllm_ext.options import ConfigError

SERVE = ["/usr/bin/vllm", "serve", "model"]
SPARSE = ["--attention-backend", "VLLM_EXT_SPARSE", "--block-size", "64"]


@pytest.fixture(scope="module")
def parse() -> Any:
    """vLLM's parser of `vllm serve`, as tokens -> keyword arguments that we set."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))

    def read(tokens: list[str]) -> dict[str, Any]:
        read = parser.parse_args(["serve", *tokens])
        return {k: getattr(read, k) for k in ("attention_backend", "block_size", "additional_config")}

    return read


def rewritten(*tokens: str, base: list[str] = SERVE) -> list[str]:
    argv = [*base, *tokens]
    assert command_line.rewrite(argv) is not None
    assert argv[: len(base)] == base
    return argv[2:]


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (["--plugins", "quest"], {}),
        (["--plugins=quest", "--port", "8000"], {}),
        (["--plugins", "quest", "--additional-config.vllm_ext.quest.budget", "2048"], {"budget": 2048}),
        (["--additional_config.vllm_ext.quest.budget=2k", "--plugins", "quest"], {"budget": 2000}),
        (["--plugins", "quest", "--additional-config.vllm_ext.quest.dense_layers=[0, 3]"], {"dense_layers": [0, 3]}),
        (["--plugins", "quest", "--additional-config", '{"vllm_ext": {"quest": {"sink": 0}}}'], {"sink": 0}),
        (["--plugins", "quest", "--additional-config.vllm_ext.quest.group", "mean"], {"group": "mean"}),
        (["--plugins", "quest", "--additional-config.vllm_ext.quest.dense_below", "null"], {"dense_below": None}),
        (["--plugins", "quest", *SPARSE], {}),
    ],
)
def test_command_line_equals_args_equals_engine_args(parse: Any, tokens: list[str], options: dict[str, Any]) -> None:
    import vllm_ext

    expansion = config.expand(["quest"], {"quest": options})
    assert parse(rewritten(*tokens)) == expansion.engine_args
    assert parse(["model", *expansion.cli]) == expansion.engine_args
    assert vllm_ext.engine_args("quest", quest=options) == expansion.engine_args


def test_users_own_additional_config_is_kept(parse: Any) -> None:
    mine = ["--additional-config", '{"a": {"b": 1}, "c": 2}', "--additional-config.a.d", "x", "--temp.e", "-0.5"]
    read = rewritten(*mine, "--plugins", "quest")
    assert read[:3] == ["model", "--temp.e", "-0.5"]
    additional = parse(["model", *read[3:]])["additional_config"]
    assert additional == {"a": {"b": 1, "d": "x"}, "c": 2, "vllm_ext": {"quest": {}}}
    odd = parse(rewritten("--additional-config", '{"a.b": 1, "t": "3k", "e": ""}', "--plugins", "quest"))
    assert odd["additional_config"] == {"a.b": 1, "t": "3k", "e": "", "vllm_ext": {"quest": {}}}


def test_precedence_file_then_json_then_dotted(tmp_path: Path, parse: Any) -> None:
    (tmp_path / "p.yaml").write_text("quest: {budget: 512, sink: 2, local: 3}")
    low = json.dumps({"vllm_ext": {"quest": {"sink": 0, "budget": 1024}}})
    read = parse(
        rewritten(
            *("--plugins", str(tmp_path / "p.yaml"), "--additional-config", low),
            *("--additional-config.vllm_ext.quest.budget", "2048"),
        )
    )
    assert read["additional_config"]["vllm_ext"]["quest"] == {"budget": 2048, "sink": 0, "local": 3}


@pytest.mark.parametrize("plugins", ["quest", ["quest"], {"quest": {"sink": 0}}])
def test_vllms_config_file(tmp_path: Path, parse: Any, monkeypatch: pytest.MonkeyPatch, plugins: Any) -> None:
    from vllm_ext import plugin

    path = tmp_path / "serve.yaml"
    path.write_text(json.dumps({"plugins": plugins, "block-size": 64, "additional-config": {"a": 1}}))
    argv = [*SERVE, "--config", str(path)]
    expansion = command_line.rewrite(argv)
    monkeypatch.setattr(plugin, "_expansion", expansion)
    options = plugins["quest"] if isinstance(plugins, dict) else {}
    read = parse(argv[2:])
    assert read["additional_config"] == {"a": 1, "vllm_ext": {"quest": options}}
    assert (read["attention_backend"], read["block_size"]) == ("VLLM_EXT_SPARSE", 64)


@pytest.mark.parametrize(
    "argv",
    [
        [*SERVE, "--port", "1", "--additional-config", "not json"],
        [*SERVE, "--block-size", "32"],
        ["pytest", "--plugins", "quest"],
        ["vllm", "bench", "serve", "--plugins", "quest"],
        ["vllm", "chat", "--plugins", "quest"],
        ["vllm"],
        [],
        [*SERVE, *SPARSE, "--additional-config.vllm_ext.quest", "{}"],
        [*SERVE, "-ac.backend", "VLLM_EXT_SPARSE", "--block-size=64", "--additional-config.vllm_ext.quest", "{}"],
    ],
)
def test_what_is_left_alone(argv: list[str]) -> None:
    before = list(argv)
    assert command_line.rewrite(argv) is None
    assert argv == before


@pytest.mark.parametrize(
    "base",
    [
        ["vllm", "bench", "throughput"],
        ["vllm", "run-batch"],
        ["/x/vllm/entrypoints/openai/api_server.py"],
        ["/x/vllm/entrypoints/cli/main.py", "serve"],
    ],
)
def test_other_commands(base: list[str]) -> None:
    argv = [*base, "--model", "m", "--plugins", "quest"]
    assert command_line.rewrite(argv) is not None
    assert argv == [*base, "--model", "m", *SPARSE, "--additional-config.vllm_ext.quest", "{}"]


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        ("--plugins", "--plugins needs a value"),
        ("--plugins quest --plugins streaming", "--plugins is given more than once"),
        ("--plugins qest", "did you mean 'quest'?"),
        ("--plugins quest,streaming", "exclude each other"),
        ("--plugins none.yaml", "cannot read plugin file 'none.yaml'"),
        (
            "--plugins quest --attention-backend FLASH_ATTN",
            "--attention-backend FLASH_ATTN conflicts with --plugins quest",
        ),
        ("--plugins quest --attention_backend=FLASH_ATTN", "drop --attention-backend"),
        ("--plugins quest --attention-config.backend FLASH_ATTN", "--attention-config.backend FLASH_ATTN conflicts"),
        ("--plugins quest -ac.backend=FLASH_ATTN", "-ac.backend FLASH_ATTN conflicts"),
        ('--plugins quest --attention-config {"backend":"FLASH_ATTN"}', "conflicts with --plugins quest"),
        (
            "--plugins quest --block-size 32",
            "--block-size 32 conflicts with --plugins quest, which sets --block-size 64",
        ),
        ("--plugins quest --additional-config {", "--additional-config is not valid JSON"),
        ("--plugins quest --additional-config.vllm_ext.quest.budgt 1", "did you mean 'budget'?"),
        ("--plugins quest --additional-config.vllm_ext.quest.budget many", "quest.budget must be of type int"),
        ("--plugins quest --additional-config.vllm_ext.quest.budget", "needs a value"),
        ("--plugins quest --additional-config.vllm_ext.streaming.budget 512", "'streaming', which is not selected"),
        ("--plugins quest --additional-config.vllm-ext.quest.budget 512", "write vllm_ext, with an underscore"),
        ("--additional-config.vllm_ext.quest.budget 512", "add --plugins quest"),
        ("--attention-backend VLLM_EXT_SPARSE --additional-config.vllm_ext.quest {}", "--block-size 64 is not"),
        ("--additional-config.vllm_ext 3", "additional_config.vllm_ext must map"),
    ],
)
def test_bad_input(tokens: str, sentence: str) -> None:
    argv = [*SERVE, *tokens.split()]
    with pytest.raises(ConfigError) as error:
        command_line.rewrite(argv)
    assert sentence in str(error.value)


def test_conflict_in_vllms_config_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("block-size: 32\n")
    with pytest.raises(ConfigError, match="--block-size 32 conflicts"):
        command_line.rewrite([*SERVE, "--config", str(path), "--plugins", "quest"])
