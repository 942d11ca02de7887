"""The server: Flower's own FedAvg, with the time and the memory of each round."""

import json
import time
from pathlib import Path

import psutil
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict

from flower_way.model import build

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg."""
    config = context.run_config
    while not list(grid.get_node_ids()):
        time.sleep(0.1)
    nodes = len(list(grid.get_node_ids()))
    lines = []

    def on_round(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        memory = psutil.Process().memory_info().rss
        lines.append({"round": server_round, "time_s": time.time(), "server_bytes": memory})
        Path(config["times"]).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return MetricRecord({"round": server_round})

    strategy = FedAvg(fraction_train=config["clients-per-round"] / nodes, fraction_evaluate=0.0)
    initial = ArrayRecord(get_peft_model_state_dict(build(config["model"])))
    strategy.start(grid, initial, num_rounds=config["rounds"], evaluate_fn=on_round)
