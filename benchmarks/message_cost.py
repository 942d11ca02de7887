"""What a message costs a deployed site with MiniLM resident, above an empty Flower ClientApp, measured in one run.

The empty ClientApp answers with what it was sent: nothing, or as many bytes as ours.

A federation of one site on this machine, with TLS and the gateway. Messages are sent several at once, so that a
SuperNode has the next one as soon as it has answered: what is measured is process start, imports, the way to the daemon
and back, and a training step, and not how often Flower looks for messages.

    python -m benchmarks.message_cost
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from deploy.coordinator_file import CoordinatorFile
from deploy.demo import federation, prepare
from deploy.run import app_folder
from fedlora.config import Config, from_toml, to_toml
from fedlora.data import load_corpus
from simulations.launch import shipped
from simulations.options import read_overrides
from simulations.superlink import flower_command, flower_environment

MESSAGES = 6
SIZES = {"empty": 0, "empty, 160 kB": 160_000, "fedlora": 0}
"""Bytes of the messages of an empty ClientApp; fedlora's are those of FFA-LoRA of rank 8 and a head, 160 kB."""

REPEATS = 3

SERVER = '''
import json, time
from pathlib import Path
import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
empty = ClientApp()
COUNT = {count}

@empty.train()
def train(message, context):
    return Message(message.content, reply_to=message)

def ask(grid, messages):
    """Send messages, and return the seconds until the last reply, and the replies."""
    started = time.monotonic()
    waiting = set(grid.push_messages(messages))
    replies = []
    while waiting:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            replies.append(reply)
        time.sleep(0.02)
    assert not any(reply.has_error() for reply in replies), [reply.error for reply in replies if reply.has_error()]
    return time.monotonic() - started, replies

@server.main()
def main(grid, context):
    while not (nodes := sorted(grid.get_node_ids())):
        time.sleep(0.5)
    if {ours}:
        contents = messages_of(grid, context, nodes[0])
    else:
        size = {size}
        contents = lambda number: RecordDict({{"a": ArrayRecord([np.zeros(size // 4, np.float32)])}} if size else {{}})
    ask(grid, [Message(contents(1), nodes[0], "train", ttl=600.0)])
    took, replies = ask(grid, [Message(contents(2 + n), nodes[0], "train", ttl=600.0) for n in range(COUNT)])
    if {ours}:
        from fedlora.wire import read_reports
        reports = [read_reports(reply.content)[0] for reply in replies]
        assert all(report.outcome == "ok" for report in reports), reports
    Path(context.run_config["bench.out"]).write_text(json.dumps(took / COUNT))

def messages_of(grid, context, node):
    """Have the site join, and return what makes a training message."""
    import numpy as np
    from clients.limits import SiteLimits
    from clients.site import Job
    from clients.worker import Worker
    from fedlora.data import FederatedData, load_corpus
    from fedlora.exchange import Instruction
    from fedlora.joining import JoinRequest
    from fedlora.wire import read_join_report, write_instruction, write_join_request
    from simulations.setup import resolve
    from strategies.build import build_strategy
    config = resolve({{key: value for key, value in context.run_config.items() if not key.startswith("bench.")}})
    nobody = (np.zeros(0, dtype=np.int64),)
    data = FederatedData(load_corpus(config), nobody, nobody)
    model = Worker(lambda: Job(config.to_flat(), data, SiteLimits("/tmp")), 1).loaded.model
    strategy = build_strategy(config, model.specs)
    tensors = strategy.initial(model.initial).tensors
    request = JoinRequest("a", 0, 1, config.to_flat())
    _, (joined,) = ask(grid, [Message(write_join_request(request), node, "query", ttl=600.0)])
    assert not read_join_report(joined.content).reason, read_join_report(joined.content)
    sent = {{name: tensors[name] for name in strategy.sent(1)}}
    return lambda number: write_instruction(
        Instruction(
            number, (0,), strategy.all_roles(number), sent, blocks=strategy.blocks(number), job=request.job
        )
    )
'''


def main() -> None:
    """Measure, and print a line of JSON."""
    corpus = load_corpus(Config())
    rows = {"a": corpus.train.take(np.arange(16))}
    with tempfile.TemporaryDirectory(prefix="fedlora-cost-") as folder:
        place = Path(folder) / "federation"
        prepare(place, rows, corpus, {})
        site = place / "sites/a/site.toml"
        kept = [
            line for line in site.read_text().splitlines() if not line.startswith(("max-epsilon", "max-delta", "min-n"))
        ]
        site.write_text("\n".join(kept).replace("[limits]", "[limits]\nraw-updates = true"))
        with federation(place, ("a",)):
            measured: dict[str, list[float]] = {name: [] for name in SIZES}
            for number in range(REPEATS):
                for name in measured:
                    measured[name].append(_run(Path(folder) / f"{number}-{name}", place, name))
    medians = {name: statistics.median(values) for name, values in measured.items()}
    print(json.dumps({"seconds a message": measured, "median": medians}))


def _run(app: Path, place: Path, name: str) -> float:
    """Run the measuring app once; return seconds a message."""
    own, ours = app_folder(), name == "fedlora"
    shipped(own, app)
    (app / "bench").mkdir()
    (app / "bench/__init__.py").touch()
    (app / "bench/server.py").write_text(SERVER.format(count=MESSAGES, ours=ours, size=SIZES[name]))
    project = (app / "pyproject.toml").read_text()
    project = project.replace('serverapp = "deploy.server_app:app"', 'serverapp = "bench.server:server"')
    if not ours:
        project = project.replace('clientapp = "clients.app:app"', 'clientapp = "bench.server:empty"')
    project = project.replace("fab-include = [", 'fab-include = ["bench/**/*.py", ')
    project = project.replace("[tool.flwr.app.config]\n", '[tool.flwr.app.config]\nbench.out = ""\n')
    (app / "pyproject.toml").write_text(project)
    run = {
        **read_overrides(own, []),
        **from_toml((place / "coordinator/run.toml").read_text()),
        "privacy.mode": "none",
        "privacy.epsilon": 0.0,
        "privacy.delta": 0.0,
        "privacy.client-size": 0,
        "train.optimizer": "adamw",
        "train.learning-rate": 0.01,
        "train.batch-size": 1,
        "train.local-steps": 1,
        "federation.min-replies": 0,
        "bench.out": str(app / "out"),
    }
    (app / "run.toml").write_text(to_toml(run))
    home = CoordinatorFile.read(place / "coordinator/coordinator.toml").flower_home
    command = [flower_command(), "run", str(app), "deployment", "--stream", "--run-config", str(app / "run.toml")]
    done = subprocess.run(
        command,
        env={**os.environ, **flower_environment(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (app / "out").is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    return float(json.loads((app / "out").read_text()))


if __name__ == "__main__":
    main()
