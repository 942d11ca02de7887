"""Makes the tables of ``docs/performance.md`` from what was measured (``make tables``)."""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tools.markdown import Table, rewrite
from tools.performance_goals import rows_of, scaling_goal
from tools.performance_results import Line, device, lines_of, results, table_of

SEQUENTIAL = ("graph", "compile", "eager")


def engine_table(dp: bool) -> list[str]:
    """Return a line for each way, pack and number of steps, without or with DP-SGD."""
    ways = ["opacus-hooks", "opacus-ghost"] if dp else ["as-shipped", *SEQUENTIAL]
    left = {"model": "<", "way": "<", "clients": ">", "steps": ">", "rows x tokens": ">", "ms a client-step": ">"}
    columns = {**left, "of the ceiling": ">", "memory, GiB": ">", **{f"x {way}": ">" for way in ways}}
    rows = []
    for line in lines_of("train"):
        plain = line["method"] == "lora" and not line.get("ragged")
        if line["dp"] == dp and plain:
            cells = [_model(line), line["way"], str(line["clients"]), str(line["steps"]), _size(line), _ms(line)]
            cells += [_share(line), _memory(line), *(_times(line, way) for way in ways)]
            rows.append(cells)
    return table_of(columns, rows)


def methods_table() -> list[str]:
    """Return each method's client-step by that of LoRA without privacy, and its DP-SGD by its own step without."""
    lines = [line for line in lines_of("train") if line["way"] == "fedlora" and "ms" in line]
    times = {_key(line): line["ms"] for line in lines}
    columns = dict.fromkeys(("model", "method"), "<")
    columns |= dict.fromkeys(("clients", "steps", "rows x tokens", "ms", "by lora", "DP, ms", "DP by no DP"), ">")
    rows = []
    for line in (line for line in lines if not line["dp"]):
        lora = times.get(_key({**line, "method": "lora", "ragged": False}))
        private = times.get(_key({**line, "dp": True}))
        name = f"`{line['method']}`" + (", ranks 2 to 8" if line["ragged"] else "")
        cells = [_model(line), name, str(line["clients"]), str(line["steps"]), _size(line), f"{line['ms']:.3g}"]
        cells += [_number(lora and line["ms"] / lora), _number(private), _number(private and private / line["ms"])]
        rows.append(cells)
    return table_of(columns, rows)


def regimes_table() -> list[str]:
    """Return a line for each number of tokens a client-step."""
    columns = {"model": "<", **dict.fromkeys(("tokens a client-step", "clients", "fedlora, ms", "of the ceiling"), ">")}
    columns |= {f"x {way}": ">" for way in SEQUENTIAL}
    rows = []
    for line in (line for line in lines_of("regimes") if line["way"] == "fedlora"):
        cells = [_model(line), f"{line['size']} ({_size(line)})", str(line["clients"]), _ms(line), _share(line)]
        rows.append(cells + [_times(line, way) for way in SEQUENTIAL])
    return table_of(columns, rows)


def uneven_table() -> list[str]:
    """Return uneven clients beside equal ones."""
    columns = {"model": "<", "clients": "<", "client-steps": ">", "real of the computed tokens": ">"}
    columns |= dict.fromkeys(("ms a client-step", "us a real token", "of the ceiling"), ">")
    rows = []
    for line in lines_of("uneven"):
        cells = [_model(line), f"{line['clients']} {line['way']}", str(line["client_steps"])]
        cells += [
            f"{line['useful']:.1%}" if "useful" in line else "not seen",
            _ms(line),
            _number(line.get("us_a_token")),
            _share(line),
        ]
        rows.append(cells)
    return table_of(columns, rows)


def memory_table() -> list[str]:
    """Return the memory of large models over rounds."""
    columns = {"model": "<", "base": "<", **dict.fromkeys(("clients", "rows x tokens", "rounds", "base, GiB"), ">")}
    columns |= dict.fromkeys(("peak, GiB", "growth from round 2 on, GiB", "ms a client-step", "of the ceiling"), ">")
    rows = []
    for _, whole in results("memory"):
        own, base = whole["arguments"], whole["arguments"]["quantization"]
        cells = [_model({**own, "device": device(whole)}), base if base != "none" else "bfloat16", str(own["clients"])]
        cells += [_size(own), str(whole["rounds"]), f"{whole['base_gib']:.2f}", f"{whole['peak_gib']:.2f}"]
        share = whole["tflops"] / max(whole["ceiling_tflops"])
        cells += [f"{whole['growth_gib']:+.3f}", _ms(whole), f"{share:.1%}"]
        rows.append([*cells[:-2], whole["error"], ""] if whole["error"] else cells)
    return table_of(columns, rows)


def profile_table() -> list[str]:
    """Return where a round's time goes, a column a run."""
    found = list(results("profile"))
    columns = {"": "<", **{f"{name}": ">" for name, _ in found}}
    head = [[""], ["ms a client-step"], ["of the ceiling"]]
    for _, whole in found:
        own = whole["arguments"]
        what = f"{own['shape']}, {_size(own)}, {own['clients']} clients, {own['method']}{', DP' * own['dp']}"
        head[0].append(f"{what}, {device(whole)}")
        head[1].append(f"{whole['ms']:.3g}")
        head[2].append(f"{whole['tflops'] / max(whole['ceiling_tflops']):.1%}")
    kinds = list(dict.fromkeys(line["family"] for _, whole in found for line in whole["lines"]))
    shares = [{line["family"]: line["share"] for line in whole["lines"]} for _, whole in found]
    rows = [[kind, *(f"{share.get(kind, 0):.1%}" for share in shares)] for kind in kinds]
    return table_of(columns, [*head, *rows] if found else [])


def losses_table() -> list[str]:
    """Return how far the losses of packed clients were from those of the same clients alone, at most."""
    columns = {"run": "<", "method": "<", "against": "<", "apart at most": ">", "allowed": ">", "fell by": ">"}
    worst: dict[tuple[str, str, str], Line] = {}
    for name, whole in [*results("train"), *results("regimes")]:
        for one in whole["checks"]:
            what = f"`{one['method']}`" + ", DP" * one["dp"] + ", unlike ranks" * one["ragged"]
            before = worst.setdefault((name, what, one["against"]), one)
            if _apart(one) > _apart(before):
                worst[name, what, one["against"]] = one
    rows = []
    for key, one in worst.items():
        numbers = [f"{one[number]:.1e}" for number in ("off", "tolerance", "fell")] if "equal" in one else []
        rows.append([*key, *(numbers or [one["error"], "", ""])])
    return table_of(columns, rows)


def curves_table() -> list[str]:
    """Return mean losses over rounds of growing length, PEFT in float32 first."""
    columns = {"model": "<", "steps": ">", "PEFT, float32": ">", "fedlora, float32": ">", "PEFT, bfloat16": ">"}
    rows = []
    for _, whole in results("curves"):
        own = whole["arguments"]
        named = {(line["way"], line["dtype"]): line for line in whole["lines"]}
        none: Line = {"steps": [], "losses": [], "off": []}  # of a command that was cut off
        order = [named.get((way, dtype), none) for dtype in ("float32", "bfloat16") for way in ("eager", "fedlora")]
        for at, steps in enumerate(order[0]["steps"]):
            cells = [_model({**own, "device": device(whole)}), str(steps)]
            for line in order:
                reached = at < len(line["losses"])
                cells.append(f"{statistics.mean(line['losses'][at]):.4f} ({line['off'][at]:.0e})" if reached else "")
            rows.append(cells)
    return table_of({**columns, "fedlora, bfloat16": ">"}, rows)


def _apart(check: Line) -> float:
    """Return how far losses were apart, by what was allowed; one that could not be compared is shown before all."""
    return float(check["off"] / check["tolerance"]) if "equal" in check else float("inf")


def runs_table() -> list[str]:
    """Return the command, machine and versions of each run."""
    names = ("run", "command", "machine", "ceiling, TFLOP/s", "load", "versions", "commit, day")
    columns = dict.fromkeys(names, "<")
    rows = []
    for table in ("train", "regimes", "uneven", "memory", "profile", "curves", "kernels", "scaling"):
        for name, whole in results(table):
            about = whole["machine"]
            versions = {key: about["versions"][key] for key in ("torch", "transformers", "peft")}
            cells = [name, f"`{about['command']}`", f"{device(whole)}, {about['cores']} cores"]
            tops = [f"{top:.3g}" for top in sorted(whole.get("ceiling_tflops", []))]
            cells.append(" to ".join(dict.fromkeys([*tops[:1], *tops[-1:]])))
            cells += [f"{about['load'][0]:g} to {about['load_after'][0]:g}"]
            rows.append(
                [
                    *cells,
                    ", ".join(f"{key} {value}" for key, value in versions.items()),
                    f"{about['commit']} {about['time'][:10]}".strip(),
                ]
            )
    return table_of(columns, rows)


def kernels_table() -> list[str]:
    """Return what each kernel takes on the device, and what a call of it costs the host."""
    columns = dict.fromkeys(("kernel", "sizes", "way"), "<")
    columns |= dict.fromkeys(("forward, us", "backward, us", "by moving the numbers once", "eager call, us"), ">")
    rows = []
    for _, whole in results("kernels"):
        for line in whole["lines"]:
            by = line["device_us"] / line["moved_us"]
            cells = [line["kernel"], " x ".join(map(str, line["sizes"])), line["way"]]
            cells += [f"{line['forward_us']:.0f}", f"{line['backward_us']:.0f}", f"{by:.2f}", f"{line['host_us']:.0f}"]
            rows.append(cells)
    return table_of(columns, rows)


def scaling_table() -> list[str]:
    """Return runs on one trainer and on several: a round's seconds, and where they go."""
    columns = {"run": "<", "trainers": ">", "order": ">", "s a round": ">", "busiest trainer, s": ">"}
    columns |= dict.fromkeys(("the rest, s", "most by least busy", "GPU busy", "start, s", "last loss"), ">")
    rows = []
    for name, whole in results("scaling"):
        for number, line in enumerate(whole["lines"], 1):
            cells = [f"{name}, {_model({**whole['arguments'], 'device': device(whole)})}", str(line["trainers"])]
            cells.append(str(number))
            if "round_s" not in line:
                rows.append([*cells, line["error"], *[""] * 6])
                continue
            own = line["round_s"]
            cells += [f"{own['median']:.3g} ({own['min']:.3g} to {own['max']:.3g})"]
            cells += [f"{line[key]:.3g}" for key in ("busiest_s", "rest_s", "uneven")]
            cells += [", ".join(f"{share:.0%}" for share in line["gpu_busy"].values()), f"{line['start_s']:.0f}"]
            rows.append([*cells, f"{line['rounds'][-1]['train_loss']:.4f}"])
        if whole["times"]:
            said = f"**{whole['times']:.2f} times** as fast, training alone {whole['times_training']:.2f} times"
            rows.append([f"{name}: {said}; losses {whole['off']:.0e} apart at most", *[""] * 9])
    return table_of(columns, rows)


def _key(line: Line) -> tuple[Any, ...]:
    names = ("run", "shape", "method", "ragged", "clients", "steps", "rows", "tokens", "dp")
    return tuple(line[name] for name in names)


def _model(line: Line) -> str:
    return f"{line['shape']}, {line['device']}"


def _size(line: Line) -> str:
    return f"{line['rows']} x {line['tokens']}"


def _ms(line: Line) -> str:
    if "ms" not in line:
        return str(line["error"])
    return f"{line['ms']:.3g} ({line['ms_min']:.3g} to {line['ms_max']:.3g})"


def _share(line: Line) -> str:
    return f"{line['share']:.1%}" if "share" in line else ""


def _memory(line: Line) -> str:
    return f"{line['peak_gib']:.1f}" if line.get("peak_gib") else ""


def _times(line: Line, way: str) -> str:
    return _number(line.get("times", {}).get(way))


def _number(value: float | None) -> str:
    return "" if not value else f"{value:.3g}"


def goals_table() -> list[str]:
    """Return what was aimed at, beside the best of the measured numbers of clients."""
    lines = [line for line in lines_of("train", "regimes") if line["gpu"]]
    columns = {"model": "<", "tokens a client-step": ">", "what": "<", "aimed at": ">"}
    rows = rows_of(lines, (4, 20)) if lines else []
    for _, whole in results("scaling"):
        if whole["machine"]["cuda"] is not None:
            rows.append(scaling_goal(whole["arguments"], whole["times"], (4, 20)))
    return table_of({**columns, "4 steps a round": ">", "20 steps a round": ">"}, rows)


TABLES: dict[str, Table] = {
    "goals": goals_table,
    "engine": partial(engine_table, dp=False),
    "dp": partial(engine_table, dp=True),
    "methods": methods_table,
    "regimes": regimes_table,
    "uneven": uneven_table,
    "memory": memory_table,
    "profile": profile_table,
    "losses": losses_table,
    "curves": curves_table,
    "kernels": kernels_table,
    "scaling": scaling_table,
    "runs": runs_table,
}


def main(root: str) -> None:
    """Make the page's tables anew."""
    rewrite(Path(root) / "docs" / "performance.md", TABLES)


if __name__ == "__main__":
    main(sys.argv[1])
