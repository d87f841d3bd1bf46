"""``python -m elora_sglang doctor [--json]``: would a server with ``--elora`` start here, and if not, why?

Looks at versions, entry points, the platform, the folder it is started from, at every patch record and at all else
that our code uses of the installed SGLang (``patches/surface.json``). Starts nothing and changes nothing; exit status
0, or 1 with the reasons. What only ``eval``, the frontend or a platform that is not in use needs is a note.

With ``--sglang PLACE`` another SGLang is looked at, a folder, a wheel or a version to download. It is read, not
imported, so only what its source shows is checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import elora_sglang
from elora_sglang.patches.base import Patch, discover
from elora_sglang.patches.surface import place, record, start
from elora_sglang.patches.surface.changes import Comparison
from elora_sglang.patches.surface.code import Code
from elora_sglang.patches.surface.shape import describe
from elora_sglang.patches.surface.uses import PART_OF_RECORD, SGLANG

_PACKAGES = ("sglang", "torch", "transformers", "peft")
_ENTRY_POINTS = {
    ("sglang.srt.plugins", "elora"): "elora_sglang.integration.plugin:register",
    ("sglang.srt.platforms", "elora_cpu"): "elora_sglang.platform:activate",
}


#: What does not work where only this part of ours misses something, and ``--elora`` does.
_ELSEWHERE = {
    "eval": "eval's baselines (eval live --compare) will not run",
    "frontend": "import elora_sglang.frontend will not work",
    "cpu": "the platform elora_cpu will not work, which is not in use here",
}


@dataclasses.dataclass(frozen=True)
class HookReport:
    """One patch record against an SGLang."""

    name: str
    target: str
    kind: str
    process: str
    when: str
    target_found: bool
    signature_ok: bool
    hash_ok: bool
    would_apply: bool
    problem: str


@dataclasses.dataclass
class Report:
    """All that was found; ``reasons`` are faults, ``notes`` are not."""

    versions: dict[str, str | None] = dataclasses.field(default_factory=dict)
    sglang_supported: str = ""
    sglang_in_range: bool = False
    platform: str | None = None
    device: str | None = None
    entry_points: dict[str, bool] = dataclasses.field(default_factory=dict)
    kernels_package: str | None = None
    hooks: list[HookReport] = dataclasses.field(default_factory=list)
    surface: str = ""
    reasons: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def examine(sglang: str | None = None) -> Report:
    """Look at everything; never raises for what is wrong with the installation.

    ``sglang``: a folder, wheel or version instead of the installed one; then only its source is looked at. Raises
    place.NotFound where there is none.
    """
    report = Report()
    if sglang is not None:
        with place.opened(sglang) as folder:
            _versions(report, place.version_in(folder))
            _surface(report, start.changes(folder))
            _hooks_in_source(report, Code({SGLANG: folder}))
        return report
    _versions(report)
    _kernels(report)
    _entry_points(report)
    if report.sglang_in_range:
        _platform(report)
        _hooks(report)
    if report.versions["sglang"] is not None:
        _surface(report, start.changes(place.installed()))
    return report


def _versions(report: Report, elsewhere: str | None = None) -> None:
    """``elsewhere``: the version of an SGLang that is not the installed one."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    from elora_sglang.patches.base import SUPPORTED_SGLANG

    report.versions = {"elora-sglang": elora_sglang.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            report.versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            report.versions[name] = None
    if elsewhere is not None:
        report.versions["sglang"] = elsewhere
    report.sglang_supported = SUPPORTED_SGLANG
    version = report.versions["sglang"]
    if version is None:
        report.reasons.append(f"sglang is not installed; pip install 'sglang{SUPPORTED_SGLANG}'")
        return
    try:
        report.sglang_in_range = SpecifierSet(SUPPORTED_SGLANG).contains(version, prereleases=True)
    except InvalidVersion:  # a folder that states none
        report.sglang_in_range = False
    if not report.sglang_in_range:
        report.reasons.append(f"sglang {version} is not supported; pip install 'sglang{SUPPORTED_SGLANG}'")


def _kernels(report: Report) -> None:
    """SGLang and transformers import a PyPI package called ``kernels``; a folder of that name hides it."""
    try:
        files = metadata.files("kernels") or []
    except metadata.PackageNotFoundError:
        files = []
    installed = next((Path(str(f.locate())) for f in files if str(f) == "kernels/__init__.py"), None)
    found = importlib.util.find_spec("kernels")
    if found is None or found.origin is None:
        report.kernels_package = None
        if installed is not None:
            report.reasons.append(
                f"the package `kernels` is installed in {installed.parent} but cannot be imported"
            )
        else:
            report.notes.append("the PyPI package `kernels` is not installed; SGLang serves without it")
        return
    report.kernels_package = str(Path(found.origin).parent)
    if installed is None or Path(found.origin).resolve() != installed.resolve():
        report.reasons.append(
            f"`import kernels` finds {report.kernels_package}, which hides the PyPI package that SGLang and "
            "transformers import; start from another folder or rename that one"
        )


def _entry_points(report: Report) -> None:
    for (group, name), value in _ENTRY_POINTS.items():
        found = [e for e in metadata.entry_points(group=group) if e.name == name]
        registered = any(e.value == value for e in found)
        report.entry_points[f"{group}: {name}"] = registered
        if not registered:
            report.reasons.append(
                f"entry point {name} of {group} is not registered; pip install elora-sglang again"
            )
    allowed = _plugin_whitelist()
    if allowed and "elora" not in allowed:
        report.reasons.append(
            "SGLANG_PLUGINS does not name elora, so SGLang will not load it; add it or unset it"
        )
    chosen = os.environ.get("SGLANG_PLATFORM", "")
    if chosen not in ("", "elora_cpu"):
        # SGLang's front-loading filter (plugins/__init__.py): a package with a platform of its own is skipped whole.
        report.reasons.append(
            f"SGLANG_PLATFORM={chosen} makes SGLang skip this package, its plugin included; unset it"
        )


def _plugin_whitelist() -> set[str]:
    return {name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()}


def _platform(report: Report) -> None:
    try:
        from sglang.srt.platforms import current_platform

        report.platform = f"{type(current_platform).__module__}.{type(current_platform).__qualname__}"
        report.device = str(getattr(current_platform, "device_name", None))
    except Exception as error:
        report.reasons.append(f"SGLang finds no platform: {type(error).__name__}: {error}")


def _hooks(report: Report) -> None:
    from elora_sglang.integration.plugin.verify import check_target

    # SGLang registers classes with the multiprocessing of a scheduler; its own import order is the safe one.
    try:
        import sglang.srt.managers.scheduler  # noqa: F401
    except Exception as error:
        report.reasons.append(f"SGLang's scheduler cannot be imported: {type(error).__name__}: {error}")
        return
    for patch in discover():
        state = check_target(patch)
        report.hooks.append(
            HookReport(
                name=patch.name,
                target=patch.target,
                kind=patch.kind.value,
                process=patch.process.value,
                when=patch.when.value,
                target_found=state.found,
                signature_ok=state.signature_ok,
                hash_ok=state.hash_ok,
                would_apply=state.ok,
                problem=state.problem,
            )
        )
        if state.problem:
            _say(report, f"hook {patch.name}: {state.problem}", [_part(patch)], fault=not state.ok)


def _hooks_in_source(report: Report, code: Code) -> None:
    """Every patch record against an SGLang that is read and not imported."""
    known = record.stored().entries
    for patch in discover():
        seen, expected = describe(code, patch.target), known.get(patch.target)
        signature_ok = (
            seen is not None and expected is not None and seen.signature == expected.shape.signature
        )
        report.hooks.append(
            HookReport(
                name=patch.name,
                target=patch.target,
                kind=patch.kind.value,
                process=patch.process.value,
                when=patch.when.value,
                target_found=seen is not None,
                signature_ok=signature_ok,
                hash_ok=seen is not None and expected is not None and seen.sha256 == expected.shape.sha256,
                would_apply=signature_ok,
                problem="" if signature_ok else "see the faults and notes",
            )
        )


def _surface(report: Report, found: Comparison) -> None:
    """All that our code uses of SGLang; what the hooks' own check has said already is not said again."""
    report.surface = found.summary
    said = {hook.target for hook in report.hooks}
    for change in found.changes:
        if change.name not in said:
            _say(report, change.line, change.parts, fault=change.breaks)


def _part(patch: Patch) -> str:
    return PART_OF_RECORD.get(patch.when, "elora")


def _say(report: Report, text: str, parts: Iterable[str], *, fault: bool) -> None:
    """A fault where a server with ``--elora`` needs it, on the platform that is in use; else a note."""
    on_our_platform = (report.platform or "").startswith("elora_sglang.platform")
    needed = {"elora", "cpu"} if on_our_platform else {"elora"}
    if not fault:
        report.notes.append(text)
    elif needed & {*parts}:
        report.reasons.append(text)
    else:
        where = ", ".join(_ELSEWHERE[part] for part in parts)
        report.notes.append(f"{where}: {text}")


def render(report: Report) -> str:
    """The report for people."""
    lines = [f"{name:14} {version or 'not installed'}" for name, version in report.versions.items()]
    lines.append(f"{'':14} sglang {report.sglang_supported}: {'yes' if report.sglang_in_range else 'NO'}")
    lines.append(f"{'platform':14} {report.platform or 'unknown'} (device {report.device or 'unknown'})")
    lines.append(f"{'kernels':14} {report.kernels_package or 'not installed'}")
    lines += [
        f"{'entry point':14} {name}: {'yes' if ok else 'NO'}" for name, ok in report.entry_points.items()
    ]
    if report.hooks:
        width = max(len(hook.name) for hook in report.hooks)
        lines += ["", f"{'hook':{width}}  target  signature  source  applies"]
    for hook in report.hooks:
        marks = (hook.target_found, hook.signature_ok, hook.hash_ok, hook.would_apply)
        found, signature, source, applies = ("yes" if mark else "NO" for mark in marks)
        lines.append(f"{hook.name:{width}}  {found:6}  {signature:9}  {source:6}  {applies}")
    if report.surface:
        lines += ["", f"{'surface':14} {report.surface}"]
    lines += [f"\nnote: {note}" for note in report.notes]
    lines += [f"\nfault: {reason}" for reason in report.reasons]
    lines.append(
        "\nready: --elora will start here" if not report.reasons else "\nnot ready: see the faults above"
    )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """Print the report; 0 when a server with ``--elora`` would start, else 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of SGLang's imports, about hardware that is not here
        try:
            report = examine(options.sglang)
        except place.NotFound as error:
            print(f"elora: {error}", file=sys.stderr)
            return 2
    if options.json:
        data: dict[str, Any] = dataclasses.asdict(report)
        print(json.dumps({"ok": not report.reasons, **data}, indent=1))
    else:
        print(render(report))
    if report.reasons and options.json:
        print(f"elora: {report.reasons[0]}", file=sys.stderr)
    return 1 if report.reasons else 0


def add_command(commands: Any) -> None:
    """Add ``doctor`` to the subcommands of ``python -m elora_sglang``."""
    parser = commands.add_parser(
        "doctor", help="check this installation: versions, platform, what we use of SGLang"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--sglang", metavar="PLACE", help="look at this folder, wheel or version of SGLang")
    parser.set_defaults(run=run)
