"""A client: takes the adapter out of the message, trains one step, sends it back."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from flower_way.model import batch, build, cached

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one client."""
    torch.set_num_threads(1)
    config = context.run_config
    model = (cached if config["cached"] else build)(config["model"])
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    node = context.node_config
    rows = batch(config["model"], config["data"], node["partition-id"], node["num-partitions"], config["batch-size"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config["learning-rate"], weight_decay=0.0)
    loss = model(**rows).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    metrics = {"num-examples": len(rows["labels"]), "train_loss": float(loss.detach())}
    content = {"arrays": ArrayRecord(get_peft_model_state_dict(model)), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)
