"""The ServerApp of docs/flower.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.serverapp import ServerApp

from fedlora.methods import Layer, Lora
from fedlora.server import Federation, FlowerStrategy
from fedlora.strategy import Setting
from fedlora.wire import read_instruction
from strategies import RoLoRA
from tests.support.loop import LoopGrid, node_of

PAGE = Path(__file__).parent.parent / "docs" / "flower.md"


def test_the_server_app_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(block, str(PAGE), "exec", dont_inherit=True), found)
    app: ServerApp = found["app"]
    specs = Lora([Layer("encoder.query", 384, 384, True, False)], rank=8, alpha=16.0, rslora=False).specs()
    clients = node_of(FlowerStrategy(RoLoRA(Setting(specs)), Federation(num_clients=10)))
    grid = LoopGrid({1: clients, 2: clients})
    app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}))
    assert len(grid.sent) == 4 * 2
    assert {client for message in grid.sent for client in read_instruction(message.content).clients} == set(range(10))
    assert "'clients_ok': 10" in capsys.readouterr().out


def test_the_body_is_ten_lines() -> None:
    """What a user has to write beside the imports and the app itself."""
    body = PAGE.read_text().split("-> None:\n")[1].split("```")[0]
    assert len(body.strip().splitlines()) <= 10
