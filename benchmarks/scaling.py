"""One GPU and two, by ``fedlora run``: seconds of a round through Flower and Ray, and where they go.

    python -m benchmarks.scaling --shape roberta-large --clients 64 --steps 20

A model of the shape with random weights is saved to a folder, with texts whose class shows in their words; the same
federation then runs on one trainer and on two, in ABBA order, each run with processes, Flower and Ray of its own. A
round's time is that of ``metrics.jsonl``, without the first: server, messages, training and evaluation. What trainers
did in it is in ``packs.jsonl``, by their own clocks: a round takes what the busiest trainer does, and the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from benchmarks.engine.report import write
from benchmarks.engine.shapes import SHAPES, random_model
from benchmarks.engine.timing import machine
from benchmarks.engine.train import numbers
from benchmarks.gpu_use import GpuUse
from fedlora.config import to_toml
from fedlora.runs.folder import read_lines

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "engine" / "scaling.json"
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # by number: RoBERTa's padding is 1
_TEST_ROWS = 128
_TAIL = 5000  # characters of a failed run's output
_LEAVE_S = 30.0  # for which a run that took too long may clear up
_ALIKE = (5e-3, 0.1)  # by how much losses may differ, and by what share of their fall: packs differ, and so rounding


def main() -> int:
    """Measure; return the exit code: 1 where a run failed, or came to another loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=SHAPES, default="roberta-large", help="of a classifier")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--trainers", type=numbers, default=[1, 2, 2, 1], help="trainers of each run, one a GPU")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=20, help="steps of a client in a round")
    parser.add_argument("--rounds", type=int, default=6, help="rounds, the first of which is not timed")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate")
    parser.add_argument("--limit-s", type=float, default=240, help="seconds after which a run is ended")
    parser.add_argument("--budget-s", type=float, default=0, help="seconds after which no run is started")
    parser.add_argument("--out", default=str(RESULTS), help="JSON file to write")
    parser.add_argument("--logs", default="", help="folder for the output of the runs")
    options = parser.parse_args()
    about = machine(torch.device(options.device), "benchmarks.scaling")
    started, lines, whole = time.monotonic(), list[dict[str, Any]](), dict[str, Any]()
    logs = Path(options.logs or tempfile.mkdtemp(prefix="scaling-"))
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        flat = federation(Path(name), options)
        for number, trainers in enumerate(options.trainers):
            if options.budget_s and time.monotonic() - started > options.budget_s:
                print("no time left for more runs", flush=True)
                break
            line = measure(Path(name), flat, number, trainers, options, logs)
            lines.append(line)
            whole = write("scaling", options, about, summary(lines), lines)
            print(json.dumps({key: value for key, value in line.items() if key != "rounds"}), flush=True)
    print(json.dumps({key: whole[key] for key in ("by_trainers", "times", "times_training", "off", "alike")}, indent=1))
    return int(any(line["error"] for line in lines) or not whole["alike"])


# -- what is run ------------------------------------------------------------------------------------------


def federation(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write model and texts, and return the configuration of a run."""
    shape, steps = SHAPES[options.shape], options.steps
    assert not shape.causal, "a classifier's texts are written"
    started = time.monotonic()
    save_model(folder / "model", options.shape, torch.bfloat16 if options.device == "cuda" else torch.float32)
    vocabulary = int(shape.config().vocab_size)
    rows = options.clients * steps * options.rows
    train = save_texts(folder / "train.csv", rows, options.tokens - 2, vocabulary, 0)
    test = save_texts(folder / "test.csv", min(_TEST_ROWS, rows), options.tokens - 2, vocabulary, 1)
    print(f"model and {rows} texts written in {time.monotonic() - started:.1f} s", flush=True)
    return {
        "rounds": options.rounds,
        "model.name": str(folder / "model"),
        "data.name": "file",
        "data.path": train,
        "data.test-path": test,
        "data.partition": "iid",
        "federation.num-clients": options.clients,
        "strategy.name": "fedavg",
        "method.name": "lora",
        "train.batch-size": options.rows,
        "train.local-steps": steps,
        "train.learning-rate": options.rate,
        "train.max-length": options.tokens,
        "engine.dtype": "bfloat16" if options.device == "cuda" else "float32",
        "run.dir": str(folder / "runs"),
    }


def save_model(folder: Path, shape: str, dtype: torch.dtype) -> None:
    """Save a model of random weights, without a head, and a tokenizer of words for all of its vocabulary."""
    whole = random_model(SHAPES[shape], torch.device("cpu"), dtype)
    whole.base_model.save_pretrained(folder)
    size = int(whole.config.vocab_size)
    words = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), size))]
    if int(whole.config.pad_token_id) == 0:  # BERT's
        words[0], words[1] = words[1], words[0]
    numbered = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbered, unk_token=SPECIAL[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(word, numbered[word]) for word in (SPECIAL[0], SPECIAL[2])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ends
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        **dict(zip(("cls_token", "pad_token", "sep_token", "unk_token"), SPECIAL, strict=True)),
    ).save_pretrained(folder)


def save_texts(path: Path, rows: int, words: int, vocabulary: int, seed: int) -> str:
    """Write texts of so many words each, a quarter of which say the class; return the file's name."""
    generator = np.random.default_rng(seed)
    labels = np.arange(rows) % 2
    drawn = generator.integers(len(SPECIAL), vocabulary, (rows, words))
    telling = len(SPECIAL) + generator.integers(0, 16, (rows, words)) + 16 * labels[:, None]
    chosen = np.where(generator.random((rows, words)) < 0.25, telling, drawn)
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for text, label in zip(chosen, labels, strict=True):
            file.write(f"{' '.join(f'w{word}' for word in text)},{'yes' if label else 'no'}\n")
    return str(path)


# -- one run ----------------------------------------------------------------------------------------------


def measure(
    folder: Path, flat: dict[str, Any], number: int, trainers: int, options: argparse.Namespace, logs: Path
) -> dict[str, Any]:
    """Run the federation on so many trainers, and return what its folder says."""
    name, cpu = f"run-{number + 1}", options.device == "cpu"
    file = folder / f"{name}.toml"
    file.write_text(to_toml({**flat, "run.name": name, "engine.trainers": trainers}), encoding="utf-8")
    visible = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    gpus = (visible or [str(gpu) for gpu in range(torch.cuda.device_count())])[:trainers]
    line: dict[str, Any] = {"run": name, "trainers": trainers, "error": ""}
    if len(gpus) < trainers and not cpu:
        return {**line, "error": f"{trainers} trainers, one a GPU, and {len(gpus)} GPU(s)"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "" if cpu else ",".join(gpus), "PYTHONPATH": path}
    command = [sys.executable, "-c", "from deploy.cli import main; main()", "run", str(ROOT), "-c", str(file)]
    log, started = logs / f"{name}.log", time.monotonic()
    with GpuUse(gpus if not cpu else []) as use, log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
        ends, error = follow(process, log, options.limit_s)
    line |= {"error": error, "whole_s": time.monotonic() - started, "start_s": ends[0] - use.started if ends else None}
    if error:
        print(f"-- {name}: {error}; the end of its output:\n{log.read_text(errors='replace')[-_TAIL:]}", flush=True)
    if len(ends) < 2:
        return line
    line["gpu_busy"] = use.busy(ends[0], ends[-1])
    return line | read_run(folder / "runs" / name)  # also of one that was ended: its rounds are whole


def follow(process: subprocess.Popen[bytes], log: Path, limit_s: float) -> tuple[list[float], str]:
    """Wait for a run, for so many seconds; return when each of its rounds was shown, and what went wrong."""
    started, ends = time.time(), list[float]()
    while process.poll() is None and time.time() - started < limit_s:
        shown = sum(line.startswith(b"round ") for line in log.read_bytes().splitlines())
        ends += [time.time()] * (shown - len(ends))
        time.sleep(0.1)
    if process.poll() is None:
        for link in Path(tempfile.gettempdir()).glob("fedlora-*/superlink.log"):
            if link.stat().st_mtime < started:
                continue  # another run's
            text = link.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
            print(f"-- {link}:\n{text}", flush=True)
            shutil.copyfile(link, log.with_suffix(".superlink.log"))
        process.terminate()  # it ends all that it has started
        try:
            process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            process.kill()
        return ends, f"not done within {limit_s:.0f} s"
    return ends, "" if process.returncode == 0 else f"exit code {process.returncode}"


def read_run(folder: Path) -> dict[str, Any]:
    """Return what a run's folder says of its rounds."""
    metrics, packs = read_lines(folder / "metrics.jsonl"), read_lines(folder / "packs.jsonl")
    rounds = []
    for one in metrics:
        own = [pack for pack in packs if pack["round"] == one["round"]]
        if not own:
            continue  # the run was ended right there
        busy: dict[str, float] = {}
        for pack in own:
            busy[str(pack["trainer"])] = busy.get(str(pack["trainer"]), 0.0) + pack["seconds"]
        kept = ("round", "seconds", "train_loss", "test_accuracy", "test_loss", "clients_ok", "message_bytes_up")
        rounds.append({**{key: one[key] for key in kept}, "busy_s": busy, "packs": len(own)})
    warm = rounds[1:]
    each = [statistics.median(one["seconds"] for one in warm), *(f(one["seconds"] for one in warm) for f in (min, max))]
    return {
        "round_s": dict(zip(("median", "min", "max"), each, strict=True)),
        "busiest_s": statistics.median(max(one["busy_s"].values()) for one in warm),
        "rest_s": statistics.median(one["seconds"] - max(one["busy_s"].values()) for one in warm),
        "uneven": statistics.median(max(one["busy_s"].values()) / min(one["busy_s"].values()) for one in warm),
        "lost": (folder / "losses.jsonl").is_file(),
        "rounds": rounds,
    }


# -- what it comes to -------------------------------------------------------------------------------------


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return medians by number of trainers, the ratio of the most to the least, and whether losses agree."""
    done = [line for line in lines if "round_s" in line]
    by: dict[int, list[dict[str, Any]]] = {}
    for line in done:
        by.setdefault(line["trainers"], []).append(line)
    warm = {
        count: {
            "round_s": statistics.median(one["seconds"] for line in own for one in line["rounds"][1:]),
            **{key: statistics.median(line[key] for line in own) for key in ("busiest_s", "rest_s", "uneven")},
        }
        for count, own in sorted(by.items())
    }
    least = min((len(line["rounds"]) for line in done), default=0)
    losses = [[one["train_loss"] for one in line["rounds"][:least]] for line in done]
    off = max((float(np.abs(np.subtract(losses[0], one)).max()) for one in losses), default=0.0)
    fell = losses[0][0] - losses[0][-1] if losses else 0.0
    return {
        "by_trainers": warm,
        "times": _ratio(warm, "round_s"),
        "times_training": _ratio(warm, "busiest_s"),
        "off": off,
        "fell": fell,
        "alike": off <= _ALIKE[0] + _ALIKE[1] * abs(fell),
    }


def _ratio(by_trainers: dict[int, dict[str, float]], what: str) -> float | None:
    """Return how many times the fewest trainers take of what the most do; None where there is one number of them."""
    few, most = by_trainers.get(min(by_trainers, default=0)), by_trainers.get(max(by_trainers, default=0))
    return few[what] / most[what] if few is not None and most is not None and few is not most else None


if __name__ == "__main__":
    sys.exit(main())
