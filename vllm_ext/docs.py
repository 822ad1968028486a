"""The generated parts of the documentation: `python -m vllm_ext.docs`, or `--check` to see whether they are current.

A generated part stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` in a Markdown file of the repository.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_ext import catalogue
from vllm_ext.markdown import table
from vllm_ext.options import ConfigError, bounds, describe

ROOT = Path(__file__).resolve().parent.parent


def plugins_table() -> str:
    """The plugins of the catalogue, one row each."""
    rows = [
        (f"[`{p.name}`](docs/plugins.md#{p.name})", p.kind, p.summary, p.paper, p.training)
        for p in catalogue.load().values()
    ]
    return table(("plugin", "kind", "what it does", "paper", "training"), rows)


def conflicts_table() -> str:
    """What each plugin cannot be combined with, one row each."""
    from vllm_ext.config import expand

    rows = []
    for p in catalogue.load().values():
        needs = ", ".join(f"`--{k.replace('_', '-')} {v}`" for k, v in expand([p.name]).stock_args.items())
        rows.append((f"`{p.name}`", _conflicts(p), needs or "none"))
    return table(("plugin", "not together with", "engine arguments that it sets, by default"), rows)


def _conflicts(plugin: catalogue.Plugin) -> str:
    """The plugins that this one excludes; a kind that it excludes whole is named once."""
    left = set(plugin.conflicts)
    kinds: dict[str, set[str]] = {}
    for other in catalogue.load().values():
        if other.name != plugin.name:
            kinds.setdefault(other.kind, set()).add(other.name)
    whole = [kind for kind, names in kinds.items() if len(names) > 1 and names <= left]
    rest = [name for name in plugin.conflicts if not any(name in kinds[kind] for kind in whole)]
    named = [f"every other plugin of kind {kind}" if kind == plugin.kind else f"any of kind {kind}" for kind in whole]
    return ", ".join([*named, *(f"`{name}`" for name in rest)]) or "none"


def compatibility_table() -> str:
    """What the attention engine and the KV managers work with, as their code declares it."""
    from vllm_ext.attention_backends.limits import COMPATIBILITY
    from vllm_ext.kv_managers.limits import COMPATIBILITY as KV

    attention = table(("with", "sparse attention plugins"), list(COMPATIBILITY.items()))
    return f"{attention}\n\n{table(('with', 'KV-cache plugins'), list(KV.items()))}"


def moe_compatibility_table() -> str:
    """What MoE plugins work with, as their code declares it."""
    from vllm_ext.moe.limits import COMPATIBILITY

    return table(("with", "MoE plugins"), list(COMPATIBILITY.items()))


def metrics_table() -> str:
    """Every metric, one row each."""
    from vllm_ext import kv_metrics, metrics, spec_metrics

    known = {**{name: metrics.HELP[name] for name in metrics.NAMES}, **kv_metrics.HELP, **spec_metrics.HELP}
    rows = [(f"`vllm_ext:{name}_total`", "counter", text) for name, text in known.items()]
    return table(("name", "type", "meaning"), [("`vllm_ext:attention_density`", "gauge", metrics.DENSITY_HELP), *rows])


def results_tables() -> str:
    """Every record under docs/results as a table."""
    from vllm_ext import results

    return results.tables(ROOT / "docs" / "results", ROOT / "docs")


def plugin_pages() -> str:
    """Every plugin with all its options."""
    return "\n\n".join(map(_page, catalogue.load().values()))


def _page(plugin: catalogue.Plugin) -> str:
    facts = [
        ("Kind", plugin.kind),
        ("Paper", plugin.paper),
        ("Code", f"`{plugin.class_path}`"),
        ("Training or calibration needed", plugin.training),
        ("Not together with", _conflicts(plugin)),
        ("Evidence", "; ".join(f"{k}: {_evidence(v)}" for k, v in plugin.evidence.items()) or "none recorded"),
    ]
    lines = "\n".join(f"* {label}: {text}" for label, text in facts)
    head = ("option", "type", "unit", "default", "paper", "bounds", "meaning")
    options = table(head, [_option(o) for o in describe(plugin.cls())])
    return f"## {plugin.name}\n\n{_sentence(plugin.summary)}\n\n{lines}\n\n{options}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _evidence(items: Sequence[str]) -> str:
    """Links to records, as seen from docs/."""
    links = (f"[{Path(i).name}](../{i})" if (ROOT / i).is_file() else i for i in items)
    return ", ".join(links) or "none recorded"


def _option(o: dict[str, Any]) -> list[str]:
    paper = "–" if o["paper"] is None else _value(o["paper"])
    return [f"`{o['name']}`", o["type"], o["unit"] or "–", _value(o["default"]), paper, bounds(o) or "–", o["help"]]


def _value(value: Any) -> str:
    return "null" if value is None else str(value)


def methods_table() -> str:
    """The slots that each sparse attention method fills, and what it took."""
    text = (ROOT / "plugins.yaml").read_text(encoding="utf-8")
    rows = []
    for p in catalogue.load().values():
        if p.kind != "attention":
            continue
        path = p.class_path.partition(":")[0].removeprefix("vllm_ext.").replace(".", "/") + ".py"
        entry = re.search(rf"^{p.name}:\n((?:  .*\n)+)", text, re.MULTILINE)
        method, yaml_lines = p.cls()(), entry.group(0).count("\n") if entry else 0
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        slots: tuple[str, ...] = (f"`{method.index}`", f"`{method.score}`", f"`{method.group}`")
        if "stages" in vars(p.cls()):
            slots = ("stages of its own", "–", "–")
        rows.append([f"`{p.name}`", *slots, f"[{path}](../{path})", str(lines), str(yaml_lines)])
    head = ("method", "index", "score", "group", "file", "lines of the file", "lines in plugins.yaml")
    return table(head, rows)


def quest_source() -> str:
    """The code of Quest."""
    return f"```python\n{(ROOT / 'attention_backends' / 'quest.py').read_text(encoding='utf-8')}```"


SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "plugins": plugins_table,
        "metrics": metrics_table,
        "compatibility": compatibility_table,
        "conflicts": conflicts_table,
    },
    "docs/results.md": {"results": results_tables},
    "docs/plugins.md": {"plugins": plugin_pages},
    "docs/moe.md": {"compatibility": moe_compatibility_table},
    "docs/adding-a-method.md": {"quest": quest_source, "methods": methods_table},
}
"""File -> name of the marker -> what makes the text between the markers."""


def fill(text: str, name: str, content: str) -> str:
    """`text` with the part of marker `name` replaced.

    Raises:
        ConfigError: the markers are not there exactly once.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ConfigError(f"the markers {begin} and {end} must be in the file once, one after the other.")
    body = f"{content}\n" if content else ""
    return pattern.sub(lambda match: f"{begin}\n{body}{end}", text)


def generate(root: Path = ROOT) -> dict[Path, str]:
    """Path -> text as it should be, for every file with generated parts.

    Raises:
        ConfigError: a file or marker is missing, or the catalogue is malformed.
    """
    wanted = {}
    for name, sections in SECTIONS.items():
        path = root / name
        if not path.is_file():
            raise ConfigError(f"{path} is missing; run this from a checkout of the repository.")
        text = path.read_text(encoding="utf-8")
        for marker, make in sections.items():
            text = fill(text, marker, make())
        wanted[path] = text
    return wanted


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, or with `--check` only compare; returns the exit code (1 = not current)."""
    parser = argparse.ArgumentParser(prog="python -m vllm_ext.docs", description="Generated parts of the documents.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is not current")
    check = parser.parse_args(argv).check
    try:
        stale = [path for path, text in generate().items() if path.read_text(encoding="utf-8") != text]
        for path in stale:
            if not check:
                path.write_text(generate()[path], encoding="utf-8")
            print(f"{path.name}: {'not current; run python -m vllm_ext.docs' if check else 'written'}")
    except ConfigError as error:
        print(f"vllm-ext: {error}", file=sys.stderr)
        return 2
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
