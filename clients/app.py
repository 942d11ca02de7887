"""The Flower ClientApp: decodes an instruction, hands it to the site, encodes the reduced updates as the reply.

No row and no model is ever in this process; what comes from the site may leave it. In a deployment the server sends
this code, so nothing that protects a site is in it: the site's daemon trusts it no more than it trusts the server.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.errors import SiteError
from clients.socket_site import SocketSite
from fedlora import wire
from fedlora.exchange import Instruction
from fedlora.joining import JoinReport

if TYPE_CHECKING:
    from clients.site import Site

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the clients that this node stands for."""
    instruction = _instruction(message, context)
    return train_reply(_site(context), instruction, message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate each client's own model on the rows that it held out."""
    instruction = _instruction(message, context)
    return evaluate_reply(_site(context), instruction, message)


@app.query()
def join(message: Message, context: Context) -> Message:
    """Ask a deployed site to take part in a run."""
    request = wire.read_join_request(message.content)
    socket = _socket(context)
    try:
        report = SocketSite(socket).join(request) if socket else JoinReport("", "this SuperNode serves no site")
    except SiteError as error:
        report = JoinReport("", str(error))
    return Message(wire.write_join_report(report), reply_to=message)


def train_reply(site: Site, instruction: Instruction, message: Message) -> Message:
    """Return the reply to a message that asks for training: the site's reports, and its updates, reduced."""
    reports, reduction = site.reduce(instruction)
    return Message(wire.Reply(reports, reduction).to_content(), reply_to=message)


def evaluate_reply(site: Site, instruction: Instruction, message: Message) -> Message:
    """Return the reply to a message that asks for evaluation: the site's reports."""
    return Message(wire.Reply(list(site.evaluate(instruction))).to_content(), reply_to=message)


def _socket(context: Context) -> Path | None:
    """Return the socket of the site's daemon, which its operator names in ``--node-config``; None in a simulation."""
    named = context.node_config.get("site-socket")
    return Path(str(named)) if named else None


def _site(context: Context) -> Site:
    """Return the site whose clients this node stands for: its daemon, or in a simulation the trainers of the run."""
    socket = _socket(context)
    if socket:
        return SocketSite(socket)
    from clients.pool import TrainerPool  # Ray takes half a second to import
    from clients.ray_site import RaySite

    return RaySite(TrainerPool.connect(context.run_id))


def _instruction(message: Message, context: Context) -> Instruction:
    """Read the instruction, and refuse it where this process runs other code than the server."""
    instruction = wire.read_instruction(message.content)
    if _socket(context):
        return instruction  # Flower sent this code itself, and the daemon's is compared when it joins
    from fedlora import plugins  # all that a configuration may name: a deployed ClientApp starts without it

    names = str(context.run_config.get("run.plugins", ""))
    plugins.load(names)
    own, folders = plugins.fingerprint(names)
    if instruction.fingerprint != own:
        raise RuntimeError(
            f"this client runs other code than the server: it was imported from {folders}. A SuperLink that was "
            "started in another checkout lends its working directory to the clients; end that flower-superlink process "
            "and start the run again from here."
        )
    return instruction
