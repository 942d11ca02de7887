"""What a command leaves: a JSON file, and a short table on the terminal."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


def write(
    table: str, options: argparse.Namespace, about: dict[str, Any], found: dict[str, Any], lines: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what was found as one, and write it where ``--out`` says.

    Args:
        table: The command's name.
        options: Its arguments.
        about: What it ran on.
        found: What holds for all lines.
        lines: The table.
    """
    about = {**about, "load_after": [round(load, 2) for load in os.getloadavg()]}
    arguments = {name: value for name, value in vars(options).items() if name not in ("out", "run", "device", "logs")}
    whole = {"table": table, "arguments": arguments, "machine": about, **found, "lines": lines}
    if options.out:
        path = Path(options.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_rounded(whole), indent=1) + "\n", encoding="utf-8")
    return whole


def _rounded(value: Any) -> Any:
    """Return the same with six digits of each number."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def show(whole: dict[str, Any]) -> int:
    """Print what was found; return the exit code, 1 where losses that must be equal are not."""
    _show_head(whole)
    for check in whole.get("checks", []):
        print(check_words(check))
    for line in whole["lines"]:
        print(line_words(line, max(whole["ceiling_tflops"])))
    return int(any(not check.get("equal", True) for check in whole.get("checks", [])))


def show_profile(whole: dict[str, Any]) -> None:
    """Print a profile."""
    _show_head(whole)
    share = 100 * whole["tflops"] / max(whole["ceiling_tflops"])
    print(f"{whole['ms']:.3f} ms a client-step, {share:.1f} % of the ceiling; {100 * whole['covered']:.1f} % covered")
    for line in whole["lines"]:
        print(f"{line['family']:<46} {line['ms']:10.2f} ms {100 * line['share']:6.1f} %")
    for kernel in whole["kernels"]:
        print(f"  {kernel['ms']:9.2f} ms {kernel['calls']:6d} x  {kernel['family'][:24]:<24}  {kernel['name'][:90]}")


def show_memory(whole: dict[str, Any]) -> None:
    """Print what a model's memory was: the first two rounds, and the last two."""
    _show_head(whole)
    lines = whole["lines"]
    for line in [*lines[:2], *lines[2:][-2:]]:
        print(
            f"round {line['round']:<3} {line['wall_s']:8.2f} s  peak {line['peak_gib']:.2f} GiB, held after "
            f"{line['held_gib']:.3f}, kept by the allocator {line['reserved_gib']:.2f} {line['error']}".rstrip()
        )
    share = 100 * whole["tflops"] / max(whole["ceiling_tflops"])
    print(
        f"{whole['rounds']} rounds, {whole['ms']:.1f} ms a client-step ({whole['ms_min']:.1f} to "
        f"{whole['ms_max']:.1f}), {share:.1f} % of the ceiling; base {whole['base_gib']:.2f} GiB (predicted "
        f"{whole['base_gib_predicted']:.2f}), peak {whole['peak_gib']:.2f} GiB; {whole['growth_gib']:+.4f} GiB held "
        f"from the second round to the last; loaded in {whole['load_s']:.0f} s, compiled in {whole['settle_s']:.0f} s"
    )


def show_curves(whole: dict[str, Any]) -> None:
    """Print loss curves: the mean of the clients over rounds of so many steps, and how far from PEFT in float32."""
    _show_head(whole)
    for line in whole["lines"]:
        print(f"{line['way']}, {line['dtype']} {line['error']}".rstrip())
        for steps, losses, off in zip(line["steps"], line["losses"], line["off"], strict=False):
            print(f"  {steps:3d} steps: {sum(losses) / len(losses):.5f}, a client at most {off:.1e} apart")


def _show_head(whole: dict[str, Any]) -> None:
    print(json.dumps(whole["machine"]))
    tops = ", ".join(f"{top:.1f}" for top in whole["ceiling_tflops"])
    print(f"ceiling of matrix products: {tops} TFLOP/s")


def check_words(check: dict[str, Any]) -> str:
    """Return a comparison of losses in words."""
    what = f"{check['method']}{', DP' if check['dp'] else ''}{', ragged ranks' if check['ragged'] else ''}"
    if check["error"]:
        return f"losses of {what} against {check['against']}: {check['error']}"
    verdict = "equal" if check["equal"] else "NOT EQUAL"
    return (
        f"losses of {what} against {check['against']}: {verdict}, {check['off']:.1e} apart at most (tolerance "
        f"{check['tolerance']:g}) where they fell by {check['fell']:.1e}"
    )


def line_words(line: dict[str, Any], ceiling: float) -> str:
    """Return a line of the table in words."""
    flags = "".join(f" {name}" for name in ("dp", "ragged") if line.get(name))
    name = line["way"] if line["way"] != "fedlora" else f"fedlora {line['method']}{flags}"
    head = f"{name:<24} K={line['clients']:<4} "
    if "steps" in line:
        head += f"steps={line['steps']:<3} {line['rows']}x{line['tokens']:<5}"
    if "useful" in line:
        head += f"{100 * line['useful']:.1f} % of {line['tokens_computed']} computed tokens are real"
    if "ms" not in line:
        return f"{head} {line['error']}"
    share = f"{100 * line['tflops'] / ceiling:5.1f} %" if ceiling else ""
    times = " ".join(f"{ratio:.2f}x {other}" for other, ratio in line.get("times", {}).items())
    span = f"{line['ms']:8.3f} ms ({line['ms_min']:.3f}-{line['ms_max']:.3f}, n={line['repeats']})"
    return f"{head} {span} {share} {line['peak_gib']:6.2f} GiB  {times} {line['error']}".rstrip()
